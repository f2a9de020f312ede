"""Test-time augmentation: an image whole, in magnified crops and in tiles, each in several orientations."""

from collections.abc import Iterator
from dataclasses import dataclass

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
MAX_TILES = 16
"""Largest number of tiles along a side."""
TILE_STEP = 0.75
"""Distance of neighbouring tiles as a share of their side; they overlap by the rest."""


@dataclass(frozen=True)
class Tiling:
    """Grid of overlapping tiles of a square image; one tile is the whole image.

    Attributes:
        count: number of tiles along each side.
        size: side of a tile in pixels.
    """

    count: int
    size: int

    @property
    def side(self) -> int:
        """Side of the image in pixels."""
        return self.starts[-1] + self.size

    @property
    def starts(self) -> tuple[int, ...]:
        """First row of each row of tiles, which is also the first column of each column of tiles."""
        step = round(TILE_STEP * self.size)
        return tuple(step * i for i in range(self.count))

    @property
    def boxes(self) -> tuple[tuple[int, int], ...]:
        """Top and left of each tile, row by row; none where the whole image is the only tile."""
        return tuple((top, left) for top in self.starts for left in self.starts) if self.count > 1 else ()


def cut_tiles(images: Shaped[Tensor, "b c h w"], tiling: Tiling) -> Shaped[Tensor, "t c s s"]:
    """Cut all tiles out of images, in the order of `Tiling.boxes`; each tile of all images, then the next."""
    size = tiling.size
    return torch.cat([images[..., top : top + size, left : left + size] for top, left in tiling.boxes])


def shrunk(images: Float[Tensor, "b c h w"], size: int) -> Float[Tensor, "b c s s"]:
    """Shrink square images to the size of a tile, averaged over areas."""
    return images if images.shape[-1] == size else F.interpolate(images, size=(size, size), mode="area")


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
