"""Measure how well Anomaly Clustering recovers true classes, by method, tau, levels and image size; and its cost.

Each draw takes 50 random images of each class (README, 8). The default of tau was chosen with `--choose-tau`.
"""

import argparse
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from bench import DATA, Row, make_parser, parse_options, run_once, table, write_csv
from jaxtyping import Float16
from scipy.cluster.hierarchy import linkage
from scipy.spatial.distance import squareform
from sklearn.metrics import normalized_mutual_info_score
from sklearn.model_selection import cross_val_predict
from sklearn.svm import SVC
from torch import Tensor

from anomalymatch import compose, make_task
from anomalymatch.build import build_embedding
from anomalymatch.build_images import build, build_source
from anomalymatch.clustering.analysis import ClusterSpec, embed, score_patches, weigh
from anomalymatch.clustering.distances import patch_weights
from anomalymatch.clustering.groups import EXACT_IMAGES, clustering_metrics, cut_tree, ward_tree
from anomalymatch.clustering.patches import Bags, PatchEmbedding
from anomalymatch.evaluation.confidence import mean_interval, paired_difference
from anomalymatch.terminal import console

SETS = ("neu_steel", "magnetic_tile", "magnetic_tile_defects", "miniimagenet_5", "miniimagenet_10")
TAUS = (0.0, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.5)
NORMALS = (5, 20, 0)
"""Numbers of labelled normal images; 0 stands for all that are not to be grouped."""
AVERAGES = (1, 3)
NEIGHBOURHOODS = ((1,), (1, 3), (1, 3, 5))
LOWEST = (0.3, 1.0)
DEFAULT = ((3, 4), 224)
VARIANTS = [((2, 3), 224), ((3,), 224), ((4,), 224), ((2, 3, 4), 224), ((3, 4), 320)]
"""Levels and image sizes that `--variants` adds."""
MEASURES = ("nmi", "ari", "f1")
COSTS = ("all", "default", "ward", "ward_groups")


def main() -> None:
    """Measure what is missing and print the table."""
    parser = make_parser(__doc__, quick="one draw of neu_steel, 8 images of each class, at 64 px")
    parser.add_argument("--datasets", nargs="+", default=list(SETS), choices=SETS)
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--per-class", type=int, default=50)
    parser.add_argument("--variants", action="store_true", help="also measure other levels and image sizes")
    parser.add_argument("--choose-tau", action="store_true", help="measure neu_steel only, and choose tau by it")
    parser.add_argument("--references", action="store_true", help="measure only NMI by number of references")
    parser.add_argument("--scores", action="store_true", help="measure only NMI by neighbourhoods and lowest share")
    parser.add_argument("--classifier", action="store_true", help="measure only a classifier that is given the classes")
    parser.add_argument("--cost", action="store_true", help="measure only seconds by number of images")
    parser.add_argument("--sizes", type=int, nargs="+", default=[100, 500, 1000, 2000], help="of --cost")
    parser.add_argument("--parts", nargs="+", default=list(COSTS), choices=COSTS, help="of --cost")
    options = parse_options(parser)
    if options.quick:
        options.datasets, options.draws, options.per_class, options.sizes = ["neu_steel"], 1, 8, [50, 100]
    if options.choose_tau:
        options.datasets = ["neu_steel"]
    if options.cost:
        rows = list(measure_cost(options.sizes, options.parts))
        write_csv(options.results / "clustering_cost.csv", rows)
        print(table(rows, ("images", "threads"), [f"{part}_{unit}" for part in options.parts for unit in ("s", "cpu")]))
        return
    if options.references:
        rows = [row for name in options.datasets for row in measure_draws(name, *DEFAULT, options, by_references)]
        write_csv(options.results / "clustering_references.csv", rows)
        print(table(rows, ("dataset", "references"), ("nmi", "seconds")))
        return
    if options.scores:
        rows = [row for name in options.datasets for row in measure_draws(name, *DEFAULT, options, by_scores)]
        write_csv(options.results / "clustering_scores.csv", rows)
        print(table(rows, ("dataset", "method", "average", "neighbourhoods", "lowest"), ("nmi",)))
        return
    if options.classifier:
        rows = [row for name in options.datasets for row in measure_draws(name, *DEFAULT, options, by_classifier)]
        write_csv(options.results / "clustering_classifier.csv", rows)
        print(table(rows, ("dataset", "method"), ("groups", "classifier")))
        return
    settings = [DEFAULT, *(VARIANTS if options.variants else [])]
    rows = [
        row
        for name in options.datasets
        for levels, size in settings
        for row in measure_draws(name, levels, size, options, by_method)
    ]
    write_csv(options.results / "clustering.csv", rows)
    print(table(rows, ("dataset", "levels", "size", "method", "tau"), MEASURES))
    if options.choose_tau:
        print(f"tau = {choose_tau(rows)}")


