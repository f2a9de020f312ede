"""What the probe could see: pooled features of all stages beside those of the last, and how to join them.

Stage features are the mean, the standard deviation and the maximum of each feature map over the image. Each of these
blocks is L2-normalised, divided by the square root of its spread over the archive, and normalised again.
"""

import argparse
import csv
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from bench import DATA, HERE, Row, table
from jaxtyping import Bool, Float32, Float64, Int64
from probe_miniimagenet import CLASSES
from sklearn.metrics import average_precision_score, roc_auc_score
from sklearn.model_selection import StratifiedKFold
from torch import Tensor, nn

from anomalymatch import compose, open_task
from anomalymatch.active.learner import POOL_IMAGES
from anomalymatch.active.run_folder import to_csv
from anomalymatch.build import build, build_embedding
from anomalymatch.cli import set_up_logging
from anomalymatch.data.task import Task
from anomalymatch.files import make_folder, write_text
from anomalymatch.models.network import Backbone
from anomalymatch.models.probe import ProbeSpec, fit_probe, self_train
from anomalymatch.progress import console

RARE = {
    "galaxyzoo1": {"merger": "merger", "don't know": "dont_know"},
    "miniimagenet": CLASSES,
}
SIZES, NORMALS = {"galaxyzoo1": 150, "miniimagenet": 84}, {"galaxyzoo1": 200, "miniimagenet": 495}
ANOMALIES, BATCH, ROUNDS, FOLDS = 5, 20, 10, 5
Rows = Float32[np.ndarray, "n d"]
Places = Int64[np.ndarray, " k"]
Score = Callable[[Rows, Rows, Places, Places, Places], Float64[np.ndarray, " n"]]


class Stages(nn.Module):
    """The features of all stages of an EfficientNet, and its last ones, in a row."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone
        self.maps: list[Tensor] = []
        for stage in backbone.body.blocks:
            stage.register_forward_hook(lambda module, inputs, output: self.maps.append(output.float()))

    def widths(self) -> list[int]:
        """Of all blocks but the last."""
        with torch.inference_mode():
            self(torch.zeros(1, 3, 64, 64))
        return [m.shape[1] for m in self.maps for _ in range(3)]

    def folded(self) -> "Stages":
        """As it is: the hooks belong to these very stages."""
        return self

    def forward(self, images: Tensor) -> Tensor:
        """One row for each image."""
        self.maps.clear()
        last = self.backbone(images).float()
        pooled = [pool for m in self.maps for pool in (m.mean((2, 3)), m.std((2, 3)), m.amax((2, 3)))]
        return torch.cat([*pooled, last], dim=1)


def main() -> None:
    """Measure what is missing, and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=Path("runs/experiments/probe_features"), help="features and CSVs")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder of the table")
    parser.add_argument("--datasets", nargs="+", default=list(RARE), choices=RARE)
    parser.add_argument("--draws", type=int, default=4)
    options = parser.parse_args()
    set_up_logging("warning")
    rows = [row for dataset in options.datasets for row in of_dataset(dataset, options)]
    write_text(options.results / "probe_features.csv", to_csv(rows))
    print(table(rows, ("task", "probe"), ("auroc", "ap", "found")))


def of_dataset(dataset: str, options: argparse.Namespace) -> Iterator[Row]:
    """All rare classes, draws and probes."""
    for name, anomaly in RARE[dataset].items():
        for draw in range(options.draws):
            path = options.runs / f"{anomaly}-{draw}.csv"
            if not path.exists():
                console.print(f"probe_features: {name}, {draw}", highlight=False)
                last, stages, truth = features(dataset, options.runs)
                rare = truth == anomaly
                found = [{"task": name, "probe": p, "draw": draw} | search(last, stages, rare, PROBES[p], draw,
                         NORMALS[dataset]) for p in PROBES]  # fmt: skip
                write_text(path, to_csv(found))
            with path.open(encoding="utf-8", newline="") as file:
                yield from csv.DictReader(file)


