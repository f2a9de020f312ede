"""Grouping of embeddings by Ward, k-means, spectral clustering or HDBSCAN, choice of the number, and its measures."""

import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int64
from scipy.cluster.hierarchy import linkage
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import pdist, squareform

from anomalymatch.checks import check_range

METHODS = ("ward", "kmeans", "spectral", "hdbscan")
CRITERIA = ("silhouette", "gap")
EXACT_IMAGES = 2000
"""Number of images up to which all pairs are compared; with more, each is compared with its neighbours only."""
NEIGHBOURS = 15
"""Neighbours of each image in the graph that replaces all pairs."""
UNGROUPED = -1
"""Label of the images that HDBSCAN assigns to no group."""
REPEATS = 10
"""Number of subsamples that vote on the number of groups, and of uniform samples for the gap statistic."""
SUBSAMPLE = 0.8
LOW_SILHOUETTE = 0.25
"""Silhouette below which Kaufman and Rousseeuw (1990) see no substantial structure."""

Embeddings = Float64[np.ndarray, "n d"]
GroupNumbers = Int64[np.ndarray, " n"]
Tree = Float64[np.ndarray, "m 4"]
Cut = Callable[[int], GroupNumbers]
"""Function from the number of groups to the labels."""


@dataclass(frozen=True)
class Choice:
    """Chosen number of groups.

    Attributes:
        count: number of groups.
        curve: value of the criterion for each number that was tried.
        agreement: share of the subsamples that lead to the same number.
        sentence: certainty of the choice, in words.
    """

    count: int
    curve: dict[int, float]
    agreement: float
    sentence: str


@dataclass(frozen=True)
class Grouping:
    """Group of each image.

    Attributes:
        labels: 0 for the largest group and so on; `UNGROUPED` for images in no group.
        tree: SciPy's linkage matrix (Ward only): row i merges two nodes into node n + i at a height.
        choice: choice of the number of groups; None if the number was given.
    """

    labels: GroupNumbers
    tree: Tree | None = None
    choice: Choice | None = None


def make_cut(embeddings: Embeddings, method: str, *, seed: int, exact_images: int = EXACT_IMAGES) -> Cut:
    """Return a function that groups the embeddings into a given number of groups; Ward's tree is built only once.

    Args:
        embeddings: one row for each image.
        method: `ward`, `kmeans` or `spectral`.
        seed: seed of k-means and spectral clustering.
        exact_images: with more images, Ward and spectral clustering use a graph of nearest neighbours.
    """
    if method == "ward":
        tree = ward_tree(embeddings, exact_images=exact_images)
        return lambda count: cut_tree(tree, count)
    if method == "kmeans":
        return lambda count: number_by_size(_kmeans(embeddings, count, seed))
    return lambda count: number_by_size(_spectral(embeddings, count, seed, exact_images))


def ward_tree(embeddings: Embeddings, *, exact_images: int = EXACT_IMAGES) -> Tree:
    """Compute Ward's linkage, from all pairs or, with more than `exact_images`, from a nearest-neighbour graph."""
    if len(embeddings) <= exact_images:
        return linkage(embeddings, "ward")
    from sklearn.cluster import AgglomerativeClustering  # late, as below: the page starts without scikit-learn
    from sklearn.neighbors import kneighbors_graph

    graph = kneighbors_graph(embeddings, NEIGHBOURS, include_self=False)
    model = AgglomerativeClustering(None, connectivity=graph, linkage="ward", distance_threshold=0.0)
    with warnings.catch_warnings():  # scikit-learn joins the components of the graph, which is wanted here
        warnings.filterwarnings("ignore", message="the number of connected components")
        model.fit(embeddings)
    sizes = np.ones(2 * len(embeddings) - 1)
    for row, (left, right) in enumerate(model.children_):
        sizes[len(embeddings) + row] = sizes[left] + sizes[right]
    return np.column_stack([model.children_, model.distances_, sizes[len(embeddings) :]]).astype(np.float64)


def cut_tree(tree: Tree, count: int) -> GroupNumbers:
    """Cut a tree into `count` groups by undoing its last `count` - 1 merges.

    SciPy's `fcluster` returns fewer groups if merges have equal heights.
    """
    images = len(tree) + 1
    owner = np.arange(2 * images - 1)
    for row in range(images - count - 1, -1, -1):  # from the last merge that is kept to the first
        owner[tree[row, :2].astype(np.int64)] = owner[images + row]
    return number_by_size(owner[:images])


