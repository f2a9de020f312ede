import time
from dataclasses import replace

import numpy as np
import pytest
from scipy.special import expit
from sklearn.linear_model import LogisticRegression

from anomalymatch.algorithms.probe.regression import ProbeSpec, fit_logistic, self_train
from anomalymatch.backbones.features import Features, Shard
from anomalymatch.errors import ConfigError


def clusters(anomalies=5, normals=200, width=24, seed=0):
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(anomalies + normals, width))
    rows[:anomalies, 0] += 2.0
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    rows = rows.astype(np.float32)
    return rows[:anomalies], rows[anomalies:]


def loss(coefficients, intercept, anomalies, normals, c):
    """What scikit-learn minimises, written out: balanced classes, an L2 penalty on all but the intercept."""
    total = 0.5 * float(coefficients @ coefficients)
    count = len(anomalies) + len(normals)
    for rows, sign in ((anomalies, 1.0), (normals, -1.0)):
        for row in rows.astype(np.float64):
            margin = sign * (float(row @ coefficients) + intercept)
            total += c * count / (2 * len(rows)) * -np.log(expit(margin))
    return total


def test_equals_scikit_learn():
    anomalies, normals = clusters()
    probe = fit_logistic(anomalies, normals, inverse_regularisation=10.0)
    model = LogisticRegression(C=10.0, class_weight="balanced", max_iter=10_000, tol=1e-10)
    model.fit(np.concatenate([normals, anomalies]).astype(np.float64), [0] * len(normals) + [1] * len(anomalies))
    np.testing.assert_allclose(probe.coefficients, model.coef_[0], atol=1e-3)
    assert probe.intercept == pytest.approx(model.intercept_[0], abs=1e-3)


def test_is_the_minimum_of_the_written_out_loss():
    anomalies, normals = clusters(width=6)
    probe = fit_logistic(anomalies, normals, inverse_regularisation=3.0)
    best = loss(probe.coefficients, probe.intercept, anomalies, normals, 3.0)
    rng = np.random.default_rng(1)
    for _ in range(20):
        step = rng.normal(size=7) * 0.02
        other = loss(probe.coefficients + step[:6], probe.intercept + step[6], anomalies, normals, 3.0)
        assert other > best


def test_anomalies_score_higher_and_both_classes_weigh_the_same():
    anomalies, normals = clusters()
    probe = fit_logistic(anomalies, normals, inverse_regularisation=10.0)
    assert (anomalies @ probe.coefficients).mean() > (normals @ probe.coefficients).mean() + 1
    # Twice the normals, each one repeated: the same probe.
    twice = fit_logistic(anomalies, np.repeat(normals, 2, axis=0), inverse_regularisation=10.0)
    ratio = (len(anomalies) + 2 * len(normals)) / (len(anomalies) + len(normals))
    same = fit_logistic(anomalies, normals, inverse_regularisation=10.0 * ratio)
    np.testing.assert_allclose(twice.coefficients, same.coefficients, atol=2e-3)


def test_the_order_of_the_labels_does_not_matter():
    anomalies, normals = clusters()
    probe = fit_logistic(anomalies, normals, inverse_regularisation=1.0)
    turned = fit_logistic(anomalies[::-1], normals[::-1], inverse_regularisation=1.0)
    np.testing.assert_allclose(turned.coefficients, probe.coefficients, atol=1e-4)


def test_inverse_regularisation_changes_the_result():
    anomalies, normals = clusters()
    norms = [
        np.linalg.norm(fit_logistic(anomalies, normals, inverse_regularisation=c).coefficients)
        for c in (0.1, 1.0, 10.0)
    ]
    assert norms[0] < norms[1] < norms[2]


def test_one_image_of_each_class_is_enough():
    probe = fit_logistic(
        np.array([[1.0, 0.0]], dtype=np.float32), np.array([[0.0, 1.0]], dtype=np.float32), inverse_regularisation=1.0
    )
    assert probe.coefficients[0] == pytest.approx(-probe.coefficients[1], abs=1e-4)
    assert probe.coefficients[0] > 0
    assert probe.intercept == pytest.approx(0.0, abs=1e-4)