def measure_draws(name: str, levels: Sequence[int], size: int, options: argparse.Namespace, by: Any) -> Iterator[Row]:
    """Yield the rows of all draws of a data set; `by` measures one draw, such as `by_method`."""
    size = 64 if options.quick else size

    def measure(draw: int) -> Iterator[Row]:
        patches = open_patches(name, tuple(levels), size)
        ids, normals = draw_images(name, patches.embedding.source.truth or {}, options.per_class, draw)
        named = {"dataset": name, "levels": "+".join(map(str, levels)), "size": size, "draw": draw}
        return (named | row for row in by(patches, ids, normals, draw))

    for draw in range(options.draws):
        words = [name, *map(str, levels), str(size), str(options.per_class), str(draw), by.__name__]
        yield from run_once(options.runs / "clustering" / f"{'-'.join(words)}.csv", measure, draw)


@lru_cache(maxsize=1)
def open_patches(name: str, levels: tuple[int, ...], size: int) -> PatchEmbedding:
    """Open the patches of a data set with the default configuration."""
    folder = name.split("_")[0] if name.startswith("miniimagenet") else name.removesuffix("_defects")
    dataset = "miniimagenet" if folder == "miniimagenet" else "parquet"
    overrides = [f"dataset={dataset}", f"data.root={DATA / folder}", f"model.image_size={size}"]
    config = compose(*overrides, f"clustering.patches.levels=[{','.join(map(str, levels))}]", name="cluster")
    source = build_source(config)
    task = make_task(source, anomaly=None)
    return PatchEmbedding(build_embedding(config, task), build(config.clustering.patches))


def draw_images(name: str, truth: Any, per_class: int, draw: int) -> tuple[list[str], list[str]]:
    """Draw the same number of images of each class to group; return them and the other normal images, shuffled."""
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
    """Yield the agreement of each method on one draw, by Ward's linkage with the true number of groups."""
    bags, classes, projected = prepare(patches, ids, draw)
    groups = len(set(classes))

    def row(method: str, tau: float, tree: Any, seconds: float) -> Row:
        scores = clustering_metrics(classes, cut_tree(tree, groups))
        return {"method": method, "tau": tau, **scores, "images": len(classes), "seconds": round(seconds, 2)}

    pooled = patches.embedding.features.take(bags.ids).astype(np.float64)
    yield row("pooled", math.inf, ward_tree(pooled), 0.0)
    uniform = torch.full(bags.patches.shape[:2], 1.0 / bags.patches.shape[1])
    yield row("average", math.inf, ward_tree(embed(bags, uniform)), 0.0)
    start = time.monotonic()
    distances = hausdorff_distances(bags.patches).double().numpy()
    # Ward assumes Euclidean distances, which these are not; the paper does the same for its baseline.
    tree = linkage(squareform(distances, checks=False), "ward")
    yield row("hausdorff", 0.0, tree, time.monotonic() - start)
    for method, some in ways_to_score(normals):
        known = None if some is None else projected(some)
        start = time.monotonic()
        scores = score_patches(bags, known, default_spec(), seed=draw)
        yield from over_tau(method, bags, scores, row, time.monotonic() - start)


