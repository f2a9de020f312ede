"""Pooled features of all images of a source, cached on disk."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, field
from functools import cache, cached_property, partial
from itertools import pairwise, takewhile
from pathlib import Path
from threading import RLock
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float16, Float32, Float64, Int64
from threadpoolctl import ThreadpoolController

from anomalymatch.backbones.inference import Inference
from anomalymatch.backbones.network import Backbone
from anomalymatch.backbones.openvino import Forward
from anomalymatch.backbones.tokens import has_class_token
from anomalymatch.backbones.weights import fingerprint
from anomalymatch.cache import Cache, CacheEntry, cache_key
from anomalymatch.data.source import ImageSource
from anomalymatch.data.stream import collect
from anomalymatch.errors import DataError
from anomalymatch.progress import ShowProgress, progress
from anomalymatch.types import Reject

SHARD_IMAGES = 4096
PROBES = 16
"""Rankings by which features in int8 are compared with those in higher precision."""
RETRIED = 64
"""Number of rejects of a shard that are tried again, approximately."""
SAMPLE = 4096
"""Images from which the spread of a feature is measured."""
BLOCK_NUMBERS = 2**20
"""Numbers that are converted and multiplied at once; PyTorch converts half precision several times as fast as NumPy."""
FEW = 8
"""Rows are multiplied one by one if they are fewer than one in so many: reading all in order is faster."""
MIN_SPREAD = 1e-4
"""Features with a smaller spread hold only the rounding of half precision."""
_thread_lock = RLock()  # overlapping blocks would restore each other's limits


@dataclass(frozen=True)
class Shard:
    """Features of up to `SHARD_IMAGES` consecutive images, memory-mapped."""

    ids: list[str]
    rows: Float16[np.ndarray, "n d"]
    rejects: list[Reject]


@dataclass(frozen=True)
class Scaling:
    """Blocks of feature columns, and the factor of each column before a probe is fitted.

    Attributes:
        blocks: columns of each part of the last layer, and of the stages if there are any.
        scale: factor of each of the `d` columns; a centred row of a block then has length one or less on average.
    """

    blocks: tuple[slice, ...]
    scale: Float32[np.ndarray, " d"]

    @classmethod
    def plain(cls, dimensions: int) -> "Scaling":
        """Return one block without scaling."""
        return cls((slice(0, dimensions),), np.ones(dimensions, np.float32))


@dataclass(frozen=True)
class Features:
    """Pooled features of a source in half precision: the last layer, L2-normalised, then statistics of the stages.

    Attributes:
        shards: shards in the order of the source.
        stage_width: number of columns that belong to the stages, the last ones.
        parts: number of equal parts of the columns of the last layer, and of those of the stages: 1, or 3 with tiles
            (see `Backbone.join_parts`).
    """

    shards: Sequence[Shard]
    stage_width: int = field(default=0, kw_only=True)
    parts: int = field(default=1, kw_only=True)

    @property
    def dimensions(self) -> int:
        """Number of columns."""
        return int(self.shards[0].rows.shape[1])

    @property
    def last_width(self) -> int:
        """Number of columns of the last layer."""
        return self.dimensions - self.stage_width

    @cached_property
    def last(self) -> "Features":
        """Features of the last layer: these measure the similarity of images."""
        return self._columns(slice(0, self.last_width)) if self.stage_width else self

    @cached_property
    def stages(self) -> "Features":
        """Features of the stages."""
        return self._columns(slice(self.last_width, None))

    def _columns(self, wanted: slice) -> "Features":
        return Features([Shard(shard.ids, shard.rows[:, wanted], shard.rejects) for shard in self.shards])

    @cached_property
    def scaling(self) -> Scaling:
        """Scaling for a probe, measured on all images."""
        return self.scaling_on(self.ids)

    def scaling_on(self, ids: Sequence[str]) -> Scaling:
        """Measure the scaling for a probe: the last layer unchanged, a stage feature over the root of its spread.

        This is half way to equal spreads: a channel that hardly varies is neither lost nor blown up.

        Args:
            ids: images on which the spread is measured; up to about `SAMPLE` of them are used.
        """
        if not self.stage_width and self.parts == 1:
            return Scaling.plain(self.dimensions)
        sample = self.stages.take(ids[:: max(1, len(ids) // SAMPLE)])
        spread = sample.std(axis=0) if len(sample) else np.zeros(self.stage_width, np.float32)
        varies = spread > MIN_SPREAD
        scale = np.zeros(self.stage_width, np.float32)
        scale[varies] = 1.0 / np.sqrt(spread[varies] * spread[varies].sum())
        # The labels tell whether whole images or their tiles show the anomalies, so that each part has its own weight.
        widths = [
            width // self.parts for width in (self.last_width, self.stage_width) if width for _ in range(self.parts)
        ]
        ends = np.cumsum([0, *widths]).tolist()
        blocks = tuple(slice(start, end) for start, end in pairwise(ends))
        return Scaling(blocks, np.concatenate([np.ones(self.last_width, np.float32), scale]))

    @cached_property
    def ids(self) -> list[str]:
        """Ids of the readable images, in the order of the rows."""
        return [id_ for shard in self.shards for id_ in shard.ids]

    @cached_property
    def rejects(self) -> list[Reject]:
        """Images that could not be read."""
        return [reject for shard in self.shards for reject in shard.rejects]

    @cached_property
    def _position(self) -> dict[str, int]:
        return {id_: i for i, id_ in enumerate(self.ids)}

    def __contains__(self, id_: object) -> bool:
        return id_ in self._position

    def split(self, ids: Iterable[str]) -> tuple[list[str], list[Reject]]:
        """Separate ids of the source into those of readable images and the rejects, each in their order."""
        ids, rejected = list(ids), self._rejected
        if not rejected:
            return ids, []
        return [id_ for id_ in ids if id_ not in rejected], [rejected[id_] for id_ in ids if id_ in rejected]

    def rows(self, ids: Iterable[str]) -> tuple[list[str], list[Reject], Int64[np.ndarray, " m"]]:
        """Return the ids of readable images, the rejects, and the row numbers of the readable images.

        Those of the last call are kept: a run ranks the same images in each round.
        """
        ids = list(ids)
        for known, found in self._last:
            if known == ids:
                return found
        readable, rejects = self.split(ids)
        found = readable, rejects, self.positions(readable)
        self._last[:] = [(ids, found)]
        return found

    @cached_property
    def _last(self) -> list[tuple[list[str], tuple[list[str], list[Reject], Int64[np.ndarray, " m"]]]]:
        return []

    @cached_property
    def _rejected(self) -> dict[str, Reject]:
        return {reject.id: reject for reject in self.rejects}

    def positions(self, ids: Iterable[str]) -> Int64[np.ndarray, " m"]:
        """Return the row numbers of images.

        Raises:
            DataError: if an image has no features, because it is unknown or could not be read.
        """
        try:
            return np.fromiter(map(self._position.__getitem__, ids), dtype=np.int64)
        except KeyError as error:
            reject = self._rejected.get(error.args[0], Reject(error.args[0], "it is not in the source"))
            raise DataError(f"there are no features of image {reject.id!r}: {reject.reason}") from None

    def take(self, ids: Iterable[str]) -> Float32[np.ndarray, "m d"]:
        """Return the features of images in single precision."""
        return self.take_rows(self.positions(ids))

    def take_rows(self, rows: Int64[np.ndarray, " m"]) -> Float32[np.ndarray, "m d"]:
        """Return the features with these row numbers in single precision."""
        taken = np.empty((len(rows), self.dimensions), dtype=np.float32)
        for places, block in self._blocks_of(rows):
            taken[places] = block
        return taken

    def project(
        self, direction: Float64[np.ndarray, " d"], rows: Int64[np.ndarray, " m"] | None = None
    ) -> Float64[np.ndarray, " m"]:
        """Return the inner product of every row with `direction`, such as the weights of a linear head.

        Args:
            direction: one number for each column.
            rows: numbers of the rows to multiply, if these are not all.
        """
        weights = direction.astype(np.float32)
        if rows is not None and len(rows) * FEW < len(self.ids):
            products = np.empty(len(rows), np.float32)
            with one_thread():
                for places, block in self._blocks_of(rows):
                    products[places] = single_precision(block) @ weights
            return products.astype(np.float64)
        with one_thread():
            every = [block @ weights for block in self.blocks()]
        products = np.concatenate([np.empty(0, np.float32), *every])
        return (products if rows is None else products[rows]).astype(np.float64)

    def blocks(self) -> Iterator[Float32[np.ndarray, "b d"]]:
        """Yield all rows in single precision, in blocks of about `BLOCK_NUMBERS` numbers."""
        step = 64 * max(1, BLOCK_NUMBERS // (64 * self.dimensions))
        for shard in self.shards:
            for start in range(0, len(shard.rows), step):
                yield single_precision(shard.rows[start : start + step])

    def _blocks_of(
        self, rows: Int64[np.ndarray, " m"]
    ) -> Iterator[tuple[Int64[np.ndarray, " b"], Float16[np.ndarray, "b d"]]]:
        """Yield the wanted rows that each shard has, with their places among `rows`."""
        starts = np.cumsum([0] + [len(shard.ids) for shard in self.shards])
        order = np.argsort(rows, kind="stable")
        ends = np.searchsorted(rows[order], starts)
        for k in np.flatnonzero(np.diff(ends)).tolist():
            places = order[ends[k] : ends[k + 1]]
            yield places, self.shards[k].rows[rows[places] - starts[k]]


@runtime_checkable
class ModelSpec(Protocol):
    """Protocol of the description of a model whose features are cached."""

    @property
    def name(self) -> str:
        """Name of the model."""
        ...

    @property
    def image_size(self) -> int:
        """Side of its images in pixels."""
        ...


@dataclass(frozen=True)
class FeatureCache:
    """Features on disk, in a subfolder of `folder` for each combination of source, weights and settings.

    They are stored shard by shard: a kill loses one shard at most.
    """

    folder: Path
    inference: Inference

    def features(
        self,
        source: ImageSource,
        spec: ModelSpec,
        backbone: Backbone,
        *,
        show: ShowProgress = progress,
        on_part: Callable[[Features], None] | None = None,
    ) -> Features:
        """Return the features of all images of a source: from disk, or computed now.

        Args:
            source: the images.
            spec: description of the backbone.
            backbone: computes the features.
            show: shows the progress.
            on_part: called with the features of the first images while others are missing: with those on disk, then
                whenever their number of shards reaches a power of two.
        """
        depends = self._depends(source, spec, backbone)
        int8 = self._int8(depends, source, spec, backbone)
        cache = Cache(self.folder / _key(depends, int8 is not None))
        chunks = {_name(k): source.ids[k : k + SHARD_IMAGES] for k in range(0, len(source.ids), SHARD_IMAGES)}
        size, empty = _input_size(spec, backbone), np.empty((0, backbone.width), np.float16)

        def made() -> Features:
            return Features(_first(found), stage_width=backbone.stage_features, parts=backbone.parts)

        with cache.locked():
            found = {name: read_entry(cache, name, source) for name in chunks}
            missing = [name for name in chunks if found[name] is None]
            ready = len(_first(found))
            if missing and ready and on_part is not None:
                on_part(made())
            if missing:
                # For all images: work that goes on after a kill has the same backend, whose rounding may be another's.
                forward = self.inference.prepare(backbone, size=size, count=len(source.ids), int8=int8)
                with show("Features", sum(len(chunks[name]) for name in missing)) as advance:
                    for name in missing:
                        batches = self.inference.run(forward, source, chunks[name], size=size)
                        rows = ((b.ids, normalise_last(b.outputs, backbone.features), b.rejects) for b in batches)
                        shard = collect(rows, empty, advance)
                        info = {"ids": shard.ids, "rejects": [astuple(reject) for reject in shard.rejects]}
                        found[name] = cache.write(name, {"rows": shard.rows}, info)
                        before, ready = ready, len(_first(found))
                        if on_part is not None and ready < len(chunks) and ready.bit_length() > before.bit_length():
                            on_part(made())
        return made()

    def forward(self, source: ImageSource, spec: ModelSpec, backbone: Backbone) -> Forward:
        """Return the function that computes features of a few other images, in the precision of those of a source."""
        int8 = self._int8(self._depends(source, spec, backbone), source, spec, backbone)
        return self.inference.prepare(backbone, size=_input_size(spec, backbone), count=1, int8=int8)

    def key(self, source: ImageSource, spec: ModelSpec, backbone: Backbone) -> str:
        """Return the name of the subfolder: a hash of everything that the features depend on."""
        depends = self._depends(source, spec, backbone)
        return _key(depends, self._int8(depends, source, spec, backbone) is not None)

    def _int8(
        self, depends: dict[str, object], source: ImageSource, spec: ModelSpec, backbone: Backbone
    ) -> Cache | None:
        """Return the cache with the int8 model of the features; None if they are computed in higher precision.

        Its place is that of the features in higher precision. If these exist, `auto` keeps them.
        """
        cache = Cache(self.folder / _key(depends, False))
        if self.inference.precision == "auto" and (cache.folder / _name(0)).exists():
            return None
        size = _input_size(spec, backbone)
        if not self.inference.tries_int8(round(len(source.ids) * backbone.pixels_per_pixel * size**2)):
            return None
        agreement = self.inference.int8_agreement(
            backbone.fused(),
            source,
            cache,
            size=size,
            batch_size=self.inference.batch_size(size),
            scores=partial(probe_scores, width=backbone.features),
        )
        return None if agreement is None else cache

    def _depends(self, source: ImageSource, spec: ModelSpec, backbone: Backbone) -> dict[str, object]:
        return {
            "source": source.fingerprint,
            "weights": fingerprint(backbone),
            "name": spec.name,
            "size": spec.image_size,
            "bf16": self.inference.computes_bf16,
            "stages": backbone.stage_features,
            "orientations": backbone.orientations,
            "crops": backbone.crops,
            # Class token and mean of the patch tokens instead of what timm pools.
            **({"tokens": True} if any(map(has_class_token, backbone.body.modules())) else {}),
            **({"tiles": backbone.tiling.count, "starts": backbone.tiling.starts} if backbone.tiling else {}),
        }


def _input_size(spec: ModelSpec, backbone: Backbone) -> int:
    """Return the side of the images that features are computed from, in pixels."""
    return spec.image_size if backbone.tiling is None else backbone.tiling.side


def _key(depends: dict[str, object], int8: bool) -> str:
    return cache_key(depends | ({"int8": True} if int8 else {}))


def _name(first: int) -> str:
    """Return the name of the entry whose first image has this number."""
    return f"{first:09d}"


def _first(found: Mapping[str, CacheEntry | None]) -> list[Shard]:
    """Return the shards from the first up to a missing one."""
    entries = takewhile(lambda entry: entry is not None, found.values())
    return [
        Shard(entry.info["ids"], entry.arrays["rows"], [Reject(*reject) for reject in entry.info["rejects"]])
        for entry in entries
        if entry is not None
    ]


def read_entry(cache: Cache, name: str, source: ImageSource) -> CacheEntry | None:
    """Read a cache entry whose `info` has rejects; None if it is missing, or if a reject can be read by now.

    Only images that could not be read for a temporary reason are tried, `RETRIED` at most.
    """
    entry = cache.read(name)
    if entry is None:
        return None
    again = [reject.id for reject in (Reject(*each) for each in entry.info["rejects"]) if reject.temporary]
    some = again[:: max(1, len(again) // RETRIED)]
    return None if any(not isinstance(source.read([id_])[0], Reject) for id_ in some) else entry


def normalise_last(outputs: Float32[np.ndarray, "n d"], width: int) -> Float32[np.ndarray, "n d"]:
    """L2-normalise the first `width` columns of a backbone's outputs, the features of the last layer."""
    with np.errstate(over="ignore"):  # of a diverged training
        norms = np.linalg.norm(outputs[:, :width], axis=1, keepdims=True)
    return np.concatenate([outputs[:, :width] / np.maximum(norms, 1e-12), outputs[:, width:]], axis=1)


