"""Without any label: how many anomalies are among the first 100 images shown, by what chooses them.

Each draw learns from four fifths of the images, taken at random, and ranks all. `discover` then goes on: 100 more
labels by the probe, as the loop does after a cold start.
"""

import argparse
import csv
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench import DATA, HERE, Row, table
from probe_miniimagenet import CLASSES
from sklearn.metrics import roc_auc_score

from anomalymatch import Label, make_learner, open_task
from anomalymatch.active.cold_start import Diverse, Mixed, Shuffled
from anomalymatch.active.run_folder import to_csv
from anomalymatch.algorithms.base import Learner
from anomalymatch.algorithms.novelty.distances import nearest_distances
from anomalymatch.data.labels import have_both_classes
from anomalymatch.data.task import Task
from anomalymatch.files import write_text
from anomalymatch.ranking import Ranking
from anomalymatch.terminal import console, set_up_logging

METHODS: dict[str, list[str]] = {
    "knn": [],
    "mahalanobis": [],
    "pca_residual": [],
    "mixed": [],
    "diverse": [],
    "random": [],
    "msc": ["algorithm.learner.detector.neighbours=10"],
}
RARE = {"galaxyzoo1": ("merger", "dont_know"), "miniimagenet": tuple(CLASSES.values())}
SIZES = {"galaxyzoo1": 150, "miniimagenet": 84}
SHOWN, BATCH = 100, 20


