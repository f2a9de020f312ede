"""Student and threshold of a cascade."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import RidgeCV

from anomalymatch.scoring.first_look import KEPT, MIN_TOP, PENALTIES, Threshold, choose_threshold, fit_student


def slow_threshold(first, full, top):
    """The highest threshold below which few enough images of the top lie; nothing above the last of the top."""
    best = sorted(range(len(full)), key=lambda i: -full[i])[:top]
    allowed = [t for t in first[best] if (np.sum(first[best] < t) + 1) / (top + 1) <= 1 - KEPT + 1e-12]
    value = min(max(allowed), full[best[-1]])
    return Threshold(value, np.mean(first >= value), sum(first[i] >= value for i in best), top)


@given(seed=st.integers(0, 99), count=st.integers(99, 400), share=st.floats(0, 1), noise=st.floats(0, 3))
def test_threshold_is_that_of_the_slow_search(seed, count, share, noise):
    rng = np.random.default_rng(seed)
    full = rng.normal(size=count)
    first = full + noise * rng.normal(size=count)
    top = max(MIN_TOP, round(share * count))
    found, expected = choose_threshold(first, full, top), slow_threshold(first, full, top)
    assert found == pytest.approx(expected)
    order = rng.permutation(count)
    assert choose_threshold(first[order], full[order], top) == pytest.approx(found)


def test_threshold_by_hand():
    full = np.arange(1000.0)  # the top 199 are 801 to 999
    assert choose_threshold(full, full, 199) == (801.0, 0.199, 199, 199)  # not 802: 801 would be among the top
    first = full - 300  # 801 becomes 501; one of 199 may be lower: (1 + 1) / 200
    assert choose_threshold(first, full, 199) == (502.0, 0.198, 198, 199)
    low, high = choose_threshold(first, full, 199).interval
    assert (low, high) == (pytest.approx(0.9723, abs=1e-4), pytest.approx(0.9999, abs=1e-4))
    with pytest.raises(ValueError, match="99 to 1000 images, got 98"):
        choose_threshold(full, full, 98)


def test_of_further_images_of_the_top_the_promised_share_is_kept():
    rng, kept = np.random.default_rng(0), []
    for _ in range(400):
        full, others = rng.normal(size=(2, 2000))
        noise = rng.normal(size=(2, 2000))
        value = choose_threshold(full + noise[0], full, 200).value
        seen = others + noise[1] >= value
        kept.append(seen[np.argsort(-others)[:200]].mean())
    assert np.mean(kept) == pytest.approx(KEPT, abs=0.002)


@pytest.mark.parametrize("shape", [(120, 30), (60, 200)])
def test_student_is_the_ridge_regression_of_scikit_learn(shape):
    rng = np.random.default_rng(1)
    x = (rng.normal(size=shape) * rng.uniform(0.1, 2, shape[1])).astype(np.float32)
    y = x @ rng.normal(size=shape[1]) + rng.normal(size=shape[0]) + 5
    student, unseen = fit_student(x, y)
    scaled = (x - x.mean(axis=0, dtype=float)) / (np.sqrt(x.std(axis=0, dtype=float)) + 1e-3)
    rank = min(shape[1], shape[0] - 1)  # without the mean, a row less
    penalties = PENALTIES * np.sum(scaled**2) / rank
    twin = RidgeCV(penalties, store_cv_results=True).fit(scaled, y)
    chosen = int(np.flatnonzero(penalties == twin.alpha_)[0])
    np.testing.assert_allclose(student.predict(x), twin.predict(scaled), rtol=1e-6)
    np.testing.assert_allclose((unseen - y) ** 2, twin.cv_results_[:, chosen], rtol=1e-5, atol=1e-9)
    left = np.arange(len(y)) != 7
    # The mean and the scale are those of all rows, as in scikit-learn's results.
    alone = RidgeCV([twin.alpha_]).fit(scaled[left], y[left])
    assert unseen[7] == pytest.approx(alone.predict(scaled[7:8])[0], rel=1e-6)


def test_student_predicts_a_linear_score_and_ignores_noise():
    rng = np.random.default_rng(0)
    x, weights = rng.normal(size=(300, 40)), rng.normal(size=40)
    y = x @ weights + 3
    np.testing.assert_allclose(fit_student(x[:200], y[:200])[0].predict(x[200:]), y[200:], atol=0.1)
    assert fit_student(x[:200], rng.normal(size=200))[0].predict(x[200:]).std() < 0.3
