"""Dense features of a frozen backbone: every image a bag of patch embeddings, computed once and kept on disk."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 (the field's own abbreviation)
from filelock import FileLock
from jaxtyping import Float16, Float32, UInt8
from torch import Tensor

from anomalymatch.backbones.embedding import Embedding
from anomalymatch.backbones.features import Shard, read_shard, write_shard
from anomalymatch.backbones.weights import fingerprint
from anomalymatch.clustering.distances import patch_projection
from anomalymatch.data.stream import stream
from anomalymatch.errors import ConfigError
from anomalymatch.files import make_folder, storage_errors
from anomalymatch.progress import Advance, progress
from anomalymatch.types import Reject

FORMAT = 1
CHUNK_IMAGES = 256
"""Images in one file of the cache."""
SAMPLE_PATCHES = 200_000
"""Patches that the principal components are computed of."""


@dataclass(frozen=True)
class Bags:
    """The patches of the readable images.

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
        """Patches on a side of the square grid."""
        return round(self.patches.shape[1] ** 0.5)

    def rows(self, ids: Sequence[str]) -> "Bags":
        """Those of `ids` that are readable, in that order."""
        position = {id_: row for row, id_ in enumerate(self.ids)}
        kept = [id_ for id_ in ids if id_ in position]
        wanted = set(ids)
        return Bags(
            kept,
            self.patches[torch.tensor([position[id_] for id_ in kept], dtype=torch.int64)],
            [reject for reject in self.rejects if reject.id in wanted],
        )


@dataclass(frozen=True)
class PatchSpec:
    """How feature maps become patches.

    Attributes:
        levels: which of the backbone's feature maps, counted as timm counts them (an EfficientNet has 0 to 4, at
            1/2 to 1/32 of the image's side).
        grid: side of the grid that all levels are resized to; None takes that of the first level.
        components: principal components of the patches that are kept; None keeps the patches as they are.
        whitening: 0 leaves the components' spreads, 1 makes them equal (see `functional.clustering.patch_projection`).
    """

    levels: Sequence[int]
    grid: int | None
    components: int | None
    whitening: float

    def __post_init__(self) -> None:
        if not self.levels or len(set(self.levels)) != len(self.levels):
            raise ConfigError(f"clustering.patches.levels is {list(self.levels)}: name at least one, and none twice")
        if self.grid is not None and self.grid < 1:
            raise ConfigError(f"clustering.patches.grid is {self.grid}: it must be at least 1, or null")
        if self.components is not None and self.components < 1:
            raise ConfigError(f"clustering.patches.components is {self.components}: it must be at least 1, or null")
        if not 0.0 <= self.whitening <= 1.0:
            raise ConfigError(f"clustering.patches.whitening is {self.whitening}: it must lie between 0 and 1")


