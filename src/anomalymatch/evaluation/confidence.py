"""Confidence intervals of means over a few repetitions (draws, seeds, classes), by Student's t."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats


class Interval(NamedTuple):
    """Mean with its two-sided confidence interval; `low` and `high` are NaN for a single value."""

    mean: float
    low: float
    high: float


def mean_interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """Compute the mean and its confidence interval by Student's t with n - 1 degrees of freedom.

    NaN values (undefined metrics) are left out. Without values all results are NaN, with one value the bounds are.

    Raises:
        ValueError: if `level` is outside (0, 1) or a value is infinite.
    """
    if not 0 < level < 1:
        raise ValueError(f"expected 0 < level < 1, got {level}")
    array = np.asarray(values, dtype=np.float64)
    array = array[~np.isnan(array)]
    if np.isinf(array).any():
        raise ValueError("expected finite values, got an infinite one")
    if array.size == 0:
        return Interval(math.nan, math.nan, math.nan)
    mean, half = float(array.mean()), math.nan
    if array.size > 1:
        half = float(stats.t.ppf((1 + level) / 2, array.size - 1) * stats.sem(array))
    return Interval(mean, mean - half, mean + half)


def paired_difference(first: Sequence[float], second: Sequence[float], level: float = 0.95) -> Interval:
    """Compute the mean of the paired differences `first - second` and its confidence interval.

    Pairing (same class, draw and seed) removes the variation that both methods share. Pairs with a NaN are left out.

    Raises:
        ValueError: if the lengths differ, `level` is outside (0, 1) or a value is infinite.
    """
    if len(first) != len(second):
        raise ValueError(f"expected pairs, got {len(first)} and {len(second)} values")
    if any(math.isinf(value) for value in (*first, *second)):
        raise ValueError("expected finite values, got an infinite one")
    return mean_interval([a - b for a, b in zip(first, second, strict=True)], level)
