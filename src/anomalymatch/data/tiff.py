"""Decoder of TIFF files of any kind: sample formats, layouts, compressions, and bands by name.

From a stack (OME, ImageJ or plain pages) the first image is taken: all its channels, at the first time and depth.
"""

import io
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal, NamedTuple
from xml.etree import ElementTree

import numpy as np
import tifffile
from jaxtyping import Shaped
from PIL import Image as PillowImage

from anomalymatch.data.warning_filter import ignore_warnings
from anomalymatch.errors import UnreadableImageError

logger = logging.getLogger(__name__)

MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_GREYS = (tifffile.PHOTOMETRIC.MINISBLACK, tifffile.PHOTOMETRIC.MINISWHITE, tifffile.PHOTOMETRIC.MASK)
_RGB, _CMYK, _YCBCR = tifffile.PHOTOMETRIC.RGB, tifffile.PHOTOMETRIC.SEPARATED, tifffile.PHOTOMETRIC.YCBCR
_PALETTE, _WHITE = tifffile.PHOTOMETRIC.PALETTE, tifffile.PHOTOMETRIC.MINISWHITE
_INNER_FORMATS = ("JPEG", "PNG", "WEBP", "JPEG2000")
_PADDING = 64
"""Pixels by which an image in a strip or tile may be larger than that: encoders fill up their blocks."""
_JPEGS = (tifffile.COMPRESSION.OJPEG, tifffile.COMPRESSION.JPEG)
_ORIENTATION, _GDAL_METADATA, _NODATA = 274, 42112, 42113  # tags
_VALUES_PER_PIXEL = 4
"""An image may have this number of values for each pixel of the limit; one of more bands has a lower limit."""
_quiet: ContextVar[bool] = ContextVar("quiet", default=False)
# tifffile logs what it finds odd in a file; an image that cannot be decoded is a reject with the reason instead.
logging.getLogger("tifffile").addFilter(lambda record: not _quiet.get())


class TiffImage(NamedTuple):
    """First image of a TIFF file."""

    pixels: Shaped[np.ndarray, "h w c"]
    """As stored, except that palettes, CMYK and YCbCr are RGB, and less than 8 bits are scaled to 8."""
    alpha: Literal["none", "straight", "premultiplied"]
    """Whether the last channel is the opacity, and the colours are multiplied by it."""
    opaque: float
    """Value of full opacity."""
    orientation: int
    """As in EXIF."""


class _Layout(NamedTuple):
    """Pages with the bands of the first image, and what its samples mean."""

    series: tifffile.TiffPageSeries | None
    pages: list[int]
    samples: int
    colours: int
    alpha: Literal["none", "straight", "premultiplied"]
    names: tuple[str, ...] | None
    picture: bool
    skipped: bool

    @property
    def n_bands(self) -> int:
        return len(self.pages) * self.samples


def tiff_bands(data: bytes) -> tuple[str, ...] | None:
    """Return the names of the bands of a TIFF file, from its OME or GDAL metadata or by number; None for a picture.

    Pictures are grey, RGB, palettes, CMYK and YCbCr, with or without alpha. No pixel is decoded.

    Raises:
        UnreadableImageError: if it is damaged.
    """
    with _opened(data) as file:
        layout = _layout(file)
        return None if layout.picture else layout.names or tuple(f"band{i}" for i in range(layout.n_bands))


def picture_channels(data: bytes) -> int:
    """Return the number of channels that show a TIFF picture: 1 (grey), 3 (RGB) or 4 (with alpha).

    Raises:
        UnreadableImageError: if it is damaged.
    """
    with _opened(data) as file:
        layout, photometric = _layout(file), file.pages.first.photometric
        return 4 if layout.alpha != "none" else 3 if layout.colours > 1 or photometric == _PALETTE else 1