def default_spec(**changes: Any) -> ClusterSpec:
    """Return the default settings of the weights, with some changes."""
    return replace(build(compose(name="cluster").clustering.spec), **changes)


def hausdorff_distances(patches: torch.Tensor) -> torch.Tensor:
    """Compute the maximum Hausdorff distance of each pair of images, a baseline of the paper."""
    rows, distances = patches.float(), torch.zeros(len(patches), len(patches))
    for k in range(len(rows)):
        pairs = torch.cdist(rows[k].expand(len(rows) - k, -1, -1), rows[k:])
        largest = torch.maximum(pairs.amin(2).amax(1), pairs.amin(1).amax(1))
        distances[k, k:] = distances[k:, k] = largest
    return distances.fill_diagonal_(0.0)


def over_tau(method: str, bags: Bags, scores: torch.Tensor, row: Any, seconds: float) -> Iterator[Row]:
    """Yield a row for each tau."""
    for tau in TAUS:
        weights = patch_weights(scores, tau)
        yield row(method, tau, ward_tree(embed(bags, weights)), seconds)


def by_references(patches: PatchEmbedding, ids: list[str], normals: list[str], draw: int) -> Iterator[Row]:
    """Yield the agreement by the number of reference images, at the default tau."""
    bags, classes, _ = prepare(patches, ids, draw)
    for count in (10, 25, 50, 100, len(bags.ids)):
        start = time.monotonic()
        weights = weigh(bags, None, default_spec(references=count), seed=draw)
        seconds = time.monotonic() - start
        groups = cut_tree(ward_tree(embed(bags, weights)), len(set(classes)))
        shown = "all" if count == len(bags.ids) else str(count)
        yield {"references": shown, **clustering_metrics(classes, groups), "seconds": round(seconds, 2)}


def by_scores(patches: PatchEmbedding, ids: list[str], normals: list[str], draw: int) -> Iterator[Row]:
    """Yield the agreement by average, neighbourhoods and share of the lowest distances, at the default tau."""
    tau = default_spec().tau
    for average in AVERAGES:
        own = PatchEmbedding(patches.embedding, replace(patches.spec, average=average))
        bags, classes, projected = prepare(own, ids, draw)
        kinds: list[tuple[str, Bags | None, float]] = [("unsupervised", None, lowest) for lowest in LOWEST]
        if normals:
            kinds.append(("normals_20", projected(normals[:20]), 1.0))
        for method, near, lowest in kinds:
            by_side = {
                side: score_patches(bags, near, default_spec(neighbourhoods=[side], lowest=lowest), seed=draw)
                for side in (1, 3, 5)
            }
            for sides in NEIGHBOURHOODS:
                scores = torch.stack([by_side[side] for side in sides]).mean(0)
                groups = cut_tree(ward_tree(embed(bags, patch_weights(scores, tau))), len(set(classes)))
                named = {"method": method, "average": average, "neighbourhoods": "+".join(map(str, sides))}
                yield {**named, "lowest": lowest, **clustering_metrics(classes, groups)}


def by_classifier(patches: PatchEmbedding, ids: list[str], normals: list[str], draw: int) -> Iterator[Row]:
    """Yield the NMI of the groups and that of a classifier, which is given the classes, on the same embeddings.

    A support vector machine predicts the classes of each fifth of the images from those of the others.
    """
    bags, classes, projected = prepare(patches, ids, draw)
    for method, some in ways_to_score(normals):
        known = None if some is None else projected(some)
        embeddings = embed(bags, weigh(bags, known, default_spec(), seed=draw))
        groups = cut_tree(ward_tree(embeddings), len(set(classes)))
        predicted = cross_val_predict(SVC(C=10.0), embeddings, classes, cv=5)
        yield {
            "method": method,
            "groups": clustering_metrics(classes, groups)["nmi"],
            "classifier": normalized_mutual_info_score(classes, predicted),
        }


