"""Read many images: rejects kept apart, decoded and resized in parallel, in order, in constant memory."""

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import NamedTuple, TypeVar

import cv2
import numpy as np
import torch
from jaxtyping import Shaped, UInt8
from torch import Tensor

from anomalymatch.data.source import ImageSource
from anomalymatch.errors import NoReadableImageError
from anomalymatch.progress import Advance, ignore_progress
from anomalymatch.types import Image, Reject

S = TypeVar("S")
T = TypeVar("T")


class ReadImages(NamedTuple):
    """Decoded images, with the ids of the images that could be read, and the rejects."""

    ids: list[str]
    images: list[Image]
    rejects: list[Reject]


class Collected(NamedTuple):
    """One row for each readable image, in order, and the rejects."""

    ids: list[str]
    rows: Shaped[np.ndarray, "n ..."]
    rejects: list[Reject]


class ImageBatch(NamedTuple):
    """Batch of images for the network; `images` is channels-last in memory."""

    ids: list[str]
    images: UInt8[Tensor, "b c h w"]
    rejects: list[Reject]


def read_images(source: ImageSource, ids: Sequence[str], size: int | None = None) -> ReadImages:
    """Decode `ids`, all at once; `size` is the side to which they are to be resized, see `ImageSource.read_for`."""
    found = ReadImages([], [], [])
    items = source.read(ids) if size is None else source.read_for(ids, size)
    for id_, item in zip(ids, items, strict=True):
        if isinstance(item, Reject):
            found.rejects.append(item)
        else:
            found.ids.append(id_)
            found.images.append(item)
    return found


def next_readable(source: ImageSource, ids: Sequence[str], position: int, size: int) -> tuple[Image, int]:
    """Return the image at `position` of `ids`, or the next one that can be read, and its position; the end wraps round.

    `size` is the side to which it is to be resized, see `ImageSource.read_for`.

    Raises:
        NoReadableImageError: if none can be read.
    """
    rejects: list[Reject] = []
    for step in range(len(ids)):
        candidate = (position + step) % len(ids)
        image = source.read_for([ids[candidate]], size)[0]
        if not isinstance(image, Reject):
            return image, candidate
        rejects.append(image)
    raise none_readable(source, rejects)


def none_readable(source: ImageSource, rejects: Sequence[Reject]) -> NoReadableImageError:
    """Return the error about images of which none can be read, with the commonest reason and a file as an example."""
    (reason, count), *_ = Counter(reject.reason for reject in rejects).most_common(1)
    example = next(reject.id for reject in rejects if reject.reason == reason)
    message = f"none of {len(rejects):,} images can be read: {count:,} of them because {reason} (as {example})"
    return NoReadableImageError(f"{source.name}: {message}", rejects)


def collect(
    batches: Iterable[tuple[Sequence[str], np.ndarray | None, Sequence[Reject]]],
    empty: np.ndarray,
    advance: Advance = ignore_progress,
) -> Collected:
    """Gather what was computed for the images of a source, batch by batch.

    Args:
        batches: ids of the readable images, a row for each of them (None if there are none), and the rejects.
        empty: result without readable images, `np.empty((0, d), np.float16)` for example; the rows get its type.
        advance: called with the number of images of each batch, rejects included.
    """
    ids: list[str] = []
    rejects: list[Reject] = []
    rows: list[np.ndarray] = []
    for kept, values, rejected in batches:
        if len(kept) != (0 if values is None else len(values)):
            raise ValueError(
                f"expected a row for each of {len(kept)} images, got {0 if values is None else len(values)}"
            )
        if values is not None and len(kept):
            rows.append(values.astype(empty.dtype, copy=False))
        ids += kept
        rejects += rejected
        advance(len(kept) + len(rejected))
    return Collected(ids, np.concatenate(rows) if rows else empty, rejects)


def stream(
    source: ImageSource, ids: Sequence[str], *, size: int, batch_size: int, workers: int = 2
) -> Iterator[ImageBatch]:
    """Decode and resize `ids` in `workers` threads, in parallel with the model; at most `workers + 3` batches wait."""
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
    found = read_images(source, ids, size)
    images = [resize(image, size, source.rendering.fit) for image in found.images]
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


def resize(image: Image, size: int, fit: str) -> UInt8[np.ndarray, "{size} {size} c"]:
    """Resize to `size` x `size` pixels: area-averaged when shrinking, bicubic when enlarging.

    Args:
        image: an image of any shape.
        size: side of the result, in pixels.
        fit: of an image that is not square, `stretch` changes the shape, `pad` adds borders of its mean colour, and
            `crop` takes the square at the centre.
    """
    height, width = image.shape[:2]
    if fit == "crop":
        rows, columns = central_square(height, width)
        return scale(image[rows, columns], size, size)
    if fit == "pad":
        inner = scaled_shape(height, width, size / max(height, width))
        above, left = (size - inner[0]) // 2, (size - inner[1]) // 2
        square = np.empty((size, size, image.shape[2]), np.uint8)
        square[:] = np.rint(image.mean((0, 1)))
        square[above : above + inner[0], left : left + inner[1]] = scale(image, *inner)
        return square
    return scale(image, size, size)


def central_square(height: int, width: int) -> tuple[slice, slice]:
    """Return rows and columns of the largest square at the centre of an image."""
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return slice(top, top + side), slice(left, left + side)


def scaled_shape(height: int, width: int, factor: float) -> tuple[int, int]:
    """Return the shape of an image that is enlarged by `factor`, in whole pixels."""
    return max(1, round(height * factor)), max(1, round(width * factor))


def scale(image: Image, height: int, width: int) -> UInt8[np.ndarray, "{height} {width} c"]:
    """Resize to any height and width: area-averaged when shrinking, bicubic when enlarging."""
    if image.shape[:2] == (height, width):
        return image
    channels = image.shape[2]
    method = cv2.INTER_AREA if image.shape[0] >= height and image.shape[1] >= width else cv2.INTER_CUBIC
    parts = [  # OpenCV takes four channels at most
        cv2.resize(np.ascontiguousarray(image[..., k : k + 4]), (width, height), interpolation=method)
        for k in range(0, channels, 4)
    ]
    return np.dstack(parts) if len(parts) > 1 else parts[0].reshape(height, width, channels)


def to_tensor(images: Sequence[Image]) -> UInt8[Tensor, "b c h w"]:
    """Stack images of one size; memory stays channels-last, as the decoder leaves it."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
