"""Distances in feature space from normal images, and their scale. Higher is more anomalous."""

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

QUERY_ROWS, BANK_ROWS = 1024, 16384
"""Size of the blocks of the distance matrix."""
MAD_TO_SIGMA = 1.4826
"""Standard deviation of a normal distribution over its median absolute deviation."""
MIDPOINT = 3.0
"""Robust standard deviations above the median at which the logit is 0."""


def neighbour_distances(
    queries: Float[Tensor, "n d"], bank: Float[Tensor, "m d"], k: int, own: Int64[Tensor, " n"]
) -> Float[Tensor, "n k"]:
    """Compute Euclidean distances to the `k` nearest rows of `bank`, ascending: exact, in single precision.

    Args:
        queries: features, on the device of `bank`.
        bank: features to compare with; half precision is widened block by block.
        k: number of neighbours.
        own: row of `bank` that is the query itself and is skipped; -1 where there is none.

    Raises:
        ValueError: if the bank has fewer than k rows, or k + 1 where a query is one of them.
    """
    needed = k + int((own >= 0).any())
    if not k >= 1 or len(bank) < needed:
        raise ValueError(f"{k} nearest neighbours need at least {needed} rows, got {len(bank)}")
    blocks = [
        _block(queries[start : start + QUERY_ROWS].float(), bank, k, own[start : start + QUERY_ROWS])
        for start in range(0, len(queries), QUERY_ROWS)
    ]
    return torch.cat(blocks) if blocks else torch.empty(0, k, device=queries.device)


def _block(
    queries: Float[Tensor, "n d"], bank: Float[Tensor, "m d"], k: int, own: Int64[Tensor, " n"]
) -> Float[Tensor, "n k"]:
    best = torch.full((len(queries), k), torch.inf, device=queries.device)
    rows = torch.zeros((len(queries), k), dtype=torch.int64, device=queries.device)
    for start in range(0, len(bank), BANK_ROWS):
        part = bank[start : start + BANK_ROWS].float()
        squared = part.square().sum(1) - 2 * queries @ part.T  # without |q|^2, which does not change the order
        mine = (own >= start) & (own < start + len(part))
        squared[mine, own[mine] - start] = torch.inf
        values, columns = squared.topk(min(k, len(part)), largest=False)
        best, order = torch.cat([best, values], 1).topk(k, largest=False)
        rows = torch.cat([rows, columns + start], 1).gather(1, order)
    # The products above are inexact near zero, so the distances to the neighbours are computed again as differences.
    found = [(queries - bank[rows[:, i]].float()).norm(dim=1) for i in range(k)]
    return torch.stack(found, 1).sort(dim=1).values


def mahalanobis(
    features: Float64[np.ndarray, "n d"], mean: Float64[np.ndarray, " d"], whitening: Float64[np.ndarray, "d d"]
) -> Float64[np.ndarray, " n"]:
    """Compute the Mahalanobis distance |(f - mean) W|, where W W^T is the precision matrix."""
    return np.linalg.norm((features - mean) @ whitening, axis=1)


def whitening_of(covariance: Float64[np.ndarray, "d d"]) -> Float64[np.ndarray, "d d"]:
    """Compute W with W W^T = covariance^-1, for `mahalanobis`.

    Raises:
        ValueError: if the covariance is singular: constant features, or fewer than dimensions without shrinkage.
    """
    values, vectors = np.linalg.eigh(covariance)
    if not values[0] > values[-1] * len(values) * np.finfo(np.float64).eps:
        raise ValueError("the covariance is singular: there are too few different features to estimate it")
    return vectors / np.sqrt(values)


def principal_residual(
    features: Float64[np.ndarray, "n d"], mean: Float64[np.ndarray, " d"], components: Float64[np.ndarray, "c d"]
) -> Float64[np.ndarray, " n"]:
    """Compute the length of f - mean without its projection on the (orthonormal) components."""
    centred = features - mean
    return np.linalg.norm(centred - (centred @ components.T) @ components, axis=1)


def principal_components(
    features: Float64[np.ndarray, "n d"], mean: Float64[np.ndarray, " d"], variance: float
) -> Float64[np.ndarray, "c d"]:
    """Compute the fewest principal components that explain at least the share `variance` of the variance.

    Raises:
        ValueError: if the features are all equal, so that there is no variance.
    """
    centred = features - mean
    if len(centred) > centred.shape[1]:  # the same directions, many times faster
        values, vectors = np.linalg.eigh(centred.T @ centred)
        power, directions = np.maximum(values[::-1], 0.0), vectors.T[::-1]
    else:
        _, singular, directions = np.linalg.svd(centred, full_matrices=False)
        power = singular**2
    if not power.sum() > 0.0:
        raise ValueError("the features are all equal: they have no principal components")
    held = np.cumsum(power) / power.sum()
    return directions[: int(np.searchsorted(held, variance * (1.0 - 1e-12))) + 1]


def trimmed_mean(features: Float[np.ndarray, "n d"], trim: float) -> Float64[np.ndarray, " d"]:
    """Compute the mean without the share `trim` that is farthest from the coordinate-wise median.

    Anomalies among the training images would pull a plain mean towards them. `trim` is in [0, 1).
    """
    if not 0.0 <= trim < 1.0:
        raise ValueError(f"expected 0 <= trim < 1, got {trim}")
    keep = len(features) - int(trim * len(features))
    if keep == len(features):
        return features.mean(axis=0, dtype=np.float64)
    distance = np.linalg.norm(features - np.median(features, axis=0), axis=1)
    return features[np.argsort(distance, kind="stable")[:keep]].mean(axis=0, dtype=np.float64)


def spread_of(distances: Float64[np.ndarray, " n"]) -> tuple[float, float]:
    """Compute median and robust standard deviation of the training images' own distances.

    The deviation follows from the median absolute deviation. It is the plain one if half of the distances are equal,
    and the median if all are.

    Raises:
        ValueError: if all distances are zero.
    """
    median = float(np.median(distances))
    robust = MAD_TO_SIGMA * float(np.median(np.abs(distances - median)))
    for spread in (robust, float(distances.std()), median):
        if spread > 1e-9 * max(1.0, median):
            return median, spread
    raise ValueError("all of their distances are equal to zero")


def distance_logits(distances: Float64[np.ndarray, " n"], median: float, spread: float) -> Float64[np.ndarray, " n"]:
    """Convert distances to a scale like that of log-odds: 2 asinh((distance - median) / spread - `MIDPOINT`).

    It keeps the order. Its sigmoid is 0.03 at the median and one half three robust standard deviations above; beyond,
    the odds grow with the square of the distance, so that it stays below 1. It is no probability.
    """
    return 2.0 * np.arcsinh((distances - median) / spread - MIDPOINT)
