"""Search two kinds of anomaly at once with the labelling page's service, and each of them alone (README, 7).

A simulated annotator has five examples of mergers and five of "don't know" galaxies, and labels 100 images for each
kind, twelve at a time: in turns by the orders of the two kinds, or by the order of all anomalies in a search that knows
one kind only, where a galaxy of the other kind counts as normal.
"""

from collections.abc import Sequence

import numpy as np
from bench import Row, make_parser, parse_options, run_once, table, write_csv
from labelling_yield import ANNOTATOR, EXAMPLES, open_galaxies

from anomalymatch.types import Label
from anomalymatch.ui import LabelService, Query

KINDS = ("merger", "dont_know")
LABELS, PAGE = 100, 12


def main() -> None:
    """Simulate all searches and print the table."""
    parser = make_parser(__doc__, quick="one draw, 12 labels")
    parser.add_argument("--draws", type=int, default=5)
    options = parse_options(parser)
    labels, draws = (PAGE, 1) if options.quick else (LABELS, options.draws)
    rows: list[Row] = []
    for draw in range(draws):
        for search in (KINDS, *((kind,) for kind in KINDS)):
            path = options.runs / "kinds" / f"{'-'.join(search)}-{labels}-{draw}.csv"
            rows += run_once(path, annotate, search, labels, draw)
    write_csv(options.results / "kinds.csv", rows)
    print(table(rows, ("kind", "search"), ("found",)))


def annotate(search: Sequence[str], labels: int, draw: int) -> list[Row]:
    """Label images for each kind of a search; return how many of each kind were found."""
    with open_galaxies(draw, "knn") as service:
        truth = service.source.truth or {}
        rng = np.random.default_rng([draw, 0x1AB])
        for kind in KINDS:  # the same examples in all searches of a draw
            rare = [id_ for id_ in service.source.ids if truth[id_] == kind]
            examples = [str(id_) for id_ in rng.choice(rare, EXAMPLES, replace=False)]
            if kind in search:
                label(service, examples, search, "start")
        for turn in range(0, labels, PAGE):
            for kind in search:
                number = service.groups.add(kind) if len(search) > 1 else None
                service.rerank()
                page = service.page(Query(kind=number, size=PAGE))
                label(service, [tile.id for tile in page.tiles[: labels - turn]], search, ANNOTATOR)
        found = {kind: sum(truth[id_] == kind for id_ in service.labels) - EXAMPLES for kind in search}
    words = "both kinds" if len(search) > 1 else "alone"
    return [{"kind": kind, "search": words, "draw": draw, "found": count} for kind, count in found.items()]


def label(service: LabelService, ids: Sequence[str], search: Sequence[str], annotator: str) -> None:
    """Label images by their true class: as a kind if several are searched, as anomalies or normals otherwise."""
    truth = service.source.truth or {}
    for id_ in ids:
        if truth[id_] not in search:
            service.label([id_], Label.NORMAL, annotator)
        elif len(search) == 1:
            service.label([id_], Label.ANOMALY, annotator)
        else:
            service.label_kind([id_], service.groups.add(truth[id_]), annotator)


if __name__ == "__main__":
    main()
