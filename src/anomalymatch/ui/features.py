"""Feature store of the labelling page: features of all images by position, exact or as principal components."""

import mmap
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float16, Float32, Float64, Int32, Int64

from anomalymatch.backbones.features import Features, Scaling, one_thread, single_precision
from anomalymatch.cache import Blocks, Cache, cache_key
from anomalymatch.checks import check_choice, check_range
from anomalymatch.errors import DataError
from anomalymatch.progress import ShowProgress, progress

COMPRESSIONS = ("auto", "exact", "pca")
EXACT_BYTES = 512 * 2**20
"""Size in half precision up to which `auto` keeps the features as they are."""
SAMPLE = 20_000
"""Vectors from which the principal components are computed."""
BLOCK_ROWS = 2048
_CHUNK = 2048
_SEED = 0


class HalfMatrix:
    """Feature vectors in half precision, mapped from disk or in memory.

    Args:
        blocks: the vectors, one below the other; at least one block, all with the same number of columns.
        components: projection from pooled features to these vectors; None if they are the pooled features.
    """

    def __init__(
        self, blocks: Sequence[Float16[np.ndarray, "_ d"]], components: Float32[np.ndarray, "D d"] | None = None
    ) -> None:
        self.dimensions, self.components = int(blocks[0].shape[1]), components
        # Blocks that fit into the processor's cache are converted and multiplied ten times as fast as the whole.
        self._blocks = [block[i : i + BLOCK_ROWS] for block in blocks for i in range(0, len(block), BLOCK_ROWS)]
        self._starts = np.cumsum([0] + [len(block) for block in self._blocks])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def take(self, index: Int64[np.ndarray, " k"]) -> Float32[np.ndarray, "k d"]:
        """Return the vectors of these rows."""
        rows = np.empty((len(index), self.dimensions), dtype=np.float32)
        owner = np.searchsorted(self._starts, index, side="right") - 1
        for k in np.unique(owner):
            mine = owner == k
            rows[mine] = self._blocks[k][index[mine] - self._starts[k]]
        return rows

    def multiply(self, direction: Float32[np.ndarray, " d"]) -> Float32[np.ndarray, " m"]:
        """Return the inner product of every vector with `direction`."""
        products = torch.empty(len(self))
        weights = torch.from_numpy(np.array(direction))
        with one_thread():
            for block, start in zip(self.singles(), self._starts, strict=False):
                torch.mv(torch.from_numpy(block), weights, out=products[start : start + len(block)])
        return products.numpy()

    def singles(self) -> Iterator[Float32[np.ndarray, "b d"]]:
        """Convert one block after the other; what is mapped from disk is taken out of this process's memory again."""
        files = pairwise([*map(_mapped_file, self._blocks), None])
        for block, (file, following) in zip(self._blocks, files, strict=True):
            yield single_precision(block)
            if file is not None and file is not following and hasattr(mmap, "MADV_DONTNEED"):
                file.madvise(mmap.MADV_DONTNEED)  # the system keeps it in its cache while there is room

    def encode(self, pooled: Float32[np.ndarray, "k D"]) -> Float32[np.ndarray, "k d"]:
        """Map pooled features of other images to the space of these vectors."""
        return pooled if self.components is None else pooled @ self.components


