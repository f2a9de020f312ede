from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from probes import SELF_TRAINING
from scipy.optimize import minimize
from scipy.special import expit
from sklearn.model_selection import StratifiedKFold

from anomalymatch.algorithms.probe.regression import fit_logistic, platt, self_train


def clusters(anomalies=5, normals=200, width=24, seed=0):
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(anomalies + normals, width))
    rows[:anomalies, 0] += 2.0
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    rows = rows.astype(np.float32)
    return rows[:anomalies], rows[anomalies:]


def loss(coefficients, intercept, anomalies, normals, c):
    """Compute scikit-learn's objective in plain Python: balanced classes, an L2 penalty on all but the intercept."""
    total = 0.5 * float(coefficients @ coefficients)
    count = len(anomalies) + len(normals)
    for rows, sign in ((anomalies, 1.0), (normals, -1.0)):
        for row in rows.astype(np.float64):
            margin = sign * (float(row @ coefficients) + intercept)
            total += c * count / (2 * len(rows)) * -np.log(expit(margin))
    return total


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


def test_one_image_of_each_class_is_enough():
    probe = fit_logistic(
        np.array([[1.0, 0.0]], dtype=np.float32), np.array([[0.0, 1.0]], dtype=np.float32), inverse_regularisation=1.0
    )
    assert probe.coefficients[0] == pytest.approx(-probe.coefficients[1], abs=1e-4)
    assert probe.coefficients[0] > 0
    assert probe.intercept == pytest.approx(0.0, abs=1e-4)


def trained(*args, **options):
    return self_train(*args, **options).probe


def test_a_pseudo_labelled_anomaly_of_weight_one_counts_as_labelled():
    anomalies, normals = clusters()
    # 2 + 3 anomalies against 200 normals; C scales with the number of labelled images, here 202 of 205.
    split = fit_logistic(anomalies[:2], normals, inverse_regularisation=10.0 * 205 / 202, pseudo_labelled=anomalies[2:])
    whole = fit_logistic(anomalies, normals, inverse_regularisation=10.0)
    np.testing.assert_allclose(split.coefficients, whole.coefficients, atol=2e-3)


def half_shown(noise=0.1, seed=0):
    """Make anomalies that point to 0, 1 and 2, two labelled ones that point to 0 and 1, and normals that point to 3."""
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
    plain = trained(anomalies, normals, pool, SELF_TRAINING)
    eight = replace(SELF_TRAINING, orientations=8)
    same = trained(anomalies, normals, pool, eight, turned=np.repeat(anomalies, 7, axis=0))
    np.testing.assert_allclose(same.coefficients, plain.coefficients, atol=1e-3)
    none = trained(anomalies, normals, pool, SELF_TRAINING, turned=anomalies[:0])
    np.testing.assert_array_equal(none.coefficients, plain.coefficients)


def test_other_views_generalise_the_probe():
    anomalies, normals = clusters()
    turned = anomalies.copy()
    turned[:, [0, 1]] = anomalies[:, [1, 0]]  # what sets them apart lies elsewhere in the other view
    spec = replace(SELF_TRAINING, rounds=0, orientations=2)
    alone = trained(anomalies, normals, normals, spec).logits(turned)
    taught = trained(anomalies, normals, normals, spec, turned=turned).logits(turned)
    assert (taught > alone).all()


def test_self_training_learns_from_the_pool_what_the_labels_do_not_show():
    labelled, normals, pool, hidden = half_shown()
    alone = fit_logistic(labelled, normals, inverse_regularisation=10.0).logits(hidden)
    helped = trained(labelled, normals, pool, SELF_TRAINING).logits(hidden)
    assert (helped[:50].mean() - helped[50:].mean()) > (alone[:50].mean() - alone[50:].mean()) + 0.2


def test_a_pool_without_confident_images_changes_nothing():
    anomalies, normals = clusters()
    probe = trained(anomalies, normals, normals, SELF_TRAINING)
    plain = fit_logistic(anomalies, normals, inverse_regularisation=10.0)
    assert plain.logits(normals).max() < np.log(4.0)
    np.testing.assert_array_equal(probe.coefficients, plain.coefficients)


@pytest.mark.parametrize(("limit", "counts"), [(0.99, True), (1.01, False)])
def test_self_training_counts_where_the_labelled_anomalies_stand_out(limit, counts):
    labelled, normals, pool, _ = half_shown()
    always = self_train(labelled, normals, pool, SELF_TRAINING)
    first = always.rounds[0]
    logits = first.logits(pool)
    gap = (min(first.logits(labelled)) - np.mean(logits)) / np.std(logits)
    assert gap > 1
    fit = self_train(labelled, normals, pool, replace(SELF_TRAINING, fit_gap=limit * gap))
    assert len(fit.rounds) == 4  # a fine-tuning may start from any of them
    np.testing.assert_array_equal(fit.probe.coefficients, (always.probe if counts else first).coefficients)
    second = np.full(len(pool), 99.0)
    both = [self_train(labelled, normals, pool, each, second=second).probe for each in (fit.spec, SELF_TRAINING)]
    np.testing.assert_array_equal(both[0].coefficients, both[1].coefficients)  # of a refit, whose pool is a part


