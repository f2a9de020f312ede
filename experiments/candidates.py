"""Compare two sets of candidates for the next labels: all images, and neighbours of labelled anomalies (README, 19).

The second is SEALS (arXiv 2007.00077): the nearest neighbours, by the cosine of the features, of every labelled
anomaly, and a random share of the archive. Each round ranks the candidates by the probe and labels the first ones. The
archives are synthetic features with ten rare kinds, and the mergers of Galaxy Zoo 1.
"""

import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from bench import NO_CROPS, Row, dataset_overrides, group_by, make_parser, markdown, parse_options, write_csv
from rounds import settings, write_features

from anomalymatch import compose, initial_labels, make_task
from anomalymatch.algorithms.probe.learner import fit_probe
from anomalymatch.backbones.embedding import Embedding
from anomalymatch.backbones.features import Features
from anomalymatch.build import build_embedding
from anomalymatch.build_images import build, build_task
from anomalymatch.data.task import Task
from anomalymatch.terminal import console
from anomalymatch.types import Label

LABELS, BUDGET, POOL = 200, 20, 10_000
CANDIDATES = {
    "all": (0, 1.0),
    "10 neighbours": (10, 0.0),
    "100 neighbours": (100, 0.0),
    "100 neighbours, 1 % at random": (100, 0.01),
    "1,000 neighbours, 1 % at random": (1000, 0.01),
}
"""Neighbours of each labelled anomaly, and share of the archive at random."""


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
        for name, (neighbours, share) in CANDIDATES.items():
            row = simulate(embedding, everything, neighbours, share, draw)
            rows.append({"archive": archive, "candidates": name, "draw": draw, **row})
            console.print(rows[-1], highlight=False)
    keys = ("found", "images", "search", "fit", "rank")
    lines = [
        [name, *(f"{statistics.mean(float(row[key]) for row in some):.4g}" for key in keys)]
        for (name,), some in group_by(rows, ("candidates",)).items()
    ]
    print(markdown([archive, "found", "images ranked", "search, s", "fit, s", "rank, s"], lines), flush=True)
    return rows


def simulate(embedding: Embedding, task: Task, neighbours: int, share: float, draw: int) -> Row:
    """Label images; return the anomalies found after the start, and the mean images and seconds of a round."""
    features, ids, spec = embedding.probe_features, task.source.ids, build(compose("probe.orientations=1").probe)
    rng = np.random.default_rng([draw, 0x5EA])
    labels = dict(initial_labels(task, anomalies=5, normals=195, seed=draw))
    start, is_rare = len(labels), task.truth(ids)
    chosen = np.zeros(len(ids), bool)
    chosen[rng.choice(len(ids), round(share * len(ids)), replace=False)] = True
    searched: set[str] = set()
    spent = {"images": 0.0, "search": 0.0, "fit": 0.0, "rank": 0.0}
    while len(labels) < start + LABELS:
        begin = time.perf_counter()
        new = [id_ for id_, label in labels.items() if label == Label.ANOMALY and id_ not in searched]
        if neighbours and new:
            chosen[nearest(features.last, features.positions(new), neighbours)] = True
            searched.update(new)
        spent["search"] += time.perf_counter() - begin
        begin = time.perf_counter()
        pool = [ids[i] for i in rng.choice(len(ids), min(POOL, len(ids)), replace=False).tolist()]
        probe = fit_probe(embedding, labels, [id_ for id_ in pool if id_ not in labels], spec).probe
        spent["fit"] += time.perf_counter() - begin
        begin = time.perf_counter()
        at = np.flatnonzero(chosen)
        if share == 1.0:
            logits = features.project(probe.coefficients)
        else:
            logits = probe.logits(features.take([ids[i] for i in at.tolist()]))
        free = ~np.isin(at, features.positions(labels))
        at, logits = at[free], logits[free]
        best = at[np.argsort(-logits)[:BUDGET]]
        if len(best) < BUDGET:  # the neighbours are all labelled
            others = np.setdiff1d(np.arange(len(ids)), np.concatenate([best, features.positions(labels)]))
            best = np.concatenate([best, rng.choice(others, BUDGET - len(best), replace=False)])
        spent["rank"] += time.perf_counter() - begin
        spent["images"] += len(at)
        labels |= {ids[i]: Label.ANOMALY if is_rare[i] else Label.NORMAL for i in best.tolist()}
    found = sum(label == Label.ANOMALY for label in labels.values()) - 5
    return {"found": found, **{key: value * BUDGET / LABELS for key, value in spent.items()}}


def nearest(features: Features, queries: Sequence[int], count: int) -> np.ndarray:
    """Return the positions of the nearest images of each query, found exactly, block by block."""
    wanted = torch.from_numpy(features.take([features.ids[i] for i in queries])).T.contiguous()
    products = torch.cat([torch.from_numpy(np.array(shard.rows)).float() @ wanted for shard in features.shards])
    return np.unique(products.topk(min(count, len(products)), dim=0).indices.numpy())


if __name__ == "__main__":
    main()
