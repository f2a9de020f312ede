"""Advice to continue or stop labelling, from the yield of the last labels and the estimated anomalies left."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from anomalymatch.checks import check_range
from anomalymatch.evaluation.discovery import Count


class Yield(NamedTuple):
    """Anomalies found by the last labels of the search."""

    found: int
    labels: int


@dataclass(frozen=True)
class StoppingRule:
    """Rule for the advice to stop labelling: the settings `stopping` of `conf/al/default.yaml`."""

    recent_labels: int
    least_labels: int
    few: int
    share: float
    score: float

    def __post_init__(self) -> None:
        check_range("al.stopping.recent_labels", self.recent_labels, low=1)
        check_range("al.stopping.least_labels", self.least_labels, low=1)
        check_range("al.stopping.few", self.few, low=0)
        for key in ("share", "score"):
            check_range(f"al.stopping.{key}", getattr(self, key), low=0, high=1)

    def limit(self, found: int) -> int:
        """Return the number of anomalies that may be left when stopping is advised."""
        return max(self.few, math.floor(self.share * found))

    def recent_yield(self, rows: Sequence[Mapping[str, float | int | str]]) -> Yield:
        """Sum up the last batches, until they have `recent_labels` labels.

        Args:
            rows: one per cycle, with the totals `labels`, `found` and `audited`. A batch with revoked or corrected
                labels or with audited images ends the sum, because it does not show the yield of the search.
        """
        found = labels = 0
        for now, before in zip(rows[:0:-1], rows[-2::-1], strict=True):
            spent, gained = int(now["labels"]) - int(before["labels"]), int(now["found"]) - int(before["found"])
            audited = float(now.get("audited", 0)) > float(before.get("audited", 0))
            if labels >= self.recent_labels or audited or not 0 <= gained <= spent:
                break
            labels, found = labels + spent, found + gained
        return Yield(found, labels)

    def audit_advice(self, left: Count, *, found: int) -> str:
        """Write in one sentence what a random audit says of the search, whatever the search has found last.

        Args:
            left: estimated number of anomalies not found yet.
            found: number of anomalies found.
        """
        most = f"{left.high:,.0f} anomalies (90 %)"
        if left.high <= self.limit(found):
            return f"at most {most} are left: you may stop" if left.high else "no anomaly is left: stop labelling"
        if left.low > self.limit(found):
            return f"between {left.low:,.0f} and {most} are left: go on with the search"
        return f"between {left.low:,.0f} and {most} are left: go on, or audit more images to know better"

    def advice(self, left: Count, recent: Yield, *, found: int, above: Count | None = None) -> str:
        """Write the advice as one sentence; empty without an estimate.

        Args:
            left: estimated number of anomalies not found yet.
            recent: yield of the last labels.
            found: number of anomalies found.
            above: estimated number of them above a score of `score`, if known.
        """
        if math.isnan(left.high):
            return ""
        if left.high == 0:
            return "no anomaly is left: stop labelling"
        limit = self.limit(found)
        if recent.found or recent.labels < self.least_labels:
            return _going_on(left, recent, enough=left.high <= limit)
        nothing = f"the last {recent.labels:,} labels found nothing"
        if left.high <= limit:
            return f"{nothing} and at most {left.high:,.0f} (90 %) are left: you may stop"
        if above is not None and above.high <= limit:
            return (
                f"{nothing} and at most {above.high:,.0f} (90 %) are left above a score of {self.score}: you may stop, "
                f"though up to {left.high:,.0f} may be left in all, of kinds that the ranking does not know"
            )
        return (
            f"{nothing}, though up to {left.high:,.0f} (90 %) may be left: go on with other examples or another order, "
            f"or audit more images to know better"
        )


def _going_on(left: Count, recent: Yield, *, enough: bool) -> str:
    if enough:
        return f"at most {left.high:,.0f} (90 %) are left: you may stop soon"
    estimate = f"about {left.middle:,.0f} are left (90 %: {left.low:,.0f} to {left.high:,.0f})"
    if not recent.found:
        return estimate
    labels = f"{recent.labels / recent.found:.1f}".removesuffix(".0")
    return f"{estimate}; going on at the present rate finds one in {labels} labels"
