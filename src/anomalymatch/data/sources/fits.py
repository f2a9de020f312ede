"""FITS files as a source: one image in each file, its extensions or the planes of a cube as bands."""

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from astropy.io import fits
from astropy.wcs import WCS

from anomalymatch.checks import check_choice
from anomalymatch.data.codecs import MAX_PIXELS
from anomalymatch.data.find import missing_root, scan_for, stamp
from anomalymatch.data.labels import read_labels
from anomalymatch.data.rendering import Rendering, band_names
from anomalymatch.data.source import EIGHT_BITS, ImageSource, hash_rows
from anomalymatch.data.sources.fits_file import (
    Extensions,
    FitsFile,
    Layout,
    Unit,
    find_plain,
    fits_errors,
    image_shape,
)
from anomalymatch.data.sources.sky import Sky
from anomalymatch.data.warning_filter import ASTROPY, ignore_warnings
from anomalymatch.errors import ConfigError, DataError, UnreadableImageError
from anomalymatch.text import listed
from anomalymatch.types import Orientation, Pixels

logger = logging.getLogger(__name__)

FITS_SUFFIXES = (".fits", ".fit", ".fts", ".fits.gz", ".fit.gz", ".fits.fz")
LAYOUTS = ("auto", "chw", "hwc")
NARROW, MAX_BANDS = 8, 64
"""Length below which an axis is no side of an image; length up to which the last axis is guessed to be the bands."""
STOKES = {1: "I", 2: "Q", 3: "U", 4: "V"}
KINDS = (fits.PrimaryHDU, fits.ImageHDU, fits.CompImageHDU, fits.BinTableHDU, fits.TableHDU, fits.GroupsHDU)
MAX_CARDS, MAX_UNITS = 400, 8
_STRUCTURE = {"SIMPLE", "XTENSION", "EXTEND", "PCOUNT", "GCOUNT", "COMMENT", "HISTORY", "CONTINUE", ""}
TRIED = 10
"""Files that are tried for one that tells the bands."""


class FitsSource(ImageSource):
    """FITS files below a folder, or one file; an id is the POSIX path below the folder.

    BSCALE and BZERO are applied, BLANK becomes NaN. Hidden files and folders are skipped, and so, with a warning, are
    links that leave the folder. Opening reads the headers of the first readable file only; a file with another number
    of bands, or with other band names where these come from the headers, becomes a `Reject`.

    Args:
        root: the folder, or one file.
        extensions: index or name of a FITS extension, or several of them as bands of one image; None takes the first
            with an image of 2 axes (one band) or 3 axes (NAXIS3 counts the bands).
        layout: order of the axes of a cube: "chw", "hwc" or "auto", see `FitsImages`; a guess is told once.
        bands: names of the bands; None takes the names of the extensions, else FILTER, BANDS, BAND0 … or FILTER0 …,
            else CTYPE3, else usual ones.
        labels_file: a CSV `filename,label`, see `labels_or_truth`; None takes `labels.csv` in the folder, where there
            is one.
        rendering: conversion of the bands to 8-bit channels.

    Raises:
        DataError: if there is nothing at `root`, no FITS file in it, or none of the first ten can be read.
        ConfigError: if `bands` are not one different name for each band, or `extensions` is an empty list.
        LabelError: if the labels file is missing, wrong, or an incomplete benchmark.
    """

    def __init__(
        self,
        root: str | Path | None,
        *,
        extensions: Extensions = None,
        layout: str = "auto",
        bands: Sequence[str] | None = None,
        labels_file: str | Path | None = None,
        rendering: Rendering = EIGHT_BITS,
    ) -> None:
        if root is None:
            raise missing_root("fits", "the folder that holds the FITS files")
        check_choice("dataset.source.layout", layout, LAYOUTS)
        path, self.cube_layout = Path(root).expanduser(), layout
        self.extensions = checked_extensions(extensions)
        self._root = path if path.is_dir() else path.parent
        entries = [(path.name, *stamp(path))] if path.is_file() else scan_for("FITS files", path, FITS_SUFFIXES)
        ids = [entry[0] for entry in entries]
        count, names, units = self._layout(ids)
        self._named = bands is None and names is not None
        labels, truth = read_labels(labels_file, ids, self._root, archive=path.is_file())
        super().__init__(
            name=path.resolve().name,
            ids=ids,
            bands=band_names(names if bands is None else bands, count),
            units=units,
            rendering=rendering,
            fingerprint=hash_rows(f"fits {self.extensions!r} {layout}", entries),
            labels=labels,
            truth=truth,
            folder=self._root,
        )

    def _layout(self, ids: Sequence[str]) -> tuple[int, Sequence[str] | None, str | None]:
        """Return the number of bands, their names and the unit of the first readable file."""
        reasons = []
        for id_ in ids[:TRIED]:
            try:
                with FitsImages(self._root / id_, self.extensions, layout=self.cube_layout) as images:
                    if images.bands_last and self.cube_layout == "auto":
                        logger.warning(
                            "%s: its shape %s is read as (h, w, bands), like others whose last axis is the smallest; "
                            "set dataset.source.layout to hwc to say so, or to chw",
                            self._root / id_,
                            images.bands_last,
                        )
                    return images.bands, images.names, images.units
            except UnreadableImageError as error:
                reasons.append(f"{id_}: {error}")
        raise DataError(
            f"{self._root}: expected FITS files with images, but none of the first {len(reasons)} can be used, "
            f"the first is {reasons[0]}; correct data.root or dataset.source.extensions"
        )

    def load(self, position: int) -> Pixels:
        """See `ImageSource.load`."""
        with FitsImages(self._root / self.ids[position], self.extensions, layout=self.cube_layout) as images:
            check_bands(images.bands, images.names, self.bands, named=self._named)
            height, width = images.shape
            if height * width * max(1, images.bands / MAX_BANDS) > MAX_PIXELS:
                shape = f"{width} x {height}" + (f" x {images.bands}" if images.bands > MAX_BANDS else "")
                raise UnreadableImageError(f"{shape} pixels is more than {MAX_PIXELS:,}")
            return images.cut()

    def coordinates(self, id_: str) -> tuple[float, float] | None:
        """Return right ascension and declination (ICRS, degrees) of the centre of an image; None if unknown."""
        sky = read_sky(self._root / self.ids[self._position[id_]], self.extensions)
        return None if sky is None else sky.centre()

    def orientation(self, id_: str) -> Orientation | None:
        """Return the scale of an image, and the directions at its centre; see `ImageSource.orientation`."""
        sky = read_sky(self._root / self.ids[self._position[id_]], self.extensions)
        return None if sky is None else sky.orientation((sky.shape[1] - 1) / 2, (sky.shape[0] - 1) / 2)

    def header(self, id_: str) -> dict[str, str]:
        """Return the cards of the first units of a file; a keyword that a later unit repeats names its unit."""
        return dict(_cards(self._root / self.ids[self._position[id_]]))


