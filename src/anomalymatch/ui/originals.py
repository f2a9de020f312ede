"""The files that images come from, as they are; none is opened that has become a link out of its folder."""

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
    """Read an image within this block, which gets its file, or None if the archive is not made of single files.

    Opening an archive passes over links that leave its folder, but one can be put there later. So the place of a file
    is looked at before it is read and again after.

    Raises:
        UnreadableImageError: if the file is gone, no ordinary file, too large, or a link that leaves the folder.
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
    """The bytes of an image's own file and the suffix that their format has; None if the archive holds no such files.

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
    """The suffix of a file by what it begins with; `.bin` for what is unknown."""
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
