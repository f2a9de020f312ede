"""Estimates of the number of anomalies left, with exact intervals from a uniform random sample (an audit).

Labels from the top of a ranking say nothing about the rest: extrapolations by score or rank are wrong by factors of ten
and more. A sample drawn before any ranking does: the number of its anomalies in any set of images chosen independently
of the sample is hypergeometric. In document review this is the elusion test.
"""

import math
from bisect import bisect_left
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import scipy  # which imports `scipy.stats` at its first use
from jaxtyping import Bool, Int64

LEVEL = 0.9
"""Default coverage of the intervals."""
WANTED = 20
"""Number of audited labels needed before the labelling page shows an estimate."""
TIE = 1e-9


class Count(NamedTuple):
    """Estimated number of anomalies with a two-sided interval; all NaN if nothing is known."""

    middle: float
    low: float
    high: float


UNKNOWN = Count(math.nan, math.nan, math.nan)


def audit_order(images: int, seed: int) -> Int64[np.ndarray, " n"]:
    """Draw the order in which images are audited; each completely labelled prefix is a uniform random sample.

    Args:
        images: number of images.
        seed: seed of the order, which depends on nothing else, in particular not on a ranking.
    """
    return np.random.default_rng(seed).permutation(images)


def anomalies_among(images: int, audited: int, anomalies: int, *, level: float = LEVEL) -> Count:
    """Estimate how many of `images` are anomalies from a uniform random sample.

    The interval has all numbers that a one-sided hypergeometric test at (1 - level) / 2 rejects on neither side: the
    Clopper-Pearson interval (Biometrika 26, 1934) of a finite set. Its coverage is at least `level`, also for samples
    without an anomaly. The middle is the median under Jeffreys' prior.

    Args:
        images: size of the set, which must be chosen independently of the sample.
        audited: size of the sample.
        anomalies: number of anomalies in the sample.
        level: coverage of the interval, in (0, 1).

    Raises:
        ValueError: unless 0 <= anomalies <= audited <= images, or if `level` is out of range.
    """
    if not 0 <= anomalies <= audited <= images:
        raise ValueError(f"expected 0 <= anomalies <= audited <= images, got {anomalies}, {audited}, {images}")
    if not 0 < level < 1:
        raise ValueError(f"expected 0 < level < 1, got {level}")
    if not audited:
        return UNKNOWN if images else Count(0.0, 0.0, 0.0)
    # TIE: a probability that equals the tail up to rounding is rejected.
    tail, least, most = (1 - level) / 2 * (1 + TIE), anomalies, images - (audited - anomalies)
    enough, too_many = range(least, most), range(least + 1, most + 1)
    hypergeom = scipy.stats.hypergeom
    low = least + bisect_left(enough, True, key=lambda n: hypergeom.sf(anomalies - 1, images, n, audited) > tail)
    over = least + 1
    over += bisect_left(too_many, True, key=lambda n: hypergeom.cdf(anomalies, images, n, audited) <= tail)
    share = scipy.stats.beta.ppf(0.5, anomalies + 0.5, audited - anomalies + 0.5)
    middle = anomalies + (images - audited) * float(share)
    return Count(min(max(middle, low), over - 1), float(low), float(over - 1))


def anomalies_left(
    images: int, audited: int, audited_anomalies: int, *, found: int, unlabelled: int, level: float = LEVEL
) -> Count:
    """Estimate how many anomalies are not labelled yet, even if the sample's labels influenced the search.

    The total is estimated and the anomalies found are subtracted, which is valid for any kind of search.

    Args:
        images: number of images in the archive.
        audited: number of labelled images that are a uniform random sample.
        audited_anomalies: number of anomalies in the sample.
        found: number of all labelled anomalies, in the sample or not.
        unlabelled: number of images without a label, an upper bound of the result.
        level: coverage of the interval, in (0, 1).

    Raises:
        ValueError: see `anomalies_among`; or unless audited_anomalies <= found and unlabelled <= images - audited.
    """
    if found < audited_anomalies or not 0 <= unlabelled <= images - audited:
        raise ValueError(f"{found} found and {unlabelled} unlabelled contradict {audited} of {images} audited")
    total = anomalies_among(images, audited, audited_anomalies, level=level)
    return Count(*(min(max(bound - found, 0.0), float(unlabelled)) for bound in total)) if audited else UNKNOWN


def anomalies_in_tops(
    audited: Bool[np.ndarray, " n"], is_anomaly: Bool[np.ndarray, " n"], tops: Sequence[int], *, level: float = LEVEL
) -> list[Count]:
    """Estimate the number of anomalies among the first images of a ranking made without the sample's labels.

    Args:
        audited: membership of each image in the sample, best rank first.
        is_anomaly: true classes, of which only those of the sample are read.
        tops: numbers of first images, each between 0 and n.
        level: coverage of each single interval, in (0, 1).

    Raises:
        ValueError: if a top is out of range or the shapes differ.
    """
    if audited.shape != is_anomaly.shape or any(not 0 <= top <= audited.size for top in tops):
        raise ValueError(f"expected tops of 0 to {audited.size} and {is_anomaly.size} labels, got {list(tops)}")
    sampled = np.concatenate([[0], np.cumsum(audited)])
    rare = np.concatenate([[0], np.cumsum(audited & is_anomaly)])
    return [anomalies_among(top, int(sampled[top]), int(rare[top]), level=level) for top in tops]