def check_bands(count: int, names: Sequence[str] | None, expected: Sequence[str], *, named: bool) -> None:
    """Refuse an image with other bands than the rest; names count only if the headers `named` them."""
    if count != len(expected):
        raise UnreadableImageError(f"it has {count} bands instead of {len(expected)}: {listed(expected)}")
    if named and (names is None or tuple(names) != tuple(expected)):
        found = "have no names in its headers" if names is None else f"are {listed(names)}"
        raise UnreadableImageError(
            f"its bands {found} instead of {listed(expected)}; give dataset.source.bands to take them as such"
        )


def _cards(path: Path) -> Iterator[tuple[str, str]]:
    """Yield up to `MAX_CARDS` cards of the first `MAX_UNITS` units; skip cards that describe the format."""
    seen: dict[str, str] = {}
    with closing(FitsFile(path)) as file, fits_errors():
        for number, hdu in enumerate(file.hdus[:MAX_UNITS] if len(file.hdus) > MAX_UNITS else file.hdus):
            for card in hdu.header.cards:
                key, value = _card(card)
                if key in _STRUCTURE or key.startswith("NAXIS") or seen.get(key) == value:
                    continue
                yield (f"{key} ({hdu.name or number})" if key in seen else key), value
                seen.setdefault(key, value)
                if len(seen) >= MAX_CARDS:
                    return


def _card(card: fits.Card) -> tuple[str, str]:
    try:
        value: Any = card.value
        return card.keyword, "" if isinstance(value, fits.card.Undefined) else str(value).strip()
    except Exception:  # one damaged card does not spoil the others
        return "", ""


