"""Views of galaxies and other objects of the sky: turned, zoomed, shifted, blurred, noisier, and in other colours."""

from dataclasses import dataclass
from typing import ClassVar

import albumentations as A  # noqa: N812 (the library's own abbreviation)

from anomalymatch.algorithms.augmentation.transforms import Blur, Gain, Noise, Reorient, Warp
from anomalymatch.algorithms.augmentation.view import TurnedAugmentation, View
from anomalymatch.checks import check_range


@dataclass(frozen=True)
class GalaxyAugmentation(TurnedAugmentation):
    """Hyper-parameters of the views of galaxies: the keys of `conf/augment/galaxies.yaml`.

    A galaxy has no upright orientation, it may be nearer or farther, and telescopes differ in sharpness, noise and
    colour. Operations that change the order of brightnesses (equalise, posterise, solarise) are left out: they turn the
    sky around a faint galaxy into noise.
    """

    borders: ClassVar = ("sky", "reflect")

    gain: float
    band_gain: float

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("gain", "band_gain"):
            check_range(f"augment.{name}", getattr(self, name), low=0, below=1)

    def strong(self, channels: int) -> View:
        """Build the strong view: another orientation, scale, place, sharpness, noise level and colour."""
        return View(self._changes())

    def contrastive(self, channels: int, size: int) -> View:
        """Build the view of contrastive learning: the strong view, of which the centre is cut out at the same scale."""
        return View([*self._changes(), A.CenterCrop(size, size)])

    def _changes(self) -> list[A.BasicTransform]:
        return [
            Reorient(),
            Warp(self.rotate, self.zoom, self.strong_translate, self.border),
            Blur(self.blur),
            Gain(self.gain, self.band_gain),
            Noise(self.noise),
        ]
