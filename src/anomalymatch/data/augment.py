"""Weak and strong views of FixMatch with albumentations: drawn for each image, from a seed of its own."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # importing a library must not phone home

import albumentations as A  # noqa: N812 (after the environment; the library's own abbreviation)
import cv2
import numpy as np

from anomalymatch.errors import ConfigError
from anomalymatch.types import Image

_BORDER = cv2.BORDER_REFLECT_101
_UNCHANGED = (1.0, 1.0)


class Sharpness(A.ImageOnlyTransform):
    """Blend an image with its smoothed self: factor 1 leaves it, 0 smooths it (Pillow's `Sharpness`)."""

    def __init__(self, factor_range: tuple[float, float], p: float = 0.5) -> None:
        super().__init__(p=p)
        self.factor_range = factor_range

    def get_params(self) -> dict[str, Any]:
        """Draw the factor."""
        return {"factor": self.py_random.uniform(*self.factor_range)}

    def apply(self, img: np.ndarray, factor: float = 1.0, **_: Any) -> np.ndarray:
        """Smooth with Pillow's 3 x 3 kernel and blend."""
        kernel = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], dtype=np.float32) / 13.0
        smooth = cv2.filter2D(img, -1, kernel, borderType=cv2.BORDER_REPLICATE).reshape(img.shape)
        return cv2.addWeighted(img, factor, smooth, 1.0 - factor, 0.0).reshape(img.shape)


@dataclass(frozen=True)
class Augmentation:
    """The hyper-parameters of both views.

    Attributes:
        flip: probability of a horizontal flip (both views).
        vertical_flip: probability of a vertical flip (both views); 0.5 where up has no meaning, as in the sky.
        translate: largest shift of the weak view, as a share of the side.
        operations: how many operations the strong view draws, with replacement.
        factor: range of brightness, contrast, saturation and sharpness factors (FixMatch, appendix D: 0.05 to 0.95).
        posterize_bits: bits kept per channel.
        rotate: largest rotation, in degrees.
        shear: largest shear, as a slope.
        strong_translate: largest shift of the strong view along one axis, as a share of the side.
        cutout: largest side of the square that is greyed out, as a share of the side.
    """

    flip: float = 0.5
    vertical_flip: float = 0.0
    translate: float = 0.125
    operations: int = 3
    factor: tuple[float, float] = (0.05, 0.95)
    posterize_bits: tuple[int, int] = (4, 8)
    rotate: float = 30.0
    shear: float = 0.3
    strong_translate: float = 0.3
    cutout: float = 0.5

    def __post_init__(self) -> None:
        for name in ("flip", "vertical_flip", "translate", "strong_translate", "cutout"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ConfigError(f"augment.{name} is {getattr(self, name)}: it must lie between 0 and 1")
        if self.operations < 0:
            raise ConfigError(f"augment.operations is {self.operations}: it cannot be negative")

    def weak(self, channels: int) -> "View":
        """Flips and a small translation."""
        return View(self._weak_steps(), channels)

    def strong(self, channels: int) -> "View":
        """`operations` random operations, cutout, then the weak view's steps (RandAugment as in FixMatch)."""
        steps: list[A.BasicTransform | A.BaseCompose] = []
        if self.operations:
            steps.append(A.SomeOf(self._operations(channels), n=self.operations, replace=True, p=1.0))
        if self.cutout:
            hole = (0.01, self.cutout)
            steps.append(A.CoarseDropout((1, 1), hole, hole, fill=127, p=1.0))
        return View([*steps, *self._weak_steps()], channels)

    def _weak_steps(self) -> list[A.BasicTransform]:
        shift = (-self.translate, self.translate)
        return [
            A.HorizontalFlip(p=self.flip),
            A.VerticalFlip(p=self.vertical_flip),
            A.Affine(translate_percent={"x": shift, "y": shift}, border_mode=_BORDER, p=1.0),
        ]

    def _operations(self, channels: int) -> list[A.BasicTransform]:
        slope = math.degrees(math.atan(self.shear))
        shear, shift = (-slope, slope), (-self.strong_translate, self.strong_translate)
        return [
            A.AutoContrast(p=1.0),
            *_photometric(tuple(self.factor), channels),
            Sharpness(tuple(self.factor), p=1.0),
            A.NoOp(p=1.0),
            A.Posterize(tuple(self.posterize_bits), p=1.0),
            A.Solarize((0.0, 1.0), p=1.0),
            A.Affine(rotate=(-self.rotate, self.rotate), border_mode=_BORDER, p=1.0),
            A.Affine(shear={"x": shear, "y": (0, 0)}, border_mode=_BORDER, p=1.0),
            A.Affine(shear={"x": (0, 0), "y": shear}, border_mode=_BORDER, p=1.0),
            A.Affine(translate_percent={"x": shift, "y": (0, 0)}, border_mode=_BORDER, p=1.0),
            A.Affine(translate_percent={"x": (0, 0), "y": shift}, border_mode=_BORDER, p=1.0),
        ]


def _photometric(factor: tuple[float, float], channels: int) -> list[A.BasicTransform]:
    """Brightness and contrast for any number of bands; equalisation where it has a meaning; saturation for colour."""
    if channels not in (1, 3):
        limit = (factor[0] - 1.0, factor[1] - 1.0)
        return [
            A.RandomBrightnessContrast(brightness_limit=limit, contrast_limit=(0.0, 0.0), p=1.0),
            A.RandomBrightnessContrast(brightness_limit=(0.0, 0.0), contrast_limit=limit, p=1.0),
        ]
    jitter: list[Sequence[tuple[float, float]]] = [(factor, _UNCHANGED, _UNCHANGED), (_UNCHANGED, factor, _UNCHANGED)]
    if channels == 3:
        jitter.append((_UNCHANGED, _UNCHANGED, factor))
    return [A.ColorJitter(*ranges, hue=(0.0, 0.0), p=1.0) for ranges in jitter] + [A.Equalize(p=1.0)]


class View:
    """A random transformation of one image that depends on nothing but the image and a seed."""

    def __init__(self, steps: Sequence[A.BasicTransform | A.BaseCompose], channels: int) -> None:
        self._compose = A.Compose(list(steps))
        self._channels = channels

    def __call__(self, image: Image, seed: int) -> Image:
        """Transform `image`; the same seed gives the same view, in any process."""
        self._compose.set_random_seed(seed)
        return np.ascontiguousarray(self._compose(image=image)["image"]).reshape(*image.shape)
