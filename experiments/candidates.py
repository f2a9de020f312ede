"""Compare two sets of candidates for the next labels: all images, and neighbours of labelled anomalies (README, 19).

The second are those of `al.candidates=neighbours`, the nearest unlabelled images of every labelled anomaly, and for
comparison those of SEALS (arXiv 2007.00077), whose neighbours are labelled or not. Each round ranks the candidates by
the probe and labels the first ones. The archives are synthetic features with ten rare kinds, and the mergers of Galaxy
Zoo 1.
"""

import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from bench import NO_CROPS, Row, dataset_overrides, group_by, make_parser, markdown, parse_options, write_csv
from rounds import settings, write_features

from anomalymatch import compose, initial_labels, make_task
from anomalymatch.active.candidates import NeighbourCandidates
from anomalymatch.algorithms.probe.learner import fit_probe, rank_by_probe
from anomalymatch.backbones.embedding import Embedding
from anomalymatch.backbones.neighbours import open_search
from anomalymatch.build import build_embedding
from anomalymatch.build_images import build, build_task
from anomalymatch.data.task import Task
from anomalymatch.terminal import console
from anomalymatch.types import Label

LABELS, BUDGET, POOL = 200, 20, 10_000
CANDIDATES = {
    "all": (0, False),
    "10 neighbours": (10, False),
    "100 neighbours": (100, False),
    "1,000 neighbours": (1000, False),
    "100 neighbours, labelled or not": (100, True),
}
"""Neighbours of each labelled anomaly, 0 for all images; True if labelled images are among them."""


def main() -> None:
    """Measure all archives and print a table for each."""
    parser = make_parser(__doc__, quick="5,000 synthetic images")
    parser.add_argument("--images", type=int, nargs="*", default=[1_000_000])
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--galaxies", action="store_true", help="only the mergers of Galaxy Zoo 1")
    options = parse_options(parser)
    options.runs.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    for images in [] if options.galaxies else [5_000] if options.quick else options.images:
        with tempfile.TemporaryDirectory(dir=options.runs) as name:
            write_features(Path(name), images, narrow=True)
            config, task, _ = settings(Path(name), images, narrow=True)
            embedding = build_embedding(config, Task(task.source, task.source.ids, [], task.anomalies))
            rows += compare(f"{images:,} synthetic", embedding, task, options.draws)
    if options.galaxies:
        config = compose(*dataset_overrides("galaxyzoo1"), *NO_CROPS, "dataset.anomaly=merger", "dataset.holdout=0")
        source = build_task(config).source
        task = make_task(source, anomaly="merger", holdout=0.0)
        rows += compare("galaxyzoo1, mergers", build_embedding(config, task), task, options.draws)
    write_csv(options.results / f"candidates{'_galaxies' if options.galaxies else ''}.csv", rows)


def compare(archive: str, embedding: Embedding, task: Task, draws: int) -> list[Row]:
    """Label `LABELS` images with each set of candidates and draw, and print the table."""
    rows: list[Row] = []
    everything = Task(task.source, task.source.ids, [], task.anomalies)
    for draw in range(draws):
        for name, (neighbours, labelled) in CANDIDATES.items():
            row = simulate(embedding, everything, neighbours, labelled, draw)
            rows.append({"archive": archive, "candidates": name, "draw": draw, **row})
            console.print(rows[-1], highlight=False)
    keys = ("found", "images", "search", "fit", "rank")
    lines = [
        [name, *(f"{statistics.mean(float(row[key]) for row in some):.4g}" for key in keys)]
        for (name,), some in group_by(rows, ("candidates",)).items()
    ]
    print(markdown([archive, "found", "images ranked", "search, s", "fit, s", "rank, s"], lines), flush=True)
    return rows


def simulate(embedding: Embedding, task: Task, neighbours: int, labelled: bool, draw: int) -> Row:
    """Label images; return the anomalies found after the start, and the mean images and seconds of a round."""
    features, ids, spec = embedding.probe_features, task.source.ids, build(compose("probe.orientations=1").probe)
    rng = np.random.default_rng([draw, 0x5EA])
    labels = dict(initial_labels(task, anomalies=5, normals=195, seed=draw))
    start = len(labels)
    choice, search = NeighbourCandidates(embedding, max(1, neighbours)), None
    if labelled:
        search = open_search(embedding.features, embedding.features_folder / "neighbours")
    spent = {"images": 0.0, "search": 0.0, "fit": 0.0, "rank": 0.0}
    while len(labels) < start + LABELS:
        begin = time.perf_counter()
        wanted = ids
        if search is not None:
            queries = features.last.take([id_ for id_, label in labels.items() if label == Label.ANOMALY])
            near = search(queries, neighbours + 1, np.ones(len(ids), bool))  # an image is its own neighbour
            wanted = [id_ for i in near.tolist() if (id_ := features.ids[i]) not in labels]
        elif neighbours and (chosen := choice.choose(labels, BUDGET, rng)) is not None:
            wanted = chosen.ids
        if len(wanted) < BUDGET:  # the neighbours are labelled
            rest = [ids[i] for i in rng.choice(len(ids), min(len(ids), 2 * len(labels)), replace=False).tolist()]
            wanted = [*wanted, *(i for i in rest if i not in labels and i not in wanted)][:BUDGET]
        spent["search"] += time.perf_counter() - begin
        begin = time.perf_counter()
        pool = [ids[i] for i in rng.choice(len(ids), min(POOL, len(ids)), replace=False).tolist()]
        probe = fit_probe(embedding, labels, [id_ for id_ in pool if id_ not in labels], spec).probe
        spent["fit"] += time.perf_counter() - begin
        begin = time.perf_counter()
        best = rank_by_probe(features, probe, wanted).without(labels).top(BUDGET)
        spent["rank"] += time.perf_counter() - begin
        spent["images"] += len(wanted)
        labels |= {id_: task.label(id_) for id_ in best}
    found = sum(label == Label.ANOMALY for label in labels.values()) - 5
    return {"found": found, **{key: value * BUDGET / LABELS for key, value in spent.items()}}


if __name__ == "__main__":
    main()
