"""Pictures of one colour and world coordinates for the tests of sources."""

import io
from typing import Any

import numpy as np
from astropy.wcs import WCS
from PIL import Image as PillowImage


def png(value: int = 1, height: int = 2, width: int = 3) -> bytes:
    buffer = io.BytesIO()
    PillowImage.fromarray(np.full((height, width, 3), value, dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def stack(n: int, start: int = 0) -> np.ndarray:
    """Return `n` images of 4 x 5 pixels, whose colours are `start`, `start + 1` and so on."""
    return np.arange(start, start + n, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 5, 3), dtype=np.uint8)


def colours(source: Any, ids: Any = None) -> list[int]:
    return [int(image[0, 0, 0]) for image in source.read(source.ids if ids is None else ids)]


def wcs(ra: float = 10.0, dec: float = 20.0, arcsec: float = 1.0, kind: str = "RA/DEC", shape: Any = (30, 40)) -> WCS:
    """Return a tangential projection whose reference is the centre of an image of `shape`."""
    made = WCS(naxis=2)
    made.wcs.ctype = {"RA/DEC": ["RA---TAN", "DEC--TAN"], "DEC/RA": ["DEC--TAN", "RA---TAN"]}.get(
        kind, ["GLON-TAN", "GLAT-TAN"]
    )
    steps = [-arcsec / 3600, arcsec / 3600]
    made.wcs.crval = [dec, ra] if kind == "DEC/RA" else [ra, dec]
    made.wcs.cdelt = steps[::-1] if kind == "DEC/RA" else steps
    made.wcs.crpix = [(shape[1] + 1) / 2, (shape[0] + 1) / 2]
    return made
