"""Decoding JPEGs on the GPU: threads only read bytes, and what is no plain JPEG takes the usual way."""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.v2 import functional as transforms

from anomalymatch.data.source import ImageSource
from anomalymatch.data.stream import ImageBatch, prefetch, resize
from anomalymatch.errors import ConfigError, UnreadableImageError
from anomalymatch.types import Reject

_START, _END = b"\xff\xd8\xff", b"\xff\xd9"
_HEADER_BYTES = 2**16


class _Fetched(NamedTuple):
    ids: Sequence[str]
    jpegs: dict[str, UInt8[Tensor, " _"]]


def check_gpu_decode(source: ImageSource, device: torch.device) -> None:
    """Refuse what only the usual decoding can do.

    Raises:
        ConfigError: if there is no GPU, or the archive does not hold encoded 8-bit colour images taken as they are.
    """
    if device.type != "cuda":
        raise ConfigError(f"scoring.decode=gpu needs a GPU, not {device}: take scoring.decode=cpu")
    if not source.encoded or source.channels != 3 or not source.rendering.keeps_eight_bits:
        raise ConfigError(
            f"scoring.decode=gpu is for JPEGs in colour without a stretch, not for {source.name}: "
            "take scoring.decode=cpu"
        )


def stream_on_device(
    source: ImageSource, chunks: Iterable[Sequence[str]], *, size: int, workers: int, device: torch.device
) -> Iterator[ImageBatch]:
    """Batches as `data.stream.stream_batches` makes them, decoded and resized on `device`.

    Resizing is bilinear with antialiasing instead of area-averaged, so that scores differ a little from the usual way.

    Args:
        source: encoded images.
        chunks: ids of each batch.
        size: side to which images are resized, in pixels.
        workers: threads that read.
        device: where to decode; on a processor this is slow, but the same.
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
            continue  # the usual way says why
        if _is_plain(data):
            jpegs[id_] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return _Fetched(ids, jpegs)


def _is_plain(data: bytes) -> bool:
    """Whether a hardware decoder does all of it: a whole JPEG that needs no turning."""
    return data.startswith(_START) and data.rstrip(b"\0").endswith(_END) and b"Exif" not in data[:_HEADER_BYTES]


def _decoded(source: ImageSource, fetched: _Fetched, size: int, device: torch.device) -> ImageBatch:
    done = _on_device(fetched.jpegs, size, device)
    rejects: list[Reject] = []
    for id_ in fetched.ids:
        if id_ in done:
            continue
        (item,) = source.read([id_])
        if isinstance(item, Reject):
            rejects.append(item)
        else:
            pixels = np.ascontiguousarray(resize(item, size))
            done[id_] = torch.from_numpy(pixels).permute(2, 0, 1).to(device)
    kept = [id_ for id_ in fetched.ids if id_ in done]
    if not kept:
        return ImageBatch([], torch.empty(0, source.channels, size, size, dtype=torch.uint8), rejects)
    images = torch.stack([done[id_] for id_ in kept])
    return ImageBatch(kept, images.contiguous(memory_format=torch.channels_last), rejects)


def _on_device(jpegs: dict[str, Tensor], size: int, device: torch.device) -> dict[str, Tensor]:
    """All JPEGs of a batch at once; if one of them is damaged, none: the usual way finds out which."""
    if not jpegs:
        return {}
    # Its successor is a package of its own, which most installations lack.
    warnings.filterwarnings("ignore", message=".*TorchVision are deprecated.*", category=DeprecationWarning)
    try:
        images = decode_jpeg(list(jpegs.values()), mode=ImageReadMode.RGB, device=str(device))
    except RuntimeError:
        return {}
    return {
        id_: image if image.shape[1:] == (size, size) else transforms.resize(image, [size, size], antialias=True)
        for id_, image in zip(jpegs, images, strict=True)
    }
