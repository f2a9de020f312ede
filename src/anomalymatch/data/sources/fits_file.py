"""Open FITS file: completeness checks, one kind of error for damage, and a quick reader of plain headers."""

import gzip
import io
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from astropy.io import fits

from anomalymatch.data.warning_filter import ASTROPY, ignore_warnings
from anomalymatch.errors import UnreadableImageError
from anomalymatch.text import reason

MAX_UNZIPPED = 2**31
"""Largest size in bytes of an unpacked .gz file, which is held in memory."""
SMALL, MAX_PACKING = 2**26, 200
"""A .gz file that unpacks to more than `SMALL` bytes may be packed by this factor at most; images are by less."""
BUFFER = 2**16
"""Bytes read at once, so that a small file takes one system call."""
_GZIP = b"\x1f\x8b"


@contextmanager
def fits_errors() -> Iterator[None]:
    """Turn any exception of astropy about a damaged file into an `UnreadableImageError`; ignore its warnings."""
    try:
        with ignore_warnings(ASTROPY):
            yield
    except UnreadableImageError:
        raise
    except Exception as error:  # a bad header can make any line of the parser fail
        if isinstance(error, OSError) and error.strerror:
            raise UnreadableImageError(f"cannot be opened: {error.strerror}") from None
        raise UnreadableImageError(f"cannot be read as FITS: {reason(error)}") from None


class Place(NamedTuple):
    """Start of the data of a unit in the file, and their size in bytes without and with padding to whole blocks."""

    start: int
    size: int
    span: int

    @classmethod
    def of(cls, hdu: Any) -> "Place":
        """Return the place of a unit of astropy."""
        info = hdu.fileinfo()
        # The table of a compressed image does not tell its own size, but is padded to whole blocks.
        return cls(info["datLoc"], info["datSpan"] if isinstance(hdu, fits.CompImageHDU) else hdu.size, info["datSpan"])


class FitsFile:
    """Open FITS file of `size` bytes; `data` has its contents if it was gzipped.

    Raises:
        UnreadableImageError: if the file cannot be opened, or is no FITS.
    """

    def __init__(self, path: Path) -> None:
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
        """Header and data units of astropy, with unscaled pixels."""
        assert self._stream is not None
        with fits_errors():
            self._stream.seek(0)
            # Scaling by astropy loses a BLANK that is 0 or stands beside the BZERO of unsigned integers.
            return fits.open(self._stream, memmap=False, do_not_scale_image_data=True, lazy_load_hdus=True)

    def _unpack(self) -> None:
        assert self._stream is not None
        self._stream.seek(0)
        packed = os.fstat(self._stream.fileno()).st_size
        most = min(MAX_UNZIPPED, max(SMALL, MAX_PACKING * packed))
        with gzip.GzipFile(fileobj=self._stream) as unzipped:
            self.data = unzipped.read(most + 1)
        self._stream.close()
        if len(self.data) > most:
            raise UnreadableImageError(f"it has {packed:,} bytes, but unpacks to more than {most:,}")
        self._stream = io.BytesIO(self.data)

    def close(self) -> None:
        """Close the file."""
        if self._stream is not None:
            self._stream.close()

    def __del__(self) -> None:
        # Tiles stay open as long as their source, which has no close method.
        self.close()

    def read(self, start: int, count: int) -> bytes:
        """Return `count` bytes from `start` on; fewer at the end of the file."""
        assert self._stream is not None
        self._stream.seek(start)
        return self._stream.read(count)

    def check_complete(self, place: Place) -> None:
        """Check that the data of a unit are complete and followed by another unit or the end."""
        missing = place.start + place.size - self.size
        if missing > 0:
            raise UnreadableImageError(
                f"the file is truncated: {missing:,} of {place.size:,} bytes of data are missing"
            )
        end = place.start + place.span
        following = self.read(end, 8) if end < self.size else b""  # reading at the end would discard the buffer
        if following.strip(b"\0 ") not in (b"", b"XTENSION"):
            raise UnreadableImageError("the file is damaged: its data are not as long as its header says")