def decode_tiff(data: bytes, max_pixels: int, bands: Sequence[str] | None = None) -> TiffImage:
    """Decode the first image of a TIFF file.

    Args:
        data: the file.
        max_pixels: limit of height times width, checked before decoding.
        bands: names of the bands that are expected; a file that names the same bands in another order is reordered.
            None decodes a picture.

    Raises:
        UnreadableImageError: if it is damaged, incomplete, too large, of an unknown kind, or has other bands.
    """
    with _opened(data) as file:
        layout = _layout(file)
        page = file.pages.first
        _check(page, layout, max_pixels)
        planes = [_decode_page(file, layout, n, data) for n in layout.pages]
        pixels = planes[0] if len(planes) == 1 else np.concatenate(planes, axis=2)
        if layout.skipped:
            say_once("TIFF files have several pages or depths: only the first is read, with all its channels")
        orientation = int(page.tags.valueof(_ORIENTATION, 1) or 1)
        bits = page.bitspersample if isinstance(page.bitspersample, int) else max(page.bitspersample)
        top = {"u": 2.0**bits - 1, "i": 2.0 ** (bits - 1) - 1}.get(pixels.dtype.kind, 1.0)
        if bands is not None and (not layout.picture or layout.n_bands == len(bands)):
            return TiffImage(_ordered(pixels, layout.names, bands), "none", top, orientation)
        if not layout.picture:
            raise UnreadableImageError(
                f"it has {layout.n_bands} bands, so it is no picture: name them by dataset.source.bands=[NAME,…]"
            )
        pixels, top = _picture(data, page, pixels[..., : layout.colours + (layout.alpha != "none")], top)
        return TiffImage(pixels, layout.alpha, top, orientation)


_said: set[str] = set()


def say_once(message: str) -> None:
    """Log a warning once in this process."""
    if message not in _said:
        _said.add(message)
        logger.warning(message)


@contextmanager
def _opened(data: bytes) -> Iterator[tifffile.TiffFile]:
    token = _quiet.set(True)
    try:
        # Other files of a data set, which OME metadata may name, are never opened.
        with tifffile.TiffFile(io.BytesIO(data), _multifile=False) as file:
            yield file
    except UnreadableImageError:
        raise
    except Exception as error:  # damage can make a codec raise anything
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UnreadableImageError(f"this TIFF cannot be decoded ({why})") from None
    finally:
        _quiet.reset(token)


def _layout(file: tifffile.TiffFile) -> _Layout:
    page = file.pages.first
    separate, _, _, _, contiguous = page.shaped
    samples = int(separate * contiguous)
    series, pages, stack = _channel_pages(file)
    colours = 1
    if page.photometric in (_RGB, _YCBCR):
        colours = 3
    elif page.photometric == _CMYK:
        colours = 4
    extra = samples - colours
    kinds = [int(kind) for kind in page.extrasamples]
    alpha: Literal["none", "straight", "premultiplied"] = "none"
    if extra == 1 and kinds and kinds[-1] in (1, 2):
        alpha = "premultiplied" if kinds[-1] == 1 else "straight"
    count = len(pages) * samples
    names = _names(file, page, count)
    grey = colours == 1 and page.photometric != _PALETTE
    if grey and count == 3 and samples == 3 and names is None and alpha == "none":
        colours, extra = 3, 0  # three samples without a meaning are taken for colours
    picture = len(pages) == 1 and (extra == 0 or alpha != "none" or (extra == 1 and not grey and not page.is_geotiff))
    return _Layout(series, pages, samples, colours, alpha, names, picture, stack)


