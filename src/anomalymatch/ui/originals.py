"""Original files of images, read only while they lie inside the folder of the archive."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from anomalymatch.data.source import ImageSource
from anomalymatch.data.sources.encoded import MAX_BYTES
from anomalymatch.errors import UnreadableImageError

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

    Raises:
        UnreadableImageError: if it cannot be read.
        DataError: if the id is not in the source.
    """
    with guarded(source, id_) as path:
        if source.encoded:
            data = source.raw_bytes(id_)
        elif path is not None:
            data = _read(path)
        else:
            return None
    return data, suffix_of(data)


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


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UnreadableImageError(f"cannot be opened: {error.strerror}") from None