def _kmeans(embeddings: Embeddings, count: int, seed: int) -> GroupNumbers:
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():  # a subsample may have fewer distinct images than groups
        warnings.simplefilter("ignore", ConvergenceWarning)
        return KMeans(count, n_init=10, random_state=seed).fit_predict(embeddings).astype(np.int64)


def _spectral(embeddings: Embeddings, count: int, seed: int, exact_images: int) -> GroupNumbers:
    """Cluster by the affinity exp(-2 (distance / median distance)^2), or by a nearest-neighbour graph."""
    from sklearn.cluster import SpectralClustering
    from sklearn.neighbors import kneighbors_graph

    if len(embeddings) <= exact_images:
        distances = squareform(pdist(embeddings))
        affinity = np.exp(-2.0 * (distances / np.median(distances[distances > 0.0])) ** 2)
    else:
        graph = kneighbors_graph(embeddings, NEIGHBOURS, include_self=True)
        affinity = 0.5 * (graph + graph.T)
    model = SpectralClustering(count, affinity="precomputed", random_state=seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Graph is not fully connected")
        return model.fit_predict(affinity).astype(np.int64)


def hdbscan(embeddings: Embeddings, smallest: int) -> GroupNumbers:
    """Find dense groups of at least `smallest` images; all other images are `UNGROUPED`.

    Raises:
        ConfigError: if there are fewer than `smallest` images.
    """
    from sklearn.cluster import HDBSCAN

    check_range("clustering.spec.smallest_group", smallest, low=2, high=len(embeddings))
    return number_by_size(HDBSCAN(min_cluster_size=smallest, copy=True).fit_predict(embeddings).astype(np.int64))


def number_by_size(labels: Int64[np.ndarray, " n"]) -> GroupNumbers:
    """Renumber groups by size, the largest 0; groups of equal size in the order of their first image."""
    names, first, sizes = np.unique(labels, return_index=True, return_counts=True)
    order = [k for k in np.lexsort((first, -sizes)) if names[k] != UNGROUPED]
    new = {int(names[k]): rank for rank, k in enumerate(order)}
    return np.array([new.get(int(label), UNGROUPED) for label in labels], dtype=np.int64)


def count_distinct(embeddings: Embeddings) -> int:
    """Count the distinct embeddings, to six digits of the largest spread."""
    spread = np.ptp(embeddings, axis=0).max(initial=0.0)
    if spread <= 1e-6 * np.abs(embeddings).max(initial=1e-300):
        return 1
    return len(np.unique(np.round(embeddings / (1e-6 * spread)), axis=0))


def choose_count(embeddings: Embeddings, method: str, *, criterion: str, most: int, seed: int) -> Choice:
    """Choose the number of groups between 2 and `most`.

    Args:
        embeddings: one row for each image, at least three distinct ones; of more than `EXACT_IMAGES` a sample is used.
        method: `ward`, `kmeans` or `spectral`.
        criterion: `silhouette` takes the number with the highest mean silhouette; `gap` the smallest number whose gap
            to uniform data is within one standard error of the next one's (Tibshirani et al., 2001).
        most: largest number of groups.
        seed: seed of the samples.
    """
    rng = np.random.default_rng([seed, 0xC07])
    rows = _sample(embeddings, min(len(embeddings), EXACT_IMAGES), rng)
    score = _silhouettes if criterion == "silhouette" else _gaps
    curve, count = score(rows, method, most, seed)
    votes = Counter(
        score(_sample(rows, max(3, round(SUBSAMPLE * len(rows))), rng), method, most, seed)[1] for _ in range(REPEATS)
    )
    return Choice(count, curve, votes[count] / REPEATS, _sentence(count, curve, votes, criterion))


def _silhouettes(rows: Embeddings, method: str, most: int, seed: int) -> tuple[dict[int, float], int]:
    from sklearn.metrics import silhouette_score

    cut = make_cut(rows, method, seed=seed)
    curve = {}
    for count in range(2, min(most, len(rows) - 1) + 1):
        labels = cut(count)
        if 2 <= len(np.unique(labels)) < len(rows):
            curve[count] = float(silhouette_score(rows, labels))
    if not curve:  # too few distinct images for any number of groups
        return {2: 0.0}, 2
    return curve, max(curve, key=lambda count: (curve[count], -count))


def _gaps(rows: Embeddings, method: str, most: int, seed: int) -> tuple[dict[int, float], int]:
    rng = np.random.default_rng([seed, 0x6A9])
    counts = range(1, min(most, len(rows) - 1) + 1)
    own = _dispersions(rows, make_cut(rows, method, seed=seed), counts)
    centred = rows - rows.mean(0)
    axes = np.linalg.svd(centred, full_matrices=False)[2]
    rotated = centred @ axes.T
    low, high = rotated.min(0), rotated.max(0)
    uniform = []
    for _ in range(REPEATS):
        drawn = rng.uniform(low, high, rotated.shape)
        uniform.append(_dispersions(drawn, make_cut(drawn, method, seed=seed), counts))
    gap = np.mean(uniform, axis=0) - own
    error = np.std(uniform, axis=0) * np.sqrt(1 + 1 / REPEATS)
    enough = [k for k in range(len(gap) - 1) if gap[k] >= gap[k + 1] - error[k + 1]]
    chosen = counts[enough[0] if enough else len(gap) - 1]
    return {count: float(value) for count, value in zip(counts, gap, strict=True)}, chosen


def _dispersions(rows: Embeddings, cut: Cut, counts: range) -> Float64[np.ndarray, " k"]:
    """Compute the logarithm of the summed squared distances to the group means."""
    return np.log([max(_within(rows, cut(count)), 1e-300) for count in counts])


def _within(rows: Embeddings, labels: GroupNumbers) -> float:
    return sum(float(((rows[labels == k] - rows[labels == k].mean(0)) ** 2).sum()) for k in np.unique(labels))


def _sample(rows: Embeddings, count: int, rng: np.random.Generator) -> Float64[np.ndarray, "m d"]:
    return rows[np.sort(rng.choice(len(rows), count, replace=False))]


def _sentence(count: int, curve: dict[int, float], votes: Counter[int], criterion: str) -> str:
    others = [f"{k} in {n}" for k, n in votes.most_common() if k != count]
    rest = f" (the others: {', '.join(others)})" if others else ""
    sure = "sure" if votes[count] >= 0.8 * REPEATS else "fairly sure" if votes[count] >= 0.5 * REPEATS else "not sure"
    agreed = f"{votes[count]} of {REPEATS} subsamples agree{rest}"
    text = f"{count} groups by {criterion} ({curve[count]:.3f}): {sure}, {agreed}"
    if criterion == "silhouette" and curve[count] < LOW_SILHOUETTE:
        text += "; at such a low silhouette the groups overlap"
    return text


def clustering_metrics(truth: Sequence[str], groups: Int64[np.ndarray, " n"]) -> dict[str, float]:
    """Compute the three measures of arXiv 2112.11573, and the purity; each is 1 for a perfect grouping.

    `nmi` is normalised by the arithmetic mean of the entropies; `ari` is corrected for chance. For `f1`, classes are
    matched one to one with groups so that the most images agree (Hungarian method); it is the mean over the classes,
    with 0 for a class without a group. `purity` is the share of images that belong to the largest class of their group.

    Raises:
        ValueError: if the lengths differ or there is no image.
    """
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
    from sklearn.metrics.cluster import contingency_matrix

    if len(truth) != len(groups) or not len(groups):
        raise ValueError(f"expected one group for each of at least one image, got {len(truth)} and {len(groups)}")
    classes = np.unique(np.asarray(truth, dtype=str), return_inverse=True)[1]
    table = contingency_matrix(classes, groups)
    rows, columns = linear_sum_assignment(table, maximize=True)
    f1 = np.zeros(len(table))
    f1[rows] = 2.0 * table[rows, columns] / (table.sum(1)[rows] + table.sum(0)[columns])
    return {
        "nmi": float(normalized_mutual_info_score(classes, groups)),
        "ari": float(adjusted_rand_score(classes, groups)),
        "f1": float(f1.mean()),
        "purity": float(table.max(0).sum() / table.sum()),
    }
