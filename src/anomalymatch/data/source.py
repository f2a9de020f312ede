"""The one protocol through which images come in: stable string ids, and a read of a batch of ids."""

import io
import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from PIL import Image as PillowImage
from PIL import ImageOps, UnidentifiedImageError

from anomalymatch.errors import DataError, UnreadableImageError
from anomalymatch.types import Image, Reject

MODES = {1: "L", 3: "RGB", 4: "RGBA"}
MAX_PIXELS = 100_000_000
"""Images that claim more pixels than this are refused before they are decoded (decompression bombs)."""
FORMATS = ("JPEG", "PNG", "TIFF", "WEBP", "BMP", "GIF", "JPEG2000", "PPM")
"""What is decoded. Pillow knows more, among them EPS, for which it would start another program."""
_IGNORE_PILLOW = ("ignore", None, Warning, re.compile(r"PIL\."), 0)


@runtime_checkable
class ImageSource(Protocol):
    """A set of images, each known by a stable string id, never by a position.

    Attributes:
        name: short name for logs and folders.
        ids: all ids, in a fixed order.
        channels: channels of every image that `read` returns.
        fingerprint: changes whenever ids or pixels change; keys the feature cache.
        truth: class name per id where a benchmark knows it, else None.
        holdout: ids of an official test split, where the set has one, else empty.
    """

    name: str
    ids: Sequence[str]
    channels: int
    fingerprint: str
    truth: Mapping[str, str] | None
    holdout: frozenset[str]

    def read(self, ids: Sequence[str]) -> list[Image | Reject]:
        """Decode `ids`, in that order; an unreadable one comes back as a `Reject`. Safe to call from many threads.

        Raises:
            DataError: if an id is not in the source.
        """
        ...


class BaseSource(ABC):
    """What the implementations share: bookkeeping, and unreadable images turned into rejects.

    Subclasses set the attributes of `ImageSource` by calling this constructor and implement `_load`.
    """

    def __init__(
        self,
        *,
        name: str,
        ids: Sequence[str],
        channels: int,
        fingerprint: str,
        truth: Mapping[str, str] | None = None,
        holdout: frozenset[str] = frozenset(),
    ) -> None:
        if not ids:
            raise DataError(f"{name}: there are no images in it")
        self.name = name
        self.ids = ids
        self.channels = channels
        self.fingerprint = fingerprint
        self.truth = truth
        self.holdout = holdout
        self._position = {id_: i for i, id_ in enumerate(ids)}
        if len(self._position) != len(ids):
            raise DataError(f"{name}: {len(ids) - len(self._position)} ids occur more than once")

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, ids: Sequence[str]) -> list[Image | Reject]:
        """See `ImageSource.read`."""
        return [self._read(id_) for id_ in ids]

    def _read(self, id_: str) -> Image | Reject:
        try:
            position = self._position[id_]
        except KeyError:
            raise DataError(f"{self.name} has no image {id_!r}") from None
        try:
            return self._load(position)
        except UnreadableImageError as error:
            return Reject(id_, str(error))

    @abstractmethod
    def _load(self, position: int) -> Image:
        """Decode the image at `position` of `ids`; raise `UnreadableImageError` with the reason if that fails."""


def decode(data: bytes, channels: int) -> Image:
    """Decode JPEG, PNG, TIFF, WebP … bytes to `channels` channels (1 grey, 3 RGB, 4 RGBA), upright by their EXIF.

    The array is the caller's own to write to.

    Raises:
        UnreadableImageError: if the bytes are empty, truncated, no image, or larger than `MAX_PIXELS`.
        DataError: if there is no such number of channels.
    """
    if channels not in MODES:
        raise DataError(f"channels must be one of {', '.join(map(str, MODES))}, got {channels}")
    mode = MODES[channels]
    if not data:
        raise UnreadableImageError("the file is empty (0 bytes)")
    _silence_pillow()
    try:
        with PillowImage.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise UnreadableImageError(f"{image.width} x {image.height} pixels is more than {MAX_PIXELS:,}")
            upright = _to_eight_bits(_upright(image))
            array = np.array(upright if upright.mode == mode else upright.convert(mode))
    except UnreadableImageError:
        raise
    except UnidentifiedImageError:
        raise UnreadableImageError(f"not an image in one of the formats {', '.join(FORMATS)}") from None
    except Exception as error:  # a damaged file can make a codec raise anything, and must not end a run over millions
        raise UnreadableImageError(f"cannot be decoded: {error or type(error).__name__}") from None
    return array.reshape(*array.shape[:2], channels)


def _silence_pillow() -> None:
    """Ignore the warnings of Pillow's own modules; they are about the contents of single files.

    `warnings.catch_warnings` is not safe to use in several threads at once, so the filter is left in place, and put
    back where something else has taken it away.
    """
    if _IGNORE_PILLOW not in warnings.filters:
        warnings.filterwarnings("ignore", module=_IGNORE_PILLOW[3].pattern)


def _upright(image: PillowImage.Image) -> PillowImage.Image:
    """Turn a photo as its camera says; broken EXIF data leaves it as it is."""
    image.load()
    if "exif" not in image.info or image.format == "TIFF":  # Pillow has turned a TIFF already
        return image
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # the pixels are sound, and EXIF data can be broken in any way
        return image


def _to_eight_bits(image: PillowImage.Image) -> PillowImage.Image:
    """Scale 16-bit, 32-bit and float grey images to 8 bits by their own range; Pillow's `convert` would clip them.

    NaN becomes 0; infinities become the darkest and the brightest value.
    """
    if image.mode == "P":
        # As bytes it has no meaning but for RGBA, and Pillow would warn of it.
        return image.convert("RGBA") if isinstance(image.info.get("transparency"), bytes) else image
    if not (image.mode.startswith("I") or image.mode == "F"):
        return image
    values = np.asarray(image, dtype=np.float64)
    finite = values[np.isfinite(values)]
    if not finite.size:
        raise UnreadableImageError("there is no finite pixel value in it")
    low, high = finite.min(), finite.max()
    scaled = (values.clip(low, high) - low) * (255.0 / (high - low)) if high > low else np.zeros_like(values)
    return PillowImage.fromarray(np.nan_to_num(scaled).round().astype(np.uint8))
