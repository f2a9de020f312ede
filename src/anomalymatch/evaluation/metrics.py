"""Metrics of a ranking and of a cycle: areas under curves, precision and recall at the top, discovery yield."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float64, Real
from torch import Tensor

from anomalymatch.data.task import Task
from anomalymatch.evaluation.ranks import expected_hits, midranks, top_fraction_count
from anomalymatch.ranking import Ranking
from anomalymatch.types import Label, Row


@dataclass(frozen=True, slots=True)
class RankingMetrics:
    """Metrics of one ranking; undefined values are NaN, with the reason in `undefined`.

    Attributes:
        auroc: area under the ROC curve; ties count one half.
        ap: average precision, the step-wise sum over recall.
        auprc: area under the precision-recall curve by the trapezoid rule, as the AnomalyMatch paper prints it; close
            to `ap` unless there are few anomalies or many ties.
        precision_at_0_1pct: share of anomalies in the top 0.1 % of the images (at least one image).
        recall_at_0_1pct: share of all anomalies that lie in the top 0.1 %.
        precision_at_1pct: share of anomalies in the top 1 % (at least one image).
        recall_at_1pct: share of all anomalies that lie in the top 1 %.
        images: number of images ranked.
        anomalies: number of true anomalies among them.
        undefined: reason for each NaN above, by name.
    """

    auroc: float
    ap: float
    auprc: float
    precision_at_0_1pct: float
    recall_at_0_1pct: float
    precision_at_1pct: float
    recall_at_1pct: float
    images: int
    anomalies: int
    undefined: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def unknown(cls, images: int, anomalies: int, reason: str) -> "RankingMetrics":
        """Return metrics that are all undefined for the same reason."""
        undefined = dict.fromkeys(MEASURES, reason)
        return cls(**dict.fromkeys(MEASURES, math.nan), images=images, anomalies=anomalies, undefined=undefined)

    def as_dict(self) -> dict[str, float | int]:
        """Return the numbers in the order above, as one row of a table."""
        return {name: value for name, value in asdict(self).items() if name != "undefined"}


MEASURES = tuple(each.name for each in fields(RankingMetrics))[:7]
"""Names of the metrics of a ranking, in the order of reports."""

PARTIAL = "only candidates were ranked (al.candidates=neighbours)"
"""Reason why metrics of the pool are undefined after a cycle that did not rank all of it."""


@dataclass(frozen=True, slots=True)
class Curves:
    """Points of the ROC and precision-recall curves of one ranking, from the highest threshold on.

    If the ranking has one class only, all arrays are empty and the numbers NaN.
    """

    fpr: Float64[np.ndarray, " r"]
    tpr: Float64[np.ndarray, " r"]
    recall: Float64[np.ndarray, " p"]
    precision: Float64[np.ndarray, " p"]
    auroc: float
    ap: float
    prevalence: float

    @classmethod
    def unknown(cls) -> "Curves":
        """Return curves without points."""
        none = np.empty(0, dtype=np.float64)
        return cls(none, none, none, none, math.nan, math.nan, math.nan)


def ranking_metrics(scores: Real[np.ndarray, " n"], is_anomaly: Bool[np.ndarray, " n"]) -> RankingMetrics:
    """Compute the metrics of arXiv 2505.03509 for a ranking.

    Only the order of the scores matters. If a top-k cut falls among equal scores, the expected value over their orders
    is used.

    Args:
        scores: any real numbers; higher is more anomalous.
        is_anomaly: true classes.

    Raises:
        ValueError: if a score is NaN.
    """
    ranks = midranks(scores)
    images, anomalies = scores.size, int(np.count_nonzero(is_anomaly))
    reason = _why_undefined(images, anomalies)
    if reason:
        return RankingMetrics.unknown(images, anomalies, reason)
    points = _points(ranks, is_anomaly)
    k_01, k_1 = (top_fraction_count(images, fraction) for fraction in (0.001, 0.01))
    hits_01, hits_1 = (expected_hits(ranks, is_anomaly, k) for k in (k_01, k_1))
    return RankingMetrics(
        auroc=points.auroc,
        ap=points.ap,
        # The curve runs from recall 1 down to 0, hence the sign.
        auprc=-float(np.trapezoid(points.precision.double().numpy(), points.recall.double().numpy())),
        precision_at_0_1pct=hits_01 / k_01,
        recall_at_0_1pct=hits_01 / anomalies,
        precision_at_1pct=hits_1 / k_1,
        recall_at_1pct=hits_1 / anomalies,
        images=images,
        anomalies=anomalies,
    )


def curves(scores: Real[np.ndarray, " n"], is_anomaly: Bool[np.ndarray, " n"], *, max_points: int = 2000) -> Curves:
    """Compute the ROC and precision-recall curves, thinned to about `max_points` each for plots.

    Args:
        scores: any real numbers; higher is more anomalous.
        is_anomaly: true classes.
        max_points: number of points that are kept, evenly along the curve, both ends included.

    Raises:
        ValueError: if a score is NaN.
    """
    ranks = midranks(scores)
    anomalies = int(np.count_nonzero(is_anomaly))
    if _why_undefined(scores.size, anomalies):
        return Curves.unknown()
    points = _points(ranks, is_anomaly)
    return Curves(
        *_thin(points.fpr.double().numpy(), points.tpr.double().numpy(), max_points),
        *_thin(points.recall.double().numpy()[::-1], points.precision.double().numpy()[::-1], max_points),
        auroc=points.auroc,
        ap=points.ap,
        prevalence=anomalies / scores.size,
    )


def evaluate(ranking: Ranking, task: Task) -> RankingMetrics:
    """Measure a ranking against the truth of `task`.

    Raises:
        DataError: if the truth is unknown.

    Example:
        >>> perfect = am.Ranking(list(task.pool), task.truth(task.pool).astype(float))
        >>> metrics = am.evaluate(perfect, task)
        >>> metrics.ap, metrics.anomalies
        (1.0, 16)
    """
    return ranking_metrics(*ascending(ranking, task))


def ascending(ranking: Ranking, task: Task) -> tuple[Float64[np.ndarray, " n"], Bool[np.ndarray, " n"]]:
    """Return the logits, lowest first, and the truth of the same images; the metrics need not sort them again."""
    order = ranking.order[::-1]
    return ranking.logits[order], task.truth(ranking.ids)[order]


def cycle_metrics(
    cycle: int,
    task: Task,
    labels: Mapping[str, Label],
    ranking: Ranking,
    baseline: Ranking | None,
    *,
    complete: bool = True,
) -> Row:
    """Count labels and, if the truth is known, measure the rankings of the learner and of the probe.

    Names without a prefix refer to the unlabelled images of the pool and `heldout_` to the fixed held-out split;
    `probe_` and `probe_heldout_` to the same images, ranked by the probe fitted on the same labels.

    Unless a ranking is `complete`, it lacks images of the pool, and the metrics of the unlabelled ones are undefined.
    """
    found = sum(label == Label.ANOMALY for label in labels.values())
    row: Row = {"cycle": cycle, "labels": len(labels), "found": found, "rejects": len(ranking.rejects)}
    if task.anomalies is None:
        return row
    rest = task.unlabelled(ranking, labels)
    partial = RankingMetrics.unknown(len(rest), int(task.truth(rest.ids).sum()), PARTIAL)
    row |= (evaluate(rest, task) if complete else partial).as_dict()
    if task.holdout:
        held_out = evaluate(ranking.restrict(task.holdout), task)
        row |= _measures("heldout", held_out) | {"heldout_anomalies": held_out.anomalies}
    if baseline is not None:
        row |= _measures("probe", evaluate(baseline.restrict(rest.ids), task) if complete else partial)
        if task.holdout:
            row |= _measures("probe_heldout", evaluate(baseline.restrict(task.holdout), task))
    return row


def yield_per_label(rows: Sequence[Row]) -> list[float]:
    """Compute the anomalies found per label since the start, after each cycle.

    NaN before the first query, and where so many labels were corrected that the counts are meaningless.
    """
    first = rows[0]
    gains = [(int(row["found"]) - int(first["found"]), int(row["labels"]) - int(first["labels"])) for row in rows]
    return [found / spent if spent and 0 <= found <= spent else math.nan for found, spent in gains]


def _measures(prefix: str, metrics: RankingMetrics) -> Row:
    return {f"{prefix}_{name}": getattr(metrics, name) for name in MEASURES}


def _why_undefined(images: int, anomalies: int) -> str:
    """Return the reason why the metrics are undefined, or an empty string."""
    if images == 0:
        return "no images to rank"
    if anomalies == 0:
        return f"no anomaly among the {images:,} images"
    if anomalies == images:
        return f"no normal image among the {images:,} images"
    return ""


class _Points(NamedTuple):
    """All points of both curves of torchmetrics, and the areas that follow from them without another sort."""

    fpr: Tensor
    tpr: Tensor
    recall: Tensor
    precision: Tensor

    @property
    def auroc(self) -> float:
        return float(torch.trapezoid(self.tpr, self.fpr))

    @property
    def ap(self) -> float:
        return -float(torch.sum((self.recall[1:] - self.recall[:-1]) * self.precision[:-1]))


def _points(ranks: Float64[np.ndarray, " n"], is_anomaly: Bool[np.ndarray, " n"]) -> _Points:
    from torchmetrics.functional import classification as areas  # late: its import takes as long as that of PyTorch

    # Ranks in [0, 1]: torchmetrics applies a sigmoid if any score lies outside, which merges large logits. float64:
    # float32 merges neighbours from about ten million ranks on.
    # Highest first, as torchmetrics sorts them: ranks that are sorted already take it a quarter of the time.
    preds, target = (torch.from_numpy(values[::-1].copy()) for values in (ranks, is_anomaly.astype(np.int64)))
    fpr, tpr, _ = areas.binary_roc(preds, target, validate_args=False)
    precision, recall, _ = areas.binary_precision_recall_curve(preds, target, validate_args=False)
    return _Points(fpr, tpr, recall, precision)


def _thin(
    x: Float64[np.ndarray, " n"], y: Float64[np.ndarray, " n"], limit: int
) -> tuple[Float64[np.ndarray, " m"], Float64[np.ndarray, " m"]]:
    """Keep about `limit` points, evenly spaced along the curve rather than by index.

    With rare anomalies nearly all points lie on the long flat end; an even choice by index would lose the start.
    """
    if x.size <= limit:
        return x.copy(), y.copy()
    length = np.concatenate([[0.0], np.cumsum(np.abs(np.diff(x)) + np.abs(np.diff(y)))])
    at = np.searchsorted(length, np.linspace(0.0, length[-1], limit))
    keep = np.unique(np.concatenate([[0], at.clip(max=x.size - 1), [x.size - 1]]))
    return x[keep], y[keep]