@dataclass(frozen=True)
class PatchEmbedding:
    """Patches of the images of a source.

    Attributes:
        embedding: backbone, image size, source, cache and device.
        spec: how its feature maps become patches.
    """

    embedding: Embedding
    spec: PatchSpec

    def bags(self, ids: Sequence[str]) -> Bags:
        """Patches of `ids`, from the cache or computed now; each level's are L2-normalised: none drowns another.

        Raises:
            ConfigError: if the backbone has no such levels, or cannot say.
            StorageError: if the cache cannot be written.
        """
        chunks = [ids[start : start + CHUNK_IMAGES] for start in range(0, len(ids), CHUNK_IMAGES)]
        folder = make_folder(Path(self.embedding.cache_dir) / "patches" / self._key)
        with storage_errors(folder), FileLock(folder / "lock"), progress("Patches", len(ids)) as advance:
            shards = [self._chunk(folder, chunk, advance) for chunk in chunks]
        kept = [id_ for shard in shards for id_ in shard.ids]
        rejects = [reject for shard in shards for reject in shard.rejects]
        filled = [torch.from_numpy(np.array(shard.rows)) for shard in shards if shard.ids]
        depth = sum(self._dense.channels)
        flat = torch.cat(filled) if filled else torch.empty(0, depth, dtype=torch.float16)
        return Bags(kept, flat.view(len(kept), -1, depth) if filled else flat.view(0, 1, depth), rejects)

    def projected(self, bags: Bags, *, seed: int) -> Callable[[Bags], Bags]:
        """The projection that the patches of `bags` suggest, to be applied to them and to others.

        Args:
            bags: patches, of which a sample is taken where there are very many.
            seed: draws the sample.
        """
        if self.spec.components is None:
            return lambda others: others
        rows = bags.patches.reshape(-1, bags.patches.shape[2])
        if len(rows) > SAMPLE_PATCHES:
            rng = np.random.default_rng([seed, 0x9CA])
            rows = rows[torch.from_numpy(rng.choice(len(rows), SAMPLE_PATCHES, replace=False))]
        mean, projection = patch_projection(rows.float(), self.spec.components, self.spec.whitening)

        def project(others: Bags) -> Bags:
            parts = [((part.float() - mean) @ projection).half() for part in others.patches.split(CHUNK_IMAGES)]
            return Bags(others.ids, torch.cat(parts), others.rejects)

        return project

    @cached_property
    def _key(self) -> str:
        embedding = self.embedding
        numeric = "bf16" if embedding.inference.computes_bf16 else "fp32"
        weights = fingerprint(embedding.backbone())
        parts = [FORMAT, embedding.source.fingerprint, weights, embedding.name, embedding.image_size, numeric]
        parts += [list(self.spec.levels), self.spec.grid]
        return hashlib.blake2b(json.dumps(parts).encode(), digest_size=12).hexdigest()

    @cached_property
    def _dense(self) -> "_Dense":
        return _Dense(self.embedding, self.spec)

    def _chunk(self, folder: Path, ids: Sequence[str], advance: Advance) -> Shard:
        path = folder / hashlib.blake2b(json.dumps(list(ids)).encode(), digest_size=12).hexdigest()
        shard = read_shard(path)
        if shard is None:
            shard = write_shard(path, self._compute(ids, advance))
        else:
            advance(len(ids))
        return shard

    def _compute(self, ids: Sequence[str], advance: Advance) -> Shard:
        kept: list[str] = []
        rejects: list[Reject] = []
        rows: list[Float16[np.ndarray, "b d"]] = []
        size, inference = self.embedding.image_size, self.embedding.inference
        batches = stream(
            self.embedding.source, ids, size=size, batch_size=inference.batch_size(size), workers=inference.workers
        )
        for batch in batches:
            if batch.ids:
                patches = self._dense(batch.images)
                rows.append(patches.reshape(len(patches), -1).astype(np.float16))
            kept += batch.ids
            rejects += batch.rejects
            advance(len(batch.ids) + len(batch.rejects))
        return Shard(kept, np.concatenate(rows) if rows else np.empty((0, 1), dtype=np.float16), rejects)


class _Dense:
    """The backbone as a function from images to patches."""

    def __init__(self, embedding: Embedding, spec: PatchSpec) -> None:
        backbone = embedding.backbone().folded().eval()
        body = cast(Any, backbone.body)
        if not hasattr(body, "forward_intermediates"):
            raise ConfigError(
                f"{embedding.name} gives no feature maps: take a model of timm with forward_intermediates"
            )
        self._inference = embedding.inference
        self._backbone = backbone.to(embedding.inference.torch_device).to(memory_format=torch.channels_last)
        self._levels = list(spec.levels)
        self._grid = spec.grid
        blank = torch.zeros(1, embedding.source.channels, embedding.image_size, embedding.image_size)
        self.channels = [int(level.shape[1]) for level in self._maps(blank)]

    def __call__(self, images: UInt8[Tensor, "b c h w"]) -> Float32[np.ndarray, "b p d"]:
        """Each level averaged over 3 x 3 places, resized to the grid, L2-normalised; then side by side."""
        maps = self._maps(images)
        grid = self._grid or min(maps[0].shape[-2:])
        parts = []
        for level in maps:
            local = F.avg_pool2d(level.float(), 3, stride=1, padding=1, count_include_pad=False)
            resized = F.interpolate(local, size=(grid, grid), mode="bilinear", antialias=True, align_corners=False)
            parts.append(F.normalize(resized.flatten(2).transpose(1, 2), dim=2))
        return torch.cat(parts, 2).cpu().numpy()

    def _maps(self, images: Tensor) -> list[Tensor]:
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
