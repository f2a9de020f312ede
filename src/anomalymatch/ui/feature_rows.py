"""Rows of feature vectors in half precision, and their inner products: all that a linear ranking costs."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float16, Float32, Int64

from anomalymatch.ui.one_thread import one_thread

BLOCK_ROWS = 2048


@runtime_checkable
class Rows(Protocol):
    """Feature vectors of all readable images, however they are stored."""

    @property
    def dimensions(self) -> int:
        """Length of a vector."""
        ...

    def __len__(self) -> int:
        """How many there are."""
        ...

    def take(self, index: Int64[np.ndarray, " k"]) -> Float32[np.ndarray, "k d"]:
        """The vectors of these rows."""
        ...

    def inner(self, direction: Float32[np.ndarray, " d"]) -> Float32[np.ndarray, " m"]:
        """Inner product of every vector with `direction`."""
        ...


class HalfRows:
    """Vectors in half precision, mapped from disk or in memory.

    Args:
        blocks: the vectors one below the other, at least one block, all of the same length.
    """

    def __init__(self, blocks: Sequence[Float16[np.ndarray, "_ d"]]) -> None:
        self.dimensions = int(blocks[0].shape[1])
        # What fits into the processor's cache is converted and multiplied in a tenth of the time of the whole.
        self.blocks = [block[i : i + BLOCK_ROWS] for block in blocks for i in range(0, len(block), BLOCK_ROWS)]
        self._starts = np.cumsum([0] + [len(block) for block in self.blocks])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def take(self, index: Int64[np.ndarray, " k"]) -> Float32[np.ndarray, "k d"]:
        """See `Rows`."""
        rows = np.empty((len(index), self.dimensions), dtype=np.float32)
        owner = np.searchsorted(self._starts, index, side="right") - 1
        for k in np.unique(owner):
            mine = owner == k
            rows[mine] = self.blocks[k][index[mine] - self._starts[k]]
        return rows

    def inner(self, direction: Float32[np.ndarray, " d"]) -> Float32[np.ndarray, " m"]:
        """See `Rows`."""
        products = torch.empty(len(self))
        weights = torch.from_numpy(np.array(direction))
        with one_thread():
            for block, start in zip(self.blocks, self._starts, strict=False):
                torch.mv(torch.from_numpy(single(block)), weights, out=products[start : start + len(block)])
        return products.numpy()


def single(block: Float16[np.ndarray, "n d"]) -> Float32[np.ndarray, "n d"]:
    """`block` in single precision; PyTorch converts ten times as fast as NumPy does."""
    return torch.from_numpy(np.array(block)).float().numpy()
