"""Scores, weights and distances of Anomaly Clustering (arXiv 2112.11573; Sohn et al., 2021).

An image is a bag of patch embeddings. Its embedding is the mean of the patches weighted by their anomaly scores, so two
images are near each other if their anomalies are similar. The paper's symbols: z patches, d scores, alpha weights, tau.
"""

import math

import torch
from jaxtyping import Float, Int64
from torch import Tensor

BLOCK_ELEMENTS = 2**20
"""Number of products in one block. It fits into the processor's cache: larger blocks are slower."""
QUERY_IMAGES = 64
"""Number of images whose distances to all references are held in memory at once."""


def unsupervised_scores(
    patches: Float[Tensor, "n p d"], references: Int64[Tensor, " r"], lowest: float
) -> Float[Tensor, "n p"]:
    """Score each patch by its distances to the nearest patch of each reference image: the mean of the lowest.

    A normal patch is near to some patch of most images, so that the lowest distances are enough to recognise it (MuSc,
    arXiv 2401.16753; Li et al., 2024).

    Args:
        patches: patches of the images.
        references: rows of the images to compare with; an image is never compared with itself.
        lowest: share of the references whose distances are averaged, at least one of them; 1 averages over all.

    Raises:
        ValueError: if there is no other image to compare an image with, or `lowest` is out of range.
    """
    if not 0.0 < lowest <= 1.0:
        raise ValueError(f"expected 0 < lowest <= 1, got {lowest}")
    count = len(references)
    is_reference = torch.zeros(len(patches), dtype=torch.bool)
    is_reference[references] = True
    if (is_reference.any() and count < 2) or (not is_reference.all() and count < 1):
        raise ValueError("an image has no other image to be compared with")
    scores = torch.empty(patches.shape[:2])
    left, right = _left_factor(patches[references]), _right_factor(patches[references])
    among = _nearest(left, right, symmetric=True)  # r p r: half of the work of two different sets
    among.diagonal(dim1=0, dim2=2).fill_(torch.inf)
    scores[references] = _lowest_mean(among, lowest, count - 1)
    del among, left
    for rows in torch.nonzero(~is_reference)[:, 0].split(QUERY_IMAGES):
        scores[rows] = _lowest_mean(_nearest(_left_factor(patches[rows]), right), lowest, count)
    return scores


def normal_scores(
    patches: Float[Tensor, "n p d"], normals: Float[Tensor, "m q d"], own: Int64[Tensor, " n"]
) -> Float[Tensor, "n p"]:
    """Score each patch by its distance to the nearest patch of all labelled normal images.

    Args:
        patches: patches of the images.
        normals: patches of the normal images.
        own: index of each image among the normal images, where it is skipped; -1 if it is not among them.

    Raises:
        ValueError: if an image has no other image to be compared with.
    """
    if len(patches) and int((len(normals) - (own >= 0).long()).min()) < 1:
        raise ValueError("an image has no other image to be compared with")
    scores, right = [], _right_factor(normals)
    for some, mine in zip(patches.split(QUERY_IMAGES), own.split(QUERY_IMAGES), strict=True):
        nearest = _nearest(_left_factor(some), right)
        among = torch.nonzero(mine >= 0)[:, 0]
        nearest[among, :, mine[among]] = torch.inf
        scores.append(nearest.amin(2))
    return torch.cat(scores) if scores else torch.empty(patches.shape[:2])


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


def _lowest_mean(nearest: Float[Tensor, "n p r"], lowest: float, others: int) -> Float[Tensor, "n p"]:
    """Average the lowest of the distances to `others` images, all that are finite."""
    count = max(1, round(lowest * others))
    if count == others:  # no need to sort
        return nearest.nan_to_num_(posinf=0.0).sum(2) / count
    blocks = nearest.split(QUERY_IMAGES)
    return torch.cat([block.topk(count, dim=2, largest=False, sorted=False).values.mean(2) for block in blocks])


def _nearest(
    left: Float[Tensor, "n p e"], right: Float[Tensor, "r q e"], *, symmetric: bool = False
) -> Float[Tensor, "n p r"]:
    """Compute the Euclidean distance from each patch to the nearest patch of each reference image.

    Squared distances are one matrix product, (-2 z, |z|^2, 1) . (w, 1, |w|^2), which near zero is accurate to about
    1e-3 of the patches' length; the softmax does not notice.

    Args:
        left: `_left_factor` of the patches.
        right: `_right_factor` of the patches of the references.
        symmetric: True if both are of the same patches: each block of products then serves both of its sides.
    """
    (n, p, e), (r, q, _) = left.shape, right.shape
    result = torch.empty(n, p, r)
    step = max(1, math.isqrt(BLOCK_ELEMENTS // (p * q)))
    buffer = torch.empty(min(step, n) * p * min(step, r) * q)  # new memory for each block takes as long as the products
    for row in range(0, n, step):
        a = left[row : row + step]
        for column in range(row if symmetric else 0, r, step):
            b = right[column : column + step]
            products = buffer[: len(a) * p * len(b) * q].view(len(a) * p, len(b) * q)
            torch.mm(a.view(-1, e), b.view(-1, e).T, out=products)
            result[row : row + step, :, column : column + step] = products.view(len(a), p, len(b), q).amin(3)
            if symmetric and column > row:
                other_side = products.view(len(a), p, len(b) * q).amin(1).view(len(a), len(b), q)
                result[column : column + step, :, row : row + step] = other_side.permute(1, 2, 0)
    return result.clamp_min_(0.0).sqrt_()


def _left_factor(patches: Float[Tensor, "n p d"]) -> Float[Tensor, "n p e"]:
    """Return (-2 z, |z|^2, 1) for each patch z, in single precision."""
    patches = patches.float()
    squared = patches.square().sum(2, keepdim=True)
    return torch.cat([-2.0 * patches, squared, torch.ones_like(squared)], 2)


def _right_factor(patches: Float[Tensor, "n p d"]) -> Float[Tensor, "n p e"]:
    """Return (w, 1, |w|^2) for each patch w, in single precision."""
    patches = patches.float()
    squared = patches.square().sum(2, keepdim=True)
    return torch.cat([patches, torch.ones_like(squared), squared], 2)


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