def features(dataset: str, folder: Path) -> tuple[Rows, Rows, np.ndarray]:
    """Those of the last stage, those of all stages, and the class of each image."""
    words = (f"data.root={DATA / dataset}", f"model.image_size={SIZES[dataset]}")
    task = open_task(dataset, *words)
    path = folder / f"{dataset}.npy"
    embedding = build_embedding(compose(f"dataset={dataset}", *words), Task(task.source, task.source.ids, [], None))
    stages = Stages(embedding.backbone().eval())
    if not path.exists():
        parts = embedding.inference.run(stages, task.source, task.source.ids, size=SIZES[dataset])
        np.save(make_folder(folder) / path.name, np.concatenate([part.outputs for part in parts]).astype(np.float16))
    rows = np.load(path).astype(np.float32)
    blocks = np.split(rows, np.cumsum(stages.widths()), axis=1)
    truth = np.array([(task.source.truth or {})[id_] for id_ in task.source.ids])
    return normalised(blocks[-1]), normalised(np.concatenate([scaled(block) for block in blocks], axis=1)), truth


def normalised(rows: Rows) -> Rows:
    """Rows of length one."""
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def scaled(block: Rows) -> Rows:
    """Columns that vary much are held back, half way to equal spreads; rows of length one before and after."""
    rows = normalised(block)
    rows = rows - rows.mean(axis=0)
    return normalised(rows / np.sqrt(np.maximum(rows.std(axis=0), 1e-6)))


def search(last: Rows, stages: Rows, rare: Bool[np.ndarray, " n"], score: Score, draw: int, normals: int) -> Row:
    """Start from five anomalies, spend 200 labels on the top of the ranking."""
    rng = np.random.default_rng([draw, 0x5EA])
    labelled = np.zeros(len(rare), dtype=bool)
    labelled[rng.permutation(np.flatnonzero(rare))[:ANOMALIES]] = True
    labelled[rng.permutation(np.flatnonzero(~rare))[:normals]] = True
    row: Row = {}
    for _ in range(ROUNDS):
        rest = np.flatnonzero(~labelled)
        scores = score(last, stages, np.flatnonzero(labelled & rare), np.flatnonzero(labelled & ~rare), rest)[rest]
        row = row or {
            "auroc": float(roc_auc_score(rare[rest], scores)),
            "ap": float(average_precision_score(rare[rest], scores)),
        }
        labelled[rest[np.argsort(-scores, kind="stable")[:BATCH]]] = True
    return row | {"found": int((labelled & rare).sum()) - ANOMALIES}


def probe(rows: Rows, anomalies: Places, normals: Places, rest: Places) -> Float64[np.ndarray, " n"]:
    """The default probe, its log-odds with mean zero and spread one."""
    pool = rest[:: max(1, len(rest) // POOL_IMAGES)]
    logits = self_train(rows[anomalies], rows[normals], rows[pool], SPEC).logits(rows)
    return (logits - logits.mean()) / logits.std()


def out_of_fold(rows: Rows, anomalies: Places, normals: Places) -> float:
    """AP of the labelled images, each ranked by a probe that has not seen it."""
    places, targets = np.concatenate([anomalies, normals]), np.repeat([True, False], [len(anomalies), len(normals)])
    logits = np.zeros(len(places))
    folds = StratifiedKFold(min(FOLDS, len(anomalies)), shuffle=True, random_state=0)
    for train, test in folds.split(places, targets):
        seen, known = places[train], targets[train]
        fitted = fit_probe(rows[seen[known]], rows[seen[~known]], inverse_regularisation=SPEC.inverse_regularisation)
        logits[test] = fitted.logits(rows[places[test]])
    return float(average_precision_score(targets, logits))


def weighted(last: Rows, stages: Rows, anomalies: Places, normals: Places, rest: Places) -> Float64[np.ndarray, " n"]:
    """Both probes, weighing as the squares of their out-of-fold AP."""
    trust = np.array([out_of_fold(rows, anomalies, normals) for rows in (last, stages)]) ** 2
    first, second = (probe(rows, anomalies, normals, rest) for rows in (last, stages))
    return (trust[0] * first + trust[1] * second) / trust.sum()


SPEC: ProbeSpec = build(compose().probe)
PROBES: dict[str, Score] = {
    "last stage": lambda last, stages, a, n, rest: probe(last, a, n, rest),
    "all stages": lambda last, stages, a, n, rest: probe(stages, a, n, rest),
    "sum": lambda last, stages, a, n, rest: probe(last, a, n, rest) + probe(stages, a, n, rest),
    "weighted sum": weighted,
}


if __name__ == "__main__":
    main()
