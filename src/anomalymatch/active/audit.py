"""The random audit of a run: how many anomalies are left after a cycle, in all and in the top of the ranking.

In a benchmark the oracle labels the audit's images before anything is ranked, and the answers stay sealed: the search
does not train on them, and asks for these images as for any other. So what it has left unlabelled, and how it ranks it,
does not depend on which images were audited, and the audited ones among any part of it are a uniform sample. Trained
on, they would rise or fall to where their labels say, and every count by score would be wrong.

Where a person labels, the page's order "random audit" gives the sample. Those labels do train, so that only the number
in all can be estimated.
"""

import csv
import logging
import math
from collections.abc import Mapping, Sequence
from itertools import takewhile

import numpy as np

from anomalymatch.active.run_folder import Row, RunReader
from anomalymatch.data.task import Task
from anomalymatch.evaluation.advice import ABOVE, advice, recent_yield
from anomalymatch.evaluation.discovery import UNKNOWN, WANTED, Count, anomalies_in_tops, anomalies_left, audit_order
from anomalymatch.ranking import Ranking
from anomalymatch.types import Label

logger = logging.getLogger(__name__)
AUDIT, LEFT = "audit.csv", "left.csv"
"""In the run folder, the audit's labels; in a cycle's, what is left by rank and score."""
ALL, HIGH = "all", f"score above {ABOVE}"


def sealed_labels(task: Task, count: int, seed: int) -> dict[str, Label]:
    """The audit of a benchmark: the oracle's answers for `count` images of the pool, drawn before any ranking."""
    ids, pool = task.source.ids, set(task.pool)
    order = (ids[i] for i in audit_order(len(ids), seed).tolist())
    drawn = [id_ for id_ in order if id_ in pool][:count]
    return {id_: task.label(id_) for id_ in drawn}


def left_by_rank(rest: Ranking, sealed: Mapping[str, Label], tops: Sequence[int]) -> list[Row]:
    """What the audit says of the first 20, 100 and 1,000 unlabelled images, of the high scores, and of all.

    Args:
        rest: what the search has not labelled, ranked without the audit's labels.
        sealed: the audit.
        tops: numbers of top-ranked images to count in.
    """
    order = rest.order
    labels = [sealed.get(rest.ids[i]) for i in order.tolist()]
    audited = np.array([label is not None for label in labels], dtype=bool)
    is_anomaly = np.array([label is Label.ANOMALY for label in labels], dtype=bool)
    sizes = {f"top {top}": top for top in tops if top < len(rest)}
    sizes |= {HIGH: int(np.count_nonzero(rest.scores > ABOVE)), ALL: len(rest)}
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


def left_in_all(task: Task, labels: Mapping[str, Label], ranking: Ranking, seed: int) -> Row:
    """What a person's labels say, as far as they follow the page's order "random audit"."""
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


def advise(run: RunReader, rows: list[Row]) -> str:
    """What to do after the last cycle, in one sentence; empty without an audit."""
    last = rows[-1]
    left = _count(last)
    path = run.cycle(len(rows)) / LEFT
    above = None
    if path.exists():
        with path.open(encoding="utf-8", newline="") as file:
            above = next((_count(row) for row in csv.DictReader(file) if row["what"] == HIGH), None)
    return advice(left, recent_yield(rows), found=int(last["found"]), above=above)


def _columns(count: Count) -> Row:
    return {"left": count.middle, "left_low": count.low, "left_high": count.high}


def _count(row: Mapping[str, float | int | str]) -> Count:
    return Count(*(float(row.get(name, math.nan)) for name in ("left", "left_low", "left_high")))