def prepare(patches: PatchEmbedding, ids: list[str], draw: int) -> tuple[Bags, list[str], Callable[[list[str]], Bags]]:
    """Return the projected patches of the images, their classes, and a function that projects those of other images."""
    raw = patches.bags(shared_ids(patches, ids))
    bags = raw.select(ids)
    project = patches.fit_projection(bags, seed=draw)
    bags, truth = project(bags), patches.embedding.source.truth or {}
    return bags, [truth[id_] for id_ in bags.ids], lambda others: project(raw.select(others))


def ways_to_score(normals: list[str]) -> Iterator[tuple[str, list[str] | None]]:
    """Yield the name and the labelled normal images of each way to score patches; None for no labels."""
    yield "unsupervised", None
    for count in NORMALS if normals else ():
        yield f"normals_{count or 'all'}", normals[: count or None]


def shared_ids(patches: PatchEmbedding, ids: list[str]) -> list[str]:
    """Return all images of a small data set, so that draws share their cached patches; otherwise those of the draw."""
    source = patches.embedding.source
    return sorted(source.ids) if len(source.ids) <= EXACT_IMAGES else ids


def measure_cost(sizes: Sequence[int], parts: Sequence[str]) -> Iterator[Row]:
    """Yield seconds on the clock and of processor time by the number of images, for random patches as by default.

    The parts: `all` weighs with all images as references and a single neighbourhood, and `default` as the command does.
    `ward` builds the tree of their embeddings, which are noise, and `ward_groups` that of twenty separate groups.
    """
    for count in sizes:
        generator = torch.Generator().manual_seed(0)
        bags = Bags([str(i) for i in range(count)], random_patches(count, generator), [])
        specs = {"all": default_spec(references=count, neighbourhoods=[1]), "default": default_spec()}
        work: dict[str, Callable[[], object]] = {
            name: partial(weigh, bags, None, specs[name], seed=0) for name in specs
        }
        noise = embed(bags, torch.full((count, 196), 1 / 196))
        centres = 4 * noise.std() * torch.randn(20, 64, generator=generator).double().numpy()
        work["ward"] = partial(ward_tree, noise)
        work["ward_groups"] = partial(ward_tree, noise + centres[np.arange(count) % len(centres)])
        row: Row = {"images": count, "threads": torch.get_num_threads()}
        for name in parts:
            start, used = time.monotonic(), time.process_time()
            work[name]()
            row |= {
                f"{name}_s": round(time.monotonic() - start, 2),
                f"{name}_cpu": round(time.process_time() - used, 2),
            }
        console.print(f"{row}", highlight=False)
        yield row


def random_patches(count: int, generator: torch.Generator) -> Float16[Tensor, "n 196 64"]:
    """Draw normal patches, a thousand images at once: single precision takes twice the memory."""
    return torch.cat([
        torch.randn(min(1000, count - start), 196, 64, generator=generator).half() for start in range(0, count, 1000)
    ])  # fmt: skip


def choose_tau(rows: Sequence[Row]) -> float:
    """Return the smallest tau whose NMI on neu_steel is not below the best, by paired 95 % intervals over draws."""
    values: dict[float, list[float]] = {}
    for row in rows:
        if row["dataset"] == "neu_steel" and row["method"] == "unsupervised":
            values.setdefault(float(row["tau"]), []).append(float(row["nmi"]))
    best = max(values, key=lambda tau: mean_interval(values[tau]).mean)
    return min(tau for tau, nmi in values.items() if not paired_difference(values[best], nmi).low > 0.0)


if __name__ == "__main__":
    main()
