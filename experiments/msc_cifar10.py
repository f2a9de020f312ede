"""Measure detectors on CIFAR-10, one class against the rest: frozen features and mean-shifted contrastive training.

Normal images are the training images of one class; with a contamination, a share of them comes from other classes. The
metric is ROC-AUC on the official test images (README, 9). `contrastive` is the same training without the mean shift.
"""

import argparse
import time
from collections.abc import Iterator
from itertools import product

import numpy as np
from bench import Row, dataset_overrides, make_parser, parse_options, run_once, table, write_csv
from sklearn.metrics import roc_auc_score

from anomalymatch import make_learner, open_task
from anomalymatch.algorithms.msc.learner import MscLearner
from anomalymatch.data.task import Task

VARIANTS = {
    "msc": [],
    "msc + angular": ["algorithm.learner.loss.angular_weight=1.0"],
    "contrastive": ["algorithm.learner.loss.mean_shift=false", "algorithm.learner.loss.angular_weight=0.0"],
}
FROZEN = {
    "knn": ["knn", "algorithm.learner.detector.neighbours=2"],  # as MSC and its paper
    "knn 10": ["knn", "algorithm.learner.detector.neighbours=10"],
    "mahalanobis": ["mahalanobis"],
    "pca_residual": ["pca_residual"],
}


def main() -> None:
    """Measure what is missing and print the table."""
    parser = make_parser(__doc__, quick="one class at 32 px, one epoch, 300 test images")
    parser.add_argument("--sizes", type=int, nargs="+", default=[64], help="image sides in pixels")
    parser.add_argument("--classes", nargs="+", help="default: all ten")
    parser.add_argument("--variants", nargs="*", default=["msc", "contrastive"], choices=list(VARIANTS))
    parser.add_argument("--contaminations", type=float, nargs="+", default=[0.0], help="shares of hidden anomalies")
    parser.add_argument("--drops", type=float, nargs="+", default=[0.0], help="shares of the images to leave out again")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--groups", type=int, default=2, help="layer groups of the backbone that are trained")
    parser.add_argument("--seed", type=int, default=0)
    options = parse_options(parser)
    if options.quick:
        options.sizes, options.epochs, options.contaminations = [32], 1, [0.0, 0.1]
    rows = [row for size in options.sizes for row in measure_size(size, options)]
    name = "msc_cifar10" if options.variants else "novelty_cifar10"
    suffix = "_contaminated" if any(options.contaminations) else ""
    write_csv(options.results / f"{name}{suffix}.csv", rows)
    print(table(rows, ("size", "method", "contamination", "dropped", "epoch"), ("auroc", "gain", "seconds")))


def measure_size(size: int, options: argparse.Namespace) -> Iterator[Row]:
    """Yield the rows of all classes, methods and contaminations at one image size."""
    overrides = [*dataset_overrides("cifar10"), f"model.image_size={size}", f"seed={options.seed}"]
    task = open_task("cifar10", *overrides[1:])
    classes = options.classes or sorted(set(task.source.truth.values()))[: 1 if options.quick else None]
    for normal, share, drop in product(classes, options.contaminations, options.drops):
        for method in (*FROZEN, *options.variants):
            name = f"{size}-{normal}-{share}-{drop}-{method.replace(' ', '')}-{options.seed}"
            if method in VARIANTS:
                name += f"-{options.epochs}-{options.lr}-{options.groups}"
            path = options.runs / "msc_cifar10" / f"{name}.csv"
            rows = run_once(path, measure, task, size, normal, share, drop, method, overrides, options)
            for row in rows:
                yield {**row, "dropped": drop, "gain": float(row["auroc"]) - float(rows[0]["auroc"])}


def measure(
    task: Task,
    size: int,
    normal: str,
    share: float,
    drop: float,
    method: str,
    overrides: list[str],
    options: argparse.Namespace,
) -> list[Row]:
    """Measure ROC-AUC after each epoch; a method on frozen features has epoch 0 only."""
    truth = task.source.truth or {}
    train, test = list(task.pool), list(task.holdout)[:: 17 if options.quick else 1]
    train = contaminate(train, truth, normal, share, options.seed)[:: 5 if options.quick else 1]
    anomalous = np.array([truth[id_] != normal for id_ in test])
    named = {"size": size, "class": normal, "method": method, "contamination": share}
    start, rows = time.monotonic(), []

    def evaluate(epoch: int) -> None:
        nonlocal start
        seconds = time.monotonic() - start
        auroc = float(roc_auc_score(anomalous, learner.rank(test).logits))
        rows.append({**named, "epoch": epoch, "auroc": auroc, "seconds": round(seconds, 2)})
        start = time.monotonic()  # the time of an epoch excludes its evaluation

    own = [f"algorithm.learner.drop={drop}", "algorithm.learner.least_normals=1"]
    if method in VARIANTS:
        own += [f"algorithm.learner.epochs={options.epochs}", f"algorithm.learner.optimizer.lr={options.lr}"]
        own += [f"algorithm.learner.trainable_groups={options.groups}", *VARIANTS[method]]
        learner = make_learner("msc", task, *overrides, *own)
    else:
        algorithm, *more = FROZEN[method]
        learner = make_learner(algorithm, task, *overrides, *own, *more)
    if isinstance(learner, MscLearner):
        learner.on_epoch = evaluate
    learner.fit(dict.fromkeys(train, "normal"))
    if not rows:
        evaluate(0)
    return rows


def contaminate(ids: list[str], truth: dict[str, str], normal: str, share: float, seed: int) -> list[str]:
    """Return the images of class `normal`, mixed with so many others that these make up `share`."""
    own = [id_ for id_ in ids if truth[id_] == normal]
    others = [id_ for id_ in ids if truth[id_] != normal]
    count = round(len(own) * share / (1 - share))
    rng = np.random.default_rng([seed, 0xC0])
    mixed = [*own, *(others[i] for i in rng.choice(len(others), count, replace=False))]
    return [mixed[i] for i in rng.permutation(len(mixed))]


if __name__ == "__main__":
    main()
