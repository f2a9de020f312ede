"""Advice to continue or stop labelling, from the yield of the last labels and the estimated anomalies left."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from anomalymatch.evaluation.discovery import Count

RECENT = 40
"""Number of labels that count as the last ones."""
ENOUGH = 20
"""Number of labels without an anomaly from which the search counts as exhausted."""
FEW = 3
MISSED = 0.1
"""Stopping is advised if at most this share of the anomalies found, or `FEW`, may be left."""
ABOVE = 0.1
"""Score above which the search expects anomalies."""


class Yield(NamedTuple):
    """Anomalies found by the last labels of the search."""

    found: int
    labels: int


def recent_yield(rows: Sequence[Mapping[str, float | int | str]]) -> Yield:
    """Sum up the last batches, until they have `RECENT` labels.

    Args:
        rows: one per cycle, with the totals `labels`, `found` and `audited`. A batch with revoked or corrected labels
            or with audited images ends the sum, because it does not show the yield of the search.
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
    """Write the advice as one sentence; empty without an estimate.

    Args:
        left: estimated number of anomalies not found yet.
        recent: yield of the last labels.
        found: number of anomalies found.
        above: estimated number of them above a score of `ABOVE`, if known.
    """
    if math.isnan(left.high):
        return ""
    if left.high == 0:
        return "no anomaly is left: stop labelling"
    limit, exhausted = max(FEW, math.floor(MISSED * found)), recent.labels >= ENOUGH and not recent.found
    if not exhausted:
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


def _left_text(left: Count) -> str:
    """Write the estimate with its interval."""
    return f"about {left.middle:,.0f} are left (90 %: {left.low:,.0f} to {left.high:,.0f})"


def _going_on(left: Count, recent: Yield, *, enough: bool) -> str:
    if enough:
        return f"at most {left.high:,.0f} (90 %) are left: you may stop soon"
    if not recent.labels or not recent.found:
        return _left_text(left)
    return f"{_left_text(left)}; going on at the present rate finds one in {_share(recent)} labels"


def _share(recent: Yield) -> str:
    return f"{recent.labels / recent.found:.1f}".removesuffix(".0")
