"""Anomaly Clustering of images: patches, patch weights, embeddings, groups and their medoids."""

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float32, Float64, Int64
from torch import Tensor

from anomalymatch.backbones.embedding import Embedding
from anomalymatch.checks import check_choice, check_range
from anomalymatch.clustering.distances import (
    normal_scores,
    patch_weights,
    relative_scores,
    unsupervised_scores,
    weighted_means,
)
from anomalymatch.clustering.groups import (
    CRITERIA,
    METHODS,
    UNGROUPED,
    Embeddings,
    Grouping,
    choose_count,
    count_distinct,
    cut_tree,
    hdbscan,
    make_cut,
    ward_tree,
)
from anomalymatch.clustering.patches import Bags, PatchEmbedding, PatchSpec
from anomalymatch.errors import ConfigError, DataError
from anomalymatch.types import Reject

logger = logging.getLogger(__name__)
SAMPLED_REFERENCES = 500
"""Default number of reference images if there are more images than this."""


@dataclass(frozen=True)
class ClusterSpec:
    """Settings of the grouping; conf/clustering/default.yaml explains each and has the defaults."""

    tau: float | int
    neighbourhoods: Sequence[int]
    lowest: float | int
    references: int | None
    method: str
    criterion: str
    most_groups: int
    smallest_group: int

    def __post_init__(self) -> None:
        check_range("clustering.spec.tau", self.tau, low=0)
        if not self.neighbourhoods or any(side < 1 or side % 2 == 0 for side in self.neighbourhoods):
            raise ConfigError(
                f"clustering.spec.neighbourhoods is {list(self.neighbourhoods)}: give at least one odd number"
            )
        check_range("clustering.spec.lowest", self.lowest, above=0, high=1)
        check_range("clustering.spec.references", self.references, low=2, null=True)
        check_choice("clustering.spec.method", self.method, METHODS)
        check_choice("clustering.spec.criterion", self.criterion, CRITERIA)
        check_range("clustering.spec.most_groups", self.most_groups, low=2)
        check_range("clustering.spec.smallest_group", self.smallest_group, low=2)


@dataclass(frozen=True)
class Clusters:
    """Images in groups.

    Attributes:
        ids: the images.
        embeddings: weighted mean of the patches of each image.
        weights: weights of the patches.
        grouping: group of each image.
        distances: distance of each image to the medoid of its group; NaN for images in no group.
        medoids: row of each group's medoid, its most central image.
        rejects: images that could not be read.
    """

    ids: list[str]
    embeddings: Embeddings
    weights: Float32[np.ndarray, "n p"]
    grouping: Grouping
    distances: Float64[np.ndarray, " n"]
    medoids: Int64[np.ndarray, " k"]
    rejects: list[Reject]

    def members(self, group: int) -> Int64[np.ndarray, " m"]:
        """Return the rows of a group: the medoid first, then by distance from it."""
        rows = np.flatnonzero(self.grouping.labels == group)
        first = self.medoids[group] if group != UNGROUPED else -1
        return rows[np.lexsort((self.distances[rows], rows != first))]


def cluster_images(
    patches: PatchEmbedding,
    ids: Sequence[str],
    spec: ClusterSpec,
    *,
    clusters: int | None = None,
    normals: Collection[str] = (),
    seed: int = 0,
) -> Clusters:
    """Group images by the kind of anomaly they show.

    Args:
        patches: extractor of the patches.
        ids: the images to group.
        spec: settings of the weights and the groups.
        clusters: number of groups; None chooses it.
        normals: images known to be normal, which may be among `ids`. With at least one, patches are scored by their
            distance to the normal images, otherwise by their distance to the other images.
        seed: seed of samples and initial values.

    Raises:
        DataError: if fewer than two images can be read.
        ConfigError: if there are fewer distinct images than groups, or a value is out of range.
    """
    bags = patches.bags(list(ids))
    if len(bags.ids) < 2:
        raise DataError(f"grouping needs at least two readable images, got {len(bags.ids)}")
    known = patches.bags(sorted(normals)) if normals else None
    if known is not None and not known.ids:
        raise DataError("none of the images that are labelled normal can be read")
    project = patches.fit_projection(bags, seed=seed)
    bags, known = project(bags), None if known is None else project(known)
    weights = weigh(bags, known, spec, seed=seed)
    embeddings = embed(bags, weights)
    grouping = group(embeddings, spec, clusters=clusters, seed=seed)
    distances, medoids = _medoids(embeddings, grouping)
    return Clusters(bags.ids, embeddings, weights.numpy(), grouping, distances, medoids, bags.rejects)


def weigh(bags: Bags, normals: Bags | None, spec: ClusterSpec, *, seed: int) -> Float32[Tensor, "n p"]:
    """Compute the weights of the patches of each image, relative to the other images or to normal ones."""
    if spec.tau == float("inf"):
        return torch.full(bags.patches.shape[:2], 1.0 / bags.patches.shape[1])
    return patch_weights(score_patches(bags, normals, spec, seed=seed), float(spec.tau))


