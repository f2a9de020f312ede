"""Pairs of views for contrastive learning: two random versions of an image, each of which follows from a seed."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import albumentations as A  # noqa: N812 (the library's own abbreviation)
import numpy as np
from jaxtyping import Int64, UInt8
from pytorch_lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from anomalymatch.algorithms.base import derive_seed
from anomalymatch.algorithms.fixmatch.batches import epoch_draws, image_tensor, view_loader
from anomalymatch.algorithms.fixmatch.views import View
from anomalymatch.checks import check_range
from anomalymatch.data.source import ImageSource
from anomalymatch.data.stream import next_readable, resize
from anomalymatch.errors import ConfigError, DataError

_FIRST, _SECOND = 4, 5
_KEY = "algorithm.learner.augmentation"


@dataclass(frozen=True)
class TwoViewAugmentation:
    """Hyper-parameters of a view (SimCLR's recipe): the keys of `augmentation` in `conf/algorithm/msc.yaml`."""

    crop: Sequence[float]
    jitter: Sequence[float]
    jitter_probability: float
    grey: float
    blur: float
    blur_sigma: Sequence[float]
    flip: float
    vertical_flip: float

    def __post_init__(self) -> None:
        for name in ("jitter_probability", "grey", "blur", "flip", "vertical_flip"):
            check_range(f"{_KEY}.{name}", getattr(self, name), low=0, high=1)
        if len(self.crop) != 2 or not 0.0 < self.crop[0] <= self.crop[1] <= 1.0:
            raise ConfigError(f"{_KEY}.crop is {list(self.crop)}: it must be [low, high] within 0 to 1")
        if len(self.jitter) != 4 or not all(0.0 <= v <= 1.0 for v in self.jitter) or self.jitter[3] > 0.5:
            raise ConfigError(
                f"{_KEY}.jitter is {list(self.jitter)}: it must be four numbers from 0 to 1, the last (hue) at most 0.5"
            )
        if len(self.blur_sigma) != 2 or not 0.0 < self.blur_sigma[0] <= self.blur_sigma[1]:
            raise ConfigError(f"{_KEY}.blur_sigma is {list(self.blur_sigma)}: it must be [low, high] above 0")

    def view(self, channels: int, size: int) -> View:
        """Build a random view of `size` x `size` pixels."""
        brightness, contrast, saturation, hue = self.jitter
        p = self.jitter_probability
        steps: list[A.BasicTransform] = [
            A.RandomResizedCrop(size=(size, size), scale=(self.crop[0], self.crop[1]), p=1.0)
        ]
        if channels == 3:
            steps += [A.ColorJitter(_around(brightness), _around(contrast), _around(saturation), (-hue, hue), p=p)]
            steps += [A.ToGray(p=self.grey)]
        else:
            steps += [A.RandomBrightnessContrast((-brightness, brightness), (-contrast, contrast), p=p)]
        steps += [A.GaussianBlur(sigma_limit=(self.blur_sigma[0], self.blur_sigma[1]), blur_limit=0, p=self.blur)]
        return View([*steps, A.HorizontalFlip(p=self.flip), A.VerticalFlip(p=self.vertical_flip)])


def _around(change: float) -> tuple[float, float]:
    return 1.0 - change, 1.0 + change


class ViewPair(NamedTuple):
    """Two views of an image, or of a batch of images."""

    x_a: UInt8[Tensor, "... c h w"]
    x_b: UInt8[Tensor, "... c h w"]


class PairedViews(Dataset[ViewPair]):
    """Dataset of two views of an image; one pair for each draw.

    An image that cannot be read is replaced by the next one.
    """

    def __init__(
        self, source: ImageSource, ids: Sequence[str], draws: Int64[np.ndarray, " n"], view: View, size: int, seed: int
    ) -> None:
        self.source, self.ids, self.draws, self.view, self.size, self.seed = source, ids, draws, view, size, seed

    def __len__(self) -> int:
        return len(self.draws)

    def __getitem__(self, draw: int) -> ViewPair:
        image = next_readable(self.source, self.ids, int(self.draws[draw]), self.size)[0]
        image = resize(image, self.size, self.source.rendering.fit)
        first, second = (self.view(image, derive_seed(self.seed, kind, draw)) for kind in (_FIRST, _SECOND))
        return ViewPair(image_tensor(first), image_tensor(second))


class TwoViewBatches(LightningDataModule):
    """LightningDataModule of `ViewPair`s; an epoch has every image once, without an incomplete last batch.

    Every draw and every view follows from `seed` alone, not from the number of workers. `image_size` is the side of
    the views in pixels. With fewer images than `batch_size`, all of them are one batch.
    """

    def __init__(
        self,
        source: ImageSource,
        ids: Sequence[str],
        *,
        augmentation: TwoViewAugmentation,
        image_size: int,
        batch_size: int,
        epochs: int,
        workers: int,
        seed: int,
    ) -> None:
        super().__init__()
        if not ids:
            raise DataError("there are no images to learn from")
        self.source, self.ids, self.workers = source, ids, workers
        self.size, self.epochs, self.seed = image_size, epochs, seed
        self.batch_size = min(batch_size, len(ids))
        self.steps = len(ids) // self.batch_size
        self.view = augmentation.view(source.channels, image_size)

    def views(self) -> PairedViews:
        """Make the dataset of the pairs of all batches."""
        rng = np.random.default_rng([self.seed, _FIRST])
        count = self.steps * self.batch_size
        draws = np.concatenate([epoch_draws(len(self.ids), count, rng) for _ in range(self.epochs)])
        return PairedViews(self.source, self.ids, draws, self.view, self.size, self.seed)

    def train_dataloader(self) -> DataLoader:
        """Make the loader of `epochs` x `steps` batches."""
        return view_loader(self.views(), self.batch_size, self.workers)
