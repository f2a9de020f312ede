"""Anomaly Clustering (arXiv 2112.11573; Sohn et al., 2021): distances of images that are bags of patch embeddings.

Each image is the mean of its patches, weighted by how unlike all else they are: two images are near when what is odd
about them is alike. Names are those of the paper: z the patches, d their scores, alpha their weights, tau.
"""

import math

import torch
from jaxtyping import Float, Int64
from torch import Tensor

BLOCK_ELEMENTS = 2**24
"""Patch distances that are in memory at a time."""


def unsupervised_scores(
    patches: Float[Tensor, "n p d"], references: Float[Tensor, "r q d"], own: Int64[Tensor, " n"]
) -> Float[Tensor, "n p"]:
    """How unlike the other images each patch is: the mean over them of its distance to their nearest patch.

    Args:
        patches: of the images.
        references: patches of the images compared with: the same ones, or a sample where they are too many.
        own: which reference an image is itself, and does not count; -1 where it is none.

    Raises:
        ValueError: if an image has no other to be compared with.
    """
    return _over_references(patches, references, own, smallest=False)


def normal_scores(
    patches: Float[Tensor, "n p d"], normals: Float[Tensor, "m q d"], own: Int64[Tensor, " n"]
) -> Float[Tensor, "n p"]:
    """How unlike the labelled normal images each patch is: its distance to the nearest patch of them all.

    Args:
        patches: of the images.
        normals: patches of the labelled normal images.
        own: which of these an image is itself, and does not count; -1 where it is none.

    Raises:
        ValueError: if an image has no normal image to be compared with.
    """
    return _over_references(patches, normals, own, smallest=True)


def relative_scores(scores: Float[Tensor, "n p"]) -> Float[Tensor, "n p"]:
    """Scores divided by their mean over all patches of all images: one tau then serves for any backbone and images.

    Where all are zero, because the images are identical, they stay zero.
    """
    mean = scores.double().mean().item() if scores.numel() else 0.0
    return scores / mean if mean > 0.0 else scores


