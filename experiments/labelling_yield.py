"""A simulated annotator at the labelling page's service: what 100 labels find on galaxyzoo1 (README: 7)."""

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from bench import DATA, HERE, Row, table

from anomalymatch import compose
from anomalymatch.active.run_folder import to_csv
from anomalymatch.files import write_text
from anomalymatch.label import open_service
from anomalymatch.types import Label
from anomalymatch.ui.service import LabelService
from anomalymatch.ui.views import Query, Show, Sort

LABELS, EXAMPLES = 100, 5
STARTS = {"five examples": "knn", "nothing, novel first": "knn", "nothing, diverse first": "diverse"}
"""What is known at the beginning, and what comes first while nothing ranks."""
ANNOTATOR = "simulated"
ORDERS = {
    "one by one": (Sort.SCORE, 1),
    "page by page": (Sort.SCORE, 12),
    "at random": (Sort.AUDIT, 12),
}
"""What is looked at, and how many images are labelled between two rankings."""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one draw of the start")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder of the table")
    options = parser.parse_args()
    rows: list[Row] = [
        {"class": anomaly, "order": order, "start": start, "seed": seed, **annotate(anomaly, order, start, seed)}
        for anomaly in ("merger", "dont_know")
        for order in ORDERS
        for start in STARTS
        for seed in range(1 if options.quick else 3)
    ]
    write_text(options.results / "labelling_yield.csv", to_csv(rows))
    print(table(rows, ("class", "start", "order"), ("found_50", "found", "estimate", "left", "covered")))


def annotate(anomaly: str, order: str, start: str, seed: int) -> Row:
    """Label 100 images in an order; return what was found, and what the page says is left."""
    with opened(seed, STARTS[start]) as service:
        truth = service.source.truth or {}
        rare = [id_ for id_ in service.source.ids if truth[id_] == anomaly]
        if start == "five examples":
            chosen = np.random.default_rng([seed, 0x1AB]).choice(rare, EXAMPLES, replace=False)
            service.label([str(id_) for id_ in chosen], Label.ANOMALY, "start")
        found = label_images(service, set(rare), *ORDERS[order])
        estimate = service.summary().estimate
    left = len(rare) - found[-1] - EXAMPLES * (start == "five examples")
    return {
        "found_50": found[LABELS // 2 - 1],
        "found": found[-1],
        "left": left,
        "estimate": estimate.left,
        "low": estimate.low,
        "high": estimate.high,
        "covered": float(estimate.low <= left <= estimate.high) if estimate.reason == "" else float("nan"),
    }


def label_images(service: LabelService, rare: set[str], sort: Sort, at_once: int) -> list[int]:
    """Label the first images of the page as they truly are, again and again; return the anomalies found so far."""
    found: list[int] = []
    while len(found) < LABELS:
        service.rerank()
        page = service.page(Query(sort=sort, show=Show.UNLABELLED, size=12))
        for tile in page.tiles[: min(at_once, LABELS - len(found))]:
            service.label([tile.id], Label.ANOMALY if tile.id in rare else Label.NORMAL, ANNOTATOR)
            found.append((found[-1] if found else 0) + (tile.id in rare))
    return found


@contextmanager
def opened(seed: int, first: str) -> Iterator[LabelService]:
    """The service on galaxyzoo1, in a run folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        words = ["dataset=galaxyzoo1", f"data.root={DATA / 'galaxyzoo1'}", f"seed={seed}", f"ui.run={folder}/run"]
        words += [f"al.cold_start={first}", "model.crops=0", "probe.orientations=2"]
        service = open_service(compose(*words, name="label"), words)
        try:
            yield service
        finally:
            service.close()


if __name__ == "__main__":
    main()
