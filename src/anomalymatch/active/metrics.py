"""Row of a cycle of active learning."""

import math
from collections.abc import Mapping, Sequence

from anomalymatch.data.task import Task
from anomalymatch.evaluation.metrics import MEASURES, RankingMetrics, discovery_yield, ranking_metrics
from anomalymatch.ranking import Ranking
from anomalymatch.types import Label, Row


def evaluate(ranking: Ranking, task: Task) -> RankingMetrics:
    """Measure a ranking against the truth of `task`.

    Raises:
        DataError: if the truth is unknown.
    """
    return ranking_metrics(ranking.logits, task.truth(ranking.ids))


def cycle_metrics(
    cycle: int, task: Task, labels: Mapping[str, Label], ranking: Ranking, baseline: Ranking | None
) -> Row:
    """Count labels and, if the truth is known, measure the rankings of the learner and of the probe.

    Names without a prefix refer to the unlabelled images of the pool, `heldout_` to the fixed held-out split, and
    `probe_` to the unlabelled images again, ranked by the probe fitted on the same labels.
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


def yield_per_label(rows: Sequence[Row]) -> list[float]:
    """Compute the anomalies found per label since the start, after each cycle.

    NaN before the first query, and where so many labels were corrected that the counts are meaningless.
    """
    first = rows[0]
    gains = [(int(row["found"]) - int(first["found"]), int(row["labels"]) - int(first["labels"])) for row in rows]
    return [discovery_yield(found, spent) if 0 <= found <= spent else math.nan for found, spent in gains]


def _measures(prefix: str, metrics: RankingMetrics) -> Row:
    return {f"{prefix}_{name}": getattr(metrics, name) for name in MEASURES}
