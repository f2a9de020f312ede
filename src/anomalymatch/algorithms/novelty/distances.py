"""How unlike the normal images an image is: distances in feature space. Higher is more anomalous."""

import math
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from anomalymatch.errors import ConfigError

QUERY_ROWS, BANK_ROWS = 1024, 16384
"""Block of the distance matrix that is in memory at a time."""
MAD_TO_SIGMA = 1.4826
"""Median absolute deviation of a normal distribution, turned into its standard deviation."""
SURPRISE = 3.0
"""Robust standard deviations above the median at which a distance counts as more likely anomalous than not."""


def neighbour_distances(
    queries: Float[Tensor, "n d"], bank: Float[Tensor, "m d"], k: int, own: Int64[Tensor, " n"]
) -> Float[Tensor, "n k"]:
    """Euclidean distances to the `k` nearest rows of `bank`, ascending; exact, in blocks, in single precision.

    Args:
        queries: features, on the device of `bank`.
        bank: features to compare with; half precision is widened block by block.
        k: neighbours.
        own: row of `bank` that is the query itself and does not count as its neighbour; -1 where there is none.

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
        squared = part.square().sum(1) - 2 * queries @ part.T  # but for |q|^2, which orders nothing
        mine = (own >= start) & (own < start + len(part))
        squared[mine, own[mine] - start] = torch.inf
        values, columns = squared.topk(min(k, len(part)), largest=False)
        best, order = torch.cat([best, values], 1).topk(k, largest=False)
        rows = torch.cat([rows, columns + start], 1).gather(1, order)
    # The products above lose what is near zero: the distances of those found are computed anew, as differences.
    found = [(queries - bank[rows[:, i]].float()).norm(dim=1) for i in range(k)]
    return torch.stack(found, 1).sort(dim=1).values


def mahalanobis(
    features: Float64[np.ndarray, "n d"], mean: Float64[np.ndarray, " d"], whitening: Float64[np.ndarray, "d d"]
) -> Float64[np.ndarray, " n"]:
    """Distance from `mean` in units of the spread in each direction: |(f - mean) W|, where W W^T is the precision."""
    return np.linalg.norm((features - mean) @ whitening, axis=1)


def whitening_of(covariance: Float64[np.ndarray, "d d"]) -> Float64[np.ndarray, "d d"]:
    """W with W W^T = covariance^-1, for `mahalanobis`.

    Raises:
        ValueError: if the covariance is singular: features are constant, or fewer than dimensions, and not shrunk.
    """
    values, vectors = np.linalg.eigh(covariance)
    if not values[0] > values[-1] * len(values) * np.finfo(np.float64).eps:
        raise ValueError("the covariance is singular: there are too few different features to estimate it")
    return vectors / np.sqrt(values)


def principal_residual(
    features: Float64[np.ndarray, "n d"], mean: Float64[np.ndarray, " d"], components: Float64[np.ndarray, "c d"]
) -> Float64[np.ndarray, " n"]:
    """What the principal components leave out: |(f - mean) - its projection on the (orthonormal) components|."""
    centred = features - mean
    return np.linalg.norm(centred - (centred @ components.T) @ components, axis=1)


def principal_components(
    features: Float64[np.ndarray, "n d"], mean: Float64[np.ndarray, " d"], variance: float
) -> Float64[np.ndarray, "c d"]:
    """The fewest orthonormal directions that hold at least the share `variance` of the spread around `mean`.

    Raises:
        ValueError: if the features are all equal, so that there is no spread.
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
    """Mean of the features, without the share `trim` of them that is farthest from their coordinate-wise median.

    Anomalies among the training images pull a plain mean towards themselves.

    Args:
        features: at least one.
        trim: in [0, 1).
    """
    if not 0.0 <= trim < 1.0:
        raise ValueError(f"expected 0 <= trim < 1, got {trim}")
    keep = len(features) - int(trim * len(features))
    if keep == len(features):
        return features.mean(axis=0, dtype=np.float64)
    distance = np.linalg.norm(features - np.median(features, axis=0), axis=1)
    return features[np.argsort(distance, kind="stable")[:keep]].mean(axis=0, dtype=np.float64)


