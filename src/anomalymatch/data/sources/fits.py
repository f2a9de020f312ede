"""FITS files as a source: one image in each file, its extensions or the planes of a cube as bands."""

from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from astropy.io import fits

from anomalymatch.data.codecs import MAX_PIXELS
from anomalymatch.data.find import missing_root, scan_for, stamp
from anomalymatch.data.labels import read_labels
from anomalymatch.data.rendering import Rendering, band_names
from anomalymatch.data.source import EIGHT_BITS, ImageSource, hash_rows
from anomalymatch.data.sources.fits_file import Extensions, FitsFile, fits_errors
from anomalymatch.data.sources.fits_reader import FITS_SUFFIXES, FitsImages, checked_extensions, read_sky
from anomalymatch.errors import DataError, UnreadableImageError
from anomalymatch.types import Pixels

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
        bands: names of the bands; None takes the names of the extensions, else FILTER, else CTYPE3, else usual ones.
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
        bands: Sequence[str] | None = None,
        labels_file: str | Path | None = None,
        rendering: Rendering = EIGHT_BITS,
    ) -> None:
        if root is None:
            raise missing_root("fits", "the folder that holds the FITS files")
        path = Path(root).expanduser()
        self.extensions = checked_extensions(extensions)
        self._root = path if path.is_dir() else path.parent
        entries = [(path.name, *stamp(path))] if path.is_file() else scan_for("FITS files", path, FITS_SUFFIXES)
        ids = [entry[0] for entry in entries]
        count, names, units = self._layout(ids)
        self._named = bands is None and names is not None
        labels, truth = read_labels(labels_file, ids, path)
        super().__init__(
            name=path.resolve().name,
            ids=ids,
            bands=band_names(names if bands is None else bands, count),
            units=units,
            rendering=rendering,
            fingerprint=hash_rows(f"fits {self.extensions!r}", entries),
            labels=labels,
            truth=truth,
            folder=self._root,
        )

    def _layout(self, ids: Sequence[str]) -> tuple[int, Sequence[str] | None, str | None]:
        """Return the number of bands, their names and the unit of the first readable file."""
        reasons = []
        for id_ in ids[:TRIED]:
            try:
                with FitsImages(self._root / id_, self.extensions) as images:
                    return images.bands, images.names, images.units
            except UnreadableImageError as error:
                reasons.append(f"{id_}: {error}")
        raise DataError(
            f"{self._root}: expected FITS files with images, but none of the first {len(reasons)} can be used, "
            f"the first is {reasons[0]}; correct data.root or dataset.source.extensions"
        )

    def load(self, position: int) -> Pixels:
        """See `ImageSource.load`."""
        with FitsImages(self._root / self.ids[position], self.extensions) as images:
            check_bands(images.bands, images.names, self.bands, named=self._named)
            height, width = images.shape
            if height * width > MAX_PIXELS:
                raise UnreadableImageError(f"{width} x {height} pixels is more than {MAX_PIXELS:,}")
            return images.cut()

    def coordinates(self, id_: str) -> tuple[float, float] | None:
        """Return right ascension and declination (ICRS, degrees) of the centre of an image; None if unknown."""
        sky = read_sky(self._root / self.ids[self._position[id_]], self.extensions)
        return None if sky is None else sky.centre()

    def header(self, id_: str) -> dict[str, str]:
        """Return the cards of the first units of a file; a keyword that a later unit repeats names its unit."""
        return dict(_cards(self._root / self.ids[self._position[id_]]))


def check_bands(count: int, names: Sequence[str] | None, expected: Sequence[str], *, named: bool) -> None:
    """Refuse an image with other bands than the rest; names count only if the headers `named` them.

    Raises:
        UnreadableImageError: if the number of bands differs, or their names.
    """
    if count != len(expected):
        raise UnreadableImageError(f"it has {count} bands instead of {len(expected)}: {', '.join(expected)}")
    if named and (names is None or tuple(names) != tuple(expected)):
        found = "have no names in its headers" if names is None else f"are {', '.join(names)}"
        raise UnreadableImageError(
            f"its bands {found} instead of {', '.join(expected)}; give dataset.source.bands to take them as such"
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
