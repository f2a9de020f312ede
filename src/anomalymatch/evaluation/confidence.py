"""Confidence intervals of means over a few repetitions (draws, seeds, classes), by Student's t."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import scipy  # which imports `scipy.stats` at its first use


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
        half = float(scipy.stats.t.ppf((1 + level) / 2, array.size - 1) * scipy.stats.sem(array))
    return Interval(mean, mean - half, mean + half)


def proportion_interval(share: float, count: int, level: float = 0.95) -> tuple[float, float]:
    """Compute the Clopper-Pearson interval (Biometrika 26, 1934) of a share of `count` independent cases.

    For an average precision or an AUROC, `count` is the number of anomalies, which limits both: their errors are those
    of a share or smaller (Boyd, Eng & Page, ECML 2013, compare such intervals), so that the coverage is at least
    `level`. The interval has a width even at 0 and 1.

    Raises:
        ValueError: if `share` is outside [0, 1], `count` below 1 or `level` outside (0, 1).
    """
    if not (0 <= share <= 1 and count >= 1 and 0 < level < 1):
        raise ValueError(f"expected 0 <= share <= 1, count >= 1 and 0 < level < 1, got {share}, {count}, {level}")
    hits, tail = share * count, (1 - level) / 2
    low = float(scipy.stats.beta.ppf(tail, hits, count - hits + 1)) if hits > 0 else 0.0
    high = float(scipy.stats.beta.ppf(1 - tail, hits + 1, count - hits)) if hits < count else 1.0
    return low, high


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