Extensions = int | str | Sequence[int | str] | None
BLOCK, CARD = 2880, 80
MAX_BLOCKS = 64
"""Length of the longest header that is parsed here; astropy parses longer ones."""
MAX_LAYOUTS = 1024
_FIRST_CARDS = (b"SIMPLE  =                    T", b"XTENSION= 'IMAGE   '")
_END = re.compile(rb"(?:.{80})*?END {5}", re.DOTALL)
_USED = (
    rb"SIMPLE|XTENSION|BITPIX|NAXIS\d*|PCOUNT|GCOUNT|GROUPS|EXTEND|EXTNAME|EXTVER|EXTLEVEL|INHERIT|"
    rb"BSCALE|BZERO|BLANK|BUNIT|FILTER\d*|BANDS?\d*|CTYPE[123]|CRPIX3|CRVAL3|CDELT3"
)
"""Keywords that this package uses, or astropy when it makes a unit from a header."""
_UNUSED = re.compile(
    rb"(?=.{8}= )(?!(?:%b)\b)[A-Z0-9_-]+ *=|HIERARCH (?! *(?i:%b)\b)|COMMENT |HISTORY | {8}" % (_USED, _USED), re.DOTALL
)


@dataclass(frozen=True)
class PixelScaling:
    """Conversion of stored numbers to values: stored * scale + zero, with NaN for `blank`."""

    scale: float
    zero: float
    blank: int | None

    @classmethod
    def of(cls, header: fits.Header) -> "PixelScaling":
        """Return the scaling that a header describes."""
        blank = header.get("BLANK")
        known = isinstance(blank, int) and header["BITPIX"] > 0
        return cls(float(header.get("BSCALE", 1)), float(header.get("BZERO", 0)), blank if known else None)

    def __call__(self, stored: np.ndarray) -> np.ndarray:
        """Return the values in native byte order, without a copy where they equal the stored numbers."""
        native = stored.astype(stored.dtype.newbyteorder("="), copy=False)
        plain = self.scale == 1 and self.zero == 0
        if native.dtype.kind == "f":
            return native if plain else native * self.scale + self.zero
        if self.blank is None and plain:
            return native
        bits = 8 * native.dtype.itemsize
        if self.blank is None and self.scale == 1 and self.zero == (-128 if bits == 8 else 2 ** (bits - 1)):
            other = native.view(f"{'i' if bits == 8 else 'u'}{bits // 8}")
            return other ^ other.dtype.type(1 << (bits - 1) if bits > 8 else -128)
        values = native.astype(np.float32 if bits <= 16 else np.float64)
        values = np.multiply(values, self.scale) + self.zero
        if self.blank is not None:
            values[native == self.blank] = np.nan
        return values


@dataclass(frozen=True)
class Layout:
    """Storage of an image in a unit, as astropy reads the header; many files share one layout.

    `shape` is that of `image_shape`, `size` is in bytes, and `words` are EXTNAME, FILTER, BUNIT and CTYPE1 to 3.
    """

    name: str
    header: fits.Header
    shape: tuple[int, ...]
    size: int
    dtype: np.dtype
    scaling: PixelScaling
    words: Mapping[str, str]

    @classmethod
    def of(cls, hdu: Any) -> "Layout":
        """Return the layout of a unit of astropy."""
        header = hdu.header
        dtype = np.dtype(fits.BITPIX2DTYPE[header["BITPIX"]]).newbyteorder(">")
        words = {key: _word(header, key) for key in ("EXTNAME", "FILTER", "BUNIT", "CTYPE1", "CTYPE2", "CTYPE3")}
        return cls(hdu.name, header, image_shape(hdu), hdu.size, dtype, PixelScaling.of(header), words)


