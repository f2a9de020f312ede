"""Mean-shifted contrastive learning on CIFAR-10, one class against the rest: before, during and after training.

ROC-AUC on the official test split. What is normal are the training images of one class; with a contamination, a share
of images of the other classes hides among them. `contrastive` is the same training without the mean shift.
"""

import argparse
import csv
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import numpy as np
from bench import DATA, HERE, Row, table
from sklearn.metrics import roc_auc_score

from anomalymatch import make_learner, open_task
from anomalymatch.active.run_folder import to_csv
from anomalymatch.algorithms.msc.learner import MscLearner
from anomalymatch.data.task import Task
from anomalymatch.files import write_text
from anomalymatch.terminal import console, set_up_logging

VARIANTS = {
    "msc": [],
    "msc + angular": ["algorithm.learner.loss.angular_weight=1.0"],
    "contrastive": ["algorithm.learner.loss.mean_shift=false", "algorithm.learner.loss.angular_weight=0.0"],
}
FROZEN = {
    "knn": ["knn", "algorithm.learner.detector.neighbours=2"],  # as after training, and as the paper has it
    "knn 10": ["knn", "algorithm.learner.detector.neighbours=10"],
    "mahalanobis": ["mahalanobis"],
    "pca_residual": ["pca_residual"],
}


def main() -> None:
    """Measure what is missing, and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=Path("runs/experiments/msc_cifar10"), help="one CSV a training")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder of the table")
    parser.add_argument("--sizes", type=int, nargs="+", default=[64], help="sides in pixels")
    parser.add_argument("--classes", nargs="+", help="all ten if not given")
    parser.add_argument("--variants", nargs="*", default=["msc", "contrastive"], choices=list(VARIANTS), help="or none")
    parser.add_argument("--contaminations", type=float, nargs="+", default=[0.0], help="shares of hidden anomalies")
    parser.add_argument("--drops", type=float, nargs="+", default=[0.0], help="shares of them that are left out again")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--groups", type=int, default=2, help="layer groups of the backbone that learn")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="one class at 32 px, one epoch, 300 test images")
    options = parser.parse_args()
    set_up_logging("warning")
    if options.quick:
        options.sizes, options.epochs, options.contaminations = [32], 1, [0.0, 0.1]
    rows = [row for size in options.sizes for row in at_size(size, options)]
    name = "msc_cifar10" if options.variants else "novelty_cifar10"
    hidden = "_contaminated" if any(options.contaminations) else ""
    write_text(options.results / f"{name}{hidden}.csv", to_csv(rows))
    print(table(rows, ("size", "method", "contamination", "dropped", "epoch"), ("auroc", "gain", "seconds")))


def at_size(size: int, options: argparse.Namespace) -> Iterator[Row]:
    """All classes, methods and contaminations at one size of the images."""
    words = ["dataset=cifar10", f"data.root={DATA / 'cifar10'}", f"model.image_size={size}", f"seed={options.seed}"]
    task = open_task("cifar10", *words[1:])
    classes = options.classes or sorted(set(task.source.truth.values()))[: 1 if options.quick else None]
    for normal in classes:
        for share, drop in product(options.contaminations, options.drops):
            for method in (*FROZEN, *options.variants):
                name = f"{size}-{normal}-{share}-{drop}-{method.replace(' ', '')}-{options.seed}"
                if method in VARIANTS:
                    name += f"-{options.epochs}-{options.lr}-{options.groups}"
                path = options.runs / f"{'quick-' * options.quick}{name}.csv"
                if not path.exists():
                    console.print(f"msc_cifar10: {name}", highlight=False)
                    measured = measure(task, normal, share, drop, method, words, options)
                    named = {"size": size, "class": normal, "method": method, "contamination": share}
                    write_text(path, to_csv([{**named, **row} for row in measured]))
                with path.open(encoding="utf-8", newline="") as file:
                    rows = list(csv.DictReader(file))
                for row in rows:
                    yield {**row, "dropped": drop, "gain": float(row["auroc"]) - float(rows[0]["auroc"])}


def measure(
    task: Task, normal: str, share: float, drop: float, method: str, words: list[str], options: argparse.Namespace
) -> list[Row]:
    """ROC-AUC after each epoch; frozen features have epoch 0 alone."""
    truth = task.source.truth or {}
    train, test = list(task.pool), list(task.holdout)[:: 17 if options.quick else 1]
    learnt = contaminated(train, truth, normal, share, options.seed)[:: 5 if options.quick else 1]
    odd = np.array([truth[id_] != normal for id_ in test])
    start, rows = time.monotonic(), []

    def look(epoch: int) -> None:
        nonlocal start
        seconds = time.monotonic() - start
        auroc = float(roc_auc_score(odd, learner.rank(test).logits))
        rows.append({"epoch": epoch, "auroc": auroc, "seconds": round(seconds, 2)})
        start = time.monotonic()  # looking does not count

    own = [f"algorithm.learner.drop={drop}", "algorithm.learner.least_normals=1"]
    if method in VARIANTS:
        own += [f"algorithm.learner.epochs={options.epochs}", f"algorithm.learner.optimizer.lr={options.lr}"]
        own += [f"algorithm.learner.trainable_groups={options.groups}", *VARIANTS[method]]
        learner = make_learner("msc", task, *words, *own)
    else:
        algorithm, *more = FROZEN[method]
        learner = make_learner(algorithm, task, *words, *own, *more)
    if isinstance(learner, MscLearner):
        learner.on_epoch = look
    learner.fit(dict.fromkeys(learnt, "normal"))
    if not rows:
        look(0)
    return rows


def contaminated(ids: list[str], truth: dict[str, str], normal: str, share: float, seed: int) -> list[str]:
    """The training images of the class `normal`, with others hidden among them so that they make up `share`."""
    own = [id_ for id_ in ids if truth[id_] == normal]
    others = [id_ for id_ in ids if truth[id_] != normal]
    count = round(len(own) * share / (1 - share))
    rng = np.random.default_rng([seed, 0xC0])
    mixed = [*own, *(others[i] for i in rng.choice(len(others), count, replace=False))]
    return [mixed[i] for i in rng.permutation(len(mixed))]


if __name__ == "__main__":
    main()
