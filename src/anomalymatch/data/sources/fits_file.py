"""An open FITS file whose units are checked for completeness; what damage raises becomes one kind of error."""

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

from anomalymatch.data.warning_filter import ignore_warnings
from anomalymatch.errors import UnreadableImageError

MAX_UNZIPPED = 2**31
"""Bytes to which a .gz file may grow: it is unpacked in memory."""
BUFFER = 2**16
"""Bytes that are read at once: a small file takes one call of the system."""
_GZIP = b"\x1f\x8b"
ASTROPY = r"astropy\."
"""Modules whose warnings are ignored: they are about the contents of single files."""


@contextmanager
def fits_errors() -> Iterator[None]:
    """Turn any error of astropy at a damaged file into an `UnreadableImageError`, and ignore its warnings."""
    try:
        with ignore_warnings(ASTROPY):
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


Extensions = int | str | Sequence[int | str] | None
BLOCK, CARD = 2880, 80
MAX_BLOCKS = 64
"""Longer headers are left to astropy."""
MAX_LAYOUTS = 1024
_FIRST_CARDS = (b"SIMPLE  =                    T", b"XTENSION= 'IMAGE   '")
_END = re.compile(rb"(?:.{80})*?END {5}", re.DOTALL)
_USED = (
    rb"SIMPLE|XTENSION|BITPIX|NAXIS\d*|PCOUNT|GCOUNT|GROUPS|EXTEND|EXTNAME|EXTVER|EXTLEVEL|INHERIT|"
    rb"BSCALE|BZERO|BLANK|BUNIT|FILTER|CTYPE3|CRPIX3|CRVAL3|CDELT3"
)
"""Keywords that are looked at here, in `_fits_images`, or by astropy when it makes a unit of a header."""
_UNUSED = re.compile(
    rb"(?=.{8}= )(?!(?:%b)\b)[A-Z0-9_-]+ *=|HIERARCH (?! *(?i:%b)\b)|COMMENT |HISTORY | {8}" % (_USED, _USED), re.DOTALL
)


@dataclass(frozen=True)
class Scaling:
    """What the numbers in the file mean: stored * scale + zero, and which of them is no value."""

    scale: float
    zero: float
    blank: int | None

    @classmethod
    def of(cls, header: fits.Header) -> "Scaling":
        """What a header says."""
        blank = header.get("BLANK")
        known = isinstance(blank, int) and header["BITPIX"] > 0
        return cls(float(header.get("BSCALE", 1)), float(header.get("BZERO", 0)), blank if known else None)

    def __call__(self, stored: np.ndarray) -> np.ndarray:
        """Values in native byte order; where they are those stored, no copy."""
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
    """How a unit stores its image, by astropy's reading of the header; many files share one.

    Attributes:
        name: of the unit.
        header: all that is used of it, at least.
        shape: see `image_shape`.
        size: bytes of the data.
        dtype: of the numbers as stored.
        scaling: what they mean.
        words: EXTNAME, FILTER, CTYPE3 and BUNIT; empty where they are missing.
    """

    name: str
    header: fits.Header
    shape: tuple[int, ...]
    size: int
    dtype: np.dtype
    scaling: Scaling
    words: Mapping[str, str]

    @classmethod
    def of(cls, hdu: Any) -> "Layout":
        """The layout of astropy's unit."""
        header = hdu.header
        dtype = np.dtype(fits.BITPIX2DTYPE[header["BITPIX"]]).newbyteorder(">")
        words = {key: _word(header, key) for key in ("EXTNAME", "FILTER", "CTYPE3", "BUNIT")}
        return cls(hdu.name, header, image_shape(hdu), hdu.size, dtype, Scaling.of(header), words)


class Unit(NamedTuple):
    """One unit of a file.

    Attributes:
        number: its index.
        layout: how its image is stored.
        place: where.
        filter: FILTER of its header, or of the first one.
        hdu: astropy's unit, or None where the layout is enough.
    """

    number: int
    layout: Layout
    place: Place
    filter: str
    hdu: Any = None

    @classmethod
    def of(cls, file: FitsFile, number: int) -> "Unit":
        """A unit that astropy has found."""
        hdu = file.hdus[number]
        layout = Layout.of(hdu)
        return cls(number, layout, Place.of(hdu), layout.words["FILTER"] or _word(file.hdus[0].header, "FILTER"), hdu)


def find_plain(file: FitsFile, extensions: Extensions) -> list[Unit] | None:
    """The chosen units, if all up to them are plain images in the order and form of the standard; None: ask astropy."""
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
    """The units of a file up to the first that is no plain image."""
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
    """The header that begins at `start`, of whole blocks; empty if it is not as the standard wants it."""
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
    """The cards that tell how pixels are stored, or might: what is left out is of the standard's form, and not used."""
    if b"CONTINUE" in header:  # which card it goes on with is astropy's business
        return header
    cards = [header[at : at + CARD] for at in range(0, len(header.rstrip(b" ")), CARD)]
    return b"".join([card for card in cards if not _UNUSED.match(card)])


@lru_cache(MAX_LAYOUTS)
def _layout(cards: bytes) -> Layout | None:
    """How astropy reads a header; None if it is no plain image."""
    kind = fits.PrimaryHDU if cards.startswith(b"SIMPLE") else fits.ImageHDU
    try:
        hdu = kind.fromstring(cards.ljust(-(-len(cards) // BLOCK) * BLOCK), do_not_scale_image_data=True)
        clear = len(dict(hdu.header.items())) == len(hdu.header)  # every card can be parsed, and none comes twice
        return Layout.of(hdu) if type(hdu) is kind and hdu.size >= 0 and clear else None
    except Exception:  # damage, which astropy describes when it opens the whole file
        return None


def _word(header: fits.Header, key: str) -> str:
    value = header.get(key)
    return str(value).strip() if isinstance(value, str | int) else ""


def image_shape(hdu: Any) -> tuple[int, ...]:
    """Shape of the image of a unit, (h, w) or (plane, h, w), without leading axes of length 1; empty if it has none."""
    if not hdu.is_image or isinstance(hdu, fits.GroupsHDU):
        return ()
    shape = tuple(hdu.shape)
    while len(shape) > 3 and shape[0] == 1:
        shape = shape[1:]
    return shape if len(shape) in (2, 3) and min(shape) > 0 else ()
