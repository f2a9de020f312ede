import math

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import average_precision_score

from anomalymatch.evaluation.confidence import mean_interval, paired_difference, proportion_interval


def test_by_hand():
    # Mean 2, standard error 1 / sqrt(3), t(0.975, 2) = 4.3027 (any table).
    mean, low, high = mean_interval([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert (low, high) == pytest.approx((2 - 4.302653 / math.sqrt(3), 2 + 4.302653 / math.sqrt(3)))


def test_agrees_with_scipy_and_leaves_nan_out():
    values = np.random.default_rng(0).normal(size=15)
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.9)
    interval = mean_interval([*values.tolist(), math.nan], level=0.9)
    assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high))


def test_too_few_values():
    assert all(map(math.isnan, mean_interval([])))
    assert all(map(math.isnan, mean_interval([math.nan])))
    one = mean_interval([0.5, math.nan])
    assert one.mean == 0.5
    assert math.isnan(one.low)
    assert math.isnan(one.high)


def test_paired_difference_removes_what_pairs_share():
    rng = np.random.default_rng(2)
    level = rng.normal(size=15) * 10
    first, second = level + 0.1 + rng.normal(size=15) * 0.01, level
    interval = paired_difference(first.tolist(), second.tolist())
    assert 0.08 < interval.low < interval.mean < interval.high < 0.12


def test_paired_difference_leaves_broken_pairs_out():
    assert paired_difference([1.0, math.nan, 3.0], [0.5, 7.0, math.nan]).mean == 0.5


@pytest.mark.parametrize(
    ("compute", "said"),
    [
        (lambda: mean_interval([1.0, 2.0], 95.0), "level"),
        (lambda: mean_interval([1.0, math.inf]), "infinite"),
        (lambda: paired_difference([math.inf, 1.0], [math.inf, 1.0]), "infinite"),
        (lambda: paired_difference([1.0], [1.0, 2.0]), "got 1 and 2"),
        (lambda: proportion_interval(1.1, 5), "share"),
        (lambda: proportion_interval(0.5, 0), "count"),
    ],
)
def test_refusals(compute, said):
    with pytest.raises(ValueError, match=said):
        compute()


@pytest.mark.parametrize(("hits", "count"), [(0, 5), (3, 8), (20, 20), (7, 400)])
def test_an_interval_of_a_share_is_that_of_scipy(hits, count):
    expected = stats.binomtest(hits, count).proportion_ci(0.9, method="exact")
    assert proportion_interval(hits / count, count, 0.9) == pytest.approx((expected.low, expected.high))


@pytest.mark.parametrize(("shift", "anomalies"), [(1.0, 8), (2.5, 8), (2.5, 30), (4.0, 12)])
def test_the_interval_covers_the_average_precision_of_many_images(shift, anomalies):
    rng = np.random.default_rng(0)

    def average_precision(count):
        truth = np.arange(50 * count) < count
        return average_precision_score(truth, rng.normal(size=50 * count) + shift * truth)

    expected = average_precision(20_000)
    intervals = [proportion_interval(average_precision(anomalies), anomalies) for _ in range(300)]
    assert np.mean([low <= expected <= high for low, high in intervals]) > 0.93
