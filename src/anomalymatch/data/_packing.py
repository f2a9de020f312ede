"""From the images of a source to files of them: copied as they are, or encoded anew."""

import io
from collections.abc import Callable, Sequence
from functools import partial

import cv2
import numpy as np
import simplejpeg
from PIL import Image as PillowImage

from anomalymatch.data.source import ImageSource
from anomalymatch.data.stream import resize
from anomalymatch.errors import ConfigError, DataError, UnreadableImageError
from anomalymatch.types import Image, Reject

Packer = Callable[[Sequence[str]], list[bytes | Reject]]
_CHANNELS = {"jpeg": (1, 3), "png": (1, 3, 4), "webp_lossless": (1, 3, 4)}
_PLANES = {1: [0], 3: [2, 1, 0], 4: [2, 1, 0, 3]}
"""OpenCV's order is blue, green, red."""


def keeper(source: ImageSource, size: int | None) -> Packer:
    """Make the function that copies image files as they are.

    Raises:
        ConfigError: if the source has none, or they are to be resized.
    """
    raw_bytes = getattr(source, "raw_bytes", None)
    if raw_bytes is None:
        raise ConfigError(f"encoding=keep: {source.name} holds no image files to copy, choose jpeg, png, webp_lossless")
    if size is not None:
        raise ConfigError("encoding=keep copies the images as they are: leave out size, or choose another encoding")

    def keep(id_: str) -> bytes | Reject:
        try:
            return raw_bytes(id_) or Reject(id_, "the file is empty (0 bytes)")
        except UnreadableImageError as error:
            return Reject(id_, str(error))

    return lambda ids: [keep(id_) for id_ in ids]


def packer(source: ImageSource, size: int | None, encoding: str, quality: int) -> Packer:
    """Make the function that encodes images anew.

    Raises:
        ConfigError: if the encoding does not have that number of channels.
    """
    if source.channels not in _CHANNELS[encoding]:
        raise ConfigError(
            f"encoding={encoding} holds {' or '.join(map(str, _CHANNELS[encoding]))} channels, but {source.name} has "
            f"{source.channels}: choose another encoding, or combine its bands by a rendering"
        )
    encoders: dict[str, Callable[[Image], bytes]] = {
        "jpeg": partial(_jpeg, quality=quality),
        "png": _png,
        "webp_lossless": _webp,
    }
    encode = encoders[encoding]

    def one(item: Image | Reject) -> bytes | Reject:
        return item if isinstance(item, Reject) else encode(item if size is None else resize(item, size))

    return lambda ids: [one(item) for item in source.read(ids)]


def _jpeg(image: Image, quality: int) -> bytes:
    grey = image.shape[2] == 1
    return simplejpeg.encode_jpeg(
        np.ascontiguousarray(image), quality, "GRAY" if grey else "RGB", "Gray" if grey else "444"
    )


def _png(image: Image) -> bytes:
    done, data = cv2.imencode(".png", np.ascontiguousarray(image[..., _PLANES[image.shape[2]]]))
    if not done:
        raise DataError(f"an image of the shape {image.shape} cannot be written as PNG")
    return data.tobytes()


def _webp(image: Image) -> bytes:
    buffer = io.BytesIO()
    pixels = image[..., 0] if image.shape[2] == 1 else image
    PillowImage.fromarray(pixels).save(buffer, "WEBP", lossless=True, exact=True)
    return buffer.getvalue()
