"""Nearest neighbours among any number of features: exact up to a million, by an index of faiss beyond."""

import math
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from anomalymatch.errors import ConfigError
from anomalymatch.functional.novelty import neighbour_distances

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