class _UnitImage:
    """Image of one unit, (plane, h, w) or, with its bands last, (h, w, plane)."""

    def __init__(self, file: FitsFile, unit: Unit, mapped: bool, layout: str) -> None:
        file.check_complete(unit.place)
        self.file, self.unit, self.mapped = file, unit, mapped
        self.shape = unit.layout.shape
        self.bands_last = _has_bands_last(unit.layout, layout)
        self.planes = 1 if len(self.shape) == 2 else self.shape[-1 if self.bands_last else 0]
        self.size = self.shape[:2] if self.bands_last else self.shape[-2:]
        self._map: np.ndarray | None = None

    def cut(self, rows: slice, columns: slice) -> np.ndarray:
        hdu, scaling = self.unit.hdu, self.unit.layout.scaling
        others = (slice(None),) * (len(self.shape) - 2)
        place = (rows, columns, *others) if self.bands_last else (*others, rows, columns)
        if isinstance(hdu, fits.CompImageHDU):
            stored = hdu.section[(0,) * (len(hdu.shape) - len(self.shape)) + place]
            if (
                hdu.compression_type == "PLIO_1"
                and stored.dtype == np.int16
                and (scaling.scale, scaling.zero) == (1, 2**15)
            ):
                # CFITSIO packs unsigned integers of 16 bits as they are, without the offset that BZERO tells.
                stored, scaling = stored.view(np.uint16), replace(scaling, zero=0.0, blank=None)
        else:
            stored = self._stored()[place]
        if self.bands_last:
            stored = np.moveaxis(stored, 2, 0)
        with np.errstate(all="ignore"):
            return scaling(stored.reshape(self.planes, *stored.shape[-2:]))

    def _stored(self) -> np.ndarray:
        (start, size, _), dtype = self.unit.place, self.unit.layout.dtype
        if self._map is not None:
            return self._map
        if self.file.data is not None:
            return np.frombuffer(self.file.data, dtype, math.prod(self.shape), start).reshape(self.shape)
        if self.mapped:
            self._map = np.memmap(self.file.path, dtype, "r", start, self.shape)
            return self._map
        return np.frombuffer(self.file.read(start, size), dtype).reshape(self.shape)


def _has_bands_last(unit: Layout, layout: str) -> bool:
    """Tell whether a cube is (h, w, bands) by the key, else by the names of its axes, else by the smallest axis."""
    if len(unit.shape) < 3 or layout != "auto":
        return layout == "hwc" and len(unit.shape) == 3
    first, middle, last = unit.shape
    if any(unit.words[f"CTYPE{axis}"] for axis in (1, 2, 3)):
        return not unit.words["CTYPE1"] and bool(unit.words["CTYPE2"] and unit.words["CTYPE3"])
    if middle < min(first, last, NARROW):
        raise UnreadableImageError(
            f"its shape {unit.shape} is neither (bands, h, w) nor (h, w, bands): store it as one of them, or set "
            "dataset.source.layout to chw or hwc"
        )
    return last < min(first, middle) and last <= MAX_BANDS


class FitsImages:
    """Chosen images of one FITS file, as the bands of one image. Opening reads headers only.

    Args:
        path: the file.
        extensions: index or name of a unit, several of them, or None for the first with an image of 2 or 3 axes.
        layout: order of the axes of a cube: "chw" (bands first, as FITS has it), "hwc" or "auto", which takes the names
            of the axes in the header, else the smallest axis for the bands.
        mapped: map uncompressed pixels into memory instead of reading them; for small cuts.

    Attributes:
        bands_last: shape of the first cube that is read as (h, w, bands); None without one.
        names: names of the `bands` bands in the headers, or None.
        units: BUNIT, or None.

    Raises:
        UnreadableImageError: if the file is missing, damaged, or truncated, or has no such images.
    """

    def __init__(
        self, path: Path, extensions: Extensions = None, *, layout: str = "auto", mapped: bool = False
    ) -> None:
        self._file, self._mapped = FitsFile(path), mapped
        try:
            with fits_errors():
                units = find_plain(self._file, extensions) or _choose(self._file, extensions)
                self._images = [_UnitImage(self._file, unit, mapped, layout) for unit in units]
                sizes = {part.size for part in self._images}
                if len(sizes) > 1:
                    described = ", ".join(f"{w} x {h}" for h, w in sorted(sizes))
                    raise UnreadableImageError(f"its extensions have different sizes: {described}")
                self.shape: tuple[int, int] = self._images[0].size  # type: ignore[assignment]
                self.bands_last = next((part.shape for part in self._images if part.bands_last), None)
                self.bands = sum(part.planes for part in self._images)
                self.names = _names(units, self.bands)
                self.units = units[0].layout.words["BUNIT"] or None
        except UnreadableImageError:
            self.close()
            raise

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> "FitsImages":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def cut(self, rows: slice = slice(None), columns: slice = slice(None)) -> Pixels:
        """Return the pixels of a region, (h, w, band), scaled by BSCALE and BZERO; BLANK becomes NaN.

        Raises:
            UnreadableImageError: if they are damaged.
        """
        with fits_errors():
            in_file = self._mapped and self._file.data is None
            # Reading a map beyond the end kills the process.
            if in_file and self._file.path.stat().st_size < self._file.size:
                raise UnreadableImageError("the file has become shorter since it was opened")
            return np.dstack([plane for part in self._images for plane in part.cut(rows, columns)])

    def sky(self) -> Sky | None:
        """Return the celestial coordinates of the first band; None if they are unknown."""
        try:
            with ignore_warnings(ASTROPY):
                hdus = self._file.hdus
                axes = [2, 3] if self._images[0].bands_last else 2
                wcs = WCS(hdus[self._images[0].unit.number].header, fobj=hdus, naxis=axes)
                return Sky(wcs, self.shape) if wcs.has_celestial else None
        except Exception:  # a wrong header does not spoil the image
            return None


