"""An open FITS file whose units are checked for completeness; what damage raises becomes one kind of error."""

import gzip
import io
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from astropy.io import fits

from anomalymatch.errors import UnreadableImageError

MAX_UNZIPPED = 2**31
"""Bytes to which a .gz file may grow: it is unpacked in memory."""
BUFFER = 2**16
"""Bytes that are read at once: a small file takes one call of the system."""
_GZIP = b"\x1f\x8b"
_IGNORE_ASTROPY = ("ignore", None, Warning, re.compile(r"astropy\."), 0)


def silence_astropy() -> None:
    """Ignore the warnings of astropy's own modules; they are about the contents of single files.

    What matters among them, above all a truncated file, is checked here. `warnings.catch_warnings` is not safe to use
    in several threads at once, so the filter is left in place, and put back where something has taken it away.
    """
    if _IGNORE_ASTROPY not in warnings.filters:
        warnings.filterwarnings("ignore", module=_IGNORE_ASTROPY[3].pattern)


@contextmanager
def fits_errors() -> Iterator[None]:
    """Turn whatever a damaged file makes astropy raise into an `UnreadableImageError`."""
    try:
        yield
    except UnreadableImageError:
        raise
    except Exception as error:  # a bad header can make any line of a parser fail, and must not end a run over millions
        if isinstance(error, OSError) and error.strerror:
            raise UnreadableImageError(f"cannot be opened: {error.strerror}") from None
        text = str(error).strip().split("\n", 1)[0] or type(error).__name__
        raise UnreadableImageError(f"cannot be read as FITS: {text}") from None


class Place(NamedTuple):
    """Where the data of a unit begin in the file, and their bytes without and with the padding to whole blocks."""

    start: int
    size: int
    span: int

    @classmethod
    def of(cls, hdu: Any) -> "Place":
        """The place of astropy's unit."""
        info = hdu.fileinfo()
        # The table behind a compressed image does not tell its own size, but is padded to whole blocks.
        return cls(info["datLoc"], info["datSpan"] if isinstance(hdu, fits.CompImageHDU) else hdu.size, info["datSpan"])


class FitsFile:
    """An open FITS file, unpacked in memory if it is gzipped.

    Attributes:
        data: the bytes, if they are in memory.
        size: bytes of the file.

    Raises:
        UnreadableImageError: if the file cannot be opened, or is no FITS.
    """

    def __init__(self, path: Path) -> None:
        silence_astropy()
        self.path = path
        self.data: bytes | None = None
        self._stream: BinaryIO | None = None
        try:
            with fits_errors():
                self._stream = path.open("rb", buffering=BUFFER)
                if self._stream.read(2) == _GZIP:
                    self._unpack()
                self.size = os.fstat(self._stream.fileno()).st_size if self.data is None else len(self.data)
                if not self.size:
                    raise UnreadableImageError("the file is empty (0 bytes)")
                if not self.read(0, 6) == b"SIMPLE":
                    raise UnreadableImageError("it is no FITS file: it does not begin with SIMPLE")
        except UnreadableImageError:
            self.close()
            raise

    @cached_property
    def hdus(self) -> Any:
        """The header and data units as astropy lists them; pixels are left unscaled.

        Raises:
            UnreadableImageError: if the first header is damaged.
        """
        assert self._stream is not None
        with fits_errors():
            self._stream.seek(0)
            # Scaled by astropy, BLANK would be lost where it is 0, or stands beside the BZERO of unsigned integers.
            return fits.open(self._stream, memmap=False, do_not_scale_image_data=True, lazy_load_hdus=True)

    def _unpack(self) -> None:
        assert self._stream is not None
        self._stream.seek(0)
        with gzip.GzipFile(fileobj=self._stream) as unzipped:
            self.data = unzipped.read(MAX_UNZIPPED + 1)
        self._stream.close()
        if len(self.data) > MAX_UNZIPPED:
            raise UnreadableImageError(f"it unpacks to more than {MAX_UNZIPPED:,} bytes")
        self._stream = io.BytesIO(self.data)

    def close(self) -> None:
        """Close the file."""
        if self._stream is not None:
            self._stream.close()

    def __del__(self) -> None:
        # Tiles stay open for as long as their source lives, which nobody closes.
        self.close()

    def read(self, start: int, count: int) -> bytes:
        """Bytes from `start` on; fewer at the end of the file."""
        assert self._stream is not None
        self._stream.seek(start)
        return self._stream.read(count)

    def check_complete(self, place: Place) -> None:
        """Refuse a unit whose data are cut off, or are followed by what is no further unit.

        Raises:
            UnreadableImageError: with the number of missing bytes.
        """
        missing = place.start + place.size - self.size
        if missing > 0:
            raise UnreadableImageError(
                f"the file is truncated: {missing:,} of {place.size:,} bytes of data are missing"
            )
        end = place.start + place.span
        following = self.read(end, 8) if end < self.size else b""  # or the buffer would be lost
        if following.strip(b"\0 ") not in (b"", b"XTENSION"):
            raise UnreadableImageError("the file is damaged: its data are not as long as its header says")
