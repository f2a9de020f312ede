"""What is known of an image beside its pixels: its class, file, header, row in a catalogue, and place on the sky."""

import math
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
from astropy.io import fits

from anomalymatch.data.source import BaseSource, ImageSource
from anomalymatch.data.sources.catalogue_rows import USUAL_DEC, USUAL_RA
from anomalymatch.data.sources.encoded import EncodedSource
from anomalymatch.data.sources.fits import FitsSource
from anomalymatch.data.sources.fits_file import FitsFile, fits_errors
from anomalymatch.errors import UnreadableImageError
from anomalymatch.ui.originals import guarded, suffix_of

MAX_CARDS, MAX_UNITS, MAX_TEXT = 400, 8, 300
_STRUCTURE = {"SIMPLE", "XTENSION", "EXTEND", "PCOUNT", "GCOUNT", "COMMENT", "HISTORY", "CONTINUE", ""}


class Metadata:
    """What an archive tells of its images.

    Args:
        source: the images.
    """

    def __init__(self, source: ImageSource) -> None:
        self.source = source

    @cached_property
    def table(self) -> pa.Table | None:
        """See `metadata_table`; read when it is asked for first."""
        return metadata_table(self.source)

    def __call__(self, id_: str) -> dict[str, str]:
        """All but the pixels of one image, by name. What cannot be read is left out.

        Raises:
            DataError: if the id is not in the source.
        """
        found: dict[str, str] = {}
        if self.source.truth is not None and (name := self.source.truth.get(id_)) is not None:
            found["class"] = name
        with suppress(UnreadableImageError), guarded(self.source, id_) as path:
            found |= {} if path is None else _file(path)
            if isinstance(self.source, FitsSource) and path is not None:
                found |= dict(_cards(path))
            elif isinstance(self.source, EncodedSource):
                data = self.source.raw_bytes(id_)
                found |= {"format": suffix_of(data).removeprefix(".").upper(), "bytes": f"{len(data):,}"}
        for name, value in self._row(id_).items():
            found[f"{name} (catalogue)" if name in found else name] = value
        return {_printable(name): _printable(value) for name, value in found.items()}

    def coordinates(self, id_: str) -> tuple[float, float] | None:
        """Right ascension and declination in degrees, by the source or by the usual columns of its table.

        Raises:
            DataError: if the id is not in the source.
        """
        given: Callable[[str], tuple[float, float] | None] | None = getattr(self.source, "coordinates", None)
        if given is not None:
            with guarded(self.source, id_):
                return given(id_)
        row = {name.lower(): value for name, value in self._row(id_).items()}
        texts = [next((row[name] for name in usual if name in row), "") for usual in (USUAL_RA, USUAL_DEC)]
        try:
            ra, dec = (float(text) for text in texts)
        except ValueError:
            return None
        return (ra, dec) if math.isfinite(ra) and 0 <= ra <= 360 and abs(dec) <= 90 else None

    def _row(self, id_: str) -> dict[str, str]:
        if not isinstance(self.source, BaseSource):
            return {}
        row = self.source.position(id_)
        if self.table is None:
            return {}
        values = {name: self.table[name][row].as_py() for name in self.table.column_names}
        return {name: value for name, value in values.items() if value}


def metadata_table(source: ImageSource) -> pa.Table | None:
    """What stands beside the images (a catalogue, further columns of Parquet files, the metadata of Zarr stores).

    Returns:
        Text, a row for each of `source.ids` in their order; None for sources that have nothing of the kind.

    Raises:
        DataError: if it cannot be read.
    """
    read: Callable[[], pa.Table | None] | None = getattr(source, "metadata", None)
    return None if read is None else read()


def _file(path: Path) -> dict[str, str]:
    try:
        found = os.stat(path)
    except OSError:
        return {}
    changed = datetime.fromtimestamp(found.st_mtime, UTC)
    return {"file": str(path), "bytes": f"{found.st_size:,}", "changed": f"{changed:%Y-%m-%d %H:%M} UTC"}


def _cards(path: Path) -> Iterator[tuple[str, str]]:
    """The cards of the first units of a FITS file, up to a number; one of a later unit that is not new says where."""
    seen: dict[str, str] = {}
    file = FitsFile(path)
    try:
        with fits_errors():
            for number, hdu in enumerate(file.hdus[:MAX_UNITS] if len(file.hdus) > MAX_UNITS else file.hdus):
                for card in hdu.header.cards:
                    key, value = _card(card)
                    if key in _STRUCTURE or key.startswith("NAXIS") or seen.get(key) == value:
                        continue
                    yield (f"{key} ({hdu.name or number})" if key in seen else key), value
                    seen.setdefault(key, value)
                    if len(seen) >= MAX_CARDS:
                        return
    finally:
        file.close()


def _card(card: fits.Card) -> tuple[str, str]:
    try:
        value: Any = card.value
        return card.keyword, "" if isinstance(value, fits.card.Undefined) else str(value).strip()
    except Exception:  # a card can be damaged in any way, and its neighbours still be sound
        return "", ""


def _printable(text: str) -> str:
    """Text on one line, of a length that can be shown."""
    text = "".join(character if character.isprintable() else " " for character in text[: MAX_TEXT + 1])
    return text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 1] + "…"
