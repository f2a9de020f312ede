"""The one protocol through which images come in: stable string ids, and a read of a batch of ids."""

import io
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from PIL import Image as PillowImage
from PIL import UnidentifiedImageError

from anomalymatch.errors import DataError, UnreadableImageError
from anomalymatch.types import Image, Reject

MODES = {1: "L", 3: "RGB", 4: "RGBA"}
MAX_PIXELS = 100_000_000
"""Images that claim more pixels than this are refused before they are decoded (decompression bombs)."""


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
    """Decode JPEG, PNG, TIFF, WebP … bytes to `channels` channels (1 grey, 3 RGB, 4 RGBA).

    Raises:
        UnreadableImageError: if the bytes are empty, truncated, no image, or larger than `MAX_PIXELS`.
    """
    if not data:
        raise UnreadableImageError("the file is empty (0 bytes)")
    try:
        with PillowImage.open(io.BytesIO(data)) as image:
            if image.width * image.height > MAX_PIXELS:
                raise UnreadableImageError(f"{image.width} x {image.height} pixels is more than {MAX_PIXELS:,}")
            array = np.asarray(_to_eight_bits(image).convert(MODES[channels]))
    except UnidentifiedImageError:
        raise UnreadableImageError("not an image in a format that Pillow reads") from None
    except (OSError, SyntaxError, ValueError, EOFError, PillowImage.DecompressionBombError) as error:
        raise UnreadableImageError(f"cannot be decoded: {error}") from None
    return array.reshape(*array.shape[:2], channels)


def _to_eight_bits(image: PillowImage.Image) -> PillowImage.Image:
    """Scale 16-bit, 32-bit and float grey images to 8 bits by their own range; Pillow's `convert` would clip them."""
    if not (image.mode.startswith("I") or image.mode == "F"):
        return image
    values = np.asarray(image, dtype=np.float64)
    low, high = np.nanmin(values), np.nanmax(values)
    scaled = (values - low) * (255.0 / (high - low)) if high > low else np.zeros_like(values)
    return PillowImage.fromarray(np.nan_to_num(scaled).round().astype(np.uint8))
