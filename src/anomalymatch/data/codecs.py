"""Decoder of image files: libjpeg-turbo for JPEG, tifffile for TIFF, libpng for 16-bit PNG, Pillow for the rest."""

import io
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import imagecodecs
import numpy as np
import simplejpeg
from jaxtyping import Shaped
from PIL import Image as PillowImage
from PIL import ImageOps, UnidentifiedImageError

from anomalymatch.checks import Number
from anomalymatch.data import tiff
from anomalymatch.data.warning_filter import ignore_warnings
from anomalymatch.errors import DataError, UnreadableImageError
from anomalymatch.types import Pixels

MODES = {1: "L", 3: "RGB", 4: "RGBA"}
MAX_PIXELS = 100_000_000
"""Limit of the pixels of an image, checked before decoding (decompression bombs)."""
FORMATS = ("JPEG", "PNG", "TIFF", "WEBP", "BMP", "GIF", "JPEG2000", "PPM")
"""Formats that are decoded. Pillow has more, among them EPS, for which it starts another program."""
LUMA = np.array([0.299, 0.587, 0.114])
"""Weights of red, green and blue in grey (ITU-R BT.601), as in Pillow and JPEG."""
Colour = Number | Sequence[Number]
"""Grey level, or red, green and blue, from 0 to 255."""
BYTES_PER_PIXEL = 160
"""Memory of the machine for each pixel of the largest image: several are decoded and stretched at once, in floats."""
_JPEG, _PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"
_EXIF = b"Exif\0\0"
_ORIENTATION = 0x0112
_START_OF_SCAN, _END_OF_IMAGE, _APP1 = 0xDA, 0xD9, 0xE1


def decode(
    data: bytes,
    channels: int,
    *,
    bands: Sequence[str] | None = None,
    background: Colour = 0,
    max_pixels: int | None = None,
    at_least: int | None = None,
) -> Pixels:
    """Decode JPEG, PNG, TIFF, WebP … bytes to `channels` channels (1 grey, 3 RGB, 4 RGBA), upright by their EXIF.

    8-bit and 16-bit integers and floats keep their type. The array is writable.

    Args:
        data: the file.
        channels: number of channels; an image with opacity is laid over `background`, unless there are 4.
        bands: names of the bands of a TIFF file that is no picture; `channels` is then ignored for such a file.
        background: colour behind transparent parts.
        max_pixels: limit of height times width, checked before decoding; None takes `default_max_pixels`.
        at_least: a JPEG is decoded at 1/2, 1/4 or 1/8 of its size as long as both sides keep this length.

    Raises:
        UnreadableImageError: if the bytes are empty, truncated, no image, or have too many pixels or other bands.
        DataError: if `channels` is not supported.
    """
    if bands is None and channels not in MODES:
        raise DataError(f"channels must be one of {', '.join(map(str, MODES))}, got {channels}")
    if not data:
        raise UnreadableImageError("the file is empty (0 bytes)")
    limit = default_max_pixels() if max_pixels is None else max_pixels
    if data.startswith(tiff.MAGIC):
        found = tiff.decode_tiff(data, limit, bands)
        as_stored = bands is not None and found.alpha == "none" and found.pixels.shape[2] == len(bands)
        pixels = found.pixels if as_stored else _with_alpha(found, channels, background)
        return np.ascontiguousarray(_turned(pixels, found.orientation))
    if channels not in MODES:
        raise UnreadableImageError(f"it is no TIFF, so it cannot have the {channels} bands {', '.join(bands or ())}")
    fast = _decode_jpeg(data, channels, limit, at_least) if data.startswith(_JPEG) else None
    return _decode_with_pillow(data, channels, background, limit) if fast is None else fast


