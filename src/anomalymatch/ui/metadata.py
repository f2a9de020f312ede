"""Metadata of images: class, file, FITS header, row in a catalogue, sky coordinates."""

import math
import os
from contextlib import suppress
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path

import pyarrow as pa

from anomalymatch.data.source import ImageSource
from anomalymatch.data.sources.catalogue_rows import USUAL_DEC, USUAL_RA
from anomalymatch.errors import UnreadableImageError
from anomalymatch.text import printable
from anomalymatch.ui.originals import guarded, suffix_of

MAX_TEXT = 300


class Metadata:
    """Metadata of the images of a source.

    Args:
        source: the images.
    """

    def __init__(self, source: ImageSource) -> None:
        self.source = source

    @cached_property
    def table(self) -> pa.Table | None:
        """Further columns of the archive, see `ImageSource.metadata`; read on first use."""
        return self.source.metadata()

    def __call__(self, id_: str) -> dict[str, str]:
        """Return the metadata of one image by name, without parts that cannot be read.

        Raises:
            DataError: if the id is not in the source.
        """
        found: dict[str, str] = {}
        if self.source.truth is not None and (name := self.source.truth.get(id_)) is not None:
            found["class"] = name
        with suppress(UnreadableImageError), guarded(self.source, id_) as path:
            found |= {} if path is None else _file(path)
            found |= self.source.header(id_)
            if self.source.encoded:
                data = self.source.raw_bytes(id_)
                found |= {"format": suffix_of(data).removeprefix(".").upper(), "bytes": f"{len(data):,}"}
        for name, value in self._row(id_).items():
            found[f"{name} (catalogue)" if name in found else name] = value
        return {_one_line(name): _one_line(value) for name, value in found.items()}

    def coordinates(self, id_: str) -> tuple[float, float] | None:
        """Return right ascension and declination in degrees, from the source or the usual columns of its table.

        Raises:
            DataError: if the id is not in the source.
        """
        given = None
        with suppress(UnreadableImageError), guarded(self.source, id_):
            given = self.source.coordinates(id_)
        if given is not None:
            return given
        row = {name.lower(): value for name, value in self._row(id_).items()}
        texts = [next((row[name] for name in usual if name in row), "") for usual in (USUAL_RA, USUAL_DEC)]
        try:
            ra, dec = (float(text) for text in texts)
        except ValueError:
            return None
        return (ra, dec) if math.isfinite(ra) and 0 <= ra <= 360 and abs(dec) <= 90 else None

    def _row(self, id_: str) -> dict[str, str]:
        row = self.source.position(id_)
        if self.table is None:
            return {}
        values = {name: self.table[name][row].as_py() for name in self.table.column_names}
        return {name: value for name, value in values.items() if value}


def _file(path: Path) -> dict[str, str]:
    try:
        found = os.stat(path)
    except OSError:
        return {}
    changed = datetime.fromtimestamp(found.st_mtime, UTC)
    return {"file": str(path), "bytes": f"{found.st_size:,}", "changed": f"{changed:%Y-%m-%d %H:%M} UTC"}


def _one_line(text: str) -> str:
    return printable(text, " ", limit=MAX_TEXT)
