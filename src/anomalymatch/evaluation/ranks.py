"""Ranks of scores, with equal treatment of ties and independent of the order of the images."""

import math

import numpy as np
from jaxtyping import Bool, Float64, Int, Real


def midranks(scores: Real[np.ndarray, " n"]) -> Float64[np.ndarray, " n"]:
    """Map scores to ranks in (0, 1): (rank - 1/2) / n, where equal scores share their mean rank.

    Strictly increasing transforms of the scores do not change the ranks, `midranks(-s) = 1 - midranks(s)`, and distinct
    scores keep distinct ranks in float64 for up to about 10^15 scores. If all scores are equal, all ranks are 1/2.

    Raises:
        ValueError: if a score is NaN.
    """
    _refuse_nan(scores)
    # As scipy.stats.rankdata does, but in one pass if the scores ascend already.
    order = np.argsort(scores, kind="stable")
    ascending = scores[order]
    starts = np.flatnonzero(np.append(True, ascending[1:] != ascending[:-1])[: scores.size])
    ends = np.append(starts[1:], scores.size)
    ranks = np.empty(scores.size)
    ranks[order] = np.repeat((starts + ends) / 2, ends - starts) / max(scores.size, 1)
    return ranks


def top_fraction_count(n: int, fraction: float) -> int:
    """Count the images in the top `fraction` of `n`: n * fraction rounded to nearest, halves up, and at least one.

    The product is not rounded up, because 0.07 * 100 is 7.000000000000001 in floating point.

    Raises:
        ValueError: if `n` is negative or `fraction` outside (0, 1].
    """
    if n < 0 or not 0 < fraction <= 1:
        raise ValueError(f"expected n >= 0 and 0 < fraction <= 1, got n={n}, fraction={fraction}")
    return min(n, max(1, math.floor(n * fraction + 0.5)))


def interleave(first: Int[np.ndarray, " n"], second: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """Interleave two orders of the same positions and drop repeats; the first 2k contain the first k of both."""
    merged = np.stack([first, second], axis=1).ravel()
    _, places = np.unique(merged, return_index=True)
    return merged[np.sort(places)]


def expected_hits(scores: Real[np.ndarray, " n"], is_anomaly: Bool[np.ndarray, " n"], k: int) -> float:
    """Count the anomalies among the `k` highest scores, in expectation over the order of tied scores.

    If the cut falls among equal scores, each of these is in the top with the same probability, so the result does not
    depend on the order of the input.

    Raises:
        ValueError: if a score is NaN or `k` outside 1..n.
    """
    _refuse_nan(scores)
    if not 1 <= k <= scores.size:
        raise ValueError(f"expected 1 <= k <= {scores.size}, got k={k}")
    cut = np.partition(scores, scores.size - k)[scores.size - k]
    above, tied = scores > cut, scores == cut
    share = (k - np.count_nonzero(above)) / np.count_nonzero(tied)
    return float(np.count_nonzero(is_anomaly & above) + share * np.count_nonzero(is_anomaly & tied))


def _refuse_nan(scores: Real[np.ndarray, " n"]) -> None:
    missing = int(np.count_nonzero(np.isnan(scores)))
    if missing:
        raise ValueError(f"{missing} of {scores.size} scores are NaN: NaN cannot be ranked")
