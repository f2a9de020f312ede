"""Figures of a grouping: contact sheets with heat maps of the weights, dendrogram, two-dimensional map."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float32, Float64, Int64
from matplotlib import colormaps
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from PIL import Image as PillowImage
from scipy.cluster.hierarchy import dendrogram
from sklearn.decomposition import PCA

from anomalymatch.checks import check_choice
from anomalymatch.clustering.groups import UNGROUPED, Embeddings, GroupNumbers, Tree
from anomalymatch.clustering.umap import umap
from anomalymatch.evaluation import plots
from anomalymatch.evaluation.heat_maps import HeatMap, heat_sheet
from anomalymatch.types import Images

MAPS = ("pca", "umap")
LEAVES = 40
"""Largest number of branches in the dendrogram; each shows the number of images below it."""


def group_sheet(
    images: Images, weights: Float32[np.ndarray, "m p"], captions: Sequence[str], fit: str
) -> PillowImage.Image:
    """Draw images above the same images with heat maps; the first image, the medoid, has a frame."""
    frames = [plots.ANOMALY if k == 0 else None for k in range(len(images))]
    return heat_sheet(images, [scale_weights(each) for each in weights], captions, fit, frames=frames)


def scale_weights(weights: Float32[np.ndarray, " p"]) -> HeatMap:
    """Scale the weights of the patches of an image from 0 to 1; equal weights become 0."""
    side = round(len(weights) ** 0.5)
    spread = float(np.ptp(weights))
    relative = (weights - weights.min()) / spread if spread > 1e-9 else np.zeros_like(weights)
    return relative.reshape(side, side).astype(np.float32)


def dendrogram_figure(tree: Tree, labels: GroupNumbers) -> Figure:
    """Draw the top of Ward's tree, at most `LEAVES` branches, with a dashed line at the height of the groups."""
    figure, axes = plots.make_figure("images in the branch", "height of the merge")
    drawn: dict[str, Any] = dendrogram(
        tree, p=LEAVES, truncate_mode="lastp", no_plot=True, color_threshold=0.0, show_leaf_counts=True
    )
    for x, y in zip(drawn["icoord"], drawn["dcoord"], strict=True):
        axes.plot(x, y, color=plots.INK, linewidth=1.1)
    count = len(np.unique(labels))
    if 1 < count <= len(tree):
        heights = np.sort(tree[:, 2])
        axes.axhline((heights[-count] + heights[-count + 1]) / 2, color=plots.ANOMALY, linestyle="--", linewidth=1.3)
    axes.set_xticks(5.0 + 10.0 * np.arange(len(drawn["ivl"])), [text.strip("()") for text in drawn["ivl"]])
    axes.tick_params(axis="x", labelsize=6.5, labelrotation=90)
    axes.set_ylim(bottom=0.0)
    return figure


def map_figure(places: Float64[np.ndarray, "n 2"], labels: GroupNumbers, medoids: Int64[np.ndarray, " k"]) -> Figure:
    """Draw each image as a dot in the colour of its group, with the number of each group at its medoid."""
    figure, axes = plots.make_figure("first dimension", "second dimension")
    ramp = colormaps["tab20"]
    for k in np.unique(labels):
        rows = labels == k
        colour = plots.FAINT if k == UNGROUPED else plots.PALETTE[k] if k < len(plots.PALETTE) else to_hex(ramp(k % 20))
        axes.scatter(places[rows, 0], places[rows, 1], s=9, color=colour, alpha=0.7, linewidths=0)
    box = {"boxstyle": "round,pad=0.2", "facecolor": "white", "edgecolor": "none", "alpha": 0.8}
    for k, row in enumerate(medoids):
        axes.annotate(str(k), places[row], ha="center", va="center", fontsize=9, color=plots.INK, bbox=box)
    return figure


def flat_map(embeddings: Embeddings, method: str, *, seed: int) -> Float64[np.ndarray, "n 2"]:
    """Project embeddings of at least two images to two dimensions, by `pca` or `umap`, which takes the seed.

    Raises:
        ConfigError: if the method is unknown.
    """
    check_choice("map", method, MAPS)
    if method == "umap":
        return umap(embeddings.astype(np.float32), seed=seed).astype(np.float64)
    if not np.ptp(embeddings, axis=0).any():  # PCA would divide by a variance of zero
        return np.zeros((len(embeddings), 2))
    flat = PCA(min(2, embeddings.shape[1])).fit_transform(embeddings)
    return np.pad(flat, ((0, 0), (0, 2 - flat.shape[1])))
