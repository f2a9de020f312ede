"""Simulate an annotator who labels 100 images of Galaxy Zoo 1 through the labelling page's service (README, 7)."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from bench import NO_CROPS, Row, dataset_overrides, make_parser, parse_options, table, write_csv

from anomalymatch import compose
from anomalymatch.label import open_service
from anomalymatch.types import Label
from anomalymatch.ui import LabelService, Query, Show, Sort

LABELS, EXAMPLES = 100, 5
STARTS = {"five examples": "knn", "nothing, novel first": "knn", "nothing, diverse first": "diverse"}
"""Cold start for each kind of start."""
ANNOTATOR = "simulated"
ORDERS = {
    "one by one": (Sort.SCORE, 1),
    "page by page": (Sort.SCORE, 12),
    "at random": (Sort.AUDIT, 12),
}
"""Order of the page, and images that are labelled between two rankings."""


def main() -> None:
    """Simulate all annotators and print the table."""
    options = parse_options(make_parser(__doc__, quick="one draw of the start"))
    rows: list[Row] = [
        {"class": anomaly, "order": order, "start": start, "seed": seed, **annotate(anomaly, order, start, seed)}
        for anomaly in ("merger", "dont_know")
        for order in ORDERS
        for start in STARTS
        for seed in range(1 if options.quick else 3)
    ]
    write_csv(options.results / "labelling_yield.csv", rows)
    print(table(rows, ("class", "start", "order"), ("found_50", "found", "estimate", "left", "covered")))


def annotate(anomaly: str, order: str, start: str, seed: int) -> Row:
    """Label 100 images; return how many anomalies were found, and the page's estimate of the others."""
    with open_galaxies(seed, STARTS[start]) as service:
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
    """Label the first images of each page by their true class; return the anomalies found after each label."""
    found: list[int] = []
    while len(found) < LABELS:
        service.rerank()
        page = service.page(Query(sort=sort, show=Show.UNLABELLED, size=12))
        for tile in page.tiles[: min(at_once, LABELS - len(found))]:
            service.label([tile.id], Label.ANOMALY if tile.id in rare else Label.NORMAL, ANNOTATOR)
            found.append((found[-1] if found else 0) + (tile.id in rare))
    return found


@contextmanager
def open_galaxies(seed: int, cold_start: str) -> Iterator[LabelService]:
    """Open the service on Galaxy Zoo 1 in a temporary run folder."""
    with tempfile.TemporaryDirectory() as folder:
        overrides = [*dataset_overrides("galaxyzoo1"), f"seed={seed}", f"ui.run={folder}/run"]
        overrides += [f"al.cold_start={cold_start}", *NO_CROPS]
        service = open_service(compose(*overrides, name="label"), overrides)
        service.preparation.wait()
        try:
            yield service
        finally:
            service.close()


if __name__ == "__main__":
    main()
