"""Count the anomalies among the first 100 images that are shown without any labels, by ranking method (README, 10).

Each draw learns from a random four fifths of the images and ranks all of them. A search then labels 100 more images by
the probe, as the main job does after a cold start.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from bench import Row, dataset_overrides, make_parser, parse_options, run_once, table, write_csv
from probe_miniimagenet import CLASSES
from sklearn.metrics import roc_auc_score

from anomalymatch import Label, compose, make_learner, open_task
from anomalymatch.algorithms.base import Learner
from anomalymatch.algorithms.novelty.detectors import nearest_distances
from anomalymatch.build import build_cold_start, build_embedding
from anomalymatch.data.labels import have_both_classes
from anomalymatch.data.task import Task
from anomalymatch.ranking import Ranking
from anomalymatch.terminal import console

METHODS = ("knn", "mahalanobis", "pca_residual", "mixed", "diverse", "random", "msc")
ANOMALIES = {"galaxyzoo1": ("merger", "dont_know"), "miniimagenet": tuple(CLASSES.values())}
SIZES = {"galaxyzoo1": 150, "miniimagenet": 84}
SHOWN, BATCH = 100, 20


def main() -> None:
    """Measure what is missing and print the table."""
    parser = make_parser(__doc__, quick="one draw of galaxyzoo1 at 32 px; with --cost, 2,000 features")
    parser.add_argument("--datasets", nargs="+", default=list(ANOMALIES), choices=list(ANOMALIES))
    parser.add_argument("--methods", nargs="+", default=[name for name in METHODS if name != "msc"], choices=METHODS)
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--size", type=int, help="image side in pixels (default: 150 for galaxyzoo1, 84 otherwise)")
    parser.add_argument("--crops", type=int, default=0, help="crops over which features are averaged")
    parser.add_argument("--epochs", type=int, default=3, help="epochs of msc")
    parser.add_argument("--neighbours", type=int, default=10, help="neighbours of knn and msc")
    parser.add_argument("--drop", type=float, default=0.0, help="share of the images to leave out again")
    parser.add_argument("--cost", action="store_true", help="measure only the time of knn, exact and by faiss")
    parser.add_argument(
        "--stored", type=int, nargs="+", default=[10_000, 100_000, 1_000_000], help="stored features, for --cost"
    )
    options = parse_options(parser)
    if options.quick:
        options.datasets, options.draws, options.size, options.epochs = ["galaxyzoo1"], 1, 32, 1
    if options.cost:
        rows = list(measure_cost([2_000] if options.quick else options.stored))
        write_csv(options.results / "novelty_cost.csv", rows)
        print(table(rows, ("stored", "method"), ("first_seconds", "seconds_per_10000")))
        return
    rows = [row for dataset in options.datasets for row in measure_dataset(dataset, options)]
    suffix = f"_{options.crops}_crops" if options.crops else ""
    write_csv(options.results / f"cold_start{suffix}.csv", rows)
    measures = ("auroc", "found", "found_after_100_more")
    print(table(rows, ("dataset", "anomaly", "size", "method"), measures))


def measure_dataset(dataset: str, options: argparse.Namespace) -> Iterator[Row]:
    """Yield the rows of all draws and methods; a ranking without labels serves for every rare class."""
    size = options.size or SIZES[dataset]
    overrides = [*dataset_overrides(dataset), f"model.image_size={size}", f"model.crops={options.crops}"]
    overrides += ["probe.orientations=2"]
    task = open_task(dataset, *overrides[1:])
    for draw in range(options.draws):
        for method in options.methods:
            name = f"{dataset}-{size}-{method}-{draw}-{options.neighbours}-{options.drop}"
            name += f"-{options.epochs}" if method == "msc" else ""
            name += f"-{options.crops} crops" if options.crops else ""
            path = options.runs / "cold_start" / f"{name}.csv"
            named = {"dataset": dataset, "size": size, "method": method, "draw": draw}
            yield from run_once(path, measure, task, named, overrides, options)


def measure(task: Task, named: Row, overrides: list[str], options: argparse.Namespace) -> Iterator[Row]:
    """Rank all images by one method, and yield a row for each rare class."""
    everything, draw = [*task.pool, *task.holdout], int(named["draw"])
    rng = np.random.default_rng([draw, 0xD4])
    ids = sorted(str(id_) for id_ in rng.choice(everything, round(0.8 * len(everything)), replace=False))
    start = time.monotonic()
    learner = make_ranker(task, str(named["method"]), draw, overrides, options)
    learner.fit({}, pool=ids[:: 10 if options.quick else 1])
    ranking = learner.rank(everything)
    named |= {"seconds": round(time.monotonic() - start, 1)}
    truth = task.source.truth or {}
    probe = make_learner("probe", task, *overrides)
    for anomaly in ANOMALIES[str(named["dataset"])]:
        rare = np.array([truth[id_] == anomaly for id_ in ranking.ids])
        first = ranking.top(SHOWN)
        yield named | {
            "anomaly": anomaly,
            "rare": int(rare.sum()),
            "images": len(ranking),
            "auroc": float(roc_auc_score(rare, ranking.logits)),
            "found": sum(truth[id_] == anomaly for id_ in first),
            "found_after_100_more": discover(probe, ranking, first, lambda id_: truth[id_] == anomaly),  # noqa: B023
        }


def make_ranker(task: Task, method: str, draw: int, overrides: list[str], options: argparse.Namespace) -> Any:
    """Make a learner that needs no labels."""
    if method in ("mixed", "diverse", "random"):
        config = compose(*overrides, f"al.cold_start={method}", f"seed={draw}")
        return build_cold_start(config, task, build_embedding(config, task))
    own = [f"algorithm.learner.drop={options.drop}", f"seed={draw}"]
    if method in ("knn", "msc"):
        own.append(f"algorithm.learner.detector.neighbours={options.neighbours}")
    if method == "msc":
        own.append(f"algorithm.learner.epochs={options.epochs}")
    return make_learner(method, task, *overrides, *own)


def discover(probe: Learner, ranking: Ranking, first: list[str], is_rare: Callable[[str], bool]) -> int:
    """Label 100 more images in batches, by the probe as soon as both classes are known; return all anomalies found."""
    labels = {id_: Label.ANOMALY if is_rare(id_) else Label.NORMAL for id_ in first}
    for _ in range(SHOWN // BATCH):
        rest = [id_ for id_ in ranking.ids if id_ not in labels]
        order = ranking.restrict(rest)
        if have_both_classes(labels):
            probe.fit(labels, pool=rest)
            order = probe.rank(rest)
        labels |= {id_: Label.ANOMALY if is_rare(id_) else Label.NORMAL for id_ in order.top(BATCH)}
    return sum(label == Label.ANOMALY for label in labels.values())


def measure_cost(stored: list[int]) -> Iterator[Row]:
    """Yield the seconds of a first query and of 10,000 queries by the number of stored features of 1,280 values."""
    count = min(10_000, *stored)
    not_stored = torch.full((count,), -1)
    for rows in stored:
        generator = torch.Generator().manual_seed(0)
        features = torch.empty(rows, 1280, dtype=torch.float16)
        for part in features.split(16_384):
            centre = torch.randn(1, 1280, generator=generator)
            part.copy_(torch.nn.functional.normalize(centre + torch.randn(len(part), 1280, generator=generator)))
        queries = features[torch.randperm(rows, generator=generator)[:count]]
        for method, limit in (("exact", rows), ("faiss", 1)):
            times = []
            for some in (queries[:10], queries):
                start = time.monotonic()
                own = not_stored[: len(some)]
                nearest_distances(some, features, 2, own, device=torch.device("cpu"), exact_rows=limit)
                times.append(time.monotonic() - start)
            console.print(f"{rows:,} stored, {method}: {times[0]:.2f} s, then {times[1]:.2f} s", highlight=False)
            yield {
                "stored": rows,
                "method": method,
                "first_seconds": round(times[0], 3),
                "seconds_per_10000": round(times[1] * 10_000 / count, 3),
            }


if __name__ == "__main__":
    main()
