"""Anomaly Clustering: how well groups match the true classes, by method, tau, levels and image size; and what it costs.

Each draw takes 50 images of each class at random. tau's default is the sharpest that
neu_steel does not speak against (`--choose-tau`).
"""

import argparse
import csv
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench import DATA, HERE, Row, table

from anomalymatch.active.run_folder import to_csv
from anomalymatch.build import build, build_embedding, build_source
from anomalymatch.clustering.analysis import SAMPLED, embed
from anomalymatch.clustering.distances import (
    hausdorff_distances,
    normal_scores,
    patch_weights,
    relative_scores,
    unsupervised_scores,
)
from anomalymatch.clustering.group import EXACT_IMAGES, cut_tree, ward_tree
from anomalymatch.clustering.patches import Bags, PatchEmbedding
from anomalymatch.clustering.quality import agreement
from anomalymatch.config import compose
from anomalymatch.data.task import make_task
from anomalymatch.evaluation.confidence import mean_interval, paired_difference
from anomalymatch.files import write_text
from anomalymatch.terminal import console, set_up_logging

SETS = ("neu_steel", "magnetic_tile", "magnetic_tile_defects", "miniimagenet_5", "miniimagenet_10")
TAUS = (0.0, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.5)
NORMALS = (5, 20, 0)
"""Labelled normal images; 0 stands for all that are not among those to group."""
DEFAULT = ((3, 4), 224)
VARIANTS = [((2, 3), 224), ((3,), 224), ((4,), 224), ((2, 3, 4), 224), ((3, 4), 320)]
"""Levels and image sizes, measured at the default tau."""
MEASURES = ("nmi", "ari", "f1")