class FeatureStore:
    """Features of an archive by position: `n` images, of which `m` are readable, in `d` columns.

    The columns of the last layer come first and define which images are similar; a probe also uses those of the stages.

    Args:
        ids: all images.
        positions: readable images in increasing order, one for each row.
        reasons: by position, why an image cannot be read; images in neither have no features yet.
        parts: the last layer, then the stages if there are any.
        scaling: scaling of the columns for a probe.
    """

    def __init__(
        self,
        ids: Sequence[str],
        positions: Int64[np.ndarray, " m"],
        reasons: dict[int, str],
        parts: Sequence[HalfMatrix],
        scaling: Scaling,
    ) -> None:
        self.ids, self.positions, self.parts, self.scaling = ids, positions, parts, scaling
        self.dimensions = sum(part.dimensions for part in parts)
        self._reasons = reasons
        self._row: Int32[np.ndarray, " n"] = np.full(len(ids), -1, dtype=np.int32)
        self._row[positions] = np.arange(len(positions), dtype=np.int32)

    @cached_property
    def last_layer(self) -> "FeatureStore":
        """The same images with the columns of the last layer alone."""
        if len(self.parts) == 1:
            return self
        plain = Scaling.plain(self.parts[0].dimensions)
        return FeatureStore(self.ids, self.positions, self._reasons, self.parts[:1], plain)

    @cached_property
    def unreadable(self) -> Int64[np.ndarray, " u"]:
        """Positions of the images that cannot be read, in increasing order."""
        return np.array(sorted(self._reasons), dtype=np.int64)

    def has(self, positions: Int64[np.ndarray, " k"]) -> Bool[np.ndarray, " k"]:
        """Return True for each image that has features."""
        return self._row[positions] >= 0

    def rows(self, positions: Int64[np.ndarray, " k"]) -> Float32[np.ndarray, "k d"]:
        """Return the features of images.

        Raises:
            DataError: if one of them cannot be read; the message has the reason.
        """
        index = self._row[positions].astype(np.int64)
        if (index < 0).any():
            bad = int(positions[index < 0][0])
            reason = self._reasons.get(bad, "they are still being computed")
            raise DataError(f"there are no features of image {self.ids[bad]!r}: {reason}")
        return np.concatenate([part.take(index) for part in self.parts], axis=1)

    def project(self, direction: Float64[np.ndarray, " d"], intercept: float) -> Float32[np.ndarray, " n"]:
        """Return the inner product of every image with `direction`, plus `intercept`; NaN for unreadable images."""
        total = np.full(len(self.positions), intercept, dtype=np.float32)
        start = 0
        for part in self.parts:
            total += part.multiply(direction[start : start + part.dimensions].astype(np.float32))
            start += part.dimensions
        values = np.full(len(self.ids), np.nan, dtype=np.float32)
        values[self.positions] = total
        return values

    def direction(self, direction: Float64[np.ndarray, " d"]) -> Float64[np.ndarray, " D"]:
        """Return the direction in the space of the pooled features whose inner products are those of `project`."""
        split = np.split(direction, np.cumsum([part.dimensions for part in self.parts])[:-1])
        own = [d if part.components is None else part.components @ d for part, d in zip(self.parts, split, strict=True)]
        return np.concatenate(own)

    def nearest(self, position: int, count: int) -> Int64[np.ndarray, " k"]:
        """Return the `count` images most similar to an image, without itself; none if it cannot be read.

        Similarity is the inner product of the last-layer features; ties are in order of position.
        """
        row = int(self._row[position])
        if row < 0:
            return self.positions[:0]
        last = self.parts[0]
        products = last.multiply(last.take(np.array([row]))[0])
        products[row] = -np.inf
        near = np.arange(len(products))
        if 0 < count < len(products):
            near = np.flatnonzero(products >= np.partition(products, len(products) - count)[len(products) - count])
        near = near[np.argsort(-products[near], kind="stable")]
        return self.positions[near[near != row][:count]]

    def encode(self, pooled: Float32[np.ndarray, "k D"]) -> Float32[np.ndarray, "k d"]:
        """Map L2-normalised pooled features of other images, if there are any, to the columns of this store.

        Raises:
            DataError: if they come from a network with another number of features.
        """
        if not len(pooled):
            return np.zeros((0, self.dimensions), np.float32)
        widths = [part.dimensions if part.components is None else len(part.components) for part in self.parts]
        if pooled.shape[1] != sum(widths):
            raise DataError(
                f"these images have {pooled.shape[1]} features, but those of the archive have {sum(widths)}"
            )
        split = np.split(pooled, np.cumsum(widths)[:-1], axis=1)
        return np.concatenate([part.encode(own) for part, own in zip(self.parts, split, strict=True)], axis=1)


def build_feature_store(
    features: Features,
    ids: Sequence[str],
    *,
    compression: str,
    dimensions: int,
    folder: Path,
    show: ShowProgress = progress,
    is_part: bool = False,
) -> FeatureStore:
    """Build the feature store of an archive.

    Args:
        features: features of all of `ids`, in their order.
        ids: all images of the source.
        compression: `exact` maps the cached features in half precision; `pca` keeps their principal components;
            `auto` is `exact` up to 512 MB and `pca` above.
        dimensions: principal components that `pca` keeps of each part.
        folder: cache folder of the features; compressed features are stored below it.
        show: shows the progress of the compression.
        is_part: allow features of the first images alone.

    Raises:
        ConfigError: if `compression` is unknown or `dimensions` is not positive.
        DataError: if the features are not those of `ids`.
        StorageError: if the compressed features cannot be written.
    """
    check_compression(compression, dimensions)
    positions, reasons = _find_positions(features, ids, is_part=is_part)
    layers: list[tuple[Features, Float32[np.ndarray, " D"] | None]] = [(features.last, None)]
    if features.stage_width:
        layers.append((features.stages, features.scaling.scale[features.last_width :]))
    parts: list[HalfMatrix] = []
    slices: list[slice] = []
    scales: list[Float32[np.ndarray, " _"]] = []
    for layer, scale in layers:
        part = HalfMatrix([shard.rows for shard in layer.shards])
        is_small = 2 * len(part) * part.dimensions <= EXACT_BYTES
        if len(part) and (compression == "pca" or (compression == "auto" and not is_small)):
            part = _compress(part, positions, dimensions, folder, scale, show)
            scale = None  # the components contain it
        start = slices[-1].stop if slices else 0
        slices.append(slice(start, start + part.dimensions))
        scales.append(np.ones(part.dimensions, np.float32) if scale is None else scale)
        parts.append(part)
    return FeatureStore(ids, positions, reasons, parts, Scaling(tuple(slices), np.concatenate(scales)))


