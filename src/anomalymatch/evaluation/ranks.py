"""Ranks and orders of scores: ties are treated alike, and nothing depends on the order in which images came."""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float64, Int, Real
from scipy.stats import rankdata


def midranks(scores: Real[np.ndarray, " n"]) -> Float64[np.ndarray, " n"]:
    """Map scores to ranks in (0, 1): (rank - 1/2) / n, where equal scores share their mean rank.

    Any strictly increasing transform of the scores gives the same ranks, `midranks(-s) = 1 - midranks(s)`, and distinct
    scores stay distinct (float64) up to about 10^15 of them. All scores equal gives 1/2 everywhere.

    Args:
        scores: any real numbers, shape (n,); infinities are ordinary extremes. n may be 0.

    Returns:
        Ranks, shape (n,), the highest score nearest to 1.

    Raises:
        ValueError: if a score is NaN, which has no rank.
    """
    _refuse_nan(scores)
    return (rankdata(scores, method="average").astype(np.float64) - 0.5) / max(scores.size, 1)


def top_fraction_count(n: int, fraction: float) -> int:
    """Count the images in the top `fraction` of `n`: n * fraction rounded to nearest, halves up, and at least one.

    Rounded rather than taken upwards, because 0.07 * 100 is 7.000000000000001 in floating point.

    Args:
        n: number of images; 0 gives 0.
        fraction: in (0, 1].

    Raises:
        ValueError: if `n` is negative or `fraction` outside (0, 1].
    """
    if n < 0 or not 0 < fraction <= 1:
        raise ValueError(f"expected n >= 0 and 0 < fraction <= 1, got n={n}, fraction={fraction}")
    return min(n, max(1, math.floor(n * fraction + 0.5)))


def descending_order(scores: Real[np.ndarray, " n"], ids: Sequence[str]) -> Int[np.ndarray, " n"]:
    """Order images from the highest score to the lowest; equal scores are ordered by id, ascending.

    With unique ids the resulting sequence of ids is the same however the input was shuffled.

    Args:
        scores: any real numbers, shape (n,), infinities allowed.
        ids: n unique ids, compared by code point.

    Returns:
        Positions into `scores` and `ids`, shape (n,).

    Raises:
        ValueError: if a score is NaN or the lengths differ.
    """
    _refuse_nan(scores)
    if len(ids) != scores.size:
        raise ValueError(f"expected one id per score, got {len(ids)} ids and {scores.size} scores")
    order = np.argsort(scores, kind="stable")[::-1].copy()
    # Only runs of equal scores need their ids compared, which keeps a million distinct scores quick.
    for start, stop in _tied_runs(scores[order]):
        order[start:stop] = sorted(order[start:stop].tolist(), key=ids.__getitem__)
    return order


def interleave(first: Int[np.ndarray, " n"], second: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """Interleave two orders of the same positions and drop repeats; the first 2k contain the first k of both.

    Args:
        first: order of all positions, shape (n,); it begins.
        second: another order of them, shape (n,).
    """
    turns = np.stack([first, second], axis=1).ravel()
    _, places = np.unique(turns, return_index=True)
    return turns[np.sort(places)]


def expected_hits(scores: Real[np.ndarray, " n"], is_anomaly: Bool[np.ndarray, " n"], k: int) -> float:
    """Count the anomalies among the `k` highest scores, in expectation over the order of tied scores.

    If the cut falls inside a run of equal scores, each of the run is in the top with the same probability, so that the
    answer does not depend on the order of the input.

    Args:
        scores: shape (n,), without NaN.
        is_anomaly: shape (n,).
        k: size of the top, 1 to n.

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


def _tied_runs(ordered: Real[np.ndarray, " n"]) -> list[tuple[int, int]]:
    """Half-open ranges of `ordered` (sorted) that hold two or more equal values."""
    changes = np.flatnonzero(ordered[1:] != ordered[:-1]) + 1
    bounds = np.concatenate([[0], changes, [ordered.size]])
    runs = np.flatnonzero(np.diff(bounds) > 1)
    return [(int(bounds[run]), int(bounds[run + 1])) for run in runs]


def _refuse_nan(scores: Real[np.ndarray, " n"]) -> None:
    missing = int(np.count_nonzero(np.isnan(scores)))
    if missing:
        raise ValueError(f"{missing} of {scores.size} scores are NaN: NaN cannot be ranked")
