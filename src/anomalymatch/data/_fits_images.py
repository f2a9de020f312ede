"""The images in one FITS file: chosen, scaled to physical values, and in native byte order."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from astropy.io import fits
from astropy.wcs import WCS

from anomalymatch.data._fits_file import FitsFile, fits_errors, silence_astropy
from anomalymatch.errors import ConfigError, UnreadableImageError
from anomalymatch.types import Pixels

Extensions = int | str | Sequence[int | str] | None
FITS_SUFFIXES = (".fits", ".fit", ".fts", ".fits.gz", ".fit.gz", ".fits.fz")
STOKES = {1: "I", 2: "Q", 3: "U", 4: "V"}
KINDS = (fits.PrimaryHDU, fits.ImageHDU, fits.CompImageHDU, fits.BinTableHDU, fits.TableHDU, fits.GroupsHDU)


@dataclass(frozen=True)
class _Scaling:
    """What the numbers in the file mean: stored * scale + zero, and which of them is no value."""

    scale: float
    zero: float
    blank: int | None

    @classmethod
    def of(cls, header: fits.Header) -> "_Scaling":
        blank = header.get("BLANK")
        known = isinstance(blank, int) and header["BITPIX"] > 0
        return cls(float(header.get("BSCALE", 1)), float(header.get("BZERO", 0)), blank if known else None)

    def __call__(self, stored: np.ndarray) -> np.ndarray:
        native = stored.astype(stored.dtype.newbyteorder("="))  # a copy, always
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


class _Part:
    """The image of one unit, (plane, h, w)."""

    def __init__(self, file: FitsFile, hdu: Any, mapped: bool) -> None:
        file.check_complete(hdu)
        self.file, self.hdu, self.mapped = file, hdu, mapped
        self.shape = image_shape(hdu)
        self.planes = self.shape[0] if len(self.shape) == 3 else 1
        self.scaling = _Scaling.of(hdu.header)
        self._map: np.ndarray | None = None

    def cut(self, rows: slice, columns: slice) -> np.ndarray:
        if isinstance(self.hdu, fits.CompImageHDU):
            lead = (0,) * (len(self.hdu.shape) - len(self.shape)) + (slice(None),) * (len(self.shape) - 2)
            stored = self.hdu.section[(*lead, rows, columns)]
        else:
            stored = self._stored()[..., rows, columns]
        with np.errstate(all="ignore"):
            return self.scaling(stored.reshape(self.planes, *stored.shape[-2:]))

    def _stored(self) -> np.ndarray:
        start, dtype = self.hdu.fileinfo()["datLoc"], np.dtype(fits.BITPIX2DTYPE[self.hdu.header["BITPIX"]])
        dtype = dtype.newbyteorder(">")
        if self._map is not None:
            return self._map
        if self.file.data is not None:
            return np.frombuffer(self.file.data, dtype, int(np.prod(self.shape)), start).reshape(self.shape)
        if self.mapped:
            self._map = np.memmap(self.file.path, dtype, "r", start, self.shape)
            return self._map
        return np.frombuffer(self.file.read(start, self.hdu.size), dtype).reshape(self.shape)


class FitsImages:
    """The chosen images of one FITS file as the bands of one image. Opening reads headers only.

    Args:
        path: the file.
        extensions: index or name of a unit, several of them, or None for the first with an image of 2 or 3 axes.
        mapped: map pixels into memory where they lie as they are, instead of reading them; for small cuts.

    Attributes:
        shape: height and width in pixels.
        bands: number of bands.
        names: of the bands, where the headers tell them, else None.
        units: BUNIT, or None.

    Raises:
        UnreadableImageError: if the file is missing, damaged, or truncated, or has no such images.
    """

    def __init__(self, path: Path, extensions: Extensions = None, *, mapped: bool = False) -> None:
        self._file = FitsFile(path)
        try:
            with fits_errors():
                self._parts = [_Part(self._file, hdu, mapped) for hdu in _choose(self._file, extensions)]
                sizes = {part.shape[-2:] for part in self._parts}
                if len(sizes) > 1:
                    described = ", ".join(f"{w} x {h}" for h, w in sorted(sizes))
                    raise UnreadableImageError(f"its extensions have different sizes: {described}")
                self.shape: tuple[int, int] = self._parts[0].shape[-2:]  # type: ignore[assignment]
                self.bands = sum(part.planes for part in self._parts)
                self.names = _names([part.hdu for part in self._parts], self._file, self.bands)
                self.units = _text(self._parts[0].hdu.header, "BUNIT") or None
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
        """Pixels of a part, (h, w, band), scaled by BSCALE and BZERO; what is BLANK becomes NaN.

        Raises:
            UnreadableImageError: if they are damaged.
        """
        with fits_errors():
            if self._file.data is None and self._file.path.stat().st_size < self._file.size:  # or a map would kill us
                raise UnreadableImageError("the file has become shorter since it was opened")
            planes = np.concatenate([part.cut(rows, columns) for part in self._parts])
            return np.ascontiguousarray(planes.transpose(1, 2, 0))

    def wcs(self) -> WCS | None:
        """World coordinates of the first band; None without celestial ones."""
        silence_astropy()
        try:
            wcs = WCS(self._parts[0].hdu.header, fobj=self._file.hdus, naxis=2)
            return wcs if wcs.has_celestial else None
        except Exception:  # a header can be wrong in any way, and its image still be sound
            return None


def image_shape(hdu: Any) -> tuple[int, ...]:
    """Shape of the image of a unit, (h, w) or (plane, h, w), without leading axes of length 1; empty if it has none."""
    if not hdu.is_image or isinstance(hdu, fits.GroupsHDU):
        return ()
    shape = tuple(hdu.shape)
    while len(shape) > 3 and shape[0] == 1:
        shape = shape[1:]
    return shape if len(shape) in (2, 3) and min(shape) > 0 else ()


def check_extensions(extensions: Extensions) -> None:
    """Refuse what names no unit.

    Raises:
        ConfigError: if it is an empty list.
    """
    if extensions is not None and not isinstance(extensions, int | str) and not len(extensions):
        raise ConfigError("dataset.source.extensions=[]: give null, an index, a name, or a list of at least one")


def _choose(file: FitsFile, extensions: Extensions) -> list[Any]:
    if extensions is None:
        for i, hdu in enumerate(file.hdus):
            # What is skipped must be sound, or a weight map behind a damaged image would be taken for it.
            if not isinstance(hdu, KINDS):
                raise UnreadableImageError(f"its unit {i}, which comes before any image, is damaged or unknown")
            if image_shape(hdu):
                return [hdu]
        raise UnreadableImageError("there is no image of 2 or 3 axes in it")
    chosen = []
    for key in [extensions] if isinstance(extensions, int | str) else extensions:
        try:
            hdu = file.hdus[key]
        except (KeyError, IndexError):
            raise UnreadableImageError(f"there is no extension {key} in it, only {_listing(file)}") from None
        if not image_shape(hdu):
            raise UnreadableImageError(f"its extension {key} is no image of 2 or 3 axes")
        chosen.append(hdu)
    return chosen


def _listing(file: FitsFile) -> str:
    return ", ".join(f"{i} {hdu.name}".strip() for i, hdu in enumerate(file.hdus))


def _names(units: Sequence[Any], file: FitsFile, bands: int) -> tuple[str, ...] | None:
    """Names of the bands from the extensions, from FILTER, or from a third axis that has a meaning."""
    headers = [unit.header for unit in units]
    if len(units) > 1:
        for key in ("EXTNAME", "FILTER"):
            names = tuple(_text(header, key) for header in headers)
            if all(names) and len(set(names)) == bands:
                return names
        return None
    words = _text(headers[0], "FILTER") or _text(file.hdus[0].header, "FILTER")
    filters = tuple(word.strip() for word in words.split(",")) if bands > 1 else (words,)
    if all(filters) and len(set(filters)) == bands:
        return filters
    axis = _text(headers[0], "CTYPE3").split("-")[0]
    if bands == 1 or not axis or axis == "RGB":
        return None
    if axis == "STOKES":
        at = [round((i + 1 - headers[0].get("CRPIX3", 1)) * headers[0].get("CDELT3", 1)) for i in range(bands)]
        return tuple(STOKES.get(round(headers[0].get("CRVAL3", 1)) + i, f"stokes{i}") for i in at)
    return tuple(f"{axis.lower()}{i}" for i in range(bands))


def _text(header: fits.Header, key: str) -> str:
    value = header.get(key)
    return str(value).strip() if isinstance(value, str | int) else ""
