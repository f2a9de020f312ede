"""Original files of images, read only while they lie inside the folder of the archive, and their metadata."""

import math
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path

import pyarrow as pa

from anomalymatch.data.source import ImageSource
from anomalymatch.data.sources.catalogue_rows import USUAL_DEC, USUAL_RA
from anomalymatch.data.sources.encoded import MAX_BYTES
from anomalymatch.errors import UnreadableImageError
from anomalymatch.text import printable
from anomalymatch.ui.columns import add_scores

_MAGIC = {
    b"\xff\xd8\xff": ".jpg",
    b"\x89PNG\r\n\x1a\n": ".png",
    b"II*\0": ".tif",
    b"MM\0*": ".tif",
    b"GIF8": ".gif",
    b"BM": ".bmp",
    b"SIMPLE": ".fits",
    b"\x1f\x8b": ".fits.gz",
    b"\0\0\0\x0cjP  ": ".jp2",
    b"\xff\x4f\xff\x51": ".j2k",
}
MAX_FITS_BYTES = 2**31
MAX_TEXT = 300
"""Longest name or value of a piece of metadata, in characters."""


@contextmanager
def guarded(source: ImageSource, id_: str) -> Iterator[Path | None]:
    """Guard the reading of an image in this block; yields its file, or None if the archive does not store single files.

    Opening an archive skips links that leave its folder, but one can be created later. Therefore the path is checked
    before and after the file is read.

    Raises:
        UnreadableImageError: if the file is missing, not a regular file, too large, or a link that leaves the folder.
        DataError: if the id is not in the source.
    """
    path = source.file(id_)
    if source.folder is None or path is None:
        yield None
        return
    limit = MAX_BYTES if source.encoded else MAX_FITS_BYTES
    _check(source.folder, path, limit)
    yield path
    _check(source.folder, path, limit)


def original(source: ImageSource, id_: str) -> tuple[bytes, str] | None:
    """Return the bytes of an image's file and the suffix of their format; None if the archive has no such files.

    Raises the errors of `guarded`.
    """
    with guarded(source, id_) as path:
        if source.encoded:
            data = source.raw_bytes(id_)
        elif path is not None:
            try:
                data = path.read_bytes()
            except OSError as error:
                raise UnreadableImageError(f"cannot be opened: {error.strerror}") from None
        else:
            return None
    return data, suffix_of(data)


def has_fits(source: ImageSource, id_: str) -> bool:
    """Return True if the archive has a FITS file of an image."""
    with suppress(UnreadableImageError, OSError), guarded(source, id_) as path:
        if path is not None and not source.encoded:
            with path.open("rb") as file:
                return suffix_of(file.read(16)).startswith(".fits")
    return False


def suffix_of(data: bytes) -> str:
    """Return the file suffix that the first bytes indicate; `.bin` if unknown."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return ".webp"
    return next((suffix for magic, suffix in _MAGIC.items() if data.startswith(magic)), ".bin")


def _check(root: Path, path: Path, limit: int) -> None:
    try:
        real = os.path.realpath(path, strict=True)
        found = os.stat(real)
    except OSError as error:
        raise UnreadableImageError(f"cannot be opened: {error.strerror}") from None
    if not real.startswith(os.path.join(os.path.realpath(root), "")):
        raise UnreadableImageError("it has become a link that leaves the folder of the archive")
    if not stat.S_ISREG(found.st_mode):
        raise UnreadableImageError("it is no longer a file")
    if found.st_size > limit:
        raise UnreadableImageError(f"it has {found.st_size:,} bytes, which is more than {limit:,}")


class Metadata:
    """Metadata of the images of a source; a `DataError` is raised for an id that is not in the source.

    Args:
        source: the images.
        scores: further columns, see `read_scores`.
    """

    def __init__(self, source: ImageSource, scores: pa.Table | None = None) -> None:
        self.source, self._scores = source, scores

    @cached_property
    def table(self) -> pa.Table | None:
        """Further columns of the archive, see `ImageSource.metadata`, and the scores; read on first use."""
        return add_scores(self.source.metadata(), self._scores)

    def __call__(self, id_: str) -> dict[str, str]:
        """Return the metadata of one image by name, without parts that cannot be read."""
        found: dict[str, str] = {}
        if self.source.truth is not None and (name := self.source.truth.get(id_)) is not None:
            found["class"] = name
        with suppress(UnreadableImageError, OSError), guarded(self.source, id_) as path:
            if path is not None:
                status = os.stat(path)
                changed = datetime.fromtimestamp(status.st_mtime, UTC)
                found |= {"file": str(path), "bytes": f"{status.st_size:,}", "changed": f"{changed:%Y-%m-%d %H:%M} UTC"}
            found |= self.source.header(id_)
            if self.source.encoded:
                data = self.source.raw_bytes(id_)
                found |= {"format": suffix_of(data).removeprefix(".").upper(), "bytes": f"{len(data):,}"}
        for name, value in self._row(id_).items():
            found[f"{name} (catalogue)" if name in found else name] = value
        return {printable(name, " ", limit=MAX_TEXT): printable(v, " ", limit=MAX_TEXT) for name, v in found.items()}

    @property
    def has_headers(self) -> bool:
        """True if the files of the archive have headers."""
        return type(self.source).header is not ImageSource.header

    def header(self, id_: str) -> dict[str, str]:
        """Return the header of an image; empty if it cannot be read."""
        with suppress(UnreadableImageError, OSError), guarded(self.source, id_):
            return self.source.header(id_)
        return {}

    def coordinates(self, id_: str) -> tuple[float, float] | None:
        """Return right ascension and declination in degrees, from the source or the usual columns of its table."""
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
