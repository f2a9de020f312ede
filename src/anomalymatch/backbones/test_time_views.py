"""The looks at an image over which its features are averaged: whole and in crops, mirrored and turned."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F  # noqa: N812 (the field's own abbreviation)
from jaxtyping import Float, Shaped
from torch import Tensor

from anomalymatch.errors import ConfigError

ORIENTATIONS = (1, 2, 4, 8)
"""Over how many of them features can be averaged."""


def turned(images: Shaped[Tensor, "b c s s"], orientation: int) -> Shaped[Tensor, "b c s s"]:
    """Square images as they are (0), mirrored (1), upside down (2), both (3), and the same four transposed (4 to 7).

    The first two differ in nothing but left and right, the first four need no turn by a quarter, and the eight are all.
    """
    flipped = images.flip([axis for bit, axis in ((1, 3), (2, 2)) if orientation & bit])
    chosen = flipped.transpose(2, 3) if orientation & 4 else flipped
    return chosen.contiguous(memory_format=torch.channels_last)


CROPS = (0, 1, 5)
"""How many crops can be looked at beside the whole image: none, the centre, or the corners, too."""
SHARE = 0.75
"""Of the side of an image that a crop shows."""


def check_looks(orientations: int, crops: int) -> None:
    """Raise ConfigError unless there are so many orientations and crops."""
    for name, value, choices in (("orientations", orientations, ORIENTATIONS), ("crops", crops, CROPS)):
        if value not in choices:
            raise ConfigError(f"model.{name} is {value}: choose one of {', '.join(map(str, choices))}")


def cropped(images: Float[Tensor, "b c s s"], crop: int) -> Float[Tensor, "b c s s"]:
    """Three quarters of the side of square images, magnified to all of it: the centre (0) or a corner (1 to 4)."""
    size = images.shape[-1]
    side = round(SHARE * size)
    rest = size - side
    top, left = ((rest // 2, rest // 2), (0, 0), (0, rest), (rest, 0), (rest, rest))[crop]
    part = images[..., top : top + side, left : left + side]
    return F.interpolate(part, size=(size, size), mode="bilinear", align_corners=False)


def looks(images: Float[Tensor, "b c s s"], orientations: int, crops: int) -> Iterator[Float[Tensor, "b c s s"]]:
    """The whole images and so many crops of them, each in so many orientations."""
    for view in (images, *(cropped(images, i) for i in range(crops))):
        yield from (turned(view, i) for i in range(orientations))
