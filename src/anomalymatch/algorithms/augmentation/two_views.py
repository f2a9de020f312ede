"""Views of SimCLR: random crops with changed colours, blurred, and mirrored."""

from collections.abc import Sequence
from dataclasses import dataclass

import albumentations as A  # noqa: N812 (the library's own abbreviation)

from anomalymatch.algorithms.augmentation.view import View
from anomalymatch.checks import Number, check_range
from anomalymatch.errors import ConfigError

_KEY = "two_views"


@dataclass(frozen=True)
class TwoViewAugmentation:
    """Hyper-parameters of a view (SimCLR's recipe): the keys of `conf/base/two_views.yaml`."""

    crop: Sequence[Number] = (0.2, 1.0)
    jitter: Sequence[Number] = (0.4, 0.4, 0.4, 0.1)
    jitter_probability: float = 0.8
    grey: float = 0.2
    blur: float = 0.5
    blur_sigma: Sequence[Number] = (0.1, 2.0)
    flip: float = 0.5
    vertical_flip: float = 0.0

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