def score_patches(bags: Bags, normals: Bags | None, spec: ClusterSpec, *, seed: int) -> Float32[Tensor, "n p"]:
    """Score the patches over each neighbourhood, relative to the mean; average over the neighbourhoods."""
    total = torch.zeros(bags.patches.shape[:2])
    for side in spec.neighbourhoods:
        near = None if normals is None else normals.average(side)
        total += relative_scores(_scores(bags.average(side), near, spec, seed=seed))
    return relative_scores(total)


def _scores(bags: Bags, normals: Bags | None, spec: ClusterSpec, *, seed: int) -> Float32[Tensor, "n p"]:
    if normals is None:
        references = _reference_rows(len(bags.ids), spec.references, seed)
        return unsupervised_scores(bags.patches, references, float(spec.lowest))
    position = {id_: row for row, id_ in enumerate(normals.ids)}
    if len(normals.ids) == 1:
        position = {}  # the only normal image has no other to be compared with
    own = torch.tensor([position.get(id_, -1) for id_ in bags.ids], dtype=torch.int64)
    return normal_scores(bags.patches, normals.patches, own)


def embed(bags: Bags, weights: Tensor) -> Embeddings:
    """Compute the weighted mean of the patches of each image."""
    blocks = zip(bags.patches.split(1024), weights.split(1024), strict=True)
    return torch.cat([weighted_means(patches.float(), alpha) for patches, alpha in blocks]).double().numpy()


def group(embeddings: Embeddings, spec: ClusterSpec, *, clusters: int | None, seed: int) -> Grouping:
    """Group embeddings into a given or chosen number of groups.

    Raises:
        ConfigError: if there are fewer distinct images than groups, or the method accepts no number.
    """
    if spec.method == "hdbscan":
        if clusters is not None:
            raise ConfigError("method hdbscan finds the number of groups itself: leave out clusters, or use ward")
        return Grouping(hdbscan(embeddings, spec.smallest_group))
    distinct = count_distinct(embeddings)
    if clusters is not None and not 1 <= clusters <= distinct:
        raise ConfigError(
            f"clusters is {clusters}: of {len(embeddings)} images {distinct} differ, "
            f"so it must be between 1 and {distinct}"
        )
    choice = None
    if clusters is None and distinct < 3:
        logger.warning("%d of %d images differ: this is the number of groups", distinct, len(embeddings))
        clusters = distinct
    elif clusters is None:
        choice = choose_count(embeddings, spec.method, criterion=spec.criterion, most=spec.most_groups, seed=seed)
        clusters = choice.count
    if spec.method == "ward":
        tree = ward_tree(embeddings)
        return Grouping(cut_tree(tree, clusters), tree, choice)
    return Grouping(make_cut(embeddings, spec.method, seed=seed)(clusters), choice=choice)


def _reference_rows(images: int, count: int | None, seed: int) -> Int64[Tensor, " r"]:
    count = min(count or SAMPLED_REFERENCES, images)
    if count == images:
        return torch.arange(images)
    rng = np.random.default_rng([seed, 0x4EF])
    return torch.from_numpy(np.sort(rng.choice(images, count, replace=False)))


def _medoids(embeddings: Embeddings, grouping: Grouping) -> tuple[Float64[np.ndarray, " n"], Int64[np.ndarray, " k"]]:
    """Find the medoid of each group (the first of equally good ones) and the distance of each image to it.

    The image nearest to the mean of its group has the smallest mean squared distance to the others, so no pairs are
    compared.
    """
    distances = np.full(len(embeddings), np.nan)
    medoids = []
    for k in range(int(grouping.labels.max(initial=-1)) + 1):
        rows = np.flatnonzero(grouping.labels == k)
        medoid = rows[np.linalg.norm(embeddings[rows] - embeddings[rows].mean(0), axis=1).argmin()]
        distances[rows] = np.linalg.norm(embeddings[rows] - embeddings[medoid], axis=1)
        medoids.append(int(medoid))
    return distances, np.array(medoids, dtype=np.int64)


@dataclass(frozen=True)
class ImageGrouper:
    """Function that divides images into groups, for the labelling page and the query strategy `per_cluster`."""

    patches: PatchEmbedding
    spec: ClusterSpec
    seed: int

    def __call__(self, ids: Sequence[str], normals: Collection[str] = (), count: int | None = None) -> list[list[str]]:
        """Return the groups of `ids`, the largest first; in each the medoid first, then by distance from it.

        Images that cannot be read, or that HDBSCAN assigns to no group, are left out.

        Args:
            ids: the images.
            normals: images known to be normal, see `cluster`.
            count: number of groups; None chooses it.

        Raises:
            DataError: if fewer than two images can be read.
            ConfigError: if fewer than `count` differ.
        """
        found = cluster_images(self.patches, ids, self.spec, clusters=count, normals=normals, seed=self.seed)
        return [[found.ids[row] for row in found.members(k)] for k in range(len(found.medoids))]


def make_grouper(
    embedding: Embedding, patches: PatchSpec, spec: ClusterSpec, *, references: int, seed: int
) -> ImageGrouper:
    """Make a grouper for use while a user waits: it compares with `references` images, if `spec` gives no number.

    experiments/README.md, 8, has the cost.
    """
    return ImageGrouper(
        PatchEmbedding(embedding, patches), replace(spec, references=spec.references or references), seed
    )
