"""Readable images and rejects of a source, kept apart."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Shaped

from anomalymatch.data.source import ImageSource
from anomalymatch.errors import DataError
from anomalymatch.progress import Advance, ignore_progress
from anomalymatch.types import Image, Reject


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


def read_images(source: ImageSource, ids: Sequence[str]) -> ReadImages:
    """Decode `ids`, all at once."""
    found = ReadImages([], [], [])
    for id_, item in zip(ids, source.read(ids), strict=True):
        if isinstance(item, Reject):
            found.rejects.append(item)
        else:
            found.ids.append(id_)
            found.images.append(item)
    return found


def next_readable(source: ImageSource, ids: Sequence[str], position: int) -> tuple[Image, int]:
    """Return the image at `position` of `ids`, or the next one that can be read, and its position; the end wraps round.

    Raises:
        DataError: if none can be read.
    """
    for step in range(len(ids)):
        candidate = (position + step) % len(ids)
        image = source.read([ids[candidate]])[0]
        if not isinstance(image, Reject):
            return image, candidate
    raise DataError(f"none of the {len(ids)} images to learn from can be read")


def collect(
    batches: Iterable[tuple[Sequence[str], np.ndarray | None, Sequence[Reject]]],
    empty: np.ndarray,
    advance: Advance = ignore_progress,
) -> Collected:
    """Gather what was computed for the images of a source, batch by batch.

    Args:
        batches: ids of the readable images, a row for each of them, and the rejects. Without readable images the
            rows may be None.
        empty: result without readable images, `np.empty((0, d), np.float16)` for example; the rows get its type.
        advance: called with the number of images of each batch, rejects included.
    """
    ids: list[str] = []
    rejects: list[Reject] = []
    rows: list[np.ndarray] = []
    for kept, values, rejected in batches:
        n = 0 if values is None else len(values)
        if len(kept) != n:
            raise ValueError(f"expected a row for each of {len(kept)} images, got {n}")
        if values is not None and n:
            rows.append(values.astype(empty.dtype, copy=False))
        ids += kept
        rejects += rejected
        advance(len(kept) + len(rejected))
    return Collected(ids, np.concatenate(rows) if rows else empty, rejects)