SPEC = ProbeSpec(inverse_regularisation=10.0, rounds=3, confidence=0.8, weight=0.25, limit=200)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inverse_regularisation": 0.0}, "probe.inverse_regularisation is 0.0: it must be positive"),
        ({"inverse_regularisation": float("nan")}, "must be positive"),
        ({"rounds": -1}, "probe.rounds=-1 and probe.limit=200 cannot be negative"),
        ({"limit": -1}, "cannot be negative"),
        ({"orientations": 3}, "probe.orientations is 3: choose one of 1, 2, 4, 8"),
        ({"confidence": 0.4}, "probe.confidence is 0.4: it must be at least 0.5 and below 1"),
        ({"confidence": 1.0}, "below 1"),
        ({"calibration": "isotonic"}, "probe.calibration is .isotonic.: choose one of none, platt"),
        ({"weight": 0.0}, "probe.weight is 0.0: it must be positive"),
    ],
)
def test_refuses_impossible_values(change, message):
    with pytest.raises(ConfigError, match=message):
        replace(SPEC, **change)


def test_a_supposed_anomaly_of_weight_one_is_a_labelled_one():
    anomalies, normals = clusters()
    # 2 + 3 anomalies against 200 normals; C scales with the number of labelled images, here 202 of 205.
    split = fit_logistic(anomalies[:2], normals, inverse_regularisation=10.0 * 205 / 202, pseudo_labelled=anomalies[2:])
    whole = fit_logistic(anomalies, normals, inverse_regularisation=10.0)
    np.testing.assert_allclose(split.coefficients, whole.coefficients, atol=2e-3)


def half_shown(noise=0.1, seed=0):
    """Anomalies that point to 0, 1 and 2, of which two labelled ones show 0 and 1 alone; normals point to 3."""
    rng = np.random.default_rng(seed)

    def rows(count, *directions):
        made = rng.normal(size=(count, 64)) * noise
        made[:, directions] += 1.0
        return (made / np.linalg.norm(made, axis=1, keepdims=True)).astype(np.float32)

    pool = np.concatenate([rows(40, 0, 1, 2), rows(960, 3)])
    return rows(2, 0, 1), rows(200, 3), pool, np.concatenate([rows(50, 2), rows(950, 3)])


def test_several_views_of_an_image_weigh_as_much_as_the_image():
    anomalies, normals = clusters()
    pool = clusters(seed=1)[1]
    plain = self_train(anomalies, normals, pool, SPEC)
    same = self_train(anomalies, normals, pool, SPEC, turned=np.repeat(anomalies, 7, axis=0))
    np.testing.assert_allclose(same.coefficients, plain.coefficients, atol=1e-3)
    none = self_train(anomalies, normals, pool, SPEC, turned=anomalies[:0])
    np.testing.assert_array_equal(none.coefficients, plain.coefficients)


def test_other_views_teach_what_an_anomaly_may_look_like():
    anomalies, normals = clusters()
    turned = anomalies.copy()
    turned[:, [0, 1]] = anomalies[:, [1, 0]]  # what sets them apart lies elsewhere in the other view
    spec = replace(SPEC, rounds=0)
    alone = self_train(anomalies, normals, normals, spec).logits(turned)
    taught = self_train(anomalies, normals, normals, spec, turned=turned).logits(turned)
    assert (taught > alone).all()


def test_self_training_learns_from_the_pool_what_the_labels_do_not_show():
    labelled, normals, pool, hidden = half_shown()
    alone = fit_logistic(labelled, normals, inverse_regularisation=10.0).logits(hidden)
    helped = self_train(labelled, normals, pool, SPEC).logits(hidden)
    assert (helped[:50].mean() - helped[50:].mean()) > (alone[:50].mean() - alone[50:].mean()) + 0.2


def test_a_pool_without_sure_images_changes_nothing():
    anomalies, normals = clusters()
    probe = self_train(anomalies, normals, normals, SPEC)
    plain = fit_logistic(anomalies, normals, inverse_regularisation=10.0)
    assert plain.logits(normals).max() < np.log(4.0)
    np.testing.assert_array_equal(probe.coefficients, plain.coefficients)