def main() -> None:
    """Measure what is missing, and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=Path("runs/experiments/cold_start"), help="one CSV a ranking")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder of the tables")
    parser.add_argument("--datasets", nargs="+", default=list(RARE), choices=list(RARE))
    parser.add_argument("--methods", nargs="+", default=[name for name in METHODS if name != "msc"], choices=METHODS)
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--size", type=int, help="side in pixels; that of the data set's features if not given")
    parser.add_argument("--crops", type=int, default=0, help="that features are averaged over, too")
    parser.add_argument("--epochs", type=int, default=3, help="of msc")
    parser.add_argument("--neighbours", type=int, default=10, help="of knn and msc")
    parser.add_argument("--drop", type=float, default=0.0, help="share of the images that is not learnt from")
    parser.add_argument("--cost", action="store_true", help="measure instead the cost of the score, exact and faiss")
    parser.add_argument(
        "--stored", type=int, nargs="+", default=[10_000, 100_000, 1_000_000], help="features, for --cost"
    )
    parser.add_argument("--quick", action="store_true", help="one draw of galaxyzoo1 at 32 px; cost at 2,000 features")
    options = parser.parse_args()
    set_up_logging("warning")
    if options.quick:
        options.datasets, options.draws, options.size, options.epochs = ["galaxyzoo1"], 1, 32, 1
    if options.cost:
        rows = list(cost([2_000] if options.quick else options.stored))
        write_text(options.results / "novelty_cost.csv", to_csv(rows))
        print(table(rows, ("stored", "method"), ("first_seconds", "seconds_per_10000")))
        return
    rows = [row for dataset in options.datasets for row in of_dataset(dataset, options)]
    suffix = f"_{options.crops}_crops" if options.crops else ""
    write_text(options.results / f"cold_start{suffix}.csv", to_csv(rows))
    measures = ("auroc", "found", "found_after_100_more")
    print(table(rows, ("dataset", "anomaly", "size", "method"), measures))


def of_dataset(dataset: str, options: argparse.Namespace) -> Iterator[Row]:
    """All draws and methods; a ranking knows nothing of what is rare, so that it serves for all rare classes."""
    size = options.size or SIZES[dataset]
    words = [f"data.root={DATA / dataset}", f"model.image_size={size}", f"model.crops={options.crops}"]
    words += ["probe.orientations=2"]
    task = open_task(dataset, *words)
    everything = [*task.pool, *task.holdout]
    for draw in range(options.draws):
        rng = np.random.default_rng([draw, 0xD4])
        ids = sorted(str(id_) for id_ in rng.choice(everything, round(0.8 * len(everything)), replace=False))
        ids = ids[:: 10 if options.quick else 1]
        for method in options.methods:
            name = f"{dataset}-{size}-{method}-{draw}-{options.neighbours}-{options.drop}"
            name += f"-{options.epochs}" if method == "msc" else ""
            name += f"-{options.crops} crops" if options.crops else ""
            path = options.runs / f"{'quick-' * options.quick}{name}.csv"
            if not path.exists():
                console.print(f"cold_start: {name}", highlight=False)
                start = time.monotonic()
                ranking = ranked(task, dataset, method, ids, everything, draw, words, options)
                seconds = round(time.monotonic() - start, 1)
                rows = list(measured(task, dataset, ranking, words))
                named = {"dataset": dataset, "size": size, "method": method, "draw": draw, "seconds": seconds}
                write_text(path, to_csv([{**named, **row} for row in rows]))
            with path.open(encoding="utf-8", newline="") as file:
                yield from csv.DictReader(file)


def ranked(
    task: Task,
    dataset: str,
    method: str,
    ids: list[str],
    everything: list[str],
    draw: int,
    words: list[str],
    options: argparse.Namespace,
) -> Ranking:
    """`everything` as a method ranks it that learns from `ids`, without labels."""
    learner: Any = make_learner("knn", task, f"dataset={dataset}", *words)
    if method == "mixed":
        learner = Mixed(learner, Diverse(learner.embedding, seed=draw))
    elif method in ("diverse", "random"):
        learner = (Diverse if method == "diverse" else Shuffled)(learner.embedding, seed=draw)
    else:
        own = [f"algorithm.learner.drop={options.drop}", f"seed={draw}", *METHODS[method]]
        if method in ("knn", "msc"):
            own.append(f"algorithm.learner.detector.neighbours={options.neighbours}")
        if method == "msc":
            own.append(f"algorithm.learner.epochs={options.epochs}")
        learner = make_learner(method, task, f"dataset={dataset}", *words, *own)
    learner.fit({}, pool=ids)
    return learner.rank(everything)


def measured(task: Task, dataset: str, ranking: Ranking, words: list[str]) -> Iterator[Row]:
    """For each rare class: anomalies among the first 100, and after 100 more labels by the probe."""
    truth = task.source.truth or {}
    probe = make_learner("probe", task, f"dataset={dataset}", *words)
    for anomaly in RARE[dataset]:
        rare = np.array([truth[id_] == anomaly for id_ in ranking.ids])
        first = ranking.top(SHOWN)
        yield {
            "anomaly": anomaly,
            "rare": int(rare.sum()),
            "images": len(ranking),
            "auroc": float(roc_auc_score(rare, ranking.logits)),
            "found": sum(truth[id_] == anomaly for id_ in first),
            "found_after_100_more": discover(probe, ranking, first, lambda id_: truth[id_] == anomaly),  # noqa: B023
        }


def discover(probe: Learner, ranking: Ranking, first: list[str], is_rare: Callable[[str], bool]) -> int:
    """Anomalies found in all when 100 more images are labelled in batches, by the probe as soon as it can rank."""
    labels = {id_: Label.ANOMALY if is_rare(id_) else Label.NORMAL for id_ in first}
    for _ in range(SHOWN // BATCH):
        rest = [id_ for id_ in ranking.ids if id_ not in labels]
        order = ranking.restrict(rest)
        if have_both_classes(labels):
            probe.fit(labels, pool=rest)
            order = probe.rank(rest)
        labels |= {id_: Label.ANOMALY if is_rare(id_) else Label.NORMAL for id_ in order.top(BATCH)}
    return sum(label == Label.ANOMALY for label in labels.values())


def cost(stored: list[int]) -> Iterator[Row]:
    """Seconds that 10,000 queries take by the number of stored features (1,280 numbers each), and the first ever."""
    count = min(10_000, *stored)
    nobody = torch.full((count,), -1)
    for rows in stored:
        generator = torch.Generator().manual_seed(0)
        bank = torch.empty(rows, 1280, dtype=torch.float16)
        for part in bank.split(16_384):
            centre = torch.randn(1, 1280, generator=generator)
            part.copy_(torch.nn.functional.normalize(centre + torch.randn(len(part), 1280, generator=generator)))
        queries = bank[torch.randperm(rows, generator=generator)[:count]]
        for method, limit in (("exact", rows), ("faiss", 1)):
            times = []
            for some in (queries[:10], queries):
                start = time.monotonic()
                nearest_distances(some, bank, 2, nobody[: len(some)], device=torch.device("cpu"), exact_rows=limit)
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
