"""From images to groups: patches, weights, embeddings, clusters, medoids."""

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float32, Float64, Int64
from torch import Tensor

from anomalymatch.clustering.choose import Choice, choose_count
from anomalymatch.clustering.distances import (
    normal_scores,
    patch_weights,
    relative_scores,
    unsupervised_scores,
    weighted_means,
)
from anomalymatch.clustering.group import (
    EXACT_IMAGES,
    METHODS,
    UNGROUPED,
    Embeddings,
    Grouping,
    cut_tree,
    distinct,
    hdbscan,
    make_cut,
    ward_tree,
)
from anomalymatch.clustering.patches import Bags, PatchEmbedding
from anomalymatch.errors import ConfigError, DataError
from anomalymatch.types import Reject

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ClusterSpec:
    """How images are grouped.

    Attributes:
        tau: of the weights, in units of the mean score; infinity weighs all patches the same.
        references: images that patches are compared with, at most; None takes all up to 2,000 images and 500 beyond.
        method: `ward`, `kmeans`, `spectral` or `hdbscan`.
        criterion: that chooses the number of groups where none is given: `silhouette` or `gap`.
        most_groups: that may be chosen.
        smallest_group: images in a group of HDBSCAN, at least.
    """

    tau: float
    references: int | None
    method: str
    criterion: str
    most_groups: int
    smallest_group: int

    def __post_init__(self) -> None:
        if not self.tau >= 0.0:
            raise ConfigError(f"clustering.tau is {self.tau}: it must be at least 0; inf weighs all patches the same")
        if self.references is not None and self.references < 2:
            raise ConfigError(f"clustering.references is {self.references}: it must be at least 2, or null")
        if self.method not in METHODS:
            raise ConfigError(f"clustering.method is {self.method!r}: choose one of {', '.join(METHODS)}")


SAMPLED = 500
"""References beyond `EXACT_IMAGES`."""


@dataclass(frozen=True)
class Clusters:
    """Grouped images.

    Attributes:
        ids: the images.
        embeddings: weighted means of their patches.
        weights: of their patches.
        grid: patches on a side.
        grouping: which image is in which group.
        distances: to the medoid of the group, 0 for itself; NaN where there is no group.
        medoids: row of each group's medoid, the image that is nearest to all others of it.
        choice: how the number of groups was chosen; None where it was given.
        rejects: images that could not be read.
    """

    ids: list[str]
    embeddings: Embeddings
    weights: Float32[np.ndarray, "n p"]
    grid: int
    grouping: Grouping
    distances: Float64[np.ndarray, " n"]
    medoids: Int64[np.ndarray, " k"]
    choice: Choice | None
    rejects: list[Reject]

    def members(self, group: int) -> Int64[np.ndarray, " m"]:
        """Rows of a group, the medoid first, then by distance from it."""
        rows = np.flatnonzero(self.grouping.labels == group)
        first = self.medoids[group] if group != UNGROUPED else -1
        return rows[np.lexsort((self.distances[rows], rows != first))]


def cluster(
    patches: PatchEmbedding,
    ids: Sequence[str],
    spec: ClusterSpec,
    *,
    clusters: int | None = None,
    normals: Collection[str] = (),
    seed: int = 0,
) -> Clusters:
    """Group images by what is odd about them.

    Args:
        patches: how images become patches.
        ids: the images to group.
        spec: weights and method.
        clusters: number of groups; None chooses it.
        normals: images known to be normal: with at least one, oddness is the distance from them, else that from the
            other images. They may be among `ids`.
        seed: draws samples and starts.

    Raises:
        DataError: if fewer than two images can be read.
        ConfigError: if there are not so many different images as groups, or a value is out of range.
    """
    bags = patches.bags(list(ids))
    if len(bags.ids) < 2:
        raise DataError(f"grouping needs at least two readable images, got {len(bags.ids)}")
    known = patches.bags(sorted(normals)) if normals else None
    if known is not None and not known.ids:
        raise DataError("none of the images that are labelled normal can be read")
    project = patches.projected(bags, seed=seed)
    bags, known = project(bags), None if known is None else project(known)
    weights = weigh(bags, known, spec, seed=seed)
    embeddings = embed(bags, weights)
    grouping, choice = group(embeddings, spec, clusters=clusters, seed=seed)
    distances, medoids = _medoids(embeddings, grouping)
    return Clusters(
        bags.ids, embeddings, weights.numpy(), bags.grid, grouping, distances, medoids, choice, bags.rejects
    )


