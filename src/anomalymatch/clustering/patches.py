"""Patch embeddings of images: feature maps of a frozen backbone on a grid, cached on disk."""

from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 (the field's own abbreviation)
from jaxtyping import Float16, Float32, UInt8
from torch import Tensor

from anomalymatch.backbones.embedding import Embedding
from anomalymatch.backbones.features import read_entry
from anomalymatch.backbones.stages import patch_levels
from anomalymatch.backbones.weights import fingerprint
from anomalymatch.cache import Cache, Contents, cache_key
from anomalymatch.checks import check_choice, check_range
from anomalymatch.clustering.distances import patch_projection
from anomalymatch.data.stream import collect, stream
from anomalymatch.errors import ConfigError
from anomalymatch.progress import progress
from anomalymatch.types import Reject

CHUNK_IMAGES = 256
"""Images in one entry of the cache."""
SAMPLE_PATCHES = 200_000
"""Largest number of patches used to compute the principal components."""


@dataclass(frozen=True)
class Bags:
    """Patch embeddings of the readable images.

    Attributes:
        ids: the images, in the order of the rows.
        patches: half precision; patch k of a grid of side g lies in row k // g, column k % g.
        rejects: images that could not be read.
    """

    ids: list[str]
    patches: Float16[Tensor, "n p d"]
    rejects: list[Reject]

    @property
    def grid(self) -> int:
        """Side of the square grid, in patches."""
        return round(self.patches.shape[1] ** 0.5)

    def select(self, ids: Sequence[str]) -> "Bags":
        """Select the readable images among `ids`, in that order."""
        position = {id_: row for row, id_ in enumerate(self.ids)}
        kept = [id_ for id_ in ids if id_ in position]
        wanted = set(ids)
        return Bags(
            kept,
            self.patches[torch.tensor([position[id_] for id_ in kept], dtype=torch.int64)],
            [reject for reject in self.rejects if reject.id in wanted],
        )

    def average(self, side: int) -> "Bags":
        """Average each patch over `side` x `side` patches, fewer at the border; `side` is odd."""
        if side == 1:
            return self
        blocks = []
        for block in self.patches.split(CHUNK_IMAGES):
            maps = block.transpose(1, 2).unflatten(2, (self.grid, self.grid))
            maps = _local_means(maps.float(), side)
            blocks.append(maps.flatten(2).transpose(1, 2).to(block.dtype))
        return replace(self, patches=torch.cat(blocks))


@dataclass(frozen=True)
class PatchSpec:
    """Settings of the patches; conf/clustering/default.yaml explains each and has the defaults."""

    levels: Sequence[int] | None
    grid: int | None
    average: int
    components: int | None
    whitening: float | int

    def __post_init__(self) -> None:
        if self.levels is not None and not 0 < len(self.levels) == len(set(self.levels)):
            raise ConfigError(f"clustering.patches.levels is {list(self.levels)}: name at least one, and none twice")
        check_range("clustering.patches.grid", self.grid, low=1, null=True)
        check_choice("clustering.patches.average", self.average, (1, 3, 5))
        check_range("clustering.patches.components", self.components, low=1, null=True)
        check_range("clustering.patches.whitening", self.whitening, low=0, high=1)


@dataclass(frozen=True)
class PatchEmbedding:
    """Extractor of patches from the images of a source."""

    embedding: Embedding
    spec: PatchSpec

    def bags(self, ids: Sequence[str]) -> Bags:
        """Return the patches of `ids`, from the cache or computed now.

        The patches of each level have unit length, so that all levels have the same influence.

        Raises:
            ConfigError: if the backbone lacks these levels or has no `forward_intermediates`.
            StorageError: if the cache cannot be written.
        """
        chunks = [ids[start : start + CHUNK_IMAGES] for start in range(0, len(ids), CHUNK_IMAGES)]
        cache = Cache(Path(self.embedding.cache_dir) / "patches" / self._key)
        entries = []
        with cache.locked(), progress("Patches", len(ids)) as advance:
            for chunk in chunks:
                name = cache_key({"ids": list(chunk)})
                entry = read_entry(cache, name, self.embedding.source)
                entries.append(entry or cache.write(name, *self._compute(chunk)))
                advance(len(chunk))
        kept = [id_ for entry in entries for id_ in entry.info["ids"]]
        rejects = [Reject(*reject) for entry in entries for reject in entry.info["rejects"]]
        filled = [torch.from_numpy(np.array(entry.arrays["rows"])) for entry in entries if entry.info["ids"]]
        return Bags(kept, torch.cat(filled) if filled else torch.from_numpy(self._empty), rejects)

    def fit_projection(self, bags: Bags, *, seed: int) -> Callable[[Bags], Bags]:
        """Fit the principal components of `bags`; return a function that projects these or other bags.

        Args:
            bags: patches, of which a sample is taken above `SAMPLE_PATCHES`.
            seed: seed of the sample.
        """
        if self.spec.components is None:
            return lambda others: others
        rows = bags.patches.reshape(-1, bags.patches.shape[2])
        if len(rows) > SAMPLE_PATCHES:
            rng = np.random.default_rng([seed, 0x9CA])
            rows = rows[torch.from_numpy(rng.choice(len(rows), SAMPLE_PATCHES, replace=False))]
        mean, projection = patch_projection(rows.float(), self.spec.components, float(self.spec.whitening))

        def project(others: Bags) -> Bags:
            blocks = [((block.float() - mean) @ projection).half() for block in others.patches.split(CHUNK_IMAGES)]
            return Bags(others.ids, torch.cat(blocks), others.rejects)

        return project

    @cached_property
    def levels(self) -> list[int]:
        """Feature maps from which patches are taken."""
        return patch_levels(self.embedding.backbone().body) if self.spec.levels is None else list(self.spec.levels)

    @cached_property
    def _key(self) -> str:
        embedding = self.embedding
        return cache_key(
            {
                "source": embedding.source.fingerprint,
                "weights": fingerprint(embedding.backbone()),
                "name": embedding.name,
                "size": embedding.spec.image_size,
                "bf16": embedding.inference.computes_bf16,
                "levels": self.levels,
                "grid": self.spec.grid,
                "average": self.spec.average,
            }
        )

    @cached_property
    def _extract(self) -> "_PatchExtractor":
        return _PatchExtractor(self.embedding, self.levels, self.spec.grid, self.spec.average)

    @property
    def _empty(self) -> Float16[np.ndarray, "0 1 d"]:
        return np.empty((0, 1, sum(self._extract.channels)), np.float16)

    def _compute(self, ids: Sequence[str]) -> Contents:
        size, inference = self.embedding.spec.image_size, self.embedding.inference
        batches = stream(
            self.embedding.source, ids, size=size, batch_size=inference.batch_size(size), workers=inference.workers
        )
        found = collect(
            ((batch.ids, self._extract(batch.images) if batch.ids else None, batch.rejects) for batch in batches),
            self._empty,
        )
        return {"rows": found.rows}, {"ids": found.ids, "rejects": [astuple(reject) for reject in found.rejects]}


class _PatchExtractor:
    """Function from a batch of images to their patches."""

    def __init__(self, embedding: Embedding, levels: Sequence[int], grid: int | None, average: int) -> None:
        backbone = embedding.backbone().fused()
        body = cast(Any, backbone.body)
        if not hasattr(body, "forward_intermediates"):
            raise ConfigError(
                f"{embedding.name} gives no feature maps: choose a timm model that has forward_intermediates"
            )
        self._inference = embedding.inference
        self._backbone = backbone.to(embedding.inference.torch_device).to(memory_format=torch.channels_last)
        self._levels = list(levels)
        self._grid = grid
        self._average = average
        blank = torch.zeros(1, embedding.source.channels, embedding.spec.image_size, embedding.spec.image_size)
        self.channels = [int(level.shape[1]) for level in self._feature_maps(blank)]

    def __call__(self, images: UInt8[Tensor, "b c h w"]) -> Float32[np.ndarray, "b p d"]:
        """Average each level over its neighbours, resize it to the grid, normalise it; concatenate the levels."""
        maps = self._feature_maps(images)
        grid = self._grid or min(maps[0].shape[-2:])
        levels = []
        for level in maps:
            local = _local_means(level.float(), self._average)
            resized = F.interpolate(local, size=(grid, grid), mode="bilinear", antialias=True, align_corners=False)
            levels.append(F.normalize(resized.flatten(2).transpose(1, 2), dim=2))
        return torch.cat(levels, 2).cpu().numpy()

    def _feature_maps(self, images: Tensor) -> list[Tensor]:
        backbone = self._backbone
        with torch.inference_mode(), self._inference.autocast():
            pixels = images.to(self._inference.torch_device).to(backbone.mean.dtype)
            try:
                return cast(Any, backbone.body).forward_intermediates(
                    (pixels - backbone.mean) / backbone.std,
                    indices=self._levels,
                    intermediates_only=True,
                    output_fmt="NCHW",
                )
            except (AssertionError, IndexError) as error:
                raise ConfigError(
                    f"clustering.patches.levels is {self._levels}: the backbone has no such feature maps ({error})"
                ) from error


def _local_means(maps: Float32[Tensor, "b c h w"], side: int) -> Float32[Tensor, "b c h w"]:
    """Average over squares of `side` x `side` cells; at the border, only cells inside the map count."""
    return F.avg_pool2d(maps, side, stride=1, padding=side // 2, count_include_pad=False)
