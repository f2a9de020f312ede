"""How many anomalies are left: exact intervals from a uniform random sample (an audit), no model of the scores.

The labels of the top of a ranking say nothing of the rest: extrapolated by score or by rank they are wrong by factors
of ten and more. A sample that was drawn before any ranking does: what it holds of any set of images that does not
depend on the draw is hypergeometric. In document review this is the elusion test.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int64
from scipy import stats

LEVEL = 0.9
"""Coverage of all intervals here, unless told otherwise."""
WANTED = 20
"""Labels of a random audit that somebody gives one after the other, before anything is said."""
TIE = 1e-9


class Count(NamedTuple):
    """A number of anomalies: the best guess and a two-sided interval; NaN throughout where nothing is known."""

    middle: float
    low: float
    high: float


UNKNOWN = Count(math.nan, math.nan, math.nan)


def audit_order(images: int, seed: int) -> Int64[np.ndarray, " n"]:
    """The order in which images are audited: as far as all of it is labelled, it is a uniform random sample.

    Args:
        images: how many there are.
        seed: of the order; it follows from nothing else, least of all from a ranking.
    """
    return np.random.default_rng(seed).permutation(images)


def anomalies_among(images: int, audited: int, anomalies: int, *, level: float = LEVEL) -> Count:
    """How many of `images` are anomalies, by a uniform random sample of them.

    The interval holds the numbers that a test at (1 - level) / 2 on either side does not refuse, by the hypergeometric
    distribution: the Clopper-Pearson interval (Biometrika 26, 1934) of a finite set. It holds the truth at least as
    often as `level` says, also where the sample has no anomaly. The middle is the median under Jeffreys' prior.

    Args:
        images: size of the set; it must not have been chosen with a look at the sample.
        audited: size of the sample; 0 tells nothing, and `images` everything.
        anomalies: in the sample.
        level: in (0, 1).

    Raises:
        ValueError: unless 0 <= anomalies <= audited <= images, or if `level` is out of range.
    """
    if not 0 <= anomalies <= audited <= images:
        raise ValueError(f"expected 0 <= anomalies <= audited <= images, got {anomalies}, {audited}, {images}")
    if not 0 < level < 1:
        raise ValueError(f"expected 0 < level < 1, got {level}")
    if not audited:
        return UNKNOWN if images else Count(0.0, 0.0, 0.0)
    # A chance that is exactly the tail is refused, whichever way its last digit is rounded.
    tail, least, most = (1 - level) / 2 * (1 + TIE), anomalies, images - (audited - anomalies)
    low = _first(least, most, lambda total: stats.hypergeom.sf(anomalies - 1, images, total, audited) > tail)
    over = _first(least + 1, most + 1, lambda total: stats.hypergeom.cdf(anomalies, images, total, audited) <= tail)
    share = stats.beta.ppf(0.5, anomalies + 0.5, audited - anomalies + 0.5)
    middle = anomalies + (images - audited) * float(share)
    return Count(min(max(middle, low), over - 1), float(low), float(over - 1))


def anomalies_left(
    images: int, audited: int, audited_anomalies: int, *, found: int, unlabelled: int, level: float = LEVEL
) -> Count:
    """How many anomalies nobody has labelled, where the sample's labels may have steered the search.

    All of the set is estimated, and what was found is taken off: that holds however the search was done.

    Args:
        images: of the archive.
        audited: of them, labelled images that are a uniform random sample.
        audited_anomalies: anomalies among these.
        found: all labelled anomalies, in the sample or not.
        unlabelled: images without a label, of which no more can be anomalies.
        level: in (0, 1).

    Raises:
        ValueError: as `anomalies_among`, or unless audited_anomalies <= found and unlabelled <= images - audited.
    """
    if found < audited_anomalies or not 0 <= unlabelled <= images - audited:
        raise ValueError(f"{found} found and {unlabelled} unlabelled cannot be with {audited} of {images} audited")
    total = anomalies_among(images, audited, audited_anomalies, level=level)
    return Count(*(min(max(bound - found, 0.0), float(unlabelled)) for bound in total)) if audited else UNKNOWN


def anomalies_in_tops(
    audited: Bool[np.ndarray, " n"], is_anomaly: Bool[np.ndarray, " n"], tops: Sequence[int], *, level: float = LEVEL
) -> list[Count]:
    """How many anomalies are among the first images of a ranking that knows nothing of the sample's labels.

    Args:
        audited: whether an image belongs to the sample, best rank first, shape (n,).
        is_anomaly: whether it is an anomaly; read where `audited` alone, shape (n,).
        tops: how many images, each 0 to n.
        level: in (0, 1), of each interval by itself.

    Raises:
        ValueError: if a top is out of range or the shapes differ.
    """
    if audited.shape != is_anomaly.shape or any(not 0 <= top <= audited.size for top in tops):
        raise ValueError(f"expected tops of 0 to {audited.size} and {is_anomaly.size} labels, got {list(tops)}")
    seen = np.concatenate([[0], np.cumsum(audited)])
    rare = np.concatenate([[0], np.cumsum(audited & is_anomaly)])
    return [anomalies_among(top, int(seen[top]), int(rare[top]), level=level) for top in tops]


def _first(low: int, high: int, holds: Callable[[int], bool]) -> int:
    """The first number of low..high for which a rising condition holds; `high` if it is none before."""
    while low < high:
        middle = (low + high) // 2
        if holds(middle):
            high = middle
        else:
            low = middle + 1
    return low