def patch_weights(scores: Float[Tensor, "n p"], tau: float) -> Float[Tensor, "n p"]:
    """Weights of each image's patches, softmax(score / tau); they add up to 1.

    Args:
        scores: of the patches; higher is more unlike the rest.
        tau: in units of the scores (see `relative_scores`). At infinity all patches weigh the same; at 0 only the
            highest does, and those that are equally high share.

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
    """The embedding of each image: the weighted mean of its patches."""
    return torch.bmm(weights.to(patches.dtype)[:, None], patches)[:, 0]


def hausdorff_distances(patches: Float[Tensor, "n p d"]) -> Float[Tensor, "n n"]:
    """Maximum Hausdorff distance of each pair of images, the paper's other baseline.

    The largest distance from a patch of one image to the nearest patch of the other, whichever way it is larger.
    """
    n = len(patches)
    distances = torch.zeros(n, n, device=patches.device)
    step = _images_per_block(patches.shape[1], patches.shape[1])
    room = _room(patches, patches, step)
    for start in range(0, n, step):
        for other in range(start, n, step):
            there, back = _nearest_both(patches[start : start + step], patches[other : other + step], room)
            block = torch.maximum(there.amax(1), back.amax(1).T)
            distances[start : start + step, other : other + step] = block
            distances[other : other + step, start : start + step] = block.T
    return distances.fill_diagonal_(0.0)


def _over_references(
    patches: Float[Tensor, "n p d"], references: Float[Tensor, "r q d"], own: Int64[Tensor, " n"], *, smallest: bool
) -> Float[Tensor, "n p"]:
    """Mean, or smallest, over the references (an image itself left out) of the distance to the nearest patch."""
    others = len(references) - (own >= 0).long()
    if len(patches) and int(others.min()) < 1:
        raise ValueError("an image has no other image to be compared with")
    start_value = torch.inf if smallest else 0.0
    total = torch.full(patches.shape[:2], start_value, device=patches.device)
    step = _images_per_block(patches.shape[1], references.shape[1])
    room = _room(patches, references, step)
    for start in range(0, len(patches), step):
        rows = slice(start, start + step)
        for other in range(0, len(references), step):
            nearest = _nearest(patches[rows], references[other : other + step], room)  # n p r
            mine = own[rows] - other
            is_own = torch.nonzero((mine >= 0) & (mine < nearest.shape[2]))[:, 0]
            nearest[is_own, :, mine[is_own]] = start_value
            total[rows] = torch.minimum(total[rows], nearest.amin(2)) if smallest else total[rows] + nearest.sum(2)
    return total if smallest else total / others[:, None]


def _nearest(a: Float[Tensor, "n p d"], b: Float[Tensor, "r q d"], room: Float[Tensor, " _"]) -> Float[Tensor, "n p r"]:
    """Euclidean distance from each patch of `a` to the nearest patch of each image of `b`."""
    squared = _squared(a, b, room).amin(3) + a.float().square().sum(2)[:, :, None]
    return squared.clamp_min_(0.0).sqrt_()


def _nearest_both(
    a: Float[Tensor, "n p d"], b: Float[Tensor, "r q d"], room: Float[Tensor, " _"]
) -> tuple[Float[Tensor, "n p r"], Float[Tensor, "r q n"]]:
    """`_nearest` from `a` to `b` and from `b` to `a`, by one product."""
    squared = _squared(a, b, room) + a.float().square().sum(2)[:, :, None, None]
    there, back = squared.amin(3), squared.amin(1).permute(1, 2, 0)
    return there.clamp_min_(0.0).sqrt_(), back.clamp_min_(0.0).sqrt_()


def _squared(
    a: Float[Tensor, "n p d"], b: Float[Tensor, "r q d"], room: Float[Tensor, " _"]
) -> Float[Tensor, "n p r q"]:
    """Squared distances of all patches but for |a|^2, which orders nothing; half precision is widened here.

    As products: near zero they are right to about 1e-3 of the patches' length, which no softmax notices.
    """
    (n, p, d), (r, q, _) = a.shape, b.shape
    left, right = a.reshape(-1, d).float(), b.reshape(-1, d).float()
    products = room[: len(left) * len(right)].view(len(left), len(right))
    return torch.addmm(right.square().sum(1), left, right.T, alpha=-2.0, out=products).view(n, p, r, q)


def _room(a: Float[Tensor, "n p d"], b: Float[Tensor, "r q d"], step: int) -> Float[Tensor, " m"]:
    """Memory for one block of distances: asked for anew each time, it would cost as much as the products."""
    images = min(step, len(a)) * min(step, len(b))
    return torch.empty(images * a.shape[1] * b.shape[1], device=a.device)


def _images_per_block(p: int, q: int) -> int:
    return max(1, math.isqrt(BLOCK_ELEMENTS // (p * q)))


def patch_projection(
    patches: Float[Tensor, "m d"], components: int, whitening: float
) -> tuple[Float[Tensor, " d"], Float[Tensor, "d c"]]:
    """Mean and projection (z - mean) W on the principal components, each divided by its spread ** whitening.

    At whitening 0 distances are those of the patches themselves, less what the components leave out; at 1 all
    components weigh the same (Mahalanobis). A direction without any spread is left out at any whitening.

    Args:
        patches: all of them, or a sample.
        components: how many, at most; as many as the patches have dimensions keep them all.
        whitening: in 0 … 1.

    Raises:
        ValueError: if components or whitening is out of range.
    """
    if components < 1 or not 0.0 <= whitening <= 1.0:
        raise ValueError(f"expected components >= 1 and whitening in 0 … 1, got {components} and {whitening}")
    rows = patches.double()
    mean = rows.mean(0)
    centred = rows - mean
    values, vectors = torch.linalg.eigh(centred.T @ centred / len(rows))  # ascending
    values, vectors = values.flip(0)[:components], vectors.flip(1)[:, :components]
    scale = torch.where(values > 1e-9 * values[0].clamp_min(1e-300), values, torch.inf) ** (-whitening / 2)
    if whitening == 0.0:
        scale = torch.ones_like(values)
    return mean.float(), (vectors * scale).float()
