import math

import numpy as np
import pytest
from scipy import stats

from anomalymatch.evaluation.confidence import mean_interval, paired_difference


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
    ],
)
def test_refusals(compute, said):
    with pytest.raises(ValueError, match=said):
        compute()
