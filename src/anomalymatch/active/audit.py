"""Random audit of a run: estimate how many anomalies remain after a cycle, in all and in the top of the ranking.

In a benchmark, the oracle labels the audit's images before anything is ranked, and these labels are sealed: the search
does not train on them and queries these images like any other. So the unlabelled images and their ranks do not depend
on the audit, and its images are a uniform sample of any part of them. Training on the labels would move these images to
where their labels say, and bias every count by score.

For a person, the page's order "random audit" gives the sample. Those labels are used for training, so that only the
total can be estimated.
"""

import csv
import math
from collections.abc import Mapping, Sequence
from itertools import islice, takewhile

import numpy as np

from anomalymatch.active.run_folder import RunReader
from anomalymatch.checksums import damaged_files
from anomalymatch.data.task import Task
from anomalymatch.evaluation.advice import StoppingRule
from anomalymatch.evaluation.discovery import (
    UNKNOWN,
    WANTED,
    Count,
    anomalies_among,
    anomalies_in_tops,
    anomalies_left,
    audit_order,
)
from anomalymatch.ranking import Ranking
from anomalymatch.types import Label, Row

AUDIT, LEFT = "audit.csv", "left.csv"
"""Files with the audit's labels (in the run folder) and with the estimates by rank and score (of a cycle)."""
ALL = "all"


def sealed_labels(task: Task, count: int, seed: int) -> dict[str, Label]:
    """Draw the audit of a benchmark: the true labels of `count` random images of the pool."""
    ids, pool = task.source.ids, task.members[0]
    order = (ids[i] for i in audit_order(len(ids), seed).tolist())
    return {id_: task.label(id_) for id_ in islice(filter(pool.__contains__, order), count)}


def left_by_rank(rest: Ranking, sealed: Mapping[str, Label], tops: Sequence[int], score: float) -> list[Row]:
    """Estimate from the sealed labels the anomalies in the tops of `rest`, above a score, and in all.

    `rest` ranks the images that the search has not labelled.
    """
    order = rest.order
    anomalies = {id_ for id_, label in sealed.items() if label is Label.ANOMALY}
    audited, is_anomaly = (
        np.fromiter(map(some.__contains__, rest.ids), bool, len(rest))[order] for some in (sealed, anomalies)
    )
    sizes = {f"top {top}": top for top in tops if top < len(rest)}
    sizes |= {above(score): int(np.count_nonzero(rest.scores > score)), ALL: len(rest)}
    counts = anomalies_in_tops(audited, is_anomaly, list(sizes.values()))
    return [
        {
            "what": name,
            "images": top,
            "lowest_score": float(rest.scores[order[top - 1]]) if top else math.nan,
            "audited": int(audited[:top].sum()),
            "audited_anomalies": int(is_anomaly[:top].sum()),
            **_columns(count),
        }
        for (name, top), count in zip(sizes.items(), counts, strict=True)
    ]


def left_unranked(task: Task, labels: Mapping[str, Label], sealed: Mapping[str, Label]) -> Row:
    """Estimate from the sealed labels the anomalies among all unlabelled images of the pool, ranked or not."""
    audited = [label for id_, label in sealed.items() if id_ not in labels]
    images, anomalies = len(task.pool) - len(task.members[0].intersection(labels)), audited.count(Label.ANOMALY)
    return {
        "what": ALL,
        "images": images,
        "lowest_score": math.nan,
        "audited": len(audited),
        "audited_anomalies": anomalies,
        **_columns(anomalies_among(images, len(audited), anomalies)),
    }


def left_in_all(task: Task, labels: Mapping[str, Label], ranking: Ranking, seed: int) -> Row:
    """Estimate the remaining anomalies from the labels of a person that follow the page's order "random audit"."""
    readable = set(ranking.ids)
    ids = task.source.ids
    order = (id_ for i in audit_order(len(ids), seed).tolist() if (id_ := ids[i]) in readable)
    audit = [labels[id_] for id_ in takewhile(labels.__contains__, order)]
    row: Row = {"what": ALL, "audited": len(audit), "audited_anomalies": audit.count(Label.ANOMALY)}
    if len(audit) < min(WANTED, len(readable)):
        return row | _columns(UNKNOWN)
    known = [label for id_, label in labels.items() if id_ in readable]
    count = anomalies_left(
        len(readable),
        len(audit),
        audit.count(Label.ANOMALY),
        found=known.count(Label.ANOMALY),
        unlabelled=len(readable) - len(known),
    )
    return row | _columns(count)


def advise(run: RunReader, rows: list[Row], stopping: StoppingRule) -> str:
    """Advise in one sentence whether to continue after the last cycle; empty without an audit."""
    last = rows[-1]
    left = _count(last)
    path = run.cycle(len(rows)) / LEFT
    high = None
    if path.exists() and not damaged_files(path.parent, LEFT):
        with path.open(encoding="utf-8", newline="") as file:
            high = next((_count(row) for row in csv.DictReader(file) if row["what"] == above(stopping.score)), None)
    return stopping.advice(left, stopping.recent_yield(rows), found=int(last["found"]), above=high)


def above(score: float) -> str:
    """Return the name of the row of left.csv for images above a score."""
    return f"score above {score}"


def _columns(count: Count) -> Row:
    return {"left": count.middle, "left_low": count.low, "left_high": count.high}


def _count(row: Mapping[str, float | int | str]) -> Count:
    return Count(*(float(row.get(name, math.nan)) for name in ("left", "left_low", "left_high")))
