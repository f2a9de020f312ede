"""Add heads on patches to the pooled probe, for small or local objects (README, Where it is odd).

The tasks are blowholes and cracks of magnetic tiles against tiles without a defect, and mergers of galaxies. Each score
of the patches is added to the log-odds of the probe, both standardised. The weight of each head is chosen on the first
half of the draws, and the gain is reported on the second half.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from bench import Row, dataset_overrides, format_interval, group_by, make_parser, markdown, parse_options, run_once
from sklearn.metrics import average_precision_score

from anomalymatch import initial_labels, make_learner, open_task
from anomalymatch.algorithms.probe import fit_logistic, fit_probe
from anomalymatch.clustering.patches import PatchEmbedding, PatchSpec
from anomalymatch.data.stream import stream
from anomalymatch.data.task import Task
from anomalymatch.evaluation.confidence import mean_interval
from anomalymatch.progress import progress

TASKS = {"blowhole": ("magnetic_tile", 224), "crack": ("magnetic_tile", 224), "merger": ("galaxyzoo1", 150)}
"""Data set, and side of the images in pixels."""
POOLINGS = {"largest": 1, "mean of 3": 3, "mean of 10 %": 0.1}
WEIGHTS = (0.25, 0.5, 1.0)
ROUNDS, CHOSEN, HARD, BANK = 5, 3, 2000, 3000
"""Rounds of multiple-instance learning, patches of each anomaly, and patches of normals in a fit and in the bank."""


def main() -> None:
    """Measure all tasks and print the table."""
    parser = make_parser(__doc__)
    parser.add_argument("--draws", type=int, default=8, help="number of initial label sets")
    parser.add_argument("--tasks", nargs="*", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--weights", default="auto", help="of the backbone: a value of model.weights")
    parser.add_argument("--name", default="patch_head", help="folder of the results, one for each value of --weights")
    options = parse_options(parser)
    draws = 2 if options.quick else options.draws
    rows: list[Row] = []
    for name in options.tasks:
        path = options.runs / options.name / f"{name}-{draws}.csv"
        rows += run_once(path, measure, name, draws, options.weights)
    print(gains(rows, draws))


def measure(name: str, draws: int, weights: str) -> Iterator[Row]:
    """Yield the average precision of the probe alone and with each head, for each draw."""
    kind, size = TASKS[name]
    dataset, root = dataset_overrides(kind)
    source = open_task("galaxyzoo1" if kind == "galaxyzoo1" else "parquet", root).source
    ids = [id_ for id_ in source.ids if kind == "galaxyzoo1" or source.truth[id_] in (name, "free")]
    anomalies = {id_ for id_ in ids if source.truth[id_] == name}
    task = Task(source, ids, [], anomalies)
    words = [dataset] if kind == "galaxyzoo1" else []
    words += [f"model.image_size={size}", "model.crops=5", f"model.weights={weights}"]
    learner: Any = make_learner("probe", task, *words)
    normals = 200 if kind == "galaxyzoo1" else 100
    labels = [initial_labels(task, anomalies=5, normals=normals, seed=draw) for draw in range(draws)]
    probes = [
        fit_probe(learner.embedding, each, [id_ for id_ in ids if id_ not in each], learner.spec).probe
        for each in labels
    ]
    spec = PatchSpec(levels=[2, 3, 4], grid=7, components=None, whitening=0, average=3)
    bags = PatchEmbedding(learner.embedding, spec).bags(ids)
    rows, truth = bags.patches.numpy(), np.array([id_ in anomalies for id_ in bags.ids])
    pooled = learner.embedding.probe_features.take(bags.ids)
    evidence = last_layer_evidence(learner.embedding, bags.ids, [probe.coefficients for probe in probes])
    for draw, (given, probe) in enumerate(zip(labels, probes, strict=True)):
        rng = np.random.default_rng(draw)
        rare = np.array([i for i, id_ in enumerate(bags.ids) if given.get(id_) == "anomaly"])
        common = np.array([i for i, id_ in enumerate(bags.ids) if given.get(id_) == "normal"])
        heads = {f"evidence, {pooling}": evidence[:, draw, k] for k, pooling in enumerate(POOLINGS)}
        instances = project(rows, multiple_instances(rows, rare, common, rng))
        heads |= {f"instances, {pooling}": best(instances, count) for pooling, count in POOLINGS.items()}
        heads["distance to normal patches"] = distances(rows, common, rng)
        rest = np.array([id_ not in given for id_ in bags.ids])
        base = standardised(probe.logits(pooled)[rest])
        yield {
            "class": name,
            "draw": draw,
            "head": "none",
            "weight": 0,
            "ap": average_precision_score(truth[rest], base),
        }
        for head, scores in heads.items():
            for weight in WEIGHTS:
                ap = average_precision_score(truth[rest], base + weight * standardised(scores[rest]))
                yield {"class": name, "draw": draw, "head": head, "weight": weight, "ap": ap}


def last_layer_evidence(embedding: Any, ids: Sequence[str], coefficients: Sequence[np.ndarray]) -> np.ndarray:
    """Return the pooled evidence of the last layer in the whole images, by image, draw and pooling."""
    backbone = embedding.network(normalised=True).backbone.fused()
    weights = torch.from_numpy(np.stack([each[: backbone.features] for each in coefficients])).float()
    found = []
    with torch.inference_mode(), progress("Evidence", len(ids)) as advance:
        for batch in stream(embedding.source, ids, size=embedding.image_size, batch_size=8):
            maps = backbone.body.forward_intermediates(backbone.normalise(batch.images), indices=1)[0].flatten(2)
            cells = torch.einsum("bdp,kd->bkp", maps, weights) / maps.mean(2).norm(dim=1)[:, None, None]
            found.append(np.stack([best(cells.numpy(), count) for count in POOLINGS.values()], axis=2))
            advance(len(batch.ids))
    return np.concatenate(found)


def multiple_instances(rows: np.ndarray, rare: np.ndarray, common: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Fit a logistic regression on the patches of anomalies that it scores highest, against patches of normals."""
    positive, normals = rows[rare], rows[common].reshape(-1, rows.shape[2])
    fitted = fit_logistic(positive.mean(1), rows[common].mean(1), inverse_regularisation=10.0)
    for _ in range(ROUNDS):
        order = np.argsort(-project(positive, fitted.coefficients), axis=1)[:, :CHOSEN]
        chosen = np.take_along_axis(positive, order[..., None], axis=1).reshape(-1, rows.shape[2])
        hard = np.argsort(-project(normals, fitted.coefficients))[: HARD // 2]
        others = rng.choice(len(normals), min(HARD // 2, len(normals)), replace=False)
        kept = normals[np.concatenate([hard, others])]
        fitted = fit_logistic(chosen, kept, inverse_regularisation=10.0)
    return fitted.coefficients


def distances(rows: np.ndarray, common: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return the largest distance of a patch of each image to the nearest of the normals' patches (PatchCore)."""
    normals = rows[common].reshape(-1, rows.shape[2])
    bank = normals[rng.choice(len(normals), min(BANK, len(normals)), replace=False)].astype(np.float32).T
    # All patches have the same length: three levels of one each.
    parts = np.array_split(rows, max(1, len(rows) // 64))
    return np.concatenate([-(part.astype(np.float32) @ bank).max(2).min(1) for part in parts])


def project(rows: np.ndarray, direction: np.ndarray) -> np.ndarray:
    """Return the inner products of patches with a direction."""
    parts = np.array_split(rows, max(1, len(rows) // 256))
    return np.concatenate([part.astype(np.float32) @ direction.astype(np.float32) for part in parts])


def best(values: np.ndarray, count: float) -> np.ndarray:
    """Return the mean of the largest `count` values of the last axis, or of a share of them."""
    k = count if count >= 1 else round(count * values.shape[-1])
    return np.sort(values, axis=-1)[..., -int(k) :].mean(-1)


def standardised(values: np.ndarray) -> np.ndarray:
    """Return values with mean 0 and deviation 1."""
    return (values - values.mean()) / values.std()


def gains(rows: list[Row], draws: int) -> str:
    """Format the gain of each head: its weight by the first half of the draws, its gain on the second half."""
    lines = []
    for name, own in group_by(rows, ("class",)).items():
        plain = {row["draw"]: float(row["ap"]) for row in own if row["head"] == "none"}
        later = [value for draw, value in plain.items() if int(draw) >= draws // 2]
        lines.append([*name, "none", "", format_interval(mean_interval(later)), ""])
        for head, some in group_by(own, ("head",)).items():
            gain = {
                weight: [float(row["ap"]) - plain[row["draw"]] for row in group]  # in the order of the draws
                for weight, group in group_by(some, ("weight",)).items()
            }
            chosen = max(gain, key=lambda weight: np.mean(gain[weight][: draws // 2]))
            if head != ("none",):
                cell = format_interval(mean_interval(gain[chosen][draws // 2 :]), "+.3f")
                lines.append([*name, *head, *chosen, "", cell])
    return markdown(["anomaly", "head", "weight", "AP", "gain"], lines)


if __name__ == "__main__":
    main()
