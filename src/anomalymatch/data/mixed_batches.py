"""The LightningDataModule of FixMatch: labelled and unlabelled images mixed in every batch."""

from collections.abc import Mapping, Sequence

import cv2
import numpy as np
import torch
from jaxtyping import Float32, Int64, UInt8
from pytorch_lightning import LightningDataModule
from pytorch_lightning.utilities import CombinedLoader
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from anomalymatch.data.augment import Augmentation, View
from anomalymatch.data.draws import BatchSpec as BatchSpec  # under which run folders know it
from anomalymatch.data.draws import balanced_draws, pool_draws, pool_weights
from anomalymatch.data.labels import training_ids
from anomalymatch.data.source import ImageSource
from anomalymatch.data.stream import resize
from anomalymatch.errors import DataError
from anomalymatch.types import Image, Reject

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
