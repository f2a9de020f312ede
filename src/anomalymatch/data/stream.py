"""Decoding ahead of the model: batches of resized 8-bit images, in order, in constant memory."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import cv2
import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from anomalymatch.data.source import ImageSource
from anomalymatch.types import Image, Reject


class ImageBatch(NamedTuple):
    """Images that are ready for the network; `images` is channels-last in memory."""

    ids: list[str]
    images: UInt8[Tensor, "b c h w"]
    rejects: list[Reject]


def resize(image: Image, size: int) -> UInt8[np.ndarray, "{size} {size} c"]:
    """Resize to `size` x `size` pixels: area-averaged when shrinking, bicubic when enlarging."""
    height, width, channels = image.shape
    if (height, width) == (size, size):
        return image
    method = cv2.INTER_AREA if min(height, width) >= size else cv2.INTER_CUBIC
    parts = [  # OpenCV takes four channels at most
        cv2.resize(np.ascontiguousarray(image[..., k : k + 4]), (size, size), interpolation=method)
        for k in range(0, channels, 4)
    ]
    return np.dstack(parts) if len(parts) > 1 else parts[0].reshape(size, size, channels)


def to_tensor(images: Sequence[Image]) -> UInt8[Tensor, "b c h w"]:
    """Stack images of one size; the channels-last memory of the decoder is kept, not copied around."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


def stream(
    source: ImageSource, ids: Sequence[str], *, size: int, batch_size: int, workers: int = 2
) -> Iterator[ImageBatch]:
    """Decode and resize `ids` in `workers` threads, a few batches ahead of the consumer.

    Pillow and OpenCV release the interpreter lock, so decoding runs beside the model. At most `workers + 3` batches
    are in memory, whatever the length of `ids`. Unreadable images are left out and reported in `rejects`.
    """
    chunks = (ids[start : start + batch_size] for start in range(0, len(ids), batch_size))
    yield from stream_batches(source, chunks, size=size, workers=workers)


def stream_batches(
    source: ImageSource, chunks: Iterable[Sequence[str]], *, size: int, workers: int = 2
) -> Iterator[ImageBatch]:
    """As `stream`, for batches that are cut already."""

    def load(chunk: Sequence[str]) -> ImageBatch:
        return load_batch(source, chunk, size)

    with ThreadPoolExecutor(workers, thread_name_prefix="decode") as pool:
        yield from ahead(pool, load, iter(chunks), workers + 1)


def load_batch(source: ImageSource, ids: Sequence[str], size: int) -> ImageBatch:
    """Decode and resize `ids` in this thread."""
    kept: list[str] = []
    images: list[Image] = []
    rejects: list[Reject] = []
    for id_, item in zip(ids, source.read(ids), strict=True):
        if isinstance(item, Reject):
            rejects.append(item)
        else:
            kept.append(id_)
            images.append(resize(item, size))
    empty = torch.empty(0, source.channels, size, size, dtype=torch.uint8)
    return ImageBatch(kept, to_tensor(images) if images else empty, rejects)


T = TypeVar("T")


def ahead(
    pool: ThreadPoolExecutor, load: Callable[[Sequence[str]], T], chunks: Iterator[Sequence[str]], depth: int
) -> Iterator[T]:
    """What `load` makes of each of `chunks`, in order; `depth` of them are being made before they are asked for."""
    waiting: deque[Future[T]] = deque()
    try:
        for chunk in chunks:
            waiting.append(pool.submit(load, chunk))
            if len(waiting) > depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:  # the consumer may stop early
        for future in waiting:
            future.cancel()
