"""Catalogue of positions in large tiles as a source: one cutout for each row."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePath

import numpy as np
import pyarrow as pa

from anomalymatch.checks import check_choice, check_inside, check_range, is_trusted
from anomalymatch.data.codecs import MAX_PIXELS
from anomalymatch.data.find import leaves, missing_root, stamp
from anomalymatch.data.labels import read_labels
from anomalymatch.data.rendering import Rendering, band_names
from anomalymatch.data.source import EIGHT_BITS, ImageSource, hash_rows
from anomalymatch.data.sources.catalogue_rows import ColumnNames, labels_or_classes, read_rows
from anomalymatch.data.sources.fits import LAYOUTS, check_bands, checked_extensions
from anomalymatch.data.sources.fits_file import Extensions
from anomalymatch.data.sources.tables import catalogue_table
from anomalymatch.data.sources.tiles import ArchiveTile, open_tile, tiles_by_name, tiles_by_position
from anomalymatch.errors import ConfigError, DataError, UnreadableImageError
from anomalymatch.lru import LRU
from anomalymatch.types import Orientation, Pixels

SIDE = 64
"""Side of a cutout in pixels if no size is given."""
OPEN_TILES = 64
_MAPPED = (".npy", ".fits", ".fit", ".fts", ".fz")
"""Tiles that take little memory while they are open."""


class CatalogueSource(ImageSource):
    """Cutouts around the positions of a catalogue; an id is that of the row, or `{catalogue}/{row:07d}`.

    The catalogue is a CSV, Parquet, FITS or VOTable file; only the columns in use are held, as arrays. Tiles are FITS
    files, .npy arrays (h, w) or (h, w, band), PNG, or TIFF. The world coordinates of a tile turn positions on the sky
    into pixels. Without a column that names the tiles, each position belongs to the FITS tile that contains it; of
    several, to the one with the nearest centre.

    A cutout that sticks out of its tile is filled with NaN (8-bit pixels: with 0). A row whose position lies outside
    its tile, or whose tile is missing or has other bands, becomes a `Reject`.

    Args:
        root: the catalogue.
        tiles: folder to which the paths of tiles are relative; None takes that of the catalogue.
        id_column: column with a unique id; None takes a usual name, else the number of the row.
        ra_column, dec_column: right ascension and declination in degrees; None takes a usual name.
        x_column, y_column: 0-based pixel, as in NumPy: the centre of the first one is 0.
        size: side of the cutouts in pixels, unless `size_column` or `size_arcsec` is given.
        size_column: side of each cutout in pixels.
        size_arcsec: side of the cutouts in arcsec, converted by the pixel size of each tile.
        tile_column: path of the tile; None takes `tile`, where there is one.
        tile_columns: paths of the tiles of several bands, instead of `tile_column`.
        label_column: class, or label by a person.
        extensions: index or name of a FITS extension, or several of them as bands; see `FitsSource`.
        layout: order of the axes of FITS cubes, see `FitsSource`.
        bands: names of the bands; None takes the endings of `tile_columns` (tile_g: g), else the names in the FITS
            headers, else the usual ones.
        labels_file: a CSV `filename,label`, see `labels_or_truth`, instead of `label_column`; None takes `labels.csv`
            beside the catalogue, where there is one.
        rendering: conversion of the bands to 8-bit channels.

    Raises:
        DataError: if the catalogue is missing, damaged, empty, or lacks a column, ids are empty or not unique, the
            first tile is missing, or no position lies in a tile.
        ConfigError: if options contradict each other.
        LabelError: if the labels file is missing, wrong, or an incomplete benchmark.
    """

    def __init__(
        self,
        root: str | Path | None,
        *,
        tiles: str | Path | None = None,
        id_column: str | None = None,
        ra_column: str | None = None,
        dec_column: str | None = None,
        x_column: str | None = None,
        y_column: str | None = None,
        size: int = SIDE,
        size_column: str | None = None,
        size_arcsec: float | int | None = None,
        tile_column: str | None = None,
        tile_columns: Sequence[str] = (),
        label_column: str | None = None,
        extensions: Extensions = None,
        layout: str = "auto",
        bands: Sequence[str] | None = None,
        labels_file: str | Path | None = None,
        rendering: Rendering = EIGHT_BITS,
    ) -> None:
        if root is None:
            raise missing_root("catalogue", "a CSV, Parquet, FITS or VOTable file with positions")
        columns = ColumnNames(
            id=id_column,
            ra=ra_column,
            dec=dec_column,
            x=x_column,
            y=y_column,
            size=size_column,
            tile=tile_column,
            tiles=tuple(tile_columns),
            label=label_column,
        )
        check_range("dataset.source.size", size, low=1)
        check_range("dataset.source.size_arcsec", size_arcsec, above=0, null=True)
        if label_column is not None and labels_file is not None:
            raise ConfigError("dataset.source.label_column and labels_file: give only one of them")
        if size_column is not None and size_arcsec is not None:
            raise ConfigError("dataset.source.size_column and size_arcsec: give only one of them")
        check_choice("dataset.source.layout", layout, LAYOUTS)
        self.extensions, self.cube_layout = checked_extensions(extensions), layout
        self.size, self.size_arcsec = size, None if size_arcsec is None else float(size_arcsec)
        self.catalogue = Path(root).expanduser()
        self.tiles = self.catalogue.parent if tiles is None else Path(tiles).expanduser()
        rows = read_rows(self.catalogue, columns)
        if not len(rows.ids):
            raise DataError(f"{self.catalogue}: the catalogue has no rows")
        self._x, self._y, self._ra, self._dec, self._sizes = rows.x, rows.y, rows.ra, rows.dec, rows.size
        self._codes, self.paths = (
            tiles_by_name(rows) if rows.tiles else tiles_by_position(self.catalogue, self.tiles, rows, self.extensions)
        )
        self._trusted = is_trusted()
        outside = next((path for path in self.paths if {"/", ".."} & set(PurePath(path).parts)), None)
        check_inside(self.catalogue, f"its tile {outside} lies outside of {self.tiles}", outside is not None)
        self._mapped: LRU[int, ArchiveTile] = LRU(OPEN_TILES, close=ArchiveTile.close)
        self._in_memory: LRU[int, ArchiveTile] = LRU(max(4, 2 * len(self._codes)), close=ArchiveTile.close)
        first = self._first_tile()
        names = _endings(rows.columns) if len(self._codes) > 1 else first.names
        self._named = bands is None and len(self._codes) == 1 and names is not None
        options = (replace(columns, label=None), size, self.size_arcsec, self.extensions, layout)
        super().__init__(
            name=self.catalogue.resolve().name.split(".")[0],
            ids=rows.ids,
            bands=band_names(names if bands is None else bands, max(first.bands, len(self._codes))),
            units=first.units,
            rendering=rendering,
            fingerprint=_fingerprint(self.catalogue, self.tiles, self.paths, options),
        )
        if label_column is not None:
            self.labels, self.truth = labels_or_classes(self.catalogue, rows, self._position)
        else:
            self.labels, self.truth = read_labels(labels_file, self.ids, self.catalogue.parent, archive=True)

    def _first_tile(self) -> ArchiveTile:
        """Return the tile of the first row that has one, after checking those of the other bands."""
        complete = np.flatnonzero(np.all([codes >= 0 for codes in self._codes], axis=0))
        if not complete.size:
            raise DataError(
                f"{self.catalogue}: none of its {len(self._codes[0]):,} rows lies in one of the "
                f"{len(self.paths):,} tiles"
            )
        for codes in reversed(self._codes):
            try:
                with self._use(int(codes[complete[0]])) as tile:
                    first = tile
            except UnreadableImageError as error:
                raise DataError(
                    f"{self.catalogue}: {error}; correct dataset.source.tiles ({self.tiles}) or the tile column"
                ) from None
            if len(self._codes) > 1 and first.bands != 1:
                raise DataError(f"{self.tiles}: tile_columns needs tiles of one band, {first.name} has {first.bands}")
            if first.sky is None and (self._x is None or self.size_arcsec is not None):
                raise DataError(
                    f"{self.tiles}: the tile {first.name} has no celestial coordinates, which positions in degrees and "
                    f"sizes in arcsec need; give dataset.source.x_column and y_column, and size in pixels"
                )
        return first

    def storage_order(self, position: int) -> int:
        """Return the number of the tile, so that a batch opens each tile once."""
        return int(self._codes[0][position])

    def coordinates(self, id_: str) -> tuple[float, float] | None:
        """Return the position of a row from the catalogue, else from its tile; see `ImageSource.coordinates`."""
        position = self._position[id_]
        if self._ra is not None and self._dec is not None:
            ra, dec = float(self._ra[position]), float(self._dec[position])
            return (ra, dec) if np.isfinite([ra, dec]).all() else None
        code = int(self._codes[0][position])
        if code < 0:
            return None
        try:
            with self._use(code) as tile:
                return None if tile.sky is None else tile.sky.at(*self._pixel(position, tile))
        except UnreadableImageError:
            return None

    def orientation(self, id_: str) -> Orientation | None:
        """Return the scale of the tile of a row, and the directions at its place; see `ImageSource.orientation`."""
        position = self._position[id_]
        code = int(self._codes[0][position])
        if code < 0:
            return None
        try:
            with self._use(code) as tile:
                return None if tile.sky is None else tile.sky.orientation(*self._pixel(position, tile))
        except UnreadableImageError:
            return None

    def metadata(self) -> pa.Table | None:
        """Return all columns of the catalogue; see `ImageSource.metadata`."""
        return catalogue_table(self.catalogue)

    def load(self, position: int) -> Pixels:
        """See `ImageSource.load`."""
        parts, shapes = [], set()
        for codes in self._codes:
            code = int(codes[position])
            if code < 0:
                raise UnreadableImageError("it lies in no tile, or the catalogue names none")
            with self._use(code) as tile:
                one_each = len(self._codes) > 1
                check_bands(tile.bands, tile.names, self.bands[:1] if one_each else self.bands, named=self._named)
                parts.append(tile.cut(*self._pixel(position, tile), self._side(position, tile)))
                shapes.add(tile.shape if self._x is not None else parts[-1].shape)
        if len(shapes) > 1:
            raise UnreadableImageError("the tiles of its bands differ in size, or in the size of their pixels")
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=2)

    def _use(self, code: int) -> AbstractContextManager[ArchiveTile]:
        light = self.paths[code].lower().endswith(_MAPPED)
        return (self._mapped if light else self._in_memory).use(code, partial(self._open, code))

    def _open(self, code: int) -> ArchiveTile:
        path = self.tiles / self.paths[code]
        try:
            if not self._trusted and leaves(path, self.tiles):
                raise UnreadableImageError("it lies outside of the folder of the tiles: set trust=true to read it")
            return open_tile(path, self.extensions, self.cube_layout)
        except UnreadableImageError as error:
            raise UnreadableImageError(f"its tile {self.paths[code]}: {error}") from None

    def _pixel(self, position: int, tile: ArchiveTile) -> tuple[float, float]:
        """Return the 0-based x and y of a row in its tile."""
        if self._x is not None and self._y is not None:
            x, y = float(self._x[position]), float(self._y[position])
        else:
            x, y = self._pixel_on_sky(position, tile)
        if not np.isfinite([x, y]).all():
            raise UnreadableImageError(f"its position is no number, or has no place in its tile {tile.name}")
        return x, y

    def _pixel_on_sky(self, position: int, tile: ArchiveTile) -> tuple[float, float]:
        assert self._ra is not None
        assert self._dec is not None
        if tile.sky is None:
            raise UnreadableImageError(f"its tile {tile.name} has no celestial coordinates")
        at = slice(position, position + 1)
        x, y = tile.sky.to_pixels(self._ra[at], self._dec[at])
        # Rounding errors must not move a whole pixel to its neighbour.
        return round(float(x[0]), 6), round(float(y[0]), 6)

    def _side(self, position: int, tile: ArchiveTile) -> int:
        side: float = self.size
        if self._sizes is not None:
            side = float(self._sizes[position])
        elif self.size_arcsec is not None:
            if tile.sky is None:
                raise UnreadableImageError(f"its tile {tile.name} has no celestial coordinates to tell its size by")
            side = self.size_arcsec / tile.sky.scale
        if not 0.5 < side <= MAX_PIXELS**0.5:
            raise UnreadableImageError(f"its size of {side:g} pixels is no number from 1 to {MAX_PIXELS**0.5:g}")
        return round(side)


def _endings(columns: Sequence[str]) -> Sequence[str]:
    """Return the endings of column names, "g" for "tile_g"; the names themselves if the endings are not unique."""
    ends = [column.rsplit("_", 1)[-1] for column in columns]
    return ends if all(ends) and len(set(ends)) == len(ends) else columns


def _fingerprint(root: Path, folder: Path, paths: Sequence[str], options: object) -> str:
    files = (root, *(folder / path for path in paths))
    rows = ((file.name, *(stamp(file) if file.exists() else ("missing",))) for file in files)
    return hash_rows(f"catalogue {options!r}", rows)
