"""Go on labelling, or stop: one sentence from the yield of the last labels and the estimate of what is left."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from anomalymatch.evaluation.discovery import Count

RECENT = 40
"""Labels that count as the last ones."""
ENOUGH = 20
"""Labels without a find from which that says something."""
FEW = 3
MISSED = 0.1
"""Left may be a tenth of what was found, or `FEW`: then it is no longer worth the labels."""
ABOVE = 0.1
"""Score above which the search still expects something."""


class Yield(NamedTuple):
    """What the last labels of the search found."""

    found: int
    labels: int


def recent_yield(rows: Sequence[Mapping[str, float | int | str]]) -> Yield:
    """Of the last batches, as many as make up `RECENT` labels.

    Args:
        rows: one per cycle, with `labels` and `found` up to then, and the images `audited`. A batch in which labels
            were taken back or corrected, or the audit went on, tells nothing, nor do those before it.
    """
    found = labels = 0
    for now, before in zip(rows[:0:-1], rows[-2::-1], strict=True):
        spent, gained = int(now["labels"]) - int(before["labels"]), int(now["found"]) - int(before["found"])
        audited = float(now.get("audited", 0)) > float(before.get("audited", 0))
        if labels >= RECENT or audited or not 0 <= gained <= spent:
            break
        labels, found = labels + spent, found + gained
    return Yield(found, labels)


def advice(left: Count, recent: Yield, *, found: int, above: Count | None = None) -> str:
    """One sentence; empty where nothing is known of what is left.

    Args:
        left: anomalies that the search has not found yet.
        recent: what its last labels found.
        found: anomalies that it has found.
        above: those of `left` above a score of `ABOVE`, where that is known.
    """
    if math.isnan(left.high):
        return ""
    if left.high == 0:
        return "no anomaly is left: stop labelling"
    limit, dry = max(FEW, math.floor(MISSED * found)), recent.labels >= ENOUGH and not recent.found
    if not dry:
        return _going_on(left, recent, enough=left.high <= limit)
    nothing = f"the last {recent.labels:,} labels found nothing"
    if left.high <= limit:
        return f"{nothing} and at most {left.high:,.0f} (90 %) are left: you may stop"
    if above is not None and above.high <= limit:
        return (
            f"{nothing} and at most {above.high:,.0f} (90 %) are left above a score of {ABOVE}: you may stop, though "
            f"up to {left.high:,.0f} may be left in all, of kinds that the ranking does not know"
        )
    return (
        f"{nothing}, though up to {left.high:,.0f} (90 %) may be left: go on with other examples or another order, or "
        f"audit more images to know better"
    )


def left_text(left: Count) -> str:
    """How many are left, with the interval; empty where it is not known."""
    if math.isnan(left.high):
        return ""
    return f"about {left.middle:,.0f} are left (90 %: {left.low:,.0f} to {left.high:,.0f})"


def _going_on(left: Count, recent: Yield, *, enough: bool) -> str:
    if enough:
        return f"at most {left.high:,.0f} (90 %) are left: you may stop soon"
    if not recent.labels or not recent.found:
        return left_text(left)
    return f"{left_text(left)}; going on at the present rate finds one in {_share(recent)} labels"


def _share(recent: Yield) -> str:
    return f"{recent.labels / recent.found:.1f}".removesuffix(".0")
