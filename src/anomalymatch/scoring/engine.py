"""Local scoring engine: decode in threads, score, and write part by part."""

from collections.abc import Sequence
from itertools import groupby
from operator import itemgetter

import numpy as np
import torch

from anomalymatch.data.source import ImageSource
from anomalymatch.data.stream import collect, stream_batches
from anomalymatch.progress import Advance
from anomalymatch.scoring.backends import Scorer
from anomalymatch.scoring.gpu_decode import stream_on_device
from anomalymatch.scoring.parts import Manifest, PartFolder
from anomalymatch.scoring.top import TopK


def score_parts(
    source: ImageSource,
    score: Scorer,
    folder: PartFolder,
    parts: Sequence[int],
    *,
    size: int,
    width: int,
    workers: int,
    decode_on: torch.device | None = None,
    top: TopK,
    advance: Advance,
) -> None:
    """Score `parts` and write each when it is complete.

    A batch never crosses the border of a part, so the numbers of a part do not depend on the process that scores it.
    Decoding runs ahead across borders: the network never waits for the first batch of a part.

    Args:
        source: the archive.
        score: the backend's function.
        folder: folder of the finished parts.
        parts: numbers of the parts.
        size: side to which images are resized, in pixels.
        width: number of features of an image that are kept; 0 keeps none.
        workers: decoding threads.
        decode_on: GPU that decodes JPEGs; None decodes in the threads.
        top: gets the ids and logits of every part.
        advance: called with the number of images of every batch.
    """
    chunks = [(part, rows) for part in parts for rows in batches_of(folder.manifest, part)]
    ids = (source.ids[start:stop] for _, (start, stop) in chunks)
    batches = (
        stream_batches(source, ids, size=size, workers=workers)
        if decode_on is None
        else stream_on_device(source, ids, size=size, workers=workers, device=decode_on)
    )
    numbered = zip((part for part, _ in chunks), batches, strict=True)
    for part, group in groupby(numbered, key=itemgetter(0)):
        rows = ((b.ids, score(b.images) if len(b.ids) else None, b.rejects) for _, b in group)
        found = collect(rows, np.empty((0, 1 + width), np.float32), advance)
        folder.write(part, found)
        top.add(found.ids, found.rows[:, 0])


def batches_of(manifest: Manifest, part: int) -> list[tuple[int, int]]:
    """Return the range of positions, start and stop, of each batch of a part."""
    start, stop = manifest.rows(part)
    return [(at, min(stop, at + manifest.batch_size)) for at in range(start, stop, manifest.batch_size)]
