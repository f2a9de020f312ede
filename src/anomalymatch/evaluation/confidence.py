"""How sure a mean over a few repetitions (draws, seeds, classes) is: Student's t intervals."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats


class Interval(NamedTuple):
    """A mean with its two-sided confidence interval; `low` and `high` are NaN where one value alone cannot tell."""

    mean: float
    low: float
    high: float


def mean_interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """Return the mean and its confidence interval by Student's t with n - 1 degrees of freedom.

    NaN values (undefined metrics) are left out. No value left gives NaN throughout, one value gives NaN bounds.

    Args:
        values: independent repetitions of one finite measurement.
        level: coverage of the interval, in (0, 1).

    Raises:
        ValueError: if `level` is outside (0, 1) or a value is infinite.
    """
    if not 0 < level < 1:
        raise ValueError(f"expected 0 < level < 1, got {level}")
    array = np.asarray(values, dtype=np.float64)
    array = array[~np.isnan(array)]
    if np.isinf(array).any():
        raise ValueError("an infinite value has no mean")
    if array.size == 0:
        return Interval(math.nan, math.nan, math.nan)
    mean = float(array.mean())
    if array.size == 1:
        return Interval(mean, math.nan, math.nan)
    standard_error = float(array.std(ddof=1)) / math.sqrt(array.size)
    half = float(stats.t.ppf((1 + level) / 2, array.size - 1)) * standard_error
    return Interval(mean, mean - half, mean + half)


def paired_difference(first: Sequence[float], second: Sequence[float], level: float = 0.95) -> Interval:
    """Return the mean of `first - second` and its confidence interval, pair by pair.

    Pairing (same class, same draw, same seed) removes what both share, so that a small gain shows. Pairs with a NaN are
    left out.

    Args:
        first: one value per repetition.
        second: the other method's value for the same repetitions.
        level: coverage of the interval, in (0, 1).

    Raises:
        ValueError: if the lengths differ, `level` is outside (0, 1) or a value is infinite.
    """
    if len(first) != len(second):
        raise ValueError(f"expected pairs, got {len(first)} and {len(second)} values")
    if any(math.isinf(value) for value in (*first, *second)):
        raise ValueError("an infinite value has no mean")
    return mean_interval([a - b for a, b in zip(first, second, strict=True)], level)
