"""Decoder of image files: libjpeg-turbo for JPEG, OpenCV for 16-bit and float colour, Pillow for the rest."""

import io

import cv2
import numpy as np
import simplejpeg
from jaxtyping import Shaped
from PIL import Image as PillowImage
from PIL import ImageOps, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

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
_JPEG, _PNG, _TIFF = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_HEADER_BYTES = 2**16
_BITS_PER_SAMPLE = 258  # TIFF tag


def decode(data: bytes, channels: int) -> Pixels:
    """Decode JPEG, PNG, TIFF, WebP … bytes to `channels` channels (1 grey, 3 RGB, 4 RGBA), upright by their EXIF.

    8-bit and 16-bit integers and floats keep their type. The array is writable.

    Raises:
        UnreadableImageError: if the bytes are empty, truncated, no image, or have more than `MAX_PIXELS` pixels.
        DataError: if `channels` is not supported.
    """
    if channels not in MODES:
        raise DataError(f"channels must be one of {', '.join(map(str, MODES))}, got {channels}")
    if not data:
        raise UnreadableImageError("the file is empty (0 bytes)")
    fast = _decode_jpeg(data, channels) if data.startswith(_JPEG) else None
    return _decode_any(data, channels) if fast is None else fast


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


def _decode_jpeg(data: bytes, channels: int) -> Pixels | None:
    """Decode a JPEG three times as fast as Pillow; None if Pillow is needed (EXIF, CMYK, damage, alpha)."""
    if channels == 4 or b"Exif" in data[:_HEADER_BYTES]:
        return None
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(data)
        if space in ("CMYK", "YCCK") or height * width > MAX_PIXELS:
            return None
        return simplejpeg.decode_jpeg(data, "GRAY" if channels == 1 else "RGB")
    except ValueError:
        return None


def _decode_any(data: bytes, channels: int) -> Pixels:
    try:
        with ignore_warnings(r"PIL\."), PillowImage.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise UnreadableImageError(f"{image.width} x {image.height} pixels is more than {MAX_PIXELS:,}")
            upright = _upright(image)
            if _is_deep_colour(data, image):  # Pillow has dropped the lower bytes
                return with_channels(_decode_deep(data), channels)
            return _from_pillow(upright, channels)
    except UnreadableImageError:
        raise
    except UnidentifiedImageError:
        if data.startswith(_TIFF):
            return with_channels(_decode_deep(data), channels)
        raise UnreadableImageError(f"not an image in one of the formats {', '.join(FORMATS)}") from None
    except Exception as error:  # damage can make a codec raise anything, and must not end a run over millions of images
        raise UnreadableImageError(f"cannot be decoded: {error or type(error).__name__}") from None


def _from_pillow(image: PillowImage.Image, channels: int) -> Pixels:
    if image.mode.startswith("I") or image.mode == "F":
        return with_channels(np.array(image), channels)
    if image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
        image = image.convert("RGBA")  # Pillow warns about any other conversion
    mode = MODES[channels]
    array = np.array(image if image.mode == mode else image.convert(mode))
    return array.reshape(*array.shape[:2], channels)


def _is_deep_colour(data: bytes, image: PillowImage.Image) -> bool:
    if data.startswith(_PNG):
        depth, colour = data[24], data[25]
        return depth == 16 and colour in (2, 6)  # RGB and RGBA
    bits = image.tag_v2.get(_BITS_PER_SAMPLE, ()) if isinstance(image, TiffImageFile) else ()
    return len(bits) >= 3 and max(bits) > 8


def _decode_deep(data: bytes) -> Shaped[np.ndarray, "h w *c"]:
    """Decode colour of 16 bits or floats, which Pillow does not support."""
    try:
        array = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error:
        array = None
    if array is None:
        raise UnreadableImageError("cannot be decoded: this kind of TIFF or PNG is damaged or not supported")
    if array.size > MAX_PIXELS * 4:
        raise UnreadableImageError(f"{array.shape[1]} x {array.shape[0]} pixels is more than {MAX_PIXELS:,}")
    if array.ndim == 3 and array.shape[2] >= 3:
        array[..., :3] = array[..., 2::-1].copy()  # OpenCV's order is blue, green, red
    return array


def _upright(image: PillowImage.Image) -> PillowImage.Image:
    """Rotate a photo as its EXIF data say; broken EXIF data are ignored."""
    image.load()
    if "exif" not in image.info or image.format == "TIFF":  # Pillow has rotated a TIFF already
        return image
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # EXIF data can be broken in any way; the pixels are sound
        return image