def check_compression(compression: str, dimensions: int) -> None:
    """Check these arguments of `build_feature_store`; a `ConfigError` is raised if one is wrong."""
    check_choice("ui.compression", compression, COMPRESSIONS)
    check_range("ui.dimensions", dimensions, low=1)


def _find_positions(
    features: Features, ids: Sequence[str], *, is_part: bool
) -> tuple[Int64[np.ndarray, " m"], dict[int, str]]:
    """Return the positions of the readable images, and the reason for each other image.

    Shards hold consecutive images, so small dictionaries suffice where one of all ids would take a gigabyte.
    """
    reasons: dict[int, str] = {}
    found: list[Int64[np.ndarray, " _"]] = []
    start = 0
    for shard in features.shards:
        stop = start + len(shard.ids) + len(shard.rejects)
        place = {id_: start + i for i, id_ in enumerate(ids[start:stop])}
        readable = np.array([place.get(id_, -1) for id_ in shard.ids], dtype=np.int64)
        rejected = {place.get(reject.id, -1): reject.reason for reject in shard.rejects}
        if (readable < 0).any() or (np.diff(readable) <= 0).any() or -1 in rejected:
            raise DataError(f"the features are of other images: those from {ids[start]!r} on do not match the source")
        found.append(readable)
        reasons |= rejected
        start = stop
    if start != len(ids) and not (is_part and start < len(ids)):
        raise DataError(f"there are features of {start} images, but {len(ids)} images: compute the features again")
    return np.concatenate(found), reasons


def _compress(
    exact: HalfMatrix,
    positions: Int64[np.ndarray, " m"],
    dimensions: int,
    folder: Path,
    scale: Float32[np.ndarray, " D"] | None,
    show: ShowProgress,
) -> HalfMatrix:
    """Project features, multiplied by `scale`, on their principal components; cached below `folder`."""
    width = min(dimensions, exact.dimensions)

    def compute() -> tuple[dict[str, np.ndarray | Blocks], dict[str, object]]:
        rng = np.random.default_rng(_SEED)
        sample = exact.take(np.sort(rng.choice(len(exact), min(SAMPLE, len(exact)), replace=False)))
        factor = np.ones(exact.dimensions, np.float32) if scale is None else scale
        components = factor[:, None] * principal_directions(sample * factor, width)
        rows = Blocks((len(exact), width), "float16", _project_blocks(exact, components, show))
        return {"components": components, "rows": rows}, {}

    key = {"positions": positions, "scale": scale, "of": exact.dimensions, "dimensions": width, "sample": SAMPLE}
    arrays = Cache(folder / "compressed").get(cache_key(key), compute).arrays
    return HalfMatrix([arrays["rows"]], np.array(arrays["components"]))


def _project_blocks(
    exact: HalfMatrix, components: Float32[np.ndarray, "D d"], show: ShowProgress
) -> Iterator[Float16[np.ndarray, "_ d"]]:
    with show("Compressing features", len(exact)) as advance:
        for block in exact.singles():
            yield (block @ components).astype(np.float16)
            advance(len(block))


def principal_directions(sample: Float32[np.ndarray, "n D"], dimensions: int) -> Float32[np.ndarray, "D d"]:
    """Compute the principal components of uncentred vectors as orthonormal columns, largest variance first.

    The mean is not subtracted: the similarity of two images is the inner product of their features, and subtracting
    the mean would change neighbours and probe even if all components were kept. At most `D` are returned.
    """
    moments = np.zeros((sample.shape[1], sample.shape[1]))
    for start in range(0, len(sample), _CHUNK):
        part = sample[start : start + _CHUNK].astype(np.float64)
        moments += part.T @ part
    vectors = np.linalg.eigh(moments)[1][:, ::-1][:, :dimensions]
    # The sign of an eigenvector depends on the library; cached features must not.
    largest = np.take_along_axis(vectors, np.abs(vectors).argmax(axis=0)[None], axis=0)
    return np.ascontiguousarray(vectors * np.sign(largest), dtype=np.float32)


def _mapped_file(array: np.ndarray) -> mmap.mmap | None:
    base: object = array
    while isinstance(base, np.ndarray):
        base = base.base
    return base if isinstance(base, mmap.mmap) else None