class Unit(NamedTuple):
    """One unit of a file; `filter` is from its own or the first header, and `hdu` is None where its layout suffices."""

    number: int
    layout: Layout
    place: Place
    filter: str
    hdu: Any = None

    @classmethod
    def of(cls, file: FitsFile, number: int) -> "Unit":
        """Return a unit that astropy has found."""
        hdu = file.hdus[number]
        layout = Layout.of(hdu)
        return cls(number, layout, Place.of(hdu), layout.words["FILTER"] or _word(file.hdus[0].header, "FILTER"), hdu)


def find_plain(file: FitsFile, extensions: Extensions) -> list[Unit] | None:
    """Return the chosen units if they and all before them are plain images; None if astropy has to find them."""
    single = extensions is None or isinstance(extensions, int | str)
    wanted: Any = [extensions] if single else extensions
    found: dict[int | str | None, Unit] = {}
    for unit in _plain_units(file):
        found |= {key: unit for key in wanted if key not in found and _is(unit, key)}
        if len(found) == len(set(wanted)):
            return [found[key] for key in wanted] if all(unit.layout.shape for unit in found.values()) else None
    return None


def _is(unit: Unit, key: int | str | None) -> bool:
    if key is None:
        return bool(unit.layout.shape)
    if isinstance(key, int):
        return unit.number == key
    return key.strip().upper() in ({unit.layout.name.strip().upper()} | ({"PRIMARY"} if unit.number == 0 else set()))


def _plain_units(file: FitsFile) -> Iterator[Unit]:
    """Yield the units of a file up to the first that is no plain image."""
    number = start = 0
    first: Layout | None = None
    while header := _header(file, start):
        if not header.startswith(_FIRST_CARDS[min(number, 1)]) or (layout := _layout(_identity(header))) is None:
            return
        place = Place(start + len(header), layout.size, -(-layout.size // BLOCK) * BLOCK)
        first = first or layout
        yield Unit(number, layout, place, layout.words["FILTER"] or first.words["FILTER"])
        number, start = number + 1, place.start + place.span


def _header(file: FitsFile, start: int) -> bytes:
    """Read the header at `start`, in whole blocks; empty if it does not follow the standard."""
    header = b""
    for _ in range(MAX_BLOCKS):
        block = file.read(start + len(header), BLOCK)
        header += block
        if end := _END.match(block):
            sound = len(block) == BLOCK and not block[end.end() :].strip(b" ")
            return header if sound and header.isascii() else b""
        if len(block) < BLOCK:
            break
    return b""


def _identity(header: bytes) -> bytes:
    """Return the cards that describe the storage; cards of standard form with unused keywords are left out."""
    if b"CONTINUE" in header:  # astropy decides which card it continues
        return header
    cards = [header[at : at + CARD] for at in range(0, len(header.rstrip(b" ")), CARD)]
    return b"".join([card for card in cards if not _UNUSED.match(card)])


@lru_cache(MAX_LAYOUTS)
def _layout(cards: bytes) -> Layout | None:
    """Return the layout that astropy reads from a header; None if it is no plain image."""
    kind = fits.PrimaryHDU if cards.startswith(b"SIMPLE") else fits.ImageHDU
    try:
        hdu = kind.fromstring(cards.ljust(-(-len(cards) // BLOCK) * BLOCK), do_not_scale_image_data=True)
        clear = len(dict(hdu.header.items())) == len(hdu.header)  # all cards can be parsed, and none occurs twice
        return Layout.of(hdu) if type(hdu) is kind and hdu.size >= 0 and clear else None
    except Exception:  # damage; astropy describes it when it opens the whole file
        return None


def _word(header: fits.Header, key: str) -> str:
    value = header.get(key)
    return str(value).strip() if isinstance(value, str | int) else ""


def image_shape(hdu: Any) -> tuple[int, ...]:
    """Return the shape of a unit's image, (h, w) or (plane, h, w) without leading axes of length 1; else ()."""
    if not hdu.is_image or isinstance(hdu, fits.GroupsHDU):
        return ()
    shape = tuple(hdu.shape)
    while len(shape) > 3 and shape[0] == 1:
        shape = shape[1:]
    return shape if len(shape) in (2, 3) and min(shape) > 0 else ()