def spread_of(distances: Float64[np.ndarray, " n"]) -> tuple[float, float]:
    """Median and robust standard deviation of the training images' own distances.

    The deviation is that of the median absolute deviation; the plain one where half of the distances are equal; the
    median where all are.

    Raises:
        ValueError: if all distances are zero: nothing tells these images apart.
    """
    median = float(np.median(distances))
    robust = MAD_TO_SIGMA * float(np.median(np.abs(distances - median)))
    for spread in (robust, float(distances.std()), median):
        if spread > 1e-9 * max(1.0, median):
            return median, spread
    raise ValueError("all of their distances are equal to zero")


def surprise(distances: Float64[np.ndarray, " n"], median: float, spread: float) -> Float64[np.ndarray, " n"]:
    """Distances on a scale like that of log-odds: 2 asinh((distance - median) / spread - `SURPRISE`).

    Strictly increasing, so the order is that of the distances. The sigmoid of it is a number in 0 … 1: 0.03 at the
    median, one half three robust standard deviations above, and then the odds grow with the square of the distance,
    so that it stays below 1 for what is far off. It is no probability: no anomaly was seen.
    """
    return 2.0 * np.arcsinh((distances - median) / spread - SURPRISE)


EXACT_ROWS = 1_000_000
"""Rows of a bank up to which every one is compared with; beyond, that takes hours."""
TRAINING_ROWS_PER_CELL = 40
PROBES = 32
"""Cells of the index that are searched for each query."""


def nearest_distances(
    queries: Float[Tensor, "n d"],
    bank: Float[Tensor, "m d"],
    k: int,
    own: Int64[Tensor, " n"],
    *,
    device: torch.device,
    exact_rows: int = EXACT_ROWS,
) -> Float[Tensor, "n k"]:
    """Euclidean distances to the `k` nearest rows of `bank`, ascending, on the CPU.

    Args:
        queries: features.
        bank: features to compare with.
        k: neighbours.
        own: row of `bank` that is the query itself and does not count; -1 where there is none.
        device: that compares.
        exact_rows: a larger bank is searched by an index of faiss, which may overlook a neighbour.

    Raises:
        ConfigError: if the bank is that large and faiss is not installed.
        ValueError: if the bank is too small.
    """
    if len(bank) > exact_rows:
        return _by_index(queries, bank, k, own)
    return neighbour_distances(queries.to(device), bank.to(device), k, own.to(device)).cpu()


def _by_index(
    queries: Float[Tensor, "n d"], bank: Float[Tensor, "m d"], k: int, own: Int64[Tensor, " n"]
) -> Float[Tensor, "n k"]:
    squared, rows = _index_of(bank).search(queries.float().numpy(), k + 1)
    squared[(rows == own.numpy()[:, None]) | (rows < 0)] = np.inf
    return torch.from_numpy(np.sqrt(np.maximum(np.sort(squared, axis=1)[:, :k], 0.0)))


@lru_cache(maxsize=1)
def _index_of(bank: Tensor) -> Any:
    """The index of this very tensor; it takes minutes to build, and a ranking asks for it chunk by chunk."""
    try:
        import faiss
    except ImportError as error:
        raise ConfigError(
            f"{len(bank):,} images to compare with need an index: pip install 'anomalymatch[faiss]', "
            f"or set al.pool_size to at most {EXACT_ROWS:,}"
        ) from error
    cells = max(1, round(4 * math.sqrt(len(bank))))
    index: Any = faiss.index_factory(bank.shape[1], f"IVF{cells},SQfp16")
    step = max(1, len(bank) // (TRAINING_ROWS_PER_CELL * cells))
    index.train(bank[::step].float().numpy())
    for part in bank.split(65536):
        index.add(part.float().numpy())
    index.nprobe = min(PROBES, cells)
    return index
