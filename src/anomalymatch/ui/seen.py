"""What the live ranking's probe sees: the bank of the last layer, and one of the stages beside it."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int64

from anomalymatch.models.views import Scaling, Views
from anomalymatch.ui.bank import FeatureBank, build_bank


class Seen(NamedTuple):
    """A bank, and how a probe on it scales its columns."""

    bank: FeatureBank
    scaling: Scaling


class PairedBank:
    """Two banks of the same images side by side: what a probe sees of them. Images are alike by the first alone.

    Args:
        first: of the first `width` columns of pooled features.
        second: of the others.
        width: see above.
    """

    def __init__(self, first: FeatureBank, second: FeatureBank, width: int) -> None:
        self.positions, self.dimensions = first.positions, first.dimensions + second.dimensions
        self._first, self._second, self._width = first, second, width

    def rows(self, positions: Int64[np.ndarray, " k"]) -> Float32[np.ndarray, "k d"]:
        """See `FeatureBank`."""
        return np.concatenate([self._first.rows(positions), self._second.rows(positions)], axis=1)

    def has(self, positions: Int64[np.ndarray, " k"]) -> Bool[np.ndarray, " k"]:
        """See `FeatureBank`."""
        return self._first.has(positions)

    def project(self, direction: Float64[np.ndarray, " d"], intercept: float) -> Float32[np.ndarray, " n"]:
        """See `FeatureBank`."""
        first, second = np.split(direction, [self._first.dimensions])
        return self._first.project(first, intercept) + self._second.project(second, 0.0)

    def nearest(self, row: Float32[np.ndarray, " d"], count: int) -> Int64[np.ndarray, " k"]:
        """See `FeatureBank`."""
        return self._first.nearest(row[: self._first.dimensions], count)

    def encode(self, pooled: Float32[np.ndarray, "k D"]) -> Float32[np.ndarray, "k d"]:
        """See `FeatureBank`."""
        first, second = np.split(pooled, [self._width], axis=1)
        return np.concatenate([self._first.encode(first), self._second.encode(second)], axis=1)


def build_seen(
    bank: FeatureBank, views: Views, ids: Sequence[str], *, compression: str, dimensions: int, folder: Path
) -> Seen:
    """What a probe sees of an archive.

    Args:
        bank: of the last layer.
        views: of all of `ids`, in their order.
        ids: all images of the source.
        compression: see `build_bank`.
        dimensions: see `build_bank`.
        folder: see `build_bank`.

    Raises:
        DataError, StorageError: see `build_bank`.
    """
    if not views.stage_width:
        return Seen(bank, Scaling.plain(bank.dimensions))
    scale = views.scaling.scale[views.width :]
    stages = build_bank(views.stages, ids, compression=compression, dimensions=dimensions, folder=folder, scale=scale)
    if stages.compressed:  # and scaled before
        scale = np.ones(stages.dimensions, np.float32)
    parts = slice(0, bank.dimensions), slice(bank.dimensions, bank.dimensions + stages.dimensions)
    scaling = Scaling(parts, np.concatenate([np.ones(bank.dimensions, np.float32), scale]))
    return Seen(PairedBank(bank, stages, views.width), scaling)