def _channel_pages(file: tifffile.TiffFile) -> tuple[tifffile.TiffPageSeries | None, list[int], bool]:
    """Return the pages that hold the channels of the first image, and whether there are other images beside it."""
    page = file.pages.first
    second = file.pages[1].aspage() if len(file.pages) > 1 else None
    others = second is not None and not second.is_reduced and not second.is_mask
    try:
        series = file.series[0]
    except Exception:  # metadata can be wrong; the first page is sound
        return None, [0], others
    leading = len(series.shape) - len(page.shape)
    if leading < 1 or series.shape[leading:] != page.shape or series.keyframe.index:
        return None, [0], others or page.shaped[1] > 1
    shape, axes = series.shape[:leading], series.axes[:leading]
    if math.prod(shape) > file.filehandle.size:  # more pages than bytes
        return None, [0], True
    channel = axes.find("C")
    count = shape[channel] if channel >= 0 else 1
    numbers = np.arange(math.prod(shape)).reshape(shape)
    first = numbers[tuple(slice(None) if k == channel else 0 for k in range(leading))]
    return series, np.atleast_1d(first).tolist(), math.prod(shape) > count


def _names(file: tifffile.TiffFile, page: tifffile.TiffPage, count: int) -> tuple[str, ...] | None:
    """Return the names that OME or GDAL metadata give to all bands, or None."""
    names: list[str] = []
    try:
        if file.is_ome:
            pixels = ElementTree.fromstring(file.ome_metadata or "").find("{*}Image/{*}Pixels")
            names = [] if pixels is None else [each.get("Name", "") for each in pixels.findall("{*}Channel")]
        elif text := page.tags.valueof(_GDAL_METADATA):
            items = [each for each in ElementTree.fromstring(text).iter("Item") if each.get("role") == "description"]
            found = {int(each.get("sample", -1)): (each.text or "").strip() for each in items}
            names = [found.get(n, "") for n in range(count)]
    except (ElementTree.ParseError, ValueError):
        return None
    return tuple(names) if len(names) == count == len(set(names)) and all(names) else None


def _check(page: tifffile.TiffPage, layout: _Layout, max_pixels: int) -> None:
    """Refuse sizes that the header claims before memory is allocated for them."""
    _, _, height, width, _ = page.shaped
    if height * width > max_pixels or height * width * layout.n_bands > max_pixels * _VALUES_PER_PIXEL:
        raise UnreadableImageError(
            f"{width} x {height} pixels of {layout.n_bands} bands is more than the limit of {max_pixels:,} (max_pixels)"
        )
    if page.is_tiled and page.tilewidth * page.tilelength * page.tiledepth * layout.samples > (
        max_pixels * _VALUES_PER_PIXEL
    ):
        raise UnreadableImageError(f"its tiles of {page.tilewidth} x {page.tilelength} pixels are too large")


def _decode_page(file: tifffile.TiffFile, layout: _Layout, number: int, data: bytes) -> Shaped[np.ndarray, "h w s"]:
    """Decode one page, or a part of a stack without pages of its own."""
    series = layout.series
    if series is not None and len(series.pages) <= number and number:
        raise UnreadableImageError(f"its channel {number} has no page")
    page = file.pages.first if series is None or number == 0 else series.pages[number]
    if page is None:
        raise UnreadableImageError(f"its channel {number} is missing")
    keyframe = page.keyframe
    if keyframe is None:
        raise UnreadableImageError("its first page is missing")
    _check_segments(page, keyframe, data)
    pixels = page.asarray(squeeze=False, maxworkers=1)[:, 0]
    pixels = np.moveaxis(pixels, 0, 2).reshape(*pixels.shape[1:3], -1)
    pixels = pixels.astype(pixels.dtype.newbyteorder("="), copy=not pixels.flags.writeable)
    if pixels.dtype.kind == "f" and _NODATA in keyframe.tags:
        pixels[pixels == np.asarray(keyframe.nodata, pixels.dtype)] = np.nan
    return pixels


