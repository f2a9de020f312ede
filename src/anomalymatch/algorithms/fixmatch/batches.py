"""LightningDataModule of FixMatch: batches of labelled and unlabelled images."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float32, Int64, UInt8
from pytorch_lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from anomalymatch.algorithms.augmentation.loading import epoch_draws, image_tensor, view_loader, whole_or_tile
from anomalymatch.algorithms.augmentation.objects import ObjectAugmentation
from anomalymatch.algorithms.augmentation.view import Augmentation, View
from anomalymatch.algorithms.base import derive_seed
from anomalymatch.backbones.tta import Tiling
from anomalymatch.checks import check_range
from anomalymatch.data.labels import training_ids
from anomalymatch.data.source import ImageSource
from anomalymatch.data.stream import next_readable, none_readable, read_images, resize
from anomalymatch.errors import ConfigError, DataError
from anomalymatch.types import Image

KEY = "algorithm.learner.batch"


class MixedBatch(NamedTuple):
    """Batch of FixMatch."""

    x_lb: UInt8[Tensor, "l c h w"]
    """Weak views of labelled images."""
    y_lb: Int64[Tensor, " l"]
    """Their classes."""
    x_ulb_w: UInt8[Tensor, "u c h w"]
    """Weak views of unlabelled images."""
    x_ulb_s: UInt8[Tensor, "u c h w"]
    """Strong views of the same images."""
    i_ulb: Int64[Tensor, " u"]
    """Positions of the unlabelled images in the pool."""


@dataclass(frozen=True)
class BatchSpec:
    """Composition of the batches: the keys of `batch` in `conf/algorithm/fixmatch.yaml`.

    `labelled` counts the images of all processes; `workers` is for each of them; `iterations` is the number of batches
    in an epoch. The defaults are those of the paper (`algorithm=fixmatch_reference`), without worker processes.

    Example:
        >>> am.BatchSpec(labelled=8).unlabelled
        40
    """

    labelled: int = 16
    unlabelled_ratio: int = 5
    iterations: int = 100
    workers: int = 0
    candidates: int = 0
    candidate_share: float = 0.0
    pool_per_candidate: float | int = 5

    def __post_init__(self) -> None:
        for name in ("labelled", "unlabelled_ratio", "iterations", "pool_per_candidate"):
            check_range(f"{KEY}.{name}", getattr(self, name), low=1)
        for name in ("workers", "candidates"):
            check_range(f"{KEY}.{name}", getattr(self, name), low=0)
        check_range(f"{KEY}.candidate_share", self.candidate_share, low=0, high=1)

    @property
    def unlabelled(self) -> int:
        """Number of unlabelled images in a batch."""
        return self.labelled * self.unlabelled_ratio

    @property
    def wants_candidates(self) -> bool:
        """True if some images of the pool are drawn more often than others."""
        return bool(self.candidates and self.candidates_per_batch)

    @property
    def candidates_per_batch(self) -> int:
        """Number of unlabelled images in a batch that are drawn from the candidates."""
        return round(self.candidate_share * self.unlabelled)

    def candidates_of(self, pool: int) -> int:
        """Return the number of candidates in a pool of so many images."""
        return min(self.candidates, int(-(-pool // self.pool_per_candidate)))

    def shared_by(self, processes: int) -> "BatchSpec":
        """Return the composition of each process's share of a batch.

        Raises:
            ConfigError: if the labelled images cannot be divided evenly.
        """
        if self.labelled % processes:
            raise ConfigError(
                f"{KEY}.labelled is {self.labelled}: it must be a multiple of the number of processes, {processes}"
            )
        return replace(self, labelled=self.labelled // processes)


def balanced_draws(targets: Int64[np.ndarray, " n"], count: int, rng: np.random.Generator) -> Int64[np.ndarray, " m"]:
    """Draw positions with replacement and weight 1 / size of the class, so that all classes are equally frequent."""
    weights = 1.0 / np.bincount(targets)[targets]
    return rng.choice(len(targets), count, p=weights / weights.sum())


def pool_draws(
    pool: int, candidates: Int64[np.ndarray, " c"], spec: BatchSpec, rng: np.random.Generator
) -> Int64[np.ndarray, " m"]:
    """Draw positions in 0 … pool-1 for all batches; every batch has its share of the positions `candidates`, if any."""
    draws = epoch_draws(pool, spec.iterations * spec.unlabelled, rng)
    own = np.arange(len(draws)) % spec.unlabelled < spec.candidates_per_batch
    if len(candidates) and own.any():
        draws[own] = candidates[epoch_draws(len(candidates), int(own.sum()), rng)]
    return draws


def pool_weights(pool: int, candidates: Int64[np.ndarray, " c"], spec: BatchSpec) -> Float32[np.ndarray, " pool"]:
    """Compute the weight of each image with which a mean over the batches of `pool_draws` is a mean over the pool.

    It is the inverse of how often the image is drawn, relative to an even draw.

    Raises:
        ConfigError: if only candidates are ever drawn: no weights make them a sample of the pool.
    """
    rates = np.ones(pool, np.float32)
    if len(candidates):
        share = spec.candidates_per_batch / spec.unlabelled
        if share == 1.0:
            raise ConfigError(
                f"{KEY}.candidate_share is {spec.candidate_share}: alignment to a rate of anomalies in the pool needs "
                f"other images too, so choose less than 1"
            )
        rates *= 1.0 - share
        rates[candidates] += share * pool / len(candidates)
    return 1.0 / rates


REFERENCE_VIEWS, REFERENCE_BATCHES = ObjectAugmentation(), BatchSpec()
"""Views and batches of the paper."""
_WEAK, _STRONG, _LABELLED, _TILE = 1, 2, 3, 4


class LabelledViews(Dataset[tuple[UInt8[Tensor, "c h w"], int]]):
    """Dataset of weak views of the labelled images, or of their tiles; one item for each draw.

    The images stay in memory, in the size that their tiles cover.
    """

    def __init__(
        self,
        images: Sequence[Image],
        targets: Int64[np.ndarray, " n"],
        draws: Int64[np.ndarray, " m"],
        weak: View,
        tiling: Tiling,
        seed: int,
    ) -> None:
        self.images, self.targets, self.draws = images, targets, draws
        self.weak, self.tiling, self.seed = weak, tiling, seed

    def __len__(self) -> int:
        return len(self.draws)

    def __getitem__(self, draw: int) -> tuple[UInt8[Tensor, "c h w"], int]:
        position = self.draws[draw]
        image = whole_or_tile(self.images[position], self.tiling, derive_seed(self.seed, _LABELLED, draw, _TILE))
        view = self.weak(image, derive_seed(self.seed, _LABELLED, draw))
        return image_tensor(view), int(self.targets[position])


class UnlabelledViews(Dataset[tuple[UInt8[Tensor, "c h w"], UInt8[Tensor, "c h w"], int]]):
    """Dataset of a weak and a strong view of an unlabelled image and its position; one item for each draw.

    With tiles, both are views of the whole image, or both of the same tile. An image that cannot be read is replaced
    by the next one in the pool.
    """

    def __init__(
        self,
        source: ImageSource,
        pool: Sequence[str],
        draws: Int64[np.ndarray, " n"],
        weak: View,
        strong: View,
        tiling: Tiling,
        seed: int,
    ) -> None:
        self.source, self.pool, self.draws = source, pool, draws
        self.weak, self.strong, self.tiling, self.seed = weak, strong, tiling, seed

    def __len__(self) -> int:
        return len(self.draws)

    def __getitem__(self, draw: int) -> tuple[UInt8[Tensor, "c h w"], UInt8[Tensor, "c h w"], int]:
        image, position = next_readable(self.source, self.pool, int(self.draws[draw]), self.tiling.side)
        image = resize(image, self.tiling.side, self.source.rendering.fit)
        image = whole_or_tile(image, self.tiling, derive_seed(self.seed, _TILE, draw))
        weak = self.weak(image, derive_seed(self.seed, _WEAK, draw))
        strong = self.strong(image, derive_seed(self.seed, _STRONG, draw))
        return image_tensor(weak), image_tensor(strong), position


@dataclass(frozen=True)
class MixedLoader:
    """Iterable of the batches of an epoch, each a `MixedBatch`; each epoch of the trainer has other draws and views."""

    data: "MixedBatches"

    def __len__(self) -> int:
        return self.data.spec.iterations

    def __iter__(self) -> Iterator[MixedBatch]:
        trainer = self.data.trainer
        epoch, rank, processes = (
            (0, 0, 1) if trainer is None else (trainer.current_epoch, trainer.global_rank, trainer.world_size)
        )
        own, labelled, unlabelled = self.data.spec.shared_by(processes), *self.data.views(epoch)
        lb = DataLoader(
            Subset(labelled, range(rank, len(labelled), processes)),
            batch_size=own.labelled,
            pin_memory=torch.cuda.is_available(),
        )
        ulb = view_loader(Subset(unlabelled, range(rank, len(unlabelled), processes)), own.unlabelled, own.workers)
        for images, others in zip(lb, ulb, strict=True):
            yield MixedBatch(*images, *others)


class MixedBatches(LightningDataModule):
    """LightningDataModule whose batches are those of FixMatch, `MixedBatch`.

    Draws and views follow from `seed` and the epoch alone, so the batches depend neither on the number of workers nor
    on the number of training processes: of each batch, process `r` of `n` gets the draws r, r + n, r + 2n, …

    Args:
        source: the images.
        labels: labelled ids; only anomaly and normal are used.
        pool: unlabelled ids to learn from.
        image_size: side of the views in pixels.
        tiles: number of tiles along each side of an image, of which views are taken beside those of the whole image.
        augmentation: the views.
        spec: the composition of the batches.
        seed: seed of this training.
        candidates: ids of the pool that are likely anomalies, for `BatchSpec.candidate_share`. Batches drawn evenly
            from a pool with one anomaly in a hundred images have too few anomalies to learn from.

    Example:
        >>> spec = am.BatchSpec(labelled=4, unlabelled_ratio=2, iterations=3)
        >>> batches = am.MixedBatches(task.source, labels, task.pool, image_size=32, spec=spec)
        >>> batch = next(iter(batches.train_dataloader()))
        >>> batch.x_lb.shape, batch.x_ulb_w.shape
        (torch.Size([4, 3, 32, 32]), torch.Size([8, 3, 32, 32]))
    """

    def __init__(
        self,
        source: ImageSource,
        labels: Mapping[str, str],
        pool: Sequence[str],
        *,
        image_size: int,
        tiles: int = 1,
        augmentation: Augmentation = REFERENCE_VIEWS,
        spec: BatchSpec = REFERENCE_BATCHES,
        seed: int = 0,
        candidates: Sequence[str] = (),
    ) -> None:
        super().__init__()
        if not pool:
            raise DataError("there are no unlabelled images left to learn from")
        self.source, self.pool, self.spec, self.seed = source, pool, spec, seed
        chosen = frozenset(candidates)
        self.labels = labels
        self.candidates = np.array([i for i, id_ in enumerate(pool) if id_ in chosen], dtype=np.int64)
        self.tiling = Tiling(tiles, image_size)
        self.weak = augmentation.weak(source.channels)
        self.strong = augmentation.strong(source.channels)

    def train_dataloader(self) -> MixedLoader:
        """Make the loader of `iterations` batches an epoch; with several processes, of this one's share of them."""
        return MixedLoader(self)

    def views(self, epoch: int = 0) -> tuple[LabelledViews, UnlabelledViews]:
        """Make the datasets of the labelled and the unlabelled half of all batches of an epoch."""
        seed = derive_seed(self.seed, epoch) if epoch else self.seed
        images, targets = self._labelled_images
        lb = balanced_draws(
            targets, self.spec.iterations * self.spec.labelled, np.random.default_rng([seed, _LABELLED])
        )
        ulb = pool_draws(len(self.pool), self.candidates, self.spec, np.random.default_rng([seed, _WEAK]))
        return (
            LabelledViews(images, targets, lb, self.weak, self.tiling, seed),
            UnlabelledViews(self.source, self.pool, ulb, self.weak, self.strong, self.tiling, seed),
        )

    @cached_property
    def _labelled_images(self) -> tuple[list[Image], Int64[np.ndarray, " n"]]:
        """Labelled images and their classes; images that cannot be read are left out."""
        side = self.tiling.side
        found = read_images(self.source, sorted(self.labels), side)
        if found.rejects and not found.ids:
            raise none_readable(self.source, found.rejects)
        images = [resize(image, side, self.source.rendering.fit) for image in found.images]
        readable = dict(zip(found.ids, images, strict=True))
        anomalies, normals = training_ids({id_: self.labels[id_] for id_ in readable})
        targets = np.repeat(np.array([1, 0]), [len(anomalies), len(normals)])
        return [readable[id_] for id_ in (*anomalies, *normals)], targets

    def weights(self) -> Float32[np.ndarray, " pool"]:
        """Compute `pool_weights` of this pool."""
        return pool_weights(len(self.pool), self.candidates, self.spec)
