"""One row of numbers for one cycle."""

import math
from collections.abc import Mapping

from anomalymatch.active.run_folder import Row
from anomalymatch.data.task import Task
from anomalymatch.evaluation.metrics import MEASURES, RankingMetrics, discovery_yield, ranking_metrics
from anomalymatch.ranking import Ranking
from anomalymatch.types import Label


def evaluate(ranking: Ranking, task: Task) -> RankingMetrics:
    """Measure a ranking against the truth of `task`.

    Raises:
        DataError: if the truth is not known.
    """
    return ranking_metrics(ranking.logits, task.truth(ranking.ids))


def cycle_row(cycle: int, task: Task, labels: Mapping[str, Label], ranking: Ranking, baseline: Ranking | None) -> Row:
    """Label counts and, where the truth is known, the metrics of `ranking` and of the probe beside it.

    Plain names are measured on the unlabelled rest of the pool, `heldout_` on the fixed held-out split, `probe_` on
    the rest again, for the probe fitted on the same labels.
    """
    found = sum(label == Label.ANOMALY for label in labels.values())
    row: Row = {"cycle": cycle, "labels": len(labels), "found": found, "rejects": len(ranking.rejects)}
    if task.anomalies is None:
        return row
    rest = [id_ for id_ in task.pool if id_ not in labels]
    row |= evaluate(ranking.restrict(rest), task).as_dict()
    if task.holdout:
        row |= _measures("heldout", evaluate(ranking.restrict(task.holdout), task))
    if baseline is not None:
        row |= _measures("probe", evaluate(baseline.restrict(rest), task))
    return row


def yield_per_label(rows: list[Row]) -> list[float]:
    """Anomalies found for each label spent since the start, after each cycle.

    NaN before the first query, and where a person corrected so many labels that the counts say nothing.
    """
    first = rows[0]
    gains = [(int(row["found"]) - int(first["found"]), int(row["labels"]) - int(first["labels"])) for row in rows]
    return [discovery_yield(found, spent) if 0 <= found <= spent else math.nan for found, spent in gains]


def _measures(prefix: str, metrics: RankingMetrics) -> Row:
    return {f"{prefix}_{name}": getattr(metrics, name) for name in MEASURES}
