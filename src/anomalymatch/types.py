"""Types shared by all modules: images, labels and rejects."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

import numpy as np
from jaxtyping import Shaped, UInt8

Image = UInt8[np.ndarray, "h w c"]
"""Decoded image: 8 bits per channel, channels last, at its native size."""

Images = Sequence[UInt8[np.ndarray, "_ _ _"]]
"""Decoded images, each of its own size."""

Pixels = Shaped[np.ndarray, "h w b"]
"""Image as stored in an archive: any number of bands, 8 or 16 bits, integers or floats."""

Row = dict[str, float | int | str]
"""Row of a table of results, by column."""


class Orientation(NamedTuple):
    """Scale and directions of an image of the sky, shown with its first row on top.

    Attributes:
        scale: side of a pixel in arcsec.
        north: direction of north in degrees, clockwise from up.
        east: direction of east, likewise.
    """

    scale: float
    north: float
    east: float


class Label(StrEnum):
    """Label that a person or an oracle gives to an image. Training uses the first two.

    Example:
        >>> am.Label.ANOMALY == "anomaly"
        True
    """

    ANOMALY = "anomaly"
    NORMAL = "normal"
    UNSURE = "unsure"
    ARTEFACT = "artefact"


@dataclass(frozen=True, slots=True)
class Reject:
    """Image that could not be read, with the reason."""

    id: str
    reason: str
    temporary: bool = field(default=False, compare=False)
    """Whether the image may be readable later: for reasons of the file system or the network."""
