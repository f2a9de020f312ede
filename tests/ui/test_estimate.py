import math

import numpy as np
import pytest
from scipy.stats import betabinom

from anomalymatch.ui.estimate import estimate_left


@pytest.mark.parametrize(("rate", "audited"), [(0.02, 100), (0.05, 200), (0.3, 40), (0.002, 300)])
def test_the_interval_covers_the_truth_though_half_was_found_before(rate, audited):
    covered = []
    for seed in range(300):
        rng = np.random.default_rng(seed)
        anomalous = rng.random(2000) < rate
        sample = rng.choice(2000, audited, replace=False)
        found = anomalous & (rng.random(2000) < 0.5)
        found[sample] = anomalous[sample]
        estimate = estimate_left(
            images=2000,
            audited=audited,
            audited_anomalies=int(anomalous[sample].sum()),
            anomalies=int(found.sum()),
            seed=0,
        )
        covered.append(estimate.low <= (anomalous & ~found).sum() <= estimate.high)
    assert np.mean(covered) > 0.85


def test_it_is_the_beta_binomial_posterior_where_nothing_else_was_found():
    estimate = estimate_left(images=1000, audited=100, audited_anomalies=7, anomalies=7, seed=0)
    expected = betabinom(900, 7.5, 93.5).ppf([0.5, 0.05, 0.95])
    np.testing.assert_allclose(estimate[:3], expected, atol=2)


def test_what_was_found_elsewhere_is_not_left():
    alone = estimate_left(images=1000, audited=100, audited_anomalies=7, anomalies=7, seed=0)
    more = estimate_left(images=1000, audited=100, audited_anomalies=7, anomalies=27, seed=0)
    assert more.left == pytest.approx(alone.left - 20, abs=2)
    assert estimate_left(images=1000, audited=100, audited_anomalies=0, anomalies=400, seed=0).left >= 0


def test_an_archive_that_was_audited_as_a_whole_has_nothing_left():
    assert estimate_left(images=12, audited=12, audited_anomalies=3, anomalies=3, seed=0)[:3] == (0, 0, 0)


def test_too_little_to_say_anything():
    estimate = estimate_left(images=1000, audited=19, audited_anomalies=5, anomalies=40, seed=0)
    assert all(math.isnan(value) for value in estimate[:3])
    assert estimate.reason == "label 20 images of the random audit for an estimate; so far 19"
