"""Views of surfaces: turned, slightly scaled and shifted, lighter or darker, noisier, and with a small part missing."""

from dataclasses import dataclass
from typing import ClassVar

import albumentations as A  # noqa: N812 (the library's own abbreviation)

from anomalymatch.algorithms.augmentation.transforms import Blur, Cutout, Noise, Reorient, Warp
from anomalymatch.algorithms.augmentation.view import TurnedAugmentation, View
from anomalymatch.checks import check_range


@dataclass(frozen=True)
class TextureAugmentation(TurnedAugmentation):
    """Hyper-parameters of the views of surfaces: the keys of `conf/augment/texture.yaml`.

    A surface has no upright orientation and no object at its centre. All changes are mild, because a defect may be
    small and of low contrast.
    """

    borders: ClassVar = ("reflect", "constant")

    brightness: float
    contrast: float
    cutout: float

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("brightness", "contrast", "cutout"):
            check_range(f"augment.{name}", getattr(self, name), low=0, high=1)

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