def main() -> None:
    """Measure what is missing, and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=Path("runs/experiments/clustering"), help="one CSV a draw")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder of the tables")
    parser.add_argument("--datasets", nargs="+", default=list(SETS), choices=SETS)
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--per-class", type=int, default=50)
    parser.add_argument("--variants", action="store_true", help="other levels and image sizes as well")
    parser.add_argument("--choose-tau", action="store_true", help="neu_steel alone, and the tau that follows from it")
    parser.add_argument("--references", action="store_true", help="measure instead NMI by the number of references")
    parser.add_argument("--cost", action="store_true", help="measure instead seconds by the number of images")
    parser.add_argument("--sizes", type=int, nargs="+", default=[100, 500, 1000, 2000, 5000, 10_000, 20_000])
    parser.add_argument("--quick", action="store_true", help="one draw of neu_steel, 8 images a class, at 64 px")
    options = parser.parse_args()
    set_up_logging("warning")
    if options.quick:
        options.datasets, options.draws, options.per_class, options.sizes = ["neu_steel"], 1, 8, [50, 100]
    if options.choose_tau:
        options.datasets = ["neu_steel"]
    if options.cost:
        rows = list(cost(options.sizes))
        write_text(options.results / "clustering_cost.csv", to_csv(rows))
        print(table(rows, ("images", "references"), ("weights_s", "ward_s")))
        return
    if options.references:
        rows = [row for name in options.datasets for row in measured(name, *DEFAULT, options, by_references)]
        write_text(options.results / "clustering_references.csv", to_csv(rows))
        print(table(rows, ("dataset", "references"), ("nmi", "seconds")))
        return
    settings = [DEFAULT, *(VARIANTS if options.variants else [])]
    rows = [
        row
        for name in options.datasets
        for levels, size in settings
        for row in measured(name, levels, size, options, by_method)
    ]
    write_text(options.results / "clustering.csv", to_csv(rows))
    print(table(rows, ("dataset", "levels", "size", "method", "tau"), MEASURES))
    if options.choose_tau:
        print(f"tau = {chosen_tau(rows)}")


def measured(name: str, levels: Sequence[int], size: int, options: argparse.Namespace, by: Any) -> Iterator[Row]:
    """The draws of one data set with one kind of patches, from earlier calls or measured now."""
    size = 64 if options.quick else size
    patches = None
    for draw in range(options.draws):
        words = [name, *map(str, levels), str(size), str(options.per_class), str(draw), by.__name__]
        path = options.runs / f"{'-'.join(words)}.csv"
        if not path.exists():
            console.print(f"clustering: {path.stem}", highlight=False)
            patches = patches or opened(name, levels, size)
            ids, normals = drawn(name, patches.embedding.source.truth or {}, options.per_class, draw)
            named = {"dataset": name, "levels": "+".join(map(str, levels)), "size": size, "draw": draw}
            write_text(path, to_csv([named | row for row in by(patches, ids, normals, draw)]))
        with path.open(encoding="utf-8", newline="") as file:
            yield from csv.DictReader(file)


def opened(name: str, levels: Sequence[int], size: int) -> PatchEmbedding:
    """The images of a data set, as patches of the default configuration."""
    folder = name.split("_")[0] if name.startswith("miniimagenet") else name.removesuffix("_defects")
    known = "miniimagenet" if name.startswith("miniimagenet") else "parquet"
    words = [f"dataset={known}", f"data.root={DATA / folder}", f"model.image_size={size}"]
    config = compose(*words, f"clustering.patches.levels=[{','.join(map(str, levels))}]", name="cluster")
    source = build_source(config)
    task = make_task(source, anomaly=None)
    return PatchEmbedding(build_embedding(config, task), build(config.clustering.patches))


def drawn(name: str, truth: Any, per_class: int, draw: int) -> tuple[list[str], list[str]]:
    """Images to group, as many of each class where it has them, and the normal images that are left, shuffled."""
    rng = np.random.default_rng([draw, 0xC1])
    classes = sorted(set(truth.values()))
    if name.startswith("miniimagenet"):
        classes = sorted(rng.choice(classes, int(name.split("_")[1]), replace=False))
    if name.endswith("_defects"):
        classes.remove("free")
    chosen: list[str] = []
    for label in classes:
        members = sorted(id_ for id_, own in truth.items() if own == label)
        chosen += [members[i] for i in np.sort(rng.choice(len(members), min(per_class, len(members)), replace=False))]
    taken = set(chosen)
    rest = sorted(id_ for id_, own in truth.items() if own == "free" and id_ not in taken)
    return chosen, [rest[i] for i in rng.permutation(len(rest))]


def by_method(patches: PatchEmbedding, ids: list[str], normals: list[str], draw: int) -> Iterator[Row]:
    """All methods on one draw; Ward, with the true number of groups."""
    truth = patches.embedding.source.truth or {}
    raw = patches.bags(everything(patches, ids))
    bags = raw.rows(ids)
    project = patches.projected(bags, seed=draw)
    bags = project(bags)
    classes = [truth[id_] for id_ in bags.ids]
    groups = len(set(classes))

    def row(method: str, tau: float, tree: Any, seconds: float) -> Row:
        scores = agreement(classes, cut_tree(tree, groups))
        return {"method": method, "tau": tau, **scores, "images": len(classes), "seconds": round(seconds, 2)}

    pooled = patches.embedding.features.take(bags.ids).astype(np.float64)
    yield row("pooled", math.inf, ward_tree(pooled), 0.0)
    uniform = torch.full(bags.patches.shape[:2], 1.0 / bags.patches.shape[1])
    yield row("average", math.inf, ward_tree(embed(bags, uniform)), 0.0)
    start = time.monotonic()
    distances = hausdorff_distances(bags.patches).double().numpy()
    yield row("hausdorff", 0.0, ward_of_distances(distances), time.monotonic() - start)
    start = time.monotonic()
    scores = unsupervised_scores(bags.patches, bags.patches, torch.arange(len(bags.ids)))
    yield from over_tau("unsupervised", bags, scores, row, time.monotonic() - start)
    for count in NORMALS if normals else ():
        known = project(raw.rows(normals[: count or None]))
        start = time.monotonic()
        scores = normal_scores(bags.patches, known.patches, torch.full((len(bags.ids),), -1))
        yield from over_tau(f"normals_{count or 'all'}", bags, scores, row, time.monotonic() - start)


def over_tau(method: str, bags: Bags, scores: torch.Tensor, row: Any, seconds: float) -> Iterator[Row]:
    """One row for each tau."""
    for tau in TAUS:
        weights = patch_weights(relative_scores(scores), tau)
        yield row(method, tau, ward_tree(embed(bags, weights)), seconds)


def by_references(patches: PatchEmbedding, ids: list[str], normals: list[str], draw: int) -> Iterator[Row]:
    """What a sample of references costs in NMI, at the default tau."""
    truth = patches.embedding.source.truth or {}
    bags = patches.bags(everything(patches, ids)).rows(ids)
    bags = patches.projected(bags, seed=draw)(bags)
    classes = [truth[id_] for id_ in bags.ids]
    tau = compose(name="cluster").clustering.spec.tau
    rng = np.random.default_rng([draw, 0x4EF])
    order = rng.permutation(len(bags.ids))
    for count in (10, 25, 50, 100, len(bags.ids)):
        some = np.sort(order[:count])
        own = torch.full((len(bags.ids),), -1)
        own[torch.from_numpy(some)] = torch.arange(len(some))
        start = time.monotonic()
        scores = unsupervised_scores(bags.patches, bags.patches[torch.from_numpy(some)], own)
        seconds = time.monotonic() - start
        weights = patch_weights(relative_scores(scores), tau)
        groups = cut_tree(ward_tree(embed(bags, weights)), len(set(classes)))
        shown = "all" if count == len(bags.ids) else str(count)
        yield {"references": shown, **agreement(classes, groups), "seconds": round(seconds, 2)}


def everything(patches: PatchEmbedding, ids: list[str]) -> list[str]:
    """All images of a small set, so that its draws share what is computed; of a large one, those of the draw."""
    source = patches.embedding.source
    return sorted(source.ids) if len(source.ids) <= EXACT_IMAGES else ids


def ward_of_distances(distances: Any) -> Any:
    """Ward's linkage on distances that are no Euclidean ones, as the paper does for its baseline."""
    from scipy.cluster.hierarchy import linkage
    from scipy.spatial.distance import squareform

    return linkage(squareform(distances, checks=False), "ward")


