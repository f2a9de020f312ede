"""Pairs of views for contrastive learning: two random versions of an image, each of which follows from a seed."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64, UInt8
from pytorch_lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from anomalymatch.algorithms.augmentation.loading import epoch_draws, image_tensor, view_loader, whole_or_tile
from anomalymatch.algorithms.augmentation.view import View
from anomalymatch.algorithms.base import derive_seed
from anomalymatch.backbones.tta import Tiling
from anomalymatch.data.source import ImageSource
from anomalymatch.data.stream import next_readable, resize
from anomalymatch.errors import DataError

_FIRST, _SECOND, _TILE = 4, 5, 6


class ViewPair(NamedTuple):
    """Two views of an image, or of a batch of images."""

    x_a: UInt8[Tensor, "... c h w"]
    x_b: UInt8[Tensor, "... c h w"]


class PairedViews(Dataset[ViewPair]):
    """Dataset of two views of an image, or of one of its tiles; one pair for each draw.

    An image that cannot be read is replaced by the next one.
    """

    def __init__(
        self,
        source: ImageSource,
        ids: Sequence[str],
        draws: Int64[np.ndarray, " n"],
        view: View,
        tiling: Tiling,
        seed: int,
    ) -> None:
        self.source, self.ids, self.draws, self.view, self.tiling, self.seed = source, ids, draws, view, tiling, seed

    def __len__(self) -> int:
        return len(self.draws)

    def __getitem__(self, draw: int) -> ViewPair:
        image = next_readable(self.source, self.ids, int(self.draws[draw]), self.tiling.side)[0]
        image = resize(image, self.tiling.side, self.source.rendering.fit)
        image = whole_or_tile(image, self.tiling, derive_seed(self.seed, _TILE, draw))
        first, second = (self.view(image, derive_seed(self.seed, kind, draw)) for kind in (_FIRST, _SECOND))
        return ViewPair(image_tensor(first), image_tensor(second))


class TwoViewBatches(LightningDataModule):
    """LightningDataModule of `ViewPair`s; an epoch has every image once, without an incomplete last batch.

    Every draw and every view follows from `seed` alone, not from the number of workers. `image_size` is the side of
    the views in pixels, `tiles` the number of tiles along each side of an image. With fewer images than `batch_size`,
    all of them are one batch. `done` epochs are left out: a training goes on after them.
    """

    def __init__(
        self,
        source: ImageSource,
        ids: Sequence[str],
        *,
        view: View,
        image_size: int,
        batch_size: int,
        epochs: int,
        workers: int,
        seed: int,
        done: int = 0,
        tiles: int = 1,
    ) -> None:
        super().__init__()
        if not ids:
            raise DataError("there are no images to learn from")
        self.source, self.ids, self.workers = source, ids, workers
        self.tiling, self.epochs, self.seed, self.done = Tiling(tiles, image_size), epochs, seed, done
        self.batch_size = min(batch_size, len(ids))
        self.steps = len(ids) // self.batch_size
        self.view = view

    def views(self) -> PairedViews:
        """Make the dataset of the pairs of all batches."""
        rng = np.random.default_rng([self.seed, _FIRST])
        count = self.steps * self.batch_size
        draws = np.concatenate([epoch_draws(len(self.ids), count, rng) for _ in range(self.epochs)])
        return PairedViews(self.source, self.ids, draws, self.view, self.tiling, self.seed)

    def train_dataloader(self) -> DataLoader:
        """Make the loader of the `steps` batches of each epoch that is left."""
        views, batches = self.views(), self.steps * self.batch_size
        return view_loader(Subset(views, range(self.done * batches, len(views))), self.batch_size, self.workers)
