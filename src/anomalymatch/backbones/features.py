"""Pooled features of every image, computed once and kept on disk."""

import hashlib
import io
import json
import logging
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from filelock import FileLock
from jaxtyping import Float16, Float32, Float64, Int64

from anomalymatch.backbones.inference import Inference
from anomalymatch.backbones.network import Backbone, NetworkSpec
from anomalymatch.backbones.openvino import Forward
from anomalymatch.backbones.weights import fingerprint
from anomalymatch.data.source import ImageSource
from anomalymatch.errors import DataError
from anomalymatch.files import atomic_file, make_folder, storage_errors, write_text
from anomalymatch.progress import Advance, progress
from anomalymatch.types import Reject

logger = logging.getLogger(__name__)
FORMAT = 1
SHARD_IMAGES = 4096


@dataclass(frozen=True)
class Shard:
    """Features of up to `SHARD_IMAGES` consecutive images, memory-mapped."""

    ids: list[str]
    rows: Float16[np.ndarray, "n d"]
    rejects: list[Reject]


@dataclass(frozen=True)
class Features:
    """L2-normalised pooled features of a source, in half precision.

    Attributes:
        shards: all of them, in the order of the source.
    """

    shards: Sequence[Shard]

    @property
    def dimensions(self) -> int:
        """Length of a row."""
        return int(self.shards[0].rows.shape[1])

    def columns(self, wanted: slice) -> "Features":
        """Some of the columns; nothing is copied."""
        return Features([Shard(shard.ids, shard.rows[:, wanted], shard.rejects) for shard in self.shards])

    @cached_property
    def ids(self) -> list[str]:
        """The readable images, in the order of the rows."""
        return [id_ for shard in self.shards for id_ in shard.ids]

    @cached_property
    def rejects(self) -> list[Reject]:
        """The images that could not be read."""
        return [reject for shard in self.shards for reject in shard.rejects]

    @cached_property
    def _position(self) -> dict[str, int]:
        return {id_: i for i, id_ in enumerate(self.ids)}

    def __contains__(self, id_: object) -> bool:
        return id_ in self._position

    def positions(self, ids: Iterable[str]) -> Int64[np.ndarray, " m"]:
        """Rows of `ids`.

        Raises:
            DataError: if one of them has no features, because it is unknown or could not be read.
        """
        try:
            return np.fromiter((self._position[id_] for id_ in ids), dtype=np.int64)
        except KeyError as error:
            reasons = {r.id: r.reason for r in self.rejects}
            reason = reasons.get(error.args[0], "it is not in the source")
            raise DataError(f"there are no features of image {error.args[0]!r}: {reason}") from None

    def take(self, ids: Iterable[str]) -> Float32[np.ndarray, "m d"]:
        """Features of `ids` in single precision."""
        positions = self.positions(ids)
        starts = np.cumsum([0] + [len(shard.ids) for shard in self.shards])
        rows = np.empty((len(positions), self.dimensions), dtype=np.float32)
        owner = np.searchsorted(starts, positions, side="right") - 1
        for k in np.unique(owner):
            mine = owner == k
            rows[mine] = self.shards[k].rows[positions[mine] - starts[k]]
        return rows

    def project(self, direction: Float64[np.ndarray, " d"]) -> Float64[np.ndarray, " n"]:
        """Inner product of every row with `direction`: all that a linear head needs to re-rank the archive."""
        weights = direction.astype(np.float32)
        return np.concatenate([shard.rows.astype(np.float32) @ weights for shard in self.shards]).astype(np.float64)


@dataclass(frozen=True)
class FeatureCache:
    """Features on disk under `folder`, one entry for each combination of source, weights and image size.

    They are computed shard by shard: a kill loses at most the shard that was being computed. A corrupt shard is
    noticed by its checksum and computed again.
    """

    folder: Path
    inference: Inference

    def features(self, source: ImageSource, spec: NetworkSpec, backbone: Backbone) -> Features:
        """Features of all images of `source`: from disk, or computed now."""
        entry = make_folder(self.folder / self.key(source, spec, backbone))
        starts = range(0, len(source.ids), SHARD_IMAGES)
        with storage_errors(entry), FileLock(entry / "lock"):
            found = ((start, read_shard(_shard_path(entry, start))) for start in starts)
            shards = {start: shard for start, shard in found if shard is not None}
            missing = {start: _chunk(source, start) for start in starts if start not in shards}
            if missing:
                size, count = spec.image_size, sum(map(len, missing.values()))
                forward = self.inference.prepared(backbone, size=size, count=count)
                with progress("Features", count) as advance:
                    for start, ids in missing.items():
                        shard = self._compute(source, ids, size, backbone, forward, advance)
                        shards[start] = write_shard(_shard_path(entry, start), shard)
        return Features([shards[start] for start in starts])

    def key(self, source: ImageSource, spec: NetworkSpec, backbone: Backbone) -> str:
        """Name of the cache entry: a hash of everything that the features depend on."""
        numeric = "bf16" if self.inference.computes_bf16 else "fp32"
        parts = [FORMAT, source.fingerprint, fingerprint(backbone), spec.name, spec.image_size, numeric]
        parts += [f"{backbone.stage_features} of stages"] if backbone.stage_features else []
        parts += [f"{backbone.orientations} orientations"] if backbone.orientations > 1 else []
        parts += [f"{backbone.crops} crops"] if backbone.crops else []
        return hashlib.blake2b(json.dumps(parts).encode(), digest_size=12).hexdigest()

    def _compute(
        self,
        source: ImageSource,
        ids: Sequence[str],
        size: int,
        backbone: Backbone,
        forward: Forward,
        advance: Advance,
    ) -> Shard:
        kept: list[str] = []
        rejects: list[Reject] = []
        rows = np.empty((len(ids), backbone.features + backbone.stage_features), dtype=np.float16)
        for batch in self.inference.run(forward, source, ids, size=size):
            rows[len(kept) : len(kept) + len(batch.ids)] = with_unit_last(batch.outputs, backbone.features)
            kept += batch.ids
            rejects += batch.rejects
            advance(len(batch.ids) + len(batch.rejects))
        return Shard(kept, rows[: len(kept)], rejects)


