"""A random view of an image that follows from a seed, and what augmentations share."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import albumentations as A  # noqa: N812 (the library's own abbreviation)
import numpy as np
from jaxtyping import UInt8

from anomalymatch.algorithms.augmentation.transforms import Reorient, Translate, check_interval
from anomalymatch.checks import Number, check_choice, check_range
from anomalymatch.types import Image


class View:
    """Random transformation of one image that depends only on the image and a seed."""

    def __init__(self, steps: Sequence[A.BasicTransform | A.BaseCompose]) -> None:
        self._compose = A.Compose(list(steps))

    def __call__(self, image: Image, seed: int) -> UInt8[np.ndarray, "height width c"]:
        """Transform `image`; the same seed gives the same view, in any process."""
        # One state for all steps: albumentations' set_random_seed gives each step the same seed, so all steps would
        # draw the same number, and a vertical flip would accompany every horizontal one.
        self._compose.set_random_state(np.random.default_rng(seed), random.Random(seed))
        view = self._compose(image=image)["image"]
        return np.ascontiguousarray(view).reshape(*view.shape[:2], image.shape[2])


@runtime_checkable
class Augmentation(Protocol):
    """Protocol of the choices of `augment=`: three kinds of views for images of any number of bands."""

    def weak(self, channels: int) -> View:
        """Build the weak view of FixMatch, on which pseudo-labels are made."""
        ...

    def strong(self, channels: int) -> View:
        """Build the strong view of FixMatch, which must get the same label."""
        ...

    def contrastive(self, channels: int, size: int) -> View:
        """Build the view of contrastive learning, two of which are drawn for each image of at least `size` pixels."""
        ...


@dataclass(frozen=True)
class TurnedAugmentation:
    """Hyper-parameters of the views of images without an upright orientation, and their weak view."""

    borders: ClassVar[tuple[str, ...]]
    """Choices of `border`."""

    translate: float
    rotate: float
    zoom: Sequence[Number]
    strong_translate: float
    blur: float
    noise: float
    border: str

    def __post_init__(self) -> None:
        for name in ("translate", "strong_translate", "blur", "noise"):
            check_range(f"augment.{name}", getattr(self, name), low=0, high=1)
        check_range("augment.rotate", self.rotate, low=0, high=180)
        check_interval("augment.zoom", self.zoom, 0.1, 10.0)
        check_choice("augment.border", self.border, self.borders)

    def weak(self, channels: int) -> View:
        """Build the weak view: one of the eight orientations, and a small shift."""
        return View([Reorient(), Translate(self.translate, self.translate, self.border)])
