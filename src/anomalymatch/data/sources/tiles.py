"""Tiles: large images to cut small ones from, in FITS, .npy and ordinary image files."""

import io
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from astropy.nddata import NoOverlapError, overlap_slices
from PIL import Image as PillowImage

from anomalymatch.data.codecs import FORMATS, MAX_PIXELS, decode
from anomalymatch.data.find import scan
from anomalymatch.data.sources.catalogue_rows import CatalogueRows, Codes
from anomalymatch.data.sources.fits import FITS_SUFFIXES, FitsImages, read_sky
from anomalymatch.data.sources.fits_file import Extensions
from anomalymatch.data.sources.sky import Sky, assign
from anomalymatch.data.tiff import MAGIC, picture_channels, tiff_bands
from anomalymatch.errors import DataError, UnreadableImageError
from anomalymatch.progress import progress
from anomalymatch.types import Pixels

logger = logging.getLogger(__name__)


class _Array:
    """Pixels of an open .npy file, or of a decoded image."""

    def __init__(self, path: Path, pixels: np.ndarray) -> None:
        self.path, self.pixels = path, pixels if pixels.ndim == 3 else pixels[..., None]
        self._size = path.stat().st_size

    def cut(self, rows: slice, columns: slice) -> Pixels:
        try:
            shorter = self.path.stat().st_size < self._size  # reading a map beyond the end kills the process
        except OSError as error:
            raise UnreadableImageError(f"its tile cannot be opened: {error.strerror}") from None
        if shorter:
            raise UnreadableImageError("its tile has become shorter since it was opened")
        part = self.pixels[rows, columns]
        return np.array(part, dtype=part.dtype.newbyteorder("="), order="C")

    def close(self) -> None:
        """Do nothing: a memory map closes with the last array that uses it."""


@dataclass(frozen=True)
class ArchiveTile:
    """Open tile of the shape (h, w); names and units of its bands, and the sky, if the file has them."""

    name: str
    shape: tuple[int, int]
    bands: int
    names: tuple[str, ...] | None
    units: str | None
    sky: Sky | None
    images: FitsImages | _Array

    def cut(self, x: float, y: float, side: int) -> Pixels:
        """Cut a square around a 0-based position, (side, side, band), placed as astropy's `Cutout2D` places it.

        Pixels outside the tile are NaN, for which integers become floats; 8-bit pixels are 0 there, as NaN would be
        rendered.

        Raises:
            UnreadableImageError: if the square lies outside the tile, or the tile is damaged.
        """
        height, width = self.shape
        try:
            large, small = overlap_slices(self.shape, (side, side), (y, x), mode="partial")
        except NoOverlapError:
            raise UnreadableImageError(
                f"it lies outside of its tile {self.name}: x = {x:.1f}, y = {y:.1f} of {width} x {height} pixels"
            ) from None
        part = self.images.cut(*large)
        if part.shape[:2] == (side, side):
            return part
        dtype, fill = _padding(part.dtype)
        padded = np.full((side, side, part.shape[2]), fill, dtype)
        padded[small] = part
        return padded

    def close(self) -> None:
        """Close the file."""
        self.images.close()


def open_tile(path: Path, extensions: Extensions, layout: str = "auto") -> ArchiveTile:
    """Open a tile: read the headers of FITS, map .npy, decode other images."""
    name = path.name.lower()
    if name.endswith(FITS_SUFFIXES):
        images = FitsImages(path, extensions, layout=layout, mapped=True)
        return ArchiveTile(path.name, images.shape, images.bands, images.names, images.units, images.sky(), images)
    pixels, names = (_load_npy(path), None) if name.endswith(".npy") else _decode(path)
    array = _Array(path, pixels)
    height, width, bands = array.pixels.shape
    return ArchiveTile(path.name, (height, width), bands, names, None, None, array)


def _padding(dtype: np.dtype) -> tuple[np.dtype, float]:
    if dtype == np.uint8:
        return dtype, 0.0
    if dtype.kind == "f":
        return dtype, np.nan
    return np.dtype(np.float32 if dtype.itemsize <= 2 else np.float64), np.nan


def _load_npy(path: Path) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError as error:
        raise UnreadableImageError(f"cannot be opened: {error.strerror or error}") from None
    except Exception as error:  # the header is parsed as Python, so damage can raise anything
        raise UnreadableImageError(f"cannot be read as .npy: {error}") from None
    if not isinstance(array, np.ndarray) or array.ndim not in (2, 3) or array.dtype.kind not in "iuf":
        found = f"{array.dtype} of {array.shape}" if isinstance(array, np.ndarray) else "an archive"
        raise UnreadableImageError(f"expected numbers of the shape (h, w) or (h, w, band) in it, found {found}")
    return array


def _decode(path: Path) -> tuple[np.ndarray, tuple[str, ...] | None]:
    """Decode an image file with all its channels; return the names of its bands, too, if it is no picture."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UnreadableImageError(f"cannot be opened: {error.strerror}") from None
    if data.startswith(MAGIC):
        names = tiff_bands(data)
        return decode(data, picture_channels(data), bands=names, max_pixels=MAX_PIXELS), names
    try:
        with PillowImage.open(io.BytesIO(data), formats=FORMATS) as image:
            count = 3 if image.mode == "P" else len(image.getbands())
    except Exception:  # the decoder knows the reason
        count = 3
    return decode(data, {1: 1, 2: 4}.get(count, min(count, 4)), max_pixels=MAX_PIXELS), None


def tiles_by_name(rows: CatalogueRows) -> tuple[list[Codes], list[str]]:
    """Return the tile number of each row for each band, -1 for none, and the paths of the tiles."""
    codes: list[Codes] = []
    paths: list[str] = []
    for column, names in rows.tiles:
        codes.append(np.where(column < 0, column, column + np.int32(len(paths))))
        paths += names
    return codes, paths


def tiles_by_position(
    root: Path, folder: Path, rows: CatalogueRows, extensions: Extensions
) -> tuple[list[Codes], list[str]]:
    """Find the FITS tile in a folder that contains each row; returns what `tiles_by_name` does."""
    if rows.ra is None or rows.dec is None or rows.x is not None:
        raise DataError(
            f"{root}: no column names the tile of each row; give dataset.source.tile_column, "
            f"or positions in degrees instead of pixels, by which the tiles can be found"
        )
    if not folder.is_dir():
        raise DataError(f"{folder}: expected a folder with FITS tiles, found nothing; correct dataset.source.tiles")
    entries, _ = scan(folder, FITS_SUFFIXES)
    paths = [path for path, *_ in entries if (folder / path).resolve() != root.resolve()]
    skies = [read_sky(folder / path, extensions) for path in paths]
    unknown = skies.count(None)
    if unknown == len(skies):
        raise DataError(
            f"{folder}: no column of {root.name} names the tile of each row, and no FITS file in this folder has world "
            f"coordinates to find it by; give dataset.source.tile_column, or dataset.source.tiles=FOLDER"
        )
    if unknown:
        logger.warning("%s: skipped %s FITS files whose place on the sky is unknown", folder, f"{unknown:,}")
    with progress("Looking up tiles", len(rows.ids), "positions") as advance:
        found = assign(skies, rows.ra, rows.dec, on_chunk=advance)
    return [found.astype(np.int32)], paths
