"""Views of photographs of objects with albumentations: those of FixMatch's paper, and those of SimCLR's."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import albumentations as A  # noqa: N812 (the library's own abbreviation)
import cv2
import numpy as np

from anomalymatch.algorithms.augmentation.transforms import BORDERS, Cutout, Translate, check_interval
from anomalymatch.algorithms.augmentation.two_views import TwoViewAugmentation
from anomalymatch.algorithms.augmentation.view import View
from anomalymatch.checks import check_choice, check_range
from anomalymatch.types import Image


class _Blend(A.ImageOnlyTransform):
    """Blend an image with a degraded copy, like Pillow's `ImageEnhance`: factor 1 gives the image, 0 the copy."""

    def __init__(self, factor_range: tuple[float, float], p: float = 1.0) -> None:
        super().__init__(p=p)
        self.factor_range = factor_range

    def get_params(self) -> dict[str, Any]:
        """Draw the factor."""
        return {"factor": self.py_random.uniform(*self.factor_range)}

    def apply(self, img: np.ndarray, factor: float = 1.0, **_: Any) -> np.ndarray:
        """Blend."""
        return cv2.addWeighted(img, factor, self._degraded(img), 1.0 - factor, 0.0).reshape(img.shape)

    def _degraded(self, img: np.ndarray) -> np.ndarray:
        raise NotImplementedError


class Brightness(_Blend):
    """Darken towards black."""

    def _degraded(self, img: np.ndarray) -> np.ndarray:
        return np.zeros_like(img)


class Contrast(_Blend):
    """Blend with the image's mean grey."""

    def _degraded(self, img: np.ndarray) -> np.ndarray:
        return np.full_like(img, round(float(_grey(img).mean())))


class Saturation(_Blend):
    """Blend with the grey image."""

    def _degraded(self, img: np.ndarray) -> np.ndarray:
        return np.repeat(_grey(img).astype(np.uint8)[..., None], img.shape[2], axis=2)


class Sharpness(_Blend):
    """Smooth with Pillow's 3 x 3 kernel."""

    def _degraded(self, img: np.ndarray) -> np.ndarray:
        kernel = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], dtype=np.float32) / 13.0
        return cv2.filter2D(img, -1, kernel, borderType=cv2.BORDER_REPLICATE).reshape(img.shape)


class AutoContrast(A.ImageOnlyTransform):
    """Stretch each channel linearly to 0 … 255; albumentations' own equalises, or ignores pixels of 255."""

    def apply(self, img: np.ndarray, **_: Any) -> np.ndarray:
        """Stretch all channels but constant ones."""
        low, high = img.min((0, 1)), img.max((0, 1))
        scale = np.where(high > low, 255.0 / np.maximum(high.astype(float) - low, 1.0), 1.0)
        return ((img - np.where(high > low, low, 0)) * scale).round().astype(np.uint8)


@dataclass(frozen=True)
class ObjectAugmentation:
    """Hyper-parameters of the views of objects: the keys of `conf/augment/objects.yaml`, after FixMatch's appendix D.

    The defaults are those of the paper (`algorithm=fixmatch_reference`).

    Example:
        >>> strong = am.ObjectAugmentation().strong(channels=3)
        >>> strong(np.zeros((32, 32, 3), np.uint8), 0).shape
        (32, 32, 3)
    """

    flip: float = 0.5
    vertical_flip: float = 0.0
    translate: float = 0.125
    operations: int = 3
    factor: Sequence[float] = (0.05, 0.95)
    posterize_bits: Sequence[int] = (4, 8)
    rotate: float = 30.0
    shear: float = 0.3
    strong_translate: float = 0.3
    cutout: float = 0.5
    border: str = "constant"
    two_views: TwoViewAugmentation = field(default_factory=TwoViewAugmentation)

    def __post_init__(self) -> None:
        for name in ("flip", "vertical_flip", "translate", "strong_translate", "cutout"):
            check_range(f"augment.{name}", getattr(self, name), low=0, high=1)
        check_choice("augment.border", self.border, ("reflect", "constant"))
        check_range("augment.operations", self.operations, low=0)
        check_range("augment.rotate", self.rotate, low=0, high=180)
        check_range("augment.shear", self.shear, low=0, high=10)
        check_interval("augment.factor", self.factor, 0.0, 10.0)
        check_interval("augment.posterize_bits", self.posterize_bits, 1, 8)

    def weak(self, channels: int) -> View:
        """Build the weak view: flips and a small translation."""
        return View(self._weak_steps())

    def strong(self, channels: int) -> View:
        """Build the strong view: random operations, cutout, then the weak view's steps (RandAugment as in FixMatch)."""
        # Separate draws: albumentations' SomeOf would apply the operations in the order of the list.
        drawn = [A.OneOf(self._operations(channels), p=1.0) for _ in range(self.operations)]
        return View([*drawn, Cutout(self.cutout), *self._weak_steps()])

    def contrastive(self, channels: int, size: int) -> View:
        """Build the view of contrastive learning, which SimCLR's recipe makes."""
        return self.two_views.view(channels, size)

    def _weak_steps(self) -> list[A.BasicTransform]:
        return [
            A.HorizontalFlip(p=self.flip),
            A.VerticalFlip(p=self.vertical_flip),
            Translate(self.translate, self.translate, self.border),
        ]

    def _operations(self, channels: int) -> list[A.BasicTransform]:
        slope = math.degrees(math.atan(self.shear))
        factor, bits = (self.factor[0], self.factor[1]), self.posterize_bits
        shear, border = (-slope, slope), BORDERS[self.border]
        return [
            AutoContrast(p=1.0),
            *_photometric(factor, channels),
            A.NoOp(p=1.0),
            A.Posterize((bits[0], bits[1]), p=1.0),
            A.Solarize((0.0, 1.0), p=1.0),
            A.Affine(rotate=(-self.rotate, self.rotate), border_mode=border, p=1.0),
            A.Affine(shear={"x": shear, "y": (0, 0)}, border_mode=border, p=1.0),
            A.Affine(shear={"x": (0, 0), "y": shear}, border_mode=border, p=1.0),
            Translate(self.strong_translate, 0.0, self.border),
            Translate(0.0, self.strong_translate, self.border),
        ]


def _photometric(factor: tuple[float, float], channels: int) -> list[A.BasicTransform]:
    """Brightness, contrast and sharpness for any number of channels; saturation and equalisation where they apply."""
    steps: list[A.BasicTransform] = [kind(factor) for kind in (Brightness, Contrast, Sharpness)]
    if channels == 3:
        steps.append(Saturation(factor))
    if channels in (1, 3):
        steps.append(A.Equalize(p=1.0))
    return steps


def _grey(image: Image) -> np.ndarray:
    return cv2.cvtColor(image, cv2.COLOR_RGB2GRAY) if image.shape[2] == 3 else image.mean(axis=2)
