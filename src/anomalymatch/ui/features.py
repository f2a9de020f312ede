"""The features of all images of an archive, close at hand: what the live ranking and the neighbours are made of."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int32, Int64

from anomalymatch.backbones.features import Features, Scaling
from anomalymatch.errors import ConfigError, DataError
from anomalymatch.ui.compression import HalfRows, Rows, compressed

COMPRESSIONS = ("auto", "exact", "pca", "pq")
EXACT_BYTES = 512 * 2**20
"""Up to here `auto` keeps the features as they are."""


@runtime_checkable
class FeatureBank(Protocol):
    """Features by position in the source; `n` images, of which `m` can be read, in `d` dimensions."""

    positions: Int64[np.ndarray, " m"]
    """The images that can be read, rising."""
    dimensions: int

    def rows(self, positions: Int64[np.ndarray, " k"]) -> Float32[np.ndarray, "k d"]:
        """Features of these images.

        Raises:
            DataError: if one of them cannot be read, with the reason.
        """
        ...

    def has(self, positions: Int64[np.ndarray, " k"]) -> Bool[np.ndarray, " k"]:
        """Whether there are features of these images."""
        ...

    def project(self, direction: Float64[np.ndarray, " d"], intercept: float) -> Float32[np.ndarray, " n"]:
        """Inner product of every image with `direction`, plus `intercept`; NaN for what cannot be read."""
        ...

    def nearest(self, row: Float32[np.ndarray, " d"], count: int) -> Int64[np.ndarray, " k"]:
        """The `count` images with the largest inner product with `row`, nearest first, equal ones by position."""
        ...

    def encode(self, pooled: Float32[np.ndarray, "k D"]) -> Float32[np.ndarray, "k d"]:
        """L2-normalised pooled features of other images, as this bank would hold them.

        Raises:
            DataError: if they come from a network with another number of features.
        """
        ...


class Bank:
    """Stored vectors and the images that they belong to.

    Args:
        ids: all images.
        positions: of the readable ones, rising, one for each row of `store`.
        reasons: why the others cannot be read, by position.
        store: the vectors.
        components: maps pooled features to the vectors by a product; None if they are the same.
    """

    def __init__(
        self,
        ids: Sequence[str],
        positions: Int64[np.ndarray, " m"],
        reasons: dict[int, str],
        store: Rows,
        components: Float32[np.ndarray, "D d"] | None = None,
    ) -> None:
        self.positions, self.dimensions, self.compressed = positions, store.dimensions, components is not None
        self._ids, self._reasons, self._store, self._components = ids, reasons, store, components
        self._row: Int32[np.ndarray, " n"] = np.full(len(ids), -1, dtype=np.int32)
        self._row[positions] = np.arange(len(positions), dtype=np.int32)

    def rows(self, positions: Int64[np.ndarray, " k"]) -> Float32[np.ndarray, "k d"]:
        """See `FeatureBank`."""
        index = self._row[positions].astype(np.int64)
        if (index < 0).any():
            bad = int(positions[index < 0][0])
            raise DataError(f"there are no features of image {self._ids[bad]!r}: {self._reasons[bad]}")
        return self._store.take(index)

    def has(self, positions: Int64[np.ndarray, " k"]) -> Bool[np.ndarray, " k"]:
        """See `FeatureBank`."""
        return self._row[positions] >= 0

    def project(self, direction: Float64[np.ndarray, " d"], intercept: float) -> Float32[np.ndarray, " n"]:
        """See `FeatureBank`."""
        values = np.full(len(self._row), np.nan, dtype=np.float32)
        values[self.positions] = self._store.inner(direction.astype(np.float32)) + np.float32(intercept)
        return values

    def nearest(self, row: Float32[np.ndarray, " d"], count: int) -> Int64[np.ndarray, " k"]:
        """See `FeatureBank`."""
        products = self._store.inner(row)
        if 0 < count < len(products):
            cut = np.partition(products, len(products) - count)[len(products) - count]
            near = np.flatnonzero(products >= cut)
        else:
            near = np.arange(len(products))
        return self.positions[near[np.argsort(-products[near], kind="stable")][:count]]

    def encode(self, pooled: Float32[np.ndarray, "k D"]) -> Float32[np.ndarray, "k d"]:
        """See `FeatureBank`."""
        expected = self.dimensions if self._components is None else len(self._components)
        if pooled.shape[1] != expected:
            raise DataError(f"these images have {pooled.shape[1]} features, but those of the archive have {expected}")
        return pooled if self._components is None else pooled @ self._components


def build_bank(
    features: Features,
    ids: Sequence[str],
    *,
    compression: str,
    dimensions: int,
    folder: Path,
    scale: Float32[np.ndarray, " d"] | None = None,
) -> Bank:
    """The bank of `features`.

    Args:
        features: of all of `ids`, in their order.
        ids: all images of the source.
        compression: `exact` keeps the features in half precision, mapped from the cache; `pca` keeps their principal
            components; `pq` quantises these to a byte for every two; `auto` is `exact` up to 512 MB, else `pca`.
        dimensions: principal components that `pca` and `pq` keep.
        folder: the cache entry of the features, to which the compressed ones are added.
        scale: of each column, by which compressed features are multiplied; None for one.

    Raises:
        ConfigError: if `compression` is unknown or `dimensions` is not positive.
        DataError: if the features are not those of `ids`.
        StorageError: if the compressed features cannot be written.
    """
    if compression not in COMPRESSIONS:
        raise ConfigError(f"ui.compression is {compression!r}: choose one of {', '.join(COMPRESSIONS)}")
    if dimensions < 1:
        raise ConfigError(f"ui.dimensions is {dimensions}: it must be at least 1")
    positions, reasons = _places(features, ids)
    exact = HalfRows([shard.rows for shard in features.shards])
    if compression == "auto":
        compression = "exact" if 2 * len(exact) * exact.dimensions <= EXACT_BYTES else "pca"
    if compression == "exact" or not len(exact):
        return Bank(ids, positions, reasons, exact)
    told = positions.tobytes() + (b"" if scale is None else scale.tobytes())
    stamp = hashlib.blake2b(told, digest_size=8).hexdigest()
    rows, components = compressed(exact, compression, dimensions, folder, stamp, scale)
    return Bank(ids, positions, reasons, rows, components)


def _places(features: Features, ids: Sequence[str]) -> tuple[Int64[np.ndarray, " m"], dict[int, str]]:
    """Positions of the readable images, and why the others are not.

    Shards hold consecutive images, so that small dictionaries do where one of all ids would take a gigabyte.
    """
    reasons: dict[int, str] = {}
    parts: list[Int64[np.ndarray, " _"]] = []
    start = 0
    for shard in features.shards:
        stop = start + len(shard.ids) + len(shard.rejects)
        place = {id_: start + i for i, id_ in enumerate(ids[start:stop])}
        found = np.array([place.get(id_, -1) for id_ in shard.ids], dtype=np.int64)
        rejected = {place.get(reject.id, -1): reject.reason for reject in shard.rejects}
        if (found < 0).any() or (np.diff(found) <= 0).any() or -1 in rejected:
            raise DataError(f"the features are of other images: those from {ids[start]!r} on do not match the source")
        parts.append(found)
        reasons |= rejected
        start = stop
    if start != len(ids):
        raise DataError(f"there are features of {start} images, but {len(ids)} images: compute the features again")
    return np.concatenate(parts), reasons


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
    bank: FeatureBank, features: Features, ids: Sequence[str], *, compression: str, dimensions: int, folder: Path
) -> Seen:
    """What a probe sees of an archive.

    Args:
        bank: of the last layer.
        features: of all of `ids`, in their order.
        ids: all images of the source.
        compression: see `build_bank`.
        dimensions: see `build_bank`.
        folder: see `build_bank`.

    Raises:
        DataError, StorageError: see `build_bank`.
    """
    if not features.stage_width:
        return Seen(bank, Scaling.plain(bank.dimensions))
    scale = features.scaling.scale[features.last_width :]
    stages = build_bank(
        features.stages, ids, compression=compression, dimensions=dimensions, folder=folder, scale=scale
    )
    if stages.compressed:  # and scaled before
        scale = np.ones(stages.dimensions, np.float32)
    parts = slice(0, bank.dimensions), slice(bank.dimensions, bank.dimensions + stages.dimensions)
    scaling = Scaling(parts, np.concatenate([np.ones(bank.dimensions, np.float32), scale]))
    return Seen(PairedBank(bank, stages, features.last_width), scaling)
