"""Views of surfaces: turned, slightly scaled and shifted, lighter or darker, noisier, and with a small part missing."""

from collections.abc import Sequence
from dataclasses import dataclass

import albumentations as A  # noqa: N812 (the library's own abbreviation)

from anomalymatch.algorithms.augmentation.transforms import (
    Blur,
    Cutout,
    Noise,
    Reorient,
    Translate,
    Warp,
    check_interval,
)
from anomalymatch.algorithms.augmentation.view import View
from anomalymatch.checks import Number, check_choice, check_range


@dataclass(frozen=True)
class TextureAugmentation:
    """Hyper-parameters of the views of surfaces: the keys of `conf/augment/texture.yaml`.

    A surface has no upright orientation and no object at its centre. All changes are mild, because a defect may be
    small and of low contrast.
    """

    translate: float
    rotate: float
    zoom: Sequence[Number]
    strong_translate: float
    brightness: float
    contrast: float
    blur: float
    noise: float
    cutout: float
    border: str

    def __post_init__(self) -> None:
        for name in ("translate", "strong_translate", "brightness", "contrast", "blur", "noise", "cutout"):
            check_range(f"augment.{name}", getattr(self, name), low=0, high=1)
        check_range("augment.rotate", self.rotate, low=0, high=180)
        check_interval("augment.zoom", self.zoom, 0.1, 10.0)
        check_choice("augment.border", self.border, ("reflect", "constant"))

    def weak(self, channels: int) -> View:
        """Build the weak view: one of the eight orientations, and a small shift."""
        return View([Reorient(), Translate(self.translate, self.translate, self.border)])

    def strong(self, channels: int) -> View:
        """Build the strong view: a larger change of place and light, blur, noise and a missing part."""
        return View([*self._changes(), Cutout(self.cutout)])

    def contrastive(self, channels: int, size: int) -> View:
        """Build the view of contrastive learning: any part of the strong view at its scale, with nothing missing."""
        return View([*self._changes(), A.RandomCrop(size, size)])

    def _changes(self) -> list[A.BasicTransform]:
        return [
            Reorient(),
            Warp(self.rotate, self.zoom, self.strong_translate, self.border),
            A.RandomBrightnessContrast(_within(self.brightness), _within(self.contrast), p=1.0),
            Blur(self.blur),
            Noise(self.noise),
        ]


def _within(change: float) -> tuple[float, float]:
    return -change, change
