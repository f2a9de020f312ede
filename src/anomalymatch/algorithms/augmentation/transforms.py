"""Transformations that the augmentations share: geometry, blur, noise and gain for images of any number of bands."""

import math
from collections.abc import Sequence
from typing import Any

import albumentations as A  # noqa: N812 (the library's own abbreviation)
import cv2
import numpy as np
from jaxtyping import UInt8

from anomalymatch.checks import Number
from anomalymatch.errors import ConfigError
from anomalymatch.types import Image

BORDERS = {"reflect": cv2.BORDER_REFLECT_101, "constant": cv2.BORDER_CONSTANT, "sky": cv2.BORDER_CONSTANT}
"""What fills the pixels that a view uncovers: the mirrored image, black, or the level of the sky (`sky_level`)."""


def sky_level(image: Image) -> UInt8[np.ndarray, " c"]:
    """Return the median of the outermost pixels of each band: the sky around an object at the centre."""
    bands = image.shape[2]
    edges = (image[0], image[-1], image[:, 0], image[:, -1])
    return np.median(np.concatenate([edge.reshape(-1, bands) for edge in edges]), axis=0).astype(np.uint8)


def check_interval(key: str, interval: Sequence[Number], low: Number, high: Number) -> None:
    """Check that a pair of numbers is [low, high] within limits.

    Raises:
        ConfigError: if it is not.
    """
    if len(interval) != 2 or not low <= interval[0] <= interval[1] <= high:
        raise ConfigError(f"{key} is {list(interval)}: it must be [low, high] within {low:g} to {high:g}")


class Translate(A.ImageOnlyTransform):
    """Shift by whole pixels, each number of them equally likely, up to a share of width and height.

    Albumentations' own shift cuts towards zero: the largest one would hardly ever occur, and zero twice as often.
    """

    def __init__(self, x: float, y: float, border: str, p: float = 1.0) -> None:
        super().__init__(p=p)
        self.x, self.y, self.border = x, y, border

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        """Draw the shifts to the right and down."""
        height, width = params["shape"][:2]
        # The products are not exact: 0.29 x 100 is below 29.
        reaches = (int(share * side + 1e-6) for share, side in ((self.x, width), (self.y, height)))
        right, down = (self.py_random.randint(-reach, reach) for reach in reaches)
        return {"right": right, "down": down}

    def apply(self, img: np.ndarray, right: int = 0, down: int = 0, **_: Any) -> np.ndarray:
        """Shift."""
        height, width = img.shape[:2]
        before, after = [max(down, 0), max(right, 0)], [max(-down, 0), max(-right, 0)]
        padding = [*zip(before, after, strict=True), (0, 0)][: img.ndim]
        padded = np.pad(img, padding, mode="reflect" if self.border == "reflect" else "constant")
        if self.border == "sky":
            covered = np.pad(np.ones((height, width), bool), padding[:2])
            padded[~covered] = sky_level(img)
        return padded[after[0] : after[0] + height, after[1] : after[1] + width]


class Reorient(A.ImageOnlyTransform):
    """Mirror and turn by a random number of quarter turns; an image that is not square is turned by half turns."""

    def __init__(self, p: float = 1.0) -> None:
        super().__init__(p=p)

    def get_params(self) -> dict[str, Any]:
        """Draw one of the eight orientations."""
        return {"mirrored": self.py_random.random() < 0.5, "turns": self.py_random.randrange(4)}

    def apply(self, img: np.ndarray, mirrored: bool = False, turns: int = 0, **_: Any) -> np.ndarray:
        """Mirror and turn."""
        turns = turns if img.shape[0] == img.shape[1] else 2 * (turns % 2)
        return np.rot90(img[:, ::-1] if mirrored else img, turns)


