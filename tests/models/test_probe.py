import time

import numpy as np
import pytest
from scipy.special import expit
from sklearn.linear_model import LogisticRegression

from anomalymatch.errors import ConfigError
from anomalymatch.models.features import Features, Shard
from anomalymatch.models.probe import fit_probe


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
    probe = fit_probe(anomalies, normals, inverse_regularisation=10.0)
    model = LogisticRegression(C=10.0, class_weight="balanced", max_iter=10_000, tol=1e-10)
    model.fit(np.concatenate([normals, anomalies]).astype(np.float64), [0] * len(normals) + [1] * len(anomalies))
    np.testing.assert_allclose(probe.coefficients, model.coef_[0], atol=1e-3)
    assert probe.intercept == pytest.approx(model.intercept_[0], abs=1e-3)


def test_is_the_minimum_of_the_written_out_loss():
    anomalies, normals = clusters(width=6)
    probe = fit_probe(anomalies, normals, inverse_regularisation=3.0)
    best = loss(probe.coefficients, probe.intercept, anomalies, normals, 3.0)
    rng = np.random.default_rng(1)
    for _ in range(20):
        step = rng.normal(size=7) * 0.02
        other = loss(probe.coefficients + step[:6], probe.intercept + step[6], anomalies, normals, 3.0)
        assert other > best


def test_anomalies_score_higher_and_both_classes_weigh_the_same():
    anomalies, normals = clusters()
    probe = fit_probe(anomalies, normals, inverse_regularisation=10.0)
    assert (anomalies @ probe.coefficients).mean() > (normals @ probe.coefficients).mean() + 1
    # Twice the normals, each one repeated: the same probe.
    twice = fit_probe(anomalies, np.repeat(normals, 2, axis=0), inverse_regularisation=10.0)
    ratio = (len(anomalies) + 2 * len(normals)) / (len(anomalies) + len(normals))
    same = fit_probe(anomalies, normals, inverse_regularisation=10.0 * ratio)
    np.testing.assert_allclose(twice.coefficients, same.coefficients, atol=2e-3)


def test_the_order_of_the_labels_does_not_matter():
    anomalies, normals = clusters()
    probe = fit_probe(anomalies, normals, inverse_regularisation=1.0)
    turned = fit_probe(anomalies[::-1], normals[::-1], inverse_regularisation=1.0)
    np.testing.assert_allclose(turned.coefficients, probe.coefficients, atol=1e-4)


def test_inverse_regularisation_changes_the_result():
    anomalies, normals = clusters()
    norms = [
        np.linalg.norm(fit_probe(anomalies, normals, inverse_regularisation=c).coefficients) for c in (0.1, 1.0, 10.0)
    ]
    assert norms[0] < norms[1] < norms[2]


def test_one_image_of_each_class_is_enough():
    probe = fit_probe(
        np.array([[1.0, 0.0]], dtype=np.float32), np.array([[0.0, 1.0]], dtype=np.float32), inverse_regularisation=1.0
    )
    assert probe.coefficients[0] == pytest.approx(-probe.coefficients[1], abs=1e-4)
    assert probe.coefficients[0] > 0
    assert probe.intercept == pytest.approx(0.0, abs=1e-4)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
def test_refuses_an_impossible_regularisation(value):
    with pytest.raises(ConfigError, match="must be positive"):
        fit_probe(*clusters(), inverse_regularisation=value)


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
