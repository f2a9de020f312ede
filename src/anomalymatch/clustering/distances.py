"""Scores, weights and distances of Anomaly Clustering (arXiv 2112.11573; Sohn et al., 2021).

An image is a bag of patch embeddings. Its embedding is the mean of the patches weighted by their anomaly scores, so two
images are near each other if their anomalies are similar. The paper's symbols: z patches, d scores, alpha weights, tau.
"""

import math

import torch
from jaxtyping import Float, Int64
from torch import Tensor

BLOCK_ELEMENTS = 2**24
"""Number of patch distances held in memory at once."""


def unsupervised_scores(
    patches: Float[Tensor, "n p d"], references: Float[Tensor, "r q d"], own: Int64[Tensor, " n"]
) -> Float[Tensor, "n p"]:
    """Score each patch by its distance to the nearest patch of another image, averaged over the other images.

    Args:
        patches: patches of the images.
        references: patches of the images to compare with: the same images, or a sample of them.
        own: index of each image among the references, where it is skipped; -1 if it is not among them.

    Raises:
        ValueError: if there is no other image to compare an image with.
    """
    return _over_references(patches, references, own, smallest=False)


def normal_scores(
    patches: Float[Tensor, "n p d"], normals: Float[Tensor, "m q d"], own: Int64[Tensor, " n"]
) -> Float[Tensor, "n p"]:
    """Score each patch by its distance to the nearest patch of all labelled normal images.

    Arguments and errors are those of `unsupervised_scores`, with the normal images as references.
    """
    return _over_references(patches, normals, own, smallest=True)


def relative_scores(scores: Float[Tensor, "n p"]) -> Float[Tensor, "n p"]:
    """Divide scores by their mean over all patches of all images, so that tau does not depend on their scale.

    If all scores are zero, because the images are identical, they stay zero.
    """
    mean = scores.double().mean().item() if scores.numel() else 0.0
    return scores / mean if mean > 0.0 else scores


def patch_weights(scores: Float[Tensor, "n p"], tau: float) -> Float[Tensor, "n p"]:
    """Compute the weights softmax(score / tau) of the patches of each image.

    Args:
        scores: scores of the patches; higher is more anomalous.
        tau: temperature, in units of the scores (see `relative_scores`). At infinity all patches have the same weight;
            at 0 only the highest has one, shared by equally high ones.

    Raises:
        ValueError: if tau is negative or NaN.
    """
    if not tau >= 0.0:
        raise ValueError(f"expected tau >= 0, got {tau}")
    if math.isinf(tau):
        return torch.full_like(scores, 1.0 / scores.shape[1])
    above = scores - scores.amax(dim=1, keepdim=True)  # at most 0, so that a small tau overflows to -inf alone
    if tau == 0.0:
        highest = (above == 0.0).to(scores.dtype)
        return highest / highest.sum(dim=1, keepdim=True)
    return torch.softmax(above.double() / tau, dim=1).to(scores.dtype)


def weighted_means(patches: Float[Tensor, "n p d"], weights: Float[Tensor, "n p"]) -> Float[Tensor, "n d"]:
    """Compute the embedding of each image, the weighted mean of its patches."""
    return torch.bmm(weights.to(patches.dtype)[:, None], patches)[:, 0]


def _over_references(
    patches: Float[Tensor, "n p d"], references: Float[Tensor, "r q d"], own: Int64[Tensor, " n"], *, smallest: bool
) -> Float[Tensor, "n p"]:
    """Average or minimise, over the references other than the image itself, the distance to their nearest patch."""
    others = len(references) - (own >= 0).long()
    if len(patches) and int(others.min()) < 1:
        raise ValueError("an image has no other image to be compared with")
    start_value = torch.inf if smallest else 0.0
    total = torch.full(patches.shape[:2], start_value, device=patches.device)
    step = max(1, math.isqrt(BLOCK_ELEMENTS // (patches.shape[1] * references.shape[1])))  # images in a block
    pairs = min(step, len(patches)) * min(step, len(references))
    buffer = torch.empty(pairs * patches.shape[1] * references.shape[1], device=patches.device)
    for start in range(0, len(patches), step):
        rows = slice(start, start + step)
        for other in range(0, len(references), step):
            nearest = _nearest(patches[rows], references[other : other + step], buffer)  # n p r
            mine = own[rows] - other
            is_own = torch.nonzero((mine >= 0) & (mine < nearest.shape[2]))[:, 0]
            nearest[is_own, :, mine[is_own]] = start_value
            total[rows] = torch.minimum(total[rows], nearest.amin(2)) if smallest else total[rows] + nearest.sum(2)
    return total if smallest else total / others[:, None]


def _nearest(
    a: Float[Tensor, "n p d"], b: Float[Tensor, "r q d"], buffer: Float[Tensor, " _"]
) -> Float[Tensor, "n p r"]:
    """Compute the Euclidean distance from each patch of `a` to the nearest patch of each image of `b`.

    Distances are expanded to products, which near zero are accurate to about 1e-3 of the patches' length; the softmax
    does not notice. Half precision is widened here. The buffer holds the products: to allocate memory for each block
    would take as long as the products themselves.
    """
    (n, p, d), (r, q, _) = a.shape, b.shape
    left, right = a.reshape(-1, d).float(), b.reshape(-1, d).float()
    products = buffer[: len(left) * len(right)].view(len(left), len(right))
    torch.addmm(right.square().sum(1), left, right.T, alpha=-2.0, out=products)
    squared = products.view(n, p, r, q).amin(3) + left.square().sum(1).view(n, p, 1)
    return squared.clamp_min_(0.0).sqrt_()


def patch_projection(
    patches: Float[Tensor, "m d"], components: int, whitening: float
) -> tuple[Float[Tensor, " d"], Float[Tensor, "d c"]]:
    """Fit a projection (z - mean) W on the principal components, divided by their standard deviation ** whitening.

    At whitening 0 distances are those of the patches, apart from the omitted components; at 1 all components have the
    same influence (Mahalanobis distance). A direction without variance is left out at any whitening above 0.

    Args:
        patches: all patches, or a sample.
        components: largest number of components.
        whitening: between 0 and 1.

    Returns:
        The mean and W.

    Raises:
        ValueError: if components or whitening is out of range.
    """
    if components < 1 or not 0.0 <= whitening <= 1.0:
        raise ValueError(f"expected components >= 1 and whitening between 0 and 1, got {components} and {whitening}")
    rows = patches.double()
    mean = rows.mean(0)
    centred = rows - mean
    values, vectors = torch.linalg.eigh(centred.T @ centred / len(rows))  # ascending
    values, vectors = values.flip(0)[:components], vectors.flip(1)[:, :components]
    scale = torch.where(values > 1e-9 * values[0].clamp_min(1e-300), values, torch.inf) ** (-whitening / 2)
    if whitening == 0.0:
        scale = torch.ones_like(values)
    return mean.float(), (vectors * scale).float()