def probe_scores(outputs: Float32[np.ndarray, "n d"], width: int) -> Float32[np.ndarray, "n s"]:
    """Rank images as nearest-mean probes do, each fitted on five random images against twenty others.

    Args:
        outputs: outputs of a backbone.
        width: number of features of the last layer.
    """
    rows, rng = normalise_last(outputs, width), np.random.default_rng(0)
    picks = [np.array_split(rng.permutation(len(rows))[:25], [5]) for _ in range(PROBES)]
    return np.stack([rows @ (rows[few].mean(axis=0) - rows[many].mean(axis=0)) for few, many in picks], axis=1)


def single_precision(rows: Float16[np.ndarray, "n d"]) -> Float32[np.ndarray, "n d"]:
    """Convert rows to single precision by PyTorch, which takes a fraction of NumPy's time."""
    return torch.from_numpy(np.array(rows)).float().numpy()


@contextmanager
def one_thread() -> Iterator[None]:
    """Limit NumPy and PyTorch to one thread within this block.

    Their threads wait for each other after every small product. With two threads on two idle cores, a ranking of a
    million images took 26.7 s instead of 1.1 s; a training on the same cores makes it worse.
    """
    with _thread_lock, _thread_pools().limit(limits=1):
        yield


@cache
def _thread_pools() -> ThreadpoolController:
    return ThreadpoolController()
