"""Stream of decoded, resized 8-bit images: in order, ahead of the model, in constant memory."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import NamedTuple, TypeVar

import cv2
import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from anomalymatch.data.collect import read_images
from anomalymatch.data.source import ImageSource
from anomalymatch.types import Image, Reject

S = TypeVar("S")
T = TypeVar("T")


class ImageBatch(NamedTuple):
    """Batch of images for the network; `images` is channels-last in memory."""

    ids: list[str]
    images: UInt8[Tensor, "b c h w"]
    rejects: list[Reject]


def stream(
    source: ImageSource, ids: Sequence[str], *, size: int, batch_size: int, workers: int = 2
) -> Iterator[ImageBatch]:
    """Decode and resize `ids` in `workers` threads, a few batches ahead of the consumer.

    Pillow and OpenCV release the interpreter lock, so decoding runs in parallel with the model. At most `workers + 3`
    batches are in memory. Unreadable images are left out and reported in `rejects`.
    """
    chunks = (ids[start : start + batch_size] for start in range(0, len(ids), batch_size))
    return stream_batches(source, chunks, size=size, workers=workers)


def stream_batches(
    source: ImageSource, chunks: Iterable[Sequence[str]], *, size: int, workers: int = 2
) -> Iterator[ImageBatch]:
    """Decode and resize batches of ids, see `stream`."""
    with ThreadPoolExecutor(workers, thread_name_prefix="decode") as pool:
        yield from prefetch(pool, partial(load_batch, source, size=size), chunks, workers + 1)


def load_batch(source: ImageSource, ids: Sequence[str], size: int) -> ImageBatch:
    """Decode and resize `ids` in this thread."""
    found = read_images(source, ids)
    images = [resize(image, size) for image in found.images]
    empty = torch.empty(0, source.channels, size, size, dtype=torch.uint8)
    return ImageBatch(found.ids, to_tensor(images) if images else empty, found.rejects)


def prefetch(pool: ThreadPoolExecutor, call: Callable[[S], T], items: Iterable[S], depth: int) -> Iterator[T]:
    """Apply `call` to each item, in order, `depth` items ahead of the consumer."""
    waiting: deque[Future[T]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(call, item))
            if len(waiting) > depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:  # the consumer may stop early
        for future in waiting:
            future.cancel()


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
    """Stack images of one size; memory stays channels-last, as the decoder leaves it."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