@cache
def default_max_pixels() -> int:
    """Return the limit of the pixels of an image that the memory of this machine, or of its container, allows."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for name in ("memory.max", "memory/memory.limit_in_bytes"):  # control groups of version 2 and 1
        file = Path("/sys/fs/cgroup") / name
        if file.is_file() and (text := file.read_text().strip()).isdecimal():
            limits.append(int(text))
    return min(limits) // BYTES_PER_PIXEL


def with_channels(pixels: Shaped[np.ndarray, "h w *c"], channels: int) -> Pixels:
    """Convert (h, w) or (h, w, c) to (h, w, channels): repeat or average grey, drop alpha or add an opaque one.

    Raises:
        UnreadableImageError: if the conversion is not defined.
    """
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    have = pixels.shape[2]
    if have == channels:
        return pixels
    if have == 1 and channels in (3, 4):
        pixels = np.repeat(pixels, 3, axis=2)
    elif have == 4 and channels in (1, 3):
        pixels = pixels[..., :3]
    elif have not in (3, 4) or channels not in (1, 3, 4):
        raise UnreadableImageError(f"it has {have} channels instead of {channels}")
    if channels == 1:
        grey = pixels @ LUMA
        return (np.rint(grey) if pixels.dtype.kind in "iu" else grey).astype(pixels.dtype)[..., None]
    if channels == 4:
        opaque = np.iinfo(pixels.dtype).max if pixels.dtype.kind in "iu" else 1
        return np.concatenate([pixels, np.full_like(pixels[..., :1], opaque)], axis=2)
    return np.ascontiguousarray(pixels)


def exif_of(jpeg: bytes) -> bytes | None:
    """Return the EXIF data of a JPEG, wherever before the image they stand; None if there are none."""
    at = 2
    while at + 4 <= len(jpeg) and jpeg[at] == 0xFF:
        marker, size = jpeg[at + 1], int.from_bytes(jpeg[at + 2 : at + 4])
        if marker == 0xFF:  # a fill byte
            at += 1
            continue
        if marker in (_START_OF_SCAN, _END_OF_IMAGE):
            return None
        if marker == _APP1 and jpeg.startswith(_EXIF, at + 4):
            return jpeg[at + 4 : at + 2 + size]
        at += 2 + max(2, size)
    return None


def _decode_jpeg(data: bytes, channels: int, limit: int, at_least: int | None) -> Pixels | None:
    """Decode a JPEG three times as fast as Pillow; None if Pillow is needed (CMYK, damage, alpha, grey with EXIF)."""
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(data)
        _check_size(width, height, limit)
        exif = exif_of(data)
        factor = next((f for f in (8, 4, 2) if at_least and min(height, width) >= f * at_least), 1)
        if space in ("CMYK", "YCCK") or channels == 4 or (channels == 1 and exif is not None and factor == 1):
            return None
        low = {} if factor == 1 else {"min_height": -(-height // factor), "min_width": -(-width // factor)}
        pixels = simplejpeg.decode_jpeg(data, "GRAY" if channels == 1 else "RGB", **low)
    except ValueError:
        return None
    return pixels if exif is None else np.ascontiguousarray(_turned(pixels, _orientation(exif)))


def _orientation(exif: bytes) -> int:
    found = PillowImage.Exif()
    try:
        found.load(exif)
        return int(found.get(_ORIENTATION, 1))
    except Exception:  # EXIF data can be broken in any way; the pixels are sound
        return 1


def _decode_with_pillow(data: bytes, channels: int, background: Colour, limit: int) -> Pixels:
    try:
        with ignore_warnings(r"PIL\."), PillowImage.open(io.BytesIO(data), formats=FORMATS) as image:
            _check_size(image.width, image.height, limit)
            if data.startswith(_PNG) and data[24] == 16:  # Pillow drops the lower bytes of colours
                deep = imagecodecs.png_decode(data)
                pixels = _with_alpha(_deep_png(deep, image.info.get("transparency")), channels, background)
                return np.ascontiguousarray(_turned(pixels, int(image.getexif().get(_ORIENTATION, 1))))
            return _from_pillow(_upright(image), channels, background)
    except UnreadableImageError:
        raise
    except PillowImage.DecompressionBombError:
        raise UnreadableImageError("it has more pixels than Pillow decodes; the limit is max_pixels") from None
    except UnidentifiedImageError:
        raise UnreadableImageError(f"not an image in one of the formats {', '.join(FORMATS)}") from None
    except Exception as error:  # damage can make a codec raise anything, and must not end a run over millions of images
        raise UnreadableImageError(f"cannot be decoded: {error or type(error).__name__}") from None


def _check_size(width: int, height: int, limit: int) -> None:
    if width * height > limit:
        raise UnreadableImageError(f"{width} x {height} pixels is more than the limit of {limit:,} (max_pixels)")


def _from_pillow(image: PillowImage.Image, channels: int, background: Colour) -> Pixels:
    if image.mode.startswith("I") or image.mode == "F":
        return with_channels(np.array(image), channels)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if channels != 4:
            found = tiff.TiffImage(np.array(image), "straight", 255.0, 1)
            image = PillowImage.fromarray(_over_background(found, background))
    mode = MODES[channels]
    array = np.array(image if image.mode == mode else image.convert(mode))
    return array.reshape(*array.shape[:2], channels)


def _deep_png(pixels: Shaped[np.ndarray, "h w *c"], transparent: object) -> tiff.TiffImage:
    """Add the opacity of a 16-bit PNG in which one colour is `transparent`."""
    pixels = pixels.reshape(*pixels.shape[:2], -1)
    if isinstance(transparent, int | tuple) and pixels.shape[2] in (1, 3):
        opacity = np.where((pixels == np.asarray(transparent)).all(axis=2, keepdims=True), 0, 65535)
        pixels = np.concatenate([pixels, opacity.astype(pixels.dtype)], axis=2)
    return tiff.TiffImage(pixels, "straight" if pixels.shape[2] in (2, 4) else "none", 65535.0, 1)


def _with_alpha(image: tiff.TiffImage, channels: int, background: Colour) -> Pixels:
    """Convert to `channels`; an image with opacity is laid over the background, unless RGBA is wanted."""
    if image.alpha == "none":
        return with_channels(image.pixels, channels)
    if channels > 1:
        colours = with_channels(image.pixels[..., :-1], 3)
        image = image._replace(pixels=np.concatenate([colours, image.pixels[..., -1:]], axis=2))
    return image.pixels if channels == 4 else with_channels(_over_background(image, background), channels)


def _over_background(image: tiff.TiffImage, background: Colour) -> Shaped[np.ndarray, "h w c"]:
    colours, opacity = image.pixels[..., :-1], image.pixels[..., -1:]
    if (opacity >= image.opaque).all():
        return np.ascontiguousarray(colours)
    tiff.say_once("images are transparent in parts: what lies behind is dataset.source.channels_background")
    kind = np.dtype(np.float64 if image.pixels.dtype.itemsize > 2 else np.float32)
    behind = (np.broadcast_to(background, 3) * (image.opaque / 255)).astype(kind)
    if colours.shape[2] == 1:
        behind = behind @ LUMA.astype(kind)
    share = np.divide(opacity, image.opaque, dtype=kind)
    mixed = colours.astype(kind) * (1 if image.alpha == "premultiplied" else share) + behind * (1 - share)
    if image.pixels.dtype.kind in "iu":
        mixed = np.rint(mixed).clip(0, image.opaque)
    return mixed.astype(image.pixels.dtype)


def _turned(pixels: Shaped[np.ndarray, "h w c"], orientation: int) -> Shaped[np.ndarray, "_ _ c"]:
    """Turn pixels upright as EXIF's orientation from 1 to 8 says."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels


def _upright(image: PillowImage.Image) -> PillowImage.Image:
    """Rotate a photo as its EXIF data say; broken EXIF data are ignored."""
    image.load()
    if "exif" not in image.info:
        return image
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # EXIF data can be broken in any way; the pixels are sound
        return image