def test_the_mean_of_two_probes_must_be_confident():
    labelled, normals, pool, _ = half_shown()
    spec = replace(SELF_TRAINING, rounds=1)
    own = fit_logistic(labelled, normals, inverse_regularisation=10.0).logits(pool)
    doubts = trained(labelled, normals, pool, spec, second=-own - 9.0)
    np.testing.assert_array_equal(doubts.coefficients, trained(labelled, normals, pool[:0], spec).coefficients)
    agrees = trained(labelled, normals, pool, spec, second=own)
    np.testing.assert_array_equal(agrees.coefficients, trained(labelled, normals, pool, spec).coefficients)
    wanted, sure = np.array([3, 500, 70]), np.log(4.0)  # a probability of 0.8, in log-odds
    second = np.full(len(pool), -99.0)
    second[wanted] = 2 * sure - own[wanted] + 1e-6
    insists = trained(labelled, normals, pool, spec, second=second)
    by_hand = fit_logistic(
        labelled, normals, inverse_regularisation=10.0, pseudo_labelled=pool[wanted], weight=spec.weight
    )
    np.testing.assert_allclose(insists.coefficients, by_hand.coefficients, atol=1e-4)


def raw_and_calibrated(*rows):
    """Train a probe without pseudo-labels, as it is and calibrated."""
    return [trained(*rows, replace(SELF_TRAINING, rounds=0, calibration=how)) for how in ("none", "platt")]


def test_calibration_keeps_the_order_and_tells_how_many_are_anomalies():
    anomalies, normals = clusters(anomalies=40, normals=2000)
    learnt = anomalies[:20], normals[:1000]
    rest = np.concatenate([anomalies[20:], normals[1000:]])
    raw, calibrated = (probe.logits(rest) for probe in raw_and_calibrated(*learnt, rest))
    np.testing.assert_array_equal(np.argsort(raw, kind="stable"), np.argsort(calibrated, kind="stable"))
    assert expit(raw).sum() > 60  # of twenty
    assert 10 < expit(calibrated).sum() < 40


def test_calibration_is_fitted_on_held_out_logits_of_the_same_recipe():
    """Draw and fit the folds one by one, with mirrored views and self-training, as in the probe itself."""
    anomalies, normals, pool, _ = half_shown(noise=0.3)
    anomalies = np.concatenate([anomalies, pool[:6]])
    turned = anomalies[:, ::-1].copy()
    spec = replace(SELF_TRAINING, orientations=2, calibration="platt")
    plain = replace(spec, calibration="none")
    both, targets = np.concatenate([anomalies, normals]), np.repeat([True, False], [len(anomalies), len(normals)])
    held_out = np.empty(len(both))
    for train, test in StratifiedKFold(5, shuffle=True, random_state=0).split(both, targets):
        rare, common = train[targets[train]], train[~targets[train]]
        part = trained(anomalies[rare], both[common], pool[6:], plain, turned=turned[rare])
        held_out[test] = part.logits(both[test])
    slope, offset = platt(held_out, targets)
    raw, calibrated = (trained(anomalies, normals, pool[6:], each, turned=turned) for each in (plain, spec))
    np.testing.assert_allclose(calibrated.coefficients, slope * raw.coefficients, rtol=1e-6)
    assert calibrated.intercept == pytest.approx(slope * raw.intercept + offset)


@pytest.mark.parametrize("counts", [(1, 50), (5, 1)])
def test_a_class_with_one_image_leaves_the_probe_uncalibrated(counts):
    anomalies, normals = clusters(*counts)
    raw, calibrated = raw_and_calibrated(anomalies, normals, normals[:0])
    np.testing.assert_array_equal(raw.coefficients, calibrated.coefficients)
    assert raw.intercept == calibrated.intercept


def test_random_labels_do_not_reverse_the_order():
    rng = np.random.default_rng(0)
    signs = []
    for _ in range(20):
        rows = rng.normal(size=(12, 6)).astype(np.float32)
        plain, probe = raw_and_calibrated(rows[:4], rows[4:], rows[:0])
        signs.append(float(probe.coefficients @ plain.coefficients) > 0)
    assert all(signs)


# --- calibration -----------------------------------------------------------------------------------------------


def test_is_the_minimum_of_platts_loss_written_out():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=300) * 3
    targets = rng.random(300) < expit(0.7 * logits - 1.5)

    def loss(parameters):
        slope, offset = parameters
        total, positive = 0.0, int(targets.sum())
        for value, rare in zip(logits, targets, strict=True):
            certain = (positive + 1) / (positive + 2) if rare else 1 / (300 - positive + 2)
            p = 1 / (1 + np.exp(-(slope * value + offset)))
            total -= certain * np.log(p) + (1 - certain) * np.log(1 - p)
        return total

    best = minimize(loss, [1.0, 0.0], method="Nelder-Mead", options={"xatol": 1e-6, "fatol": 1e-9}).x
    assert platt(logits, targets) == pytest.approx(best, abs=1e-3)


def test_separated_labels_leave_probabilities_below_one():
    slope, offset = platt(np.array([-2.0, -1.0, 1.0, 2.0]), np.array([False, False, True, True]))
    assert expit(slope * 1.0 + offset) < 0.9
    assert 0 < slope < 10


@given(st.floats(1e-3, 1e3), st.floats(-100, 100))
def test_a_change_of_scale_is_undone(scale, shift):
    logits = np.array([-3.0, -1.0, -0.5, 0.0, 0.7, 1.0, 2.5])
    targets = np.array([False, False, True, False, False, True, True])
    slope, offset = platt(logits, targets)
    other, moved = platt(scale * logits + shift, targets)
    assert other * (scale * logits + shift) + moved == pytest.approx(slope * logits + offset, abs=0.02)