class Warp(A.ImageOnlyTransform):
    """Rotate, zoom and shift in one interpolation, with each band apart.

    Args:
        rotate: largest rotation in degrees.
        zoom: range of the magnification, which is drawn evenly in its logarithm.
        translate: largest shift along each axis, as a share of the side.
        border: see `BORDERS`.
        p: probability.
    """

    def __init__(self, rotate: float, zoom: Sequence[Number], translate: float, border: str, p: float = 1.0) -> None:
        super().__init__(p=p)
        self.rotate, self.zoom, self.translate, self.border = rotate, tuple(zoom), translate, border

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        """Draw the transformation: a 2 x 3 matrix around the centre."""
        height, width = params["shape"][:2]
        angle = self.py_random.uniform(-self.rotate, self.rotate)
        zoom = math.exp(self.py_random.uniform(*map(math.log, self.zoom)))
        matrix = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), angle, zoom)
        matrix[:, 2] += [self.py_random.uniform(-self.translate, self.translate) * side for side in (width, height)]
        return {"matrix": matrix}

    def apply(self, img: np.ndarray, *_: Any, **drawn: Any) -> np.ndarray:
        """Transform."""
        level = sky_level(img).tolist() if self.border == "sky" else [0] * img.shape[2]
        mode, size = BORDERS[self.border], (img.shape[1], img.shape[0])
        bands = [
            cv2.warpAffine(
                np.ascontiguousarray(img[..., band]),
                drawn["matrix"],
                size,
                flags=cv2.INTER_LINEAR,
                borderMode=mode,
                borderValue=level[band],
            )
            for band in range(img.shape[2])
        ]
        return np.stack(bands, axis=-1)


class Blur(A.ImageOnlyTransform):
    """Blur with a Gaussian whose standard deviation is drawn from 0 up to a share of the shorter side."""

    def __init__(self, largest: float, p: float = 1.0) -> None:
        super().__init__(p=p)
        self.largest = largest

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        """Draw the standard deviation in pixels."""
        return {"sigma": self.py_random.uniform(0.0, self.largest) * min(params["shape"][:2])}

    def apply(self, img: np.ndarray, sigma: float = 0.0, **_: Any) -> np.ndarray:
        """Blur."""
        if sigma < 0.1:  # of a pixel: nothing changes
            return img
        return cv2.GaussianBlur(img, (0, 0), sigma, borderType=cv2.BORDER_REFLECT_101).reshape(img.shape)


class Noise(A.ImageOnlyTransform):
    """Add Gaussian noise, independent in each pixel and band; its deviation is drawn from 0 up to a share of white."""

    def __init__(self, largest: float, p: float = 1.0) -> None:
        super().__init__(p=p)
        self.largest = largest

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        """Draw the noise."""
        sigma = self.py_random.uniform(0.0, self.largest) * 255.0
        return {"noise": self.random_generator.standard_normal(params["shape"], dtype=np.float32) * np.float32(sigma)}

    def apply(self, img: np.ndarray, *_: Any, **drawn: Any) -> np.ndarray:
        """Add."""
        return np.clip(np.rint(img + drawn["noise"]), 0, 255).astype(np.uint8)


class Gain(A.ImageOnlyTransform):
    """Multiply by a factor that all bands share, and by another for each band.

    The factors lie between 1 - g and 1 / (1 - g), drawn evenly in their logarithm: brighter views are as likely as
    darker ones. `common` and `band` are g of both.
    """

    def __init__(self, common: float, band: float, p: float = 1.0) -> None:
        super().__init__(p=p)
        self.common, self.band = common, band

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        """Draw the factor of each band."""
        shape = params["shape"]
        bands = shape[2] if len(shape) == 3 else 1
        common, band = -math.log1p(-self.common), -math.log1p(-self.band)
        own = self.random_generator.uniform(-band, band, bands)
        return {"factors": np.exp(own + self.random_generator.uniform(-common, common))}

    def apply(self, img: np.ndarray, *_: Any, **drawn: Any) -> np.ndarray:
        """Multiply."""
        return np.clip(np.rint(img * drawn["factors"]), 0, 255).astype(np.uint8)


class Cutout(A.ImageOnlyTransform):
    """Fill a square with grey; its centre is anywhere in the image, its side up to `largest` of the image's."""

    def __init__(self, largest: float, p: float = 1.0) -> None:
        super().__init__(p=p)
        self.largest = largest

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        """Draw side and centre."""
        height, width = params["shape"][:2]
        side = self.py_random.uniform(0.0, self.largest) * min(height, width)
        top, left = self.py_random.uniform(0, height) - side / 2, self.py_random.uniform(0, width) - side / 2
        edges = ((int(max(0.0, start)), int(max(0.0, start + side))) for start in (top, left))
        return {"hole": tuple(slice(*edge) for edge in edges)}

    def apply(self, img: np.ndarray, hole: tuple[slice, slice] = (slice(0), slice(0)), **_: Any) -> np.ndarray:
        """Fill with middle grey."""
        img = img.copy()
        img[hole] = 127
        return img
