"""Which tile each row of a catalogue lies in: by the paths in its columns, or by its position on the sky."""

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from anomalymatch.data import _tree
from anomalymatch.data._fits_images import FITS_SUFFIXES, Extensions, FitsImages
from anomalymatch.data._rows import Codes, Rows
from anomalymatch.data._sky import Sky, assign
from anomalymatch.data._tiles import Tile, open_tile
from anomalymatch.errors import DataError, UnreadableImageError
from anomalymatch.progress import progress

logger = logging.getLogger(__name__)


def tiles_by_name(rows: Rows) -> tuple[list[Codes], list[str]]:
    """For each band the numbers of the rows' tiles, -1 for none, and the paths they count."""
    codes: list[Codes] = []
    paths: list[str] = []
    for column, names in rows.tiles:
        codes.append(np.where(column < 0, column, column + np.int32(len(paths))))
        paths += names
    return codes, paths


def tiles_by_position(root: Path, folder: Path, rows: Rows, extensions: Extensions) -> tuple[list[Codes], list[str]]:
    """The same for FITS tiles in a folder, whose headers are read once.

    Raises:
        DataError: if the catalogue `root` has no positions on the sky, or the folder no tiles that have them.
    """
    if rows.ra is None or rows.dec is None or rows.x is not None:
        raise DataError(
            f"{root}: no column names the tile of each row; give dataset.source.tile_column, "
            f"or positions in degrees instead of pixels, by which the tiles can be found"
        )
    if not folder.is_dir():
        raise DataError(f"{folder}: expected a folder with FITS tiles, found nothing; correct dataset.source.tiles")
    entries, _ = _tree.scan(folder, FITS_SUFFIXES)
    paths = [path for path, *_ in entries if (folder / path).resolve() != root.resolve()]
    skies = [_sky(folder / path, extensions) for path in paths]
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


def open_numbered(folder: Path, paths: Sequence[str], extensions: Extensions, code: int) -> Tile:
    """Open the tile of a number.

    Raises:
        UnreadableImageError: if it is missing or damaged; the reason names it.
    """
    try:
        return open_tile(folder / paths[code], extensions)
    except UnreadableImageError as error:
        raise UnreadableImageError(f"its tile {paths[code]}: {error}") from None


def _sky(path: Path, extensions: Extensions) -> Sky | None:
    try:
        with FitsImages(path, extensions) as images:
            return Sky.of(images.wcs(), images.shape)
    except UnreadableImageError:
        return None