def _header_names(header: fits.Header, words: str, bands: int) -> Iterator[tuple[str, ...]]:
    """Yield names of bands in a header: FILTER = 'g,r', BANDS = 'gr' or 'g,r', BAND0 and BAND1, FILTER1 and FILTER2."""
    for text in (words, str(header.get("BANDS", ""))):
        yield tuple(word.strip() for word in text.split(","))
    yield tuple(str(header.get("BANDS", "")).strip())
    for key in ("BAND", "FILTER"):
        for start in (0, 1):
            yield tuple(str(header.get(f"{key}{i}", "")).strip() for i in range(start, start + bands))


def read_sky(path: Path, extensions: Extensions) -> Sky | None:
    """Return the celestial coordinates of the image in a file; None if they are unknown, or the file is damaged."""
    try:
        with FitsImages(path, extensions) as images:
            return images.sky()
    except UnreadableImageError:
        return None


def checked_extensions(extensions: Extensions) -> Extensions:
    """Return the extensions, a sequence as a list."""
    if extensions is None or isinstance(extensions, int | str):
        return extensions
    if not len(extensions):
        raise ConfigError("dataset.source.extensions=[]: give null, an index, a name, or a list of at least one")
    return list(extensions)


def _choose(file: FitsFile, extensions: Extensions) -> list[Unit]:
    """Find the chosen units by astropy."""
    if extensions is None:
        for i, hdu in enumerate(file.hdus):
            # Skipped units must be intact, or a weight map behind a damaged image would take its place.
            if not isinstance(hdu, KINDS):
                raise UnreadableImageError(f"its unit {i}, which comes before any image, is damaged or unknown")
            if image_shape(hdu):
                return [Unit.of(file, i)]
        raise UnreadableImageError("there is no image of 2 or 3 axes in it")
    chosen = []
    for key in [extensions] if isinstance(extensions, int | str) else extensions:
        try:
            number = file.hdus.index_of(key)
            hdu = file.hdus[number]
        except (KeyError, IndexError):
            listing = listed(f"{i} {hdu.name}".strip() for i, hdu in enumerate(file.hdus))
            raise UnreadableImageError(f"there is no extension {key} in it, only {listing}") from None
        if not image_shape(hdu):
            raise UnreadableImageError(f"its extension {key} is no image of 2 or 3 axes")
        chosen.append(Unit.of(file, number))
    return chosen


def _names(units: Sequence[Unit], bands: int) -> tuple[str, ...] | None:
    """Return the names of the bands from the extensions, from FILTER, or from the type of the third axis."""
    layouts = [unit.layout for unit in units]
    if len(units) > 1:
        for key in ("EXTNAME", "FILTER"):
            names = tuple(layout.words[key] for layout in layouts)
            if all(names) and len(set(names)) == bands:
                return names
        return None
    words = units[0].filter
    for names in _header_names(layouts[0].header, words, bands) if bands > 1 else [(words,)]:
        if all(names) and len(set(names)) == len(names) == bands:
            return names
    axis = layouts[0].words["CTYPE3"].split("-")[0] if layouts[0].shape[0] == bands else ""
    if bands == 1 or not axis or axis == "RGB":
        return None
    if axis == "STOKES":
        header = layouts[0].header
        at = [round((i + 1 - header.get("CRPIX3", 1)) * header.get("CDELT3", 1)) for i in range(bands)]
        return tuple(STOKES.get(round(header.get("CRVAL3", 1)) + i, f"stokes{i}") for i in at)
    return tuple(f"{axis.lower()}{i}" for i in range(bands))