def with_unit_last(outputs: Float32[np.ndarray, "n d"], last: int) -> Float32[np.ndarray, "n d"]:
    """Outputs of a backbone whose first `last` columns, the features of the last layer, have length one."""
    norms = np.linalg.norm(outputs[:, :last], axis=1, keepdims=True)
    return np.concatenate([outputs[:, :last] / np.maximum(norms, 1e-12), outputs[:, last:]], axis=1)


def _shard_path(entry: Path, start: int) -> Path:
    return entry / f"{start:09d}"


def _chunk(source: ImageSource, start: int) -> Sequence[str]:
    return source.ids[start : start + SHARD_IMAGES]


def write_shard(path: Path, shard: Shard) -> Shard:
    """Rows first, then the description with their checksum: without the description there is no shard."""
    buffer = io.BytesIO()  # on its way to a real file NumPy would lose the reason why a disk refuses it
    np.save(buffer, shard.rows, allow_pickle=False)
    with atomic_file(path.with_suffix(".npy")) as temporary:
        temporary.write_bytes(buffer.getbuffer())
    description = {
        "crc32": _checksum(shard.rows),
        "ids": shard.ids,
        "rejects": [[r.id, r.reason] for r in shard.rejects],
    }
    write_text(path.with_suffix(".json"), json.dumps(description))
    return Shard(shard.ids, np.load(path.with_suffix(".npy"), mmap_mode="r"), shard.rejects)


def _checksum(rows: Float16[np.ndarray, "n d"]) -> int:
    return zlib.crc32(np.ascontiguousarray(rows).tobytes())


def read_shard(path: Path) -> Shard | None:
    """The shard at `path`; None if there is none or it is corrupt."""
    if not path.with_suffix(".json").exists():
        return None
    try:
        description = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        # Read, not mapped: mapped, all of a large archive's features would stay in memory for a glance at each.
        if _checksum(np.load(path.with_suffix(".npy"), allow_pickle=False)) != description["crc32"]:
            raise ValueError("the checksum is wrong")
        rows = np.load(path.with_suffix(".npy"), mmap_mode="r", allow_pickle=False)
        return Shard(description["ids"], rows, [Reject(id_, reason) for id_, reason in description["rejects"]])
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        logger.warning("Cached features in %s are corrupt (%s): computing them again", path, error)
        return None


SAMPLE = 4096
"""Images from which the spread of a feature is measured."""
CONSTANT = 1e-4
"""Spread below which a feature says nothing but how half precision rounds."""


@dataclass(frozen=True)
class Scaling:
    """Which columns belong together, and by what each is multiplied before a probe is fitted.

    Attributes:
        parts: the columns of each view.
        scale: of each of the `d` columns; a row of a view, its mean subtracted, has length one or less on average.
    """

    parts: tuple[slice, ...]
    scale: Float32[np.ndarray, " d"]

    @classmethod
    def plain(cls, dimensions: int) -> "Scaling":
        """One view, as it is."""
        return cls((slice(0, dimensions),), np.ones(dimensions, np.float32))


@dataclass(frozen=True)
class Views:
    """Features of the last layer, and those of the stages behind them.

    Attributes:
        features: all columns.
        width: columns of the last layer.
    """

    features: Features
    width: int

    @cached_property
    def last(self) -> Features:
        """Of the last layer: by these, images are alike or not."""
        return self.features.columns(slice(0, self.width)) if self.stage_width else self.features

    @cached_property
    def stages(self) -> Features:
        """Of the stages."""
        return self.features.columns(slice(self.width, None))

    @property
    def stage_width(self) -> int:
        """Columns of the stages; 0 if there are none."""
        return self.features.dimensions - self.width

    @cached_property
    def scaling(self) -> Scaling:
        """The last layer as it is; a feature of a stage by the inverse square root of its spread over the archive.

        That is half way to equal spreads: a channel that hardly varies neither drowns nor is blown up.
        """
        if not self.stage_width:
            return Scaling.plain(self.width)
        step = max(1, sum(len(shard.ids) for shard in self.stages.shards) // SAMPLE)
        sample = np.concatenate([shard.rows[::step] for shard in self.stages.shards]).astype(np.float32)
        spread = sample.std(axis=0) if len(sample) else np.zeros(self.stage_width, np.float32)
        varies = spread > CONSTANT
        scale = np.zeros(self.stage_width, np.float32)
        scale[varies] = 1.0 / np.sqrt(spread[varies] * spread[varies].sum())
        parts = slice(0, self.width), slice(self.width, self.features.dimensions)
        return Scaling(parts, np.concatenate([np.ones(self.width, np.float32), scale]))