def weigh(bags: Bags, normals: Bags | None, spec: ClusterSpec, *, seed: int) -> Tensor:
    """Weights (n, p) of the patches of each image, from the other images or from normal ones."""
    if spec.tau == float("inf"):
        return torch.full(bags.patches.shape[:2], 1.0 / bags.patches.shape[1])
    references = normals or bags.rows(_references(bags.ids, spec.references, seed))
    position = {id_: row for row, id_ in enumerate(references.ids)}
    own = torch.tensor([position.get(id_, -1) for id_ in bags.ids], dtype=torch.int64)
    if normals is not None:
        if len(normals.ids) == 1:
            own = torch.full_like(own, -1)  # a single normal image among those to group is normal by its own word
        scores = normal_scores(bags.patches, references.patches, own)
    else:
        scores = unsupervised_scores(bags.patches, references.patches, own)
    return patch_weights(relative_scores(scores), spec.tau)


def embed(bags: Bags, weights: Tensor) -> Embeddings:
    """Weighted mean (n, d) of the patches of each image."""
    parts = zip(bags.patches.split(1024), weights.split(1024), strict=True)
    return torch.cat([weighted_means(some.float(), theirs) for some, theirs in parts]).double().numpy()


def group(
    embeddings: Embeddings, spec: ClusterSpec, *, clusters: int | None, seed: int
) -> tuple[Grouping, Choice | None]:
    """Group embeddings, into a number of groups that is given or chosen.

    Raises:
        ConfigError: if there are not so many different images as groups, or the method takes no number.
    """
    if spec.method == "hdbscan":
        if clusters is not None:
            raise ConfigError("method hdbscan finds the number of groups itself: leave out clusters, or take ward")
        return Grouping(hdbscan(embeddings, spec.smallest_group)), None
    different = distinct(embeddings)
    if clusters is not None and not 1 <= clusters <= different:
        raise ConfigError(
            f"clusters is {clusters}: of {len(embeddings)} images {different} differ, "
            f"so it must lie between 1 and {different}"
        )
    choice = None
    if clusters is None:
        if different < 3:
            logger.warning("%d of %d images differ: that is the number of groups", different, len(embeddings))
            clusters = different
        else:
            choice = choose_count(embeddings, spec.method, criterion=spec.criterion, most=spec.most_groups, seed=seed)
            clusters = choice.count
    if spec.method == "ward":
        tree = ward_tree(embeddings)
        return Grouping(cut_tree(tree, clusters), tree), choice
    return Grouping(make_cut(embeddings, spec.method, seed=seed)(clusters)), choice


def _references(ids: Sequence[str], count: int | None, seed: int) -> list[str]:
    count = count or (SAMPLED if len(ids) > EXACT_IMAGES else len(ids))
    if count >= len(ids):
        return list(ids)
    rng = np.random.default_rng([seed, 0x4EF])
    return [ids[i] for i in np.sort(rng.choice(len(ids), count, replace=False))]


def _medoids(embeddings: Embeddings, grouping: Grouping) -> tuple[Float64[np.ndarray, " n"], Int64[np.ndarray, " k"]]:
    """Distance of each image to its group's medoid, and the medoids; of equally good ones the first.

    The image nearest to the mean of its group has the smallest mean squared distance to the rest, so that no pair
    need be compared.
    """
    distances = np.full(len(embeddings), np.nan)
    medoids = []
    for k in range(int(grouping.labels.max(initial=-1)) + 1):
        rows = np.flatnonzero(grouping.labels == k)
        middle = rows[np.linalg.norm(embeddings[rows] - embeddings[rows].mean(0), axis=1).argmin()]
        distances[rows] = np.linalg.norm(embeddings[rows] - embeddings[middle], axis=1)
        medoids.append(int(middle))
    return distances, np.array(medoids, dtype=np.int64)


@dataclass(frozen=True)
class Divider:
    """Divides images by what is odd about them.

    Attributes:
        patches: how images become patches.
        spec: weights and method.
        seed: draws samples and starts.
    """

    patches: PatchEmbedding
    spec: ClusterSpec
    seed: int

    def __call__(self, ids: Sequence[str], normals: Collection[str] = (), count: int | None = None) -> list[list[str]]:
        """Groups of `ids`, the largest first; in each the medoid first, then by distance from it.

        Images that cannot be read, or that HDBSCAN puts into no group, are in none.

        Args:
            ids: the images.
            normals: images known to be normal, see `cluster`.
            count: number of groups; None chooses it.

        Raises:
            DataError: if fewer than two images can be read.
            ConfigError: if fewer than `count` differ.
        """
        found = cluster(self.patches, ids, self.spec, clusters=count, normals=normals, seed=self.seed)
        return [[found.ids[row] for row in found.members(k)] for k in range(len(found.medoids))]
