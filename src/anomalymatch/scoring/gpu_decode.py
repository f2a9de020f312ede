"""JPEG decoding on the GPU: threads read bytes only, and the CPU decodes everything that is no plain JPEG."""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.v2 import functional as transforms

from anomalymatch.data.codecs import exif_of
from anomalymatch.data.source import ImageSource
from anomalymatch.data.stream import (
    ImageBatch,
    central_square,
    prefetch,
    read_images,
    resize,
    scaled_shape,
    stream_batches,
)
from anomalymatch.errors import ConfigError, UnreadableImageError

_START, _END = b"\xff\xd8\xff", b"\xff\xd9"
_Fetched = tuple[Sequence[str], dict[str, Tensor]]
"""Ids of a batch, and the bytes of its plain JPEGs by id."""


def check_gpu_decode(source: ImageSource, device: torch.device) -> None:
    """Check that a GPU can decode an archive.

    Raises:
        ConfigError: if there is no GPU, or the archive has no encoded 8-bit colour images without a stretch.
    """
    if device.type != "cuda":
        raise ConfigError(f"scoring.decode=gpu needs a GPU, not {device}: set scoring.decode=cpu")
    if not source.encoded or source.channels != 3 or not source.rendering.keeps_eight_bits:
        raise ConfigError(
            f"scoring.decode=gpu needs JPEGs in colour without a stretch, which {source.name} has not: "
            "set scoring.decode=cpu"
        )


def stream_images(
    source: ImageSource, chunks: Iterable[Sequence[str]], *, size: int, workers: int, decode_on: torch.device | None
) -> Iterator[ImageBatch]:
    """Yield decoded and resized batches: by `stream_on_device`, or by threads alone if `decode_on` is None."""
    if decode_on is None:
        return stream_batches(source, chunks, size=size, workers=workers)
    return stream_on_device(source, chunks, size=size, workers=workers, device=decode_on)


def stream_on_device(
    source: ImageSource, chunks: Iterable[Sequence[str]], *, size: int, workers: int, device: torch.device
) -> Iterator[ImageBatch]:
    """Yield the batches of `data.stream.stream_batches`, decoded and resized on `device`.

    Resizing is bilinear with antialiasing instead of area averaging, so scores differ a little from those of the CPU.

    Args:
        source: encoded images.
        chunks: ids of each batch.
        size: side to which images are resized, in pixels.
        workers: threads that read.
        device: device that decodes; a CPU works too, slowly.
    """
    with ThreadPoolExecutor(workers, thread_name_prefix="read") as pool:
        for fetched in prefetch(pool, lambda ids: _fetch(source, ids), iter(chunks), workers + 1):
            yield _decoded(source, fetched, size, device)


def _fetch(source: ImageSource, ids: Sequence[str]) -> _Fetched:
    jpegs: dict[str, Tensor] = {}
    for id_ in ids:
        try:
            data = source.raw_bytes(id_)
        except UnreadableImageError:
            continue  # the CPU finds the reason
        if _is_plain(data):
            jpegs[id_] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return ids, jpegs


def _is_plain(data: bytes) -> bool:
    """Return True for a complete JPEG that needs no turning, which hardware decodes entirely."""
    return data.startswith(_START) and data.rstrip(b"\0").endswith(_END) and exif_of(data) is None


def _decoded(source: ImageSource, fetched: _Fetched, size: int, device: torch.device) -> ImageBatch:
    ids, jpegs = fetched
    fit = source.rendering.fit
    done = _on_device(jpegs, size, fit, device)
    rest = read_images(source, [id_ for id_ in ids if id_ not in done], size)
    for id_, image in zip(rest.ids, rest.images, strict=True):
        done[id_] = torch.from_numpy(np.ascontiguousarray(resize(image, size, fit))).permute(2, 0, 1).to(device)
    kept = [id_ for id_ in ids if id_ in done]
    if not kept:
        return ImageBatch([], torch.empty(0, source.channels, size, size, dtype=torch.uint8), rest.rejects)
    images = torch.stack([done[id_] for id_ in kept])
    return ImageBatch(kept, images.contiguous(memory_format=torch.channels_last), rest.rejects)


def _on_device(jpegs: dict[str, Tensor], size: int, fit: str, device: torch.device) -> dict[str, Tensor]:
    """Decode all JPEGs of a batch at once; if one is damaged, none: the CPU then finds out which."""
    if not jpegs:
        return {}
    with warnings.catch_warnings():
        # Its successor is a separate package, which most installations lack.
        warnings.filterwarnings("ignore", message=".*TorchVision are deprecated.*", category=DeprecationWarning)
        try:
            images = decode_jpeg(list(jpegs.values()), mode=ImageReadMode.RGB, device=str(device))
        except RuntimeError:
            return {}
    return {id_: _resized(image, size, fit) for id_, image in zip(jpegs, images, strict=True)}


def _resized(image: Tensor, size: int, fit: str) -> Tensor:
    """Resize as `data.stream.resize` does, but on the device and bilinearly."""
    height, width = image.shape[1:]
    if (height, width) == (size, size):
        return image
    inner = (size, size)
    if fit == "crop":
        rows, columns = central_square(height, width)
        image = image[:, rows, columns]
    elif fit == "pad":
        inner = scaled_shape(height, width, size / max(height, width))
    above, left = (size - inner[0]) // 2, (size - inner[1]) // 2
    square = image.float().mean((1, 2)).round().to(image.dtype)[:, None, None].repeat(1, size, size)
    scaled = transforms.resize(image, list(inner), antialias=True)
    square[:, above : above + inner[0], left : left + inner[1]] = scaled
    return square