def test_what_teaches_has_to_be_sure_to_two_probes_on_average():
    labelled, normals, pool, _ = half_shown()
    spec = replace(SPEC, rounds=1)
    own = fit_logistic(labelled, normals, inverse_regularisation=10.0).logits(pool)
    doubts = self_train(labelled, normals, pool, spec, second=-own - 9.0)
    np.testing.assert_array_equal(doubts.coefficients, self_train(labelled, normals, pool[:0], spec).coefficients)
    agrees = self_train(labelled, normals, pool, spec, second=own)
    np.testing.assert_array_equal(agrees.coefficients, self_train(labelled, normals, pool, spec).coefficients)
    wanted, sure = np.array([3, 500, 70]), np.log(4.0)  # a probability of 0.8, in log-odds
    second = np.full(len(pool), -99.0)
    second[wanted] = 2 * sure - own[wanted] + 1e-6
    insists = self_train(labelled, normals, pool, spec, second=second)
    by_hand = fit_logistic(
        labelled, normals, inverse_regularisation=10.0, pseudo_labelled=pool[wanted], weight=spec.weight
    )
    np.testing.assert_allclose(insists.coefficients, by_hand.coefficients, atol=1e-4)


@pytest.mark.parametrize("change", [{"rounds": 1}, {"confidence": 0.98}, {"weight": 1.0}, {"limit": 3}])
def test_every_value_of_self_training_matters(change):
    labelled, normals, pool, _ = half_shown(noise=0.3)
    usual = self_train(labelled, normals, pool, SPEC)
    changed = self_train(labelled, normals, pool, replace(SPEC, **change))
    assert np.abs(usual.coefficients - changed.coefficients).max() > 1e-3


def test_calibration_keeps_the_order_and_tells_how_many_are_anomalies():
    anomalies, normals = clusters(anomalies=40, normals=2000)
    learnt = anomalies[:20], normals[:1000]
    rest = np.concatenate([anomalies[20:], normals[1000:]])
    raw, calibrated = (
        self_train(*learnt, rest, replace(SPEC, rounds=0, calibration=how)).logits(rest) for how in ("none", "platt")
    )
    np.testing.assert_array_equal(np.argsort(raw, kind="stable"), np.argsort(calibrated, kind="stable"))
    assert expit(raw).sum() > 60  # of twenty
    assert 10 < expit(calibrated).sum() < 40


@pytest.mark.parametrize("counts", [(1, 50), (5, 1)])
def test_without_two_images_of_a_class_nothing_can_be_calibrated(counts):
    anomalies, normals = clusters(*counts)
    raw, calibrated = (
        self_train(anomalies, normals, normals[:0], replace(SPEC, rounds=0, calibration=how))
        for how in ("none", "platt")
    )
    np.testing.assert_array_equal(raw.coefficients, calibrated.coefficients)
    assert raw.intercept == calibrated.intercept


def test_labels_that_mean_nothing_do_not_turn_the_order_round():
    rng = np.random.default_rng(0)
    signs = []
    for _ in range(20):
        rows = rng.normal(size=(12, 6)).astype(np.float32)
        probe = self_train(rows[:4], rows[4:], rows[:0], replace(SPEC, rounds=0, calibration="platt"))
        plain = self_train(rows[:4], rows[4:], rows[:0], replace(SPEC, rounds=0))
        signs.append(float(probe.coefficients @ plain.coefficients) > 0)
    assert all(signs)


def test_logits_are_the_features_times_the_coefficients():
    anomalies, normals = clusters()
    probe = fit_logistic(anomalies, normals, inverse_regularisation=1.0)
    expected = [float(row.astype(np.float64) @ probe.coefficients) + probe.intercept for row in anomalies]
    np.testing.assert_allclose(probe.logits(anomalies), expected, atol=1e-5)


def test_reranks_a_hundred_thousand_images_in_a_second():
    width, per_shard, count = 1280, 4096, 100_000
    rng = np.random.default_rng(0)
    block = rng.normal(size=(per_shard, width)).astype(np.float16)
    sizes = [per_shard] * (count // per_shard) + [count % per_shard]
    starts = np.cumsum([0, *sizes])
    features = Features(
        [
            Shard([f"i{start + k}" for k in range(size)], block[:size], [])
            for start, size in zip(starts, sizes, strict=False)
        ]
    )
    direction = rng.normal(size=width)
    seconds = []
    for _ in range(4):  # the best of four, since the machine may be busy
        start = time.perf_counter()
        scores = features.project(direction)
        order = np.argsort(-scores)
        seconds.append(time.perf_counter() - start)
    assert scores.shape == order.shape == (count,)
    assert min(seconds) < 1.0
