"""Test-time augmentation: an image whole and in magnified crops, each in several orientations."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F  # noqa: N812 (the field's own abbreviation)
from jaxtyping import Float, Shaped
from torch import Tensor

ORIENTATIONS = (1, 2, 4, 8)
"""Numbers of orientations over which features can be averaged."""
CROPS = (0, 1, 5)
"""Numbers of crops that can be added to the whole image: none, the centre, or the centre and the four corners."""
CROP_SIDE = 0.75
"""Side of a crop as a share of the side of the image."""


def tta_inputs(images: Float[Tensor, "b c s s"], orientations: int, crops: int) -> Iterator[Float[Tensor, "b c s s"]]:
    """Yield the whole images, then each of their crops, all in each orientation."""
    for part in (images, *(cropped(images, i) for i in range(crops))):
        yield from (reoriented(part, i) for i in range(orientations))


def reoriented(images: Shaped[Tensor, "b c s s"], orientation: int) -> Shaped[Tensor, "b c s s"]:
    """Return square images as they are (0), mirrored (1), upside down (2), both (3), or these four transposed (4 to 7).

    The first two orientations differ in left and right only, the first four need no quarter turn, and there are eight.
    """
    flipped = images.flip([axis for bit, axis in ((1, 3), (2, 2)) if orientation & bit])
    chosen = flipped.transpose(2, 3) if orientation & 4 else flipped
    return chosen.contiguous(memory_format=torch.channels_last)


def restored(maps: Shaped[Tensor, "b h w"], orientation: int) -> Shaped[Tensor, "b h w"]:
    """Undo `reoriented` for maps of the images."""
    turned = maps.transpose(1, 2) if orientation & 4 else maps
    return turned.flip([axis for bit, axis in ((1, 2), (2, 1)) if orientation & bit])


def cropped(images: Float[Tensor, "b c s s"], crop: int) -> Float[Tensor, "b c s s"]:
    """Cut the centre (0) or a corner (1 to 4) out of square images and magnify it to their size."""
    size = images.shape[-1]
    top, left, side = crop_box(size, crop)
    part = images[..., top : top + side, left : left + side]
    return F.interpolate(part, size=(size, size), mode="bilinear", align_corners=False)


def crop_box(size: int, crop: int) -> tuple[int, int, int]:
    """Return top, left and side of a crop (see `cropped`) of images of `size` squared pixels."""
    side = round(CROP_SIDE * size)
    rest = size - side
    top, left = ((rest // 2, rest // 2), (0, 0), (0, rest), (rest, 0), (rest, rest))[crop]
    return top, left, side
