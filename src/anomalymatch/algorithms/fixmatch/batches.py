"""The LightningDataModule of FixMatch: labelled and unlabelled images mixed in every batch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import cv2
import numpy as np
import torch
from jaxtyping import Float32, Int64, UInt8
from pytorch_lightning import LightningDataModule
from pytorch_lightning.utilities import CombinedLoader
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from anomalymatch.algorithms.fixmatch.views import Augmentation, View
from anomalymatch.data.labels import training_ids
from anomalymatch.data.source import ImageSource
from anomalymatch.data.stream import resize
from anomalymatch.errors import ConfigError, DataError
from anomalymatch.types import Image, Reject

IMAGES_A_CANDIDATE = 5
"""At least, in the pool: of a small one, too, the candidates are a choice."""


@dataclass(frozen=True)
class BatchSpec:
    """The make-up of a batch, which is shared out evenly where several processes train.

    Attributes:
        labelled: labelled images in a batch, of all processes together.
        unlabelled_ratio: unlabelled images for each labelled one (FixMatch: mu).
        iterations: batches in one training.
        workers: processes that prepare batches, for each one that trains; 0 prepares them in the training process.
        candidates: images of the pool that are likely anomalies and come more often than others; see `candidates_of`.
        candidate_share: their share of the unlabelled images in a batch; 0 treats all images alike.
    """

    labelled: int = 16
    unlabelled_ratio: int = 5
    iterations: int = 100
    workers: int = 0
    # Older run folders know nothing of what follows, and go on as they began.
    candidates: int = 0
    candidate_share: float = 0.0

    def __post_init__(self) -> None:
        for name in ("labelled", "unlabelled_ratio", "iterations"):
            if getattr(self, name) < 1:
                raise ConfigError(f"algorithm.learner.batch.{name} is {getattr(self, name)}: it must be at least 1")
        for name in ("workers", "candidates"):
            if getattr(self, name) < 0:
                raise ConfigError(f"algorithm.learner.batch.{name} is {getattr(self, name)}: it cannot be negative")
        if not 0.0 <= self.candidate_share <= 1.0:
            raise ConfigError(
                f"algorithm.learner.batch.candidate_share is {self.candidate_share}: it is a share, from 0 to 1"
            )

    @property
    def unlabelled(self) -> int:
        """Unlabelled images in a batch."""
        return self.labelled * self.unlabelled_ratio

    @property
    def wants_candidates(self) -> bool:
        """Whether some images of the pool come more often than others."""
        return bool(self.candidates and self.candidate_places)

    @property
    def candidate_places(self) -> int:
        """How many unlabelled images of a batch they are."""
        return round(self.candidate_share * self.unlabelled)

    def candidates_of(self, pool: int) -> int:
        """How many of the images of a pool are candidates: a fifth at most."""
        return min(self.candidates, -(-pool // IMAGES_A_CANDIDATE))

    def shared_by(self, processes: int) -> "BatchSpec":
        """What each of `processes` gets of every batch.

        Raises:
            ConfigError: if the labelled images cannot be shared out evenly.
        """
        if self.labelled % processes:
            raise ConfigError(
                f"algorithm.learner.batch.labelled is {self.labelled}: {processes} processes train, "
                f"so it must be a multiple of {processes}"
            )
        return replace(self, labelled=self.labelled // processes)


def balanced_draws(targets: Int64[np.ndarray, " n"], count: int, rng: np.random.Generator) -> Int64[np.ndarray, " m"]:
    """Positions drawn with replacement, each with weight 1 / size of its class: all classes come equally often."""
    weights = 1.0 / np.bincount(targets)[targets]
    return rng.choice(len(targets), count, p=weights / weights.sum())


def epoch_draws(pool: int, count: int, rng: np.random.Generator) -> Int64[np.ndarray, " m"]:
    """Positions in 0 … pool-1, reshuffled for every pass, so that none comes twice before all came once."""
    passes = -(-count // pool)
    return np.concatenate([rng.permutation(pool) for _ in range(passes)])[:count]


def pool_draws(
    pool: int, candidates: Int64[np.ndarray, " c"], spec: BatchSpec, rng: np.random.Generator
) -> Int64[np.ndarray, " m"]:
    """Positions in 0 … pool-1 for all batches, of which `candidates` fill their share of every batch.

    Args:
        pool: size of the pool.
        candidates: positions of the likely anomalies; none of them leaves every batch to the whole pool.
        spec: the make-up of a batch.
        rng: the draws' randomness.
    """
    draws = epoch_draws(pool, spec.iterations * spec.unlabelled, rng)
    own = np.arange(len(draws)) % spec.unlabelled < spec.candidate_places
    if len(candidates) and own.any():
        draws[own] = candidates[epoch_draws(len(candidates), int(own.sum()), rng)]
    return draws


def pool_weights(pool: int, candidates: Int64[np.ndarray, " c"], spec: BatchSpec) -> Float32[np.ndarray, " pool"]:
    """By what each image of the pool counts, so that a mean over the batches of `pool_draws` is one over the pool.

    The inverse of how often it comes, compared with an even draw.

    Args:
        pool: size of the pool.
        candidates: positions of the likely anomalies.
        spec: the make-up of a batch.

    Raises:
        ConfigError: if no image but candidates ever comes: they are no sample of the pool, whatever their weights.
    """
    rates = np.ones(pool, np.float32)
    if len(candidates):
        share = spec.candidate_places / spec.unlabelled
        if share == 1.0:
            raise ConfigError(
                f"algorithm.learner.batch.candidate_share is {spec.candidate_share}: aligning to a rate of anomalies "
                f"in the pool needs other images of it, too, so choose less than 1"
            )
        rates *= 1.0 - share
        rates[candidates] += share * pool / len(candidates)
    return 1.0 / rates


_WEAK, _STRONG, _LABELLED = 1, 2, 3


class LabelledViews(Dataset[tuple[UInt8[Tensor, "c h w"], int]]):
    """Weak views of labelled images, one for each draw. The few labelled images stay in memory."""

    def __init__(
        self,
        images: Sequence[Image],
        targets: Int64[np.ndarray, " n"],
        draws: Int64[np.ndarray, " m"],
        weak: View,
        seed: int,
    ) -> None:
        self.images, self.targets, self.draws = images, targets, draws
        self.weak, self.seed = weak, seed

    def __len__(self) -> int:
        return len(self.draws)

    def __getitem__(self, draw: int) -> tuple[UInt8[Tensor, "c h w"], int]:
        position = self.draws[draw]
        view = self.weak(self.images[position], draw_seed(self.seed, _LABELLED, draw))
        return image_tensor(view), int(self.targets[position])


class UnlabelledViews(Dataset[tuple[UInt8[Tensor, "c h w"], UInt8[Tensor, "c h w"], int]]):
    """A weak and a strong view of an unlabelled image, one pair for each draw, with its position in the pool."""

    def __init__(
        self,
        source: ImageSource,
        pool: Sequence[str],
        draws: Int64[np.ndarray, " n"],
        weak: View,
        strong: View,
        size: int,
        seed: int,
    ) -> None:
        self.source, self.pool, self.draws = source, pool, draws
        self.weak, self.strong, self.size, self.seed = weak, strong, size, seed

    def __len__(self) -> int:
        return len(self.draws)

    def __getitem__(self, draw: int) -> tuple[UInt8[Tensor, "c h w"], UInt8[Tensor, "c h w"], int]:
        image, position = self._readable(int(self.draws[draw]))
        image = resize(image, self.size)
        weak = self.weak(image, draw_seed(self.seed, _WEAK, draw))
        strong = self.strong(image, draw_seed(self.seed, _STRONG, draw))
        return image_tensor(weak), image_tensor(strong), position

    def _readable(self, position: int) -> tuple[Image, int]:
        """The image at `position` of the pool, or the next one that can be read; ranking reports the others."""
        for step in range(len(self.pool)):
            candidate = (position + step) % len(self.pool)
            image = self.source.read([self.pool[candidate]])[0]
            if not isinstance(image, Reject):
                return image, candidate
        raise DataError(f"none of the {len(self.pool)} images of the pool can be read")


class MixedBatches(LightningDataModule):
    """Batches of `x_lb, y_lb` (weak views of labelled images) and `x_ulb_w, x_ulb_s, i_ulb` (pairs of views).

    Every draw and every view follows from `seed` alone, so the batches do not depend on the number of workers, nor on
    the number of processes that train: of each batch, process `r` of `n` gets the draws r, r + n, r + 2n, …

    Args:
        source: the images.
        labels: labelled ids; only anomaly and normal are used.
        pool: unlabelled ids to learn from.
        augmentation: the views.
        spec: the make-up of a batch.
        image_size: side of the views, in pixels.
        seed: seed of this training.
        candidates: ids of the pool that are likely anomalies, for `BatchSpec.candidate_share`. A batch drawn evenly
            from a pool with one anomaly in a hundred images has hardly anything to learn of them.
    """

    def __init__(
        self,
        source: ImageSource,
        labels: Mapping[str, str],
        pool: Sequence[str],
        *,
        augmentation: Augmentation,
        spec: BatchSpec,
        image_size: int,
        seed: int,
        candidates: Sequence[str] = (),
    ) -> None:
        super().__init__()
        if not pool:
            raise DataError("there are no unlabelled images left to learn from")
        self.source, self.pool, self.spec, self.seed = source, pool, spec, seed
        chosen = frozenset(candidates)
        self.labels = labels
        self.candidates = np.array([i for i, id_ in enumerate(pool) if id_ in chosen], dtype=np.int64)
        self.image_size = image_size
        self.weak = augmentation.weak(source.channels)
        self.strong = augmentation.strong(source.channels)

    def train_dataloader(self) -> CombinedLoader:
        """`iterations` batches, as the dictionary {"lb": …, "ulb": …}; one of several processes gets its share."""
        rank, processes = (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)
        own = self.spec.shared_by(processes)
        labelled, unlabelled = self.labelled(), self.unlabelled()
        lb = DataLoader(
            Subset(labelled, range(rank, len(labelled), processes)),
            batch_size=own.labelled,
            pin_memory=torch.cuda.is_available(),
        )
        ulb = DataLoader(
            Subset(unlabelled, range(rank, len(unlabelled), processes)),
            batch_size=own.unlabelled,
            num_workers=self.spec.workers,
            prefetch_factor=2 if self.spec.workers else None,
            worker_init_fn=single_threaded,
            pin_memory=torch.cuda.is_available(),
        )
        return CombinedLoader({"lb": lb, "ulb": ulb}, mode="min_size")

    def labelled(self) -> LabelledViews:
        """The labelled half of all batches, one after the other."""
        images, targets = self._labelled_images()
        rng = np.random.default_rng([self.seed, _LABELLED])
        draws = balanced_draws(targets, self.spec.iterations * self.spec.labelled, rng)
        return LabelledViews(images, targets, draws, self.weak, self.seed)

    def _labelled_images(self) -> tuple[list[Image], Int64[np.ndarray, " n"]]:
        """Read every labelled image once; one that cannot be read teaches nothing, and ranking reports it."""
        ids = sorted(self.labels)
        items = zip(ids, self.source.read(ids), strict=True)
        readable = {id_: resize(image, self.image_size) for id_, image in items if not isinstance(image, Reject)}
        anomalies, normals = training_ids({id_: self.labels[id_] for id_ in readable})
        targets = np.repeat(np.array([1, 0]), [len(anomalies), len(normals)])
        return [readable[id_] for id_ in (*anomalies, *normals)], targets

    def unlabelled(self) -> UnlabelledViews:
        """The unlabelled half of all batches, one after the other."""
        rng = np.random.default_rng([self.seed, _WEAK])
        draws = pool_draws(len(self.pool), self.candidates, self.spec, rng)
        return UnlabelledViews(self.source, self.pool, draws, self.weak, self.strong, self.image_size, self.seed)

    def weights(self) -> Float32[np.ndarray, " pool"]:
        """See `pool_weights`."""
        return pool_weights(len(self.pool), self.candidates, self.spec)


def image_tensor(image: Image) -> UInt8[Tensor, "c h w"]:
    """Channels first, without a copy."""
    return torch.from_numpy(image).permute(2, 0, 1)


def draw_seed(seed: int, kind: int, draw: int) -> int:
    """The seed of one view: of the training with `seed`, the view's kind, and the number of the draw."""
    return int(np.random.SeedSequence([seed, kind, draw]).generate_state(1)[0])


def single_threaded(worker: int) -> None:
    """Workers are the parallelism; OpenCV's own threads would only compete, and do not survive a fork."""
    cv2.setNumThreads(0)