def cost(sizes: Sequence[int]) -> Iterator[Row]:
    """Seconds by the number of images, for random patches of the default number and depth."""
    for count in sizes:
        generator = torch.Generator().manual_seed(0)
        patches = torch.randn(count, 196, 64, generator=generator).half()
        references = count if count <= EXACT_IMAGES else SAMPLED
        own = torch.arange(count)
        own[references:] = -1
        start = time.monotonic()
        part = slice(0, min(count, 200))  # the cost of an image is that of any other
        scores = unsupervised_scores(patches[part], patches[:references], own[part])
        weights_s = (time.monotonic() - start) * count / len(scores)
        bags = Bags([str(i) for i in range(count)], patches, [])
        embeddings = embed(bags, torch.full((count, 196), 1 / 196))
        start = time.monotonic()
        ward_tree(embeddings)
        ward_s = time.monotonic() - start
        console.print(f"{count:,} images: weights {weights_s:.0f} s, Ward {ward_s:.1f} s", highlight=False)
        yield {"images": count, "references": references, "weights_s": round(weights_s, 1), "ward_s": round(ward_s, 2)}


def chosen_tau(rows: Sequence[Row]) -> float:
    """The smallest tau whose NMI on neu_steel is not below the best one's, by paired 95 % intervals over the draws."""
    values: dict[float, list[float]] = {}
    for row in rows:
        if row["dataset"] == "neu_steel" and row["method"] == "unsupervised":
            values.setdefault(float(row["tau"]), []).append(float(row["nmi"]))
    best = max(values, key=lambda tau: mean_interval(values[tau]).mean)
    return min(tau for tau, nmi in values.items() if not paired_difference(values[best], nmi).low > 0.0)


if __name__ == "__main__":
    main()