def _check_segments(page: tifffile.TiffPage | tifffile.TiffFrame, keyframe: tifffile.TiffPage, data: bytes) -> None:
    """Refuse strips or tiles that are missing, lie beyond the end of the file, share bytes, or hold larger images."""
    wanted = math.prod(keyframe.chunked)
    segments = list(zip(page.dataoffsets[:wanted], page.databytecounts[:wanted], strict=False))
    kept = [(start, size) for start, size in segments if size]
    if len(segments) < wanted or not kept or (len(kept) < wanted and not _is_gdal(keyframe)):
        raise UnreadableImageError(f"it has {len(kept)} of the {wanted} strips or tiles that its header claims")
    if any(start + size > len(data) for start, size in kept):
        raise UnreadableImageError("the file is truncated: strips or tiles lie behind its end")
    if sum(size for _, size in kept) > len(data):
        raise UnreadableImageError("its strips or tiles share bytes")
    if keyframe.compression not in (*_JPEGS, *tifffile.TIFF.IMAGE_COMPRESSIONS):
        return
    tiled = keyframe.is_tiled
    width = keyframe.tilewidth if tiled else keyframe.imagewidth
    height = keyframe.tilelength if tiled else min(keyframe.rowsperstrip, keyframe.imagelength)
    for start, size in kept:
        w, h = _inner_size(data[start : start + size])
        if w > width + _PADDING or h > height + _PADDING:
            raise UnreadableImageError(f"a strip or tile of {width} x {height} pixels holds an image of {w} x {h}")


def _inner_size(segment: bytes) -> tuple[int, int]:
    """Return width and height of a strip or tile that is a JPEG, PNG, WebP or JPEG 2000; (0, 0) if unknown."""
    try:
        with ignore_warnings(r"PIL\."), PillowImage.open(io.BytesIO(segment), formats=_INNER_FORMATS) as inner:
            return inner.size
    except PillowImage.DecompressionBombError:
        return 2**31, 2**31
    except Exception:  # the decoder describes what is wrong
        return 0, 0


def _is_gdal(page: tifffile.TiffPage) -> bool:
    """Tell whether GDAL wrote a page; it leaves out tiles without data."""
    return _GDAL_METADATA in page.tags or _NODATA in page.tags


def _picture(
    data: bytes, page: tifffile.TiffPage, pixels: Shaped[np.ndarray, "h w c"], top: float
) -> tuple[Shaped[np.ndarray, "_ _ _"], float]:
    """Convert samples to grey or RGB, with the alpha that they have; return the value of full opacity, too."""
    if page.photometric == _PALETTE:
        return (np.asarray(page.colormap) >> 8).astype(np.uint8).T[pixels[..., 0]], 255.0
    if page.photometric == _YCBCR and page.compression not in _JPEGS:
        with PillowImage.open(io.BytesIO(data), formats=("TIFF",)) as image:
            return np.array(image.convert("RGB")), 255.0
    if page.photometric not in (*_GREYS, _RGB, _CMYK, _YCBCR) and pixels.shape[2] > 1:
        raise UnreadableImageError(f"colours of the kind {page.photometric!r} are not supported")
    if pixels.dtype == bool or (pixels.dtype == np.uint8 and top < 255):
        pixels, top = (pixels.astype(np.uint8) * int(255 / top if pixels.dtype != bool else 255)), 255.0
    if pixels.dtype.kind == "u":
        if page.photometric == _WHITE:
            pixels[..., 0] = int(top) - pixels[..., 0]
        if page.photometric == _CMYK:
            ink = pixels[..., :4].astype(np.float64) / top
            rgb = np.rint(top * (1 - ink[..., :3]) * (1 - ink[..., 3:])).astype(pixels.dtype)
            pixels = np.concatenate([rgb, pixels[..., 4:]], axis=2)
    return pixels, top


def _ordered(
    pixels: Shaped[np.ndarray, "h w c"], names: tuple[str, ...] | None, bands: Sequence[str]
) -> Shaped[np.ndarray, "h w c"]:
    if pixels.shape[2] != len(bands):
        raise UnreadableImageError(f"it has {pixels.shape[2]} bands instead of {len(bands)}: {', '.join(bands)}")
    if names is None or list(names) == list(bands) or set(names) != set(bands):
        return pixels
    return np.ascontiguousarray(pixels[..., [names.index(band) for band in bands]])
