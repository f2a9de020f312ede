"""Pairs of views for contrastive learning: two random versions of the same image, drawn from a seed of their own."""

from collections.abc import Sequence
from dataclasses import dataclass

import albumentations as A  # noqa: N812 (the library's own abbreviation)
import numpy as np
import torch
from jaxtyping import Int64, UInt8
from pytorch_lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from anomalymatch.algorithms.fixmatch.batches import draw_seed, epoch_draws, image_tensor, single_threaded
from anomalymatch.algorithms.fixmatch.views import View
from anomalymatch.data.source import ImageSource
from anomalymatch.data.stream import resize
from anomalymatch.errors import ConfigError, DataError
from anomalymatch.types import Image, Reject

_FIRST, _SECOND = 4, 5
_SIGMA = (0.1, 2.0)


@dataclass(frozen=True)
class TwoViewAugmentation:
    """The hyper-parameters of a view: the recipe of SimCLR, which the mean-shifted loss takes over.

    Attributes:
        crop: smallest and largest share of the area that a random crop keeps; it is enlarged to full size again.
        jitter: largest change of brightness, contrast, saturation and hue; the last two are for colour images.
        jitter_probability: of changing them at all.
        grey: probability of a colour image losing its colour.
        blur: probability of a Gaussian blur.
        flip: probability of a horizontal flip.
        vertical_flip: probability of a vertical flip; 0.5 where up has no meaning, as in the sky.
    """

    crop: Sequence[float]
    jitter: Sequence[float]
    jitter_probability: float
    grey: float
    blur: float
    flip: float
    vertical_flip: float

    def __post_init__(self) -> None:
        for name in ("jitter_probability", "grey", "blur", "flip", "vertical_flip"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ConfigError(f"{_KEY}.{name} is {getattr(self, name)}: it must lie between 0 and 1")
        if len(self.crop) != 2 or not 0.0 < self.crop[0] <= self.crop[1] <= 1.0:
            raise ConfigError(f"{_KEY}.crop is {list(self.crop)}: it must be [low, high] within 0 to 1")
        if len(self.jitter) != 4 or not all(0.0 <= v <= 1.0 for v in self.jitter) or self.jitter[3] > 0.5:
            raise ConfigError(
                f"{_KEY}.jitter is {list(self.jitter)}: it must be four numbers from 0 to 1, the last, of the hue, "
                f"at most 0.5"
            )

    def view(self, channels: int, size: int) -> View:
        """A random view of images of `size` x `size` pixels."""
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
        steps += [A.GaussianBlur(sigma_limit=_SIGMA, blur_limit=0, p=self.blur)]
        return View([*steps, A.HorizontalFlip(p=self.flip), A.VerticalFlip(p=self.vertical_flip)])


_KEY = "algorithm.learner.augmentation"


def _around(change: float) -> tuple[float, float]:
    return 1.0 - change, 1.0 + change


class PairedViews(Dataset[tuple[UInt8[Tensor, "c h w"], UInt8[Tensor, "c h w"]]]):
    """Two views of an image, one pair for each draw."""

    def __init__(
        self, source: ImageSource, ids: Sequence[str], draws: Int64[np.ndarray, " n"], view: View, size: int, seed: int
    ) -> None:
        self.source, self.ids, self.draws, self.view, self.size, self.seed = source, ids, draws, view, size, seed

    def __len__(self) -> int:
        return len(self.draws)

    def __getitem__(self, draw: int) -> tuple[UInt8[Tensor, "c h w"], UInt8[Tensor, "c h w"]]:
        image = resize(self._readable(int(self.draws[draw])), self.size)
        first, second = (self.view(image, draw_seed(self.seed, kind, draw)) for kind in (_FIRST, _SECOND))
        return image_tensor(first), image_tensor(second)

    def _readable(self, position: int) -> Image:
        """The image at `position`, or the next one that can be read; ranking reports the others."""
        for step in range(len(self.ids)):
            image = self.source.read([self.ids[(position + step) % len(self.ids)]])[0]
            if not isinstance(image, Reject):
                return image
        raise DataError(f"none of the {len(self.ids)} images to learn from can be read")


class TwoViewBatches(LightningDataModule):
    """Batches `x_a, x_b` of two views each; every image comes once an epoch, but for those that fill no batch.

    Every draw and every view follows from `seed` alone, whatever the number of workers.

    Args:
        source: the images.
        ids: those to learn from.
        augmentation: the views.
        image_size: side of the views, in pixels.
        batch_size: images in a batch; all of them make one where there are fewer.
        epochs: passes over the images.
        workers: processes that prepare batches; 0 prepares them in the training process.
        seed: seed of this training.
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
        """The pairs of all batches, one after the other."""
        rng = np.random.default_rng([self.seed, _FIRST])
        count = self.steps * self.batch_size
        draws = np.concatenate([epoch_draws(len(self.ids), count, rng) for _ in range(self.epochs)])
        return PairedViews(self.source, self.ids, draws, self.view, self.size, self.seed)

    def train_dataloader(self) -> DataLoader[tuple[UInt8[Tensor, "c h w"], UInt8[Tensor, "c h w"]]]:
        """`epochs` x `steps` batches."""
        return DataLoader(
            self.views(),
            batch_size=self.batch_size,
            num_workers=self.workers,
            prefetch_factor=2 if self.workers else None,
            worker_init_fn=single_threaded,
            pin_memory=torch.cuda.is_available(),
        )
