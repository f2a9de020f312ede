"""The local engine: decode ahead in threads, score, write, part by part."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float32

from anomalymatch.data.source import ImageSource
from anomalymatch.data.stream import stream_batches
from anomalymatch.progress import Advance
from anomalymatch.scoring.backends import Scorer
from anomalymatch.scoring.gpu_decode import stream_on_device
from anomalymatch.scoring.parts import Manifest, Part, PartFolder, TopK
from anomalymatch.types import Reject

Outputs = Float32[np.ndarray, "_ _"]
"""Logits and features of a batch; batches differ in length."""


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
    """Score `parts` and write each when it is done.

    Batches never cross the border of a part, so that a part has the same numbers whoever scores it and when.
    Decoding does go on across borders: the model never waits for the first batch of a part.

    Args:
        source: the archive.
        score: the backend.
        folder: where finished parts go.
        parts: their numbers.
        size: side to which images are resized, in pixels.
        width: features of an image that are kept; 0 keeps none.
        workers: decoding threads.
        decode_on: a GPU that decodes JPEGs; None decodes in the threads.
        top: gets the ids and logits of every part.
        advance: told of every batch.
    """
    manifest = folder.manifest
    chunks = [(part, rows) for part in parts for rows in batches_of(manifest, part)]
    ids = (source.ids[start:stop] for _, (start, stop) in chunks)
    collected = _Collector()
    batches = (
        stream_batches(source, ids, size=size, workers=workers)
        if decode_on is None
        else stream_on_device(source, ids, size=size, workers=workers, device=decode_on)
    )
    for index, batch in enumerate(batches):
        collected.add(batch.ids, score(batch.images) if len(batch.ids) else None, batch.rejects)
        advance(len(batch.ids) + len(batch.rejects))
        part = chunks[index][0]
        if index + 1 == len(chunks) or chunks[index + 1][0] != part:
            done = make_part(collected.ids, collected.outputs, collected.rejects, width=width)
            folder.write(part, done)
            top.add(done.ids, done.logits)
            collected = _Collector()


def batches_of(manifest: Manifest, part: int) -> list[tuple[int, int]]:
    """First position and the one behind the last, for each batch of `part`."""
    start, stop = manifest.rows(part)
    return [(at, min(stop, at + manifest.batch_size)) for at in range(start, stop, manifest.batch_size)]


class _Collector:
    """Batches of one part."""

    def __init__(self) -> None:
        self.ids: list[str] = []
        self.outputs: list[Outputs] = []
        self.rejects: list[Reject] = []

    def add(self, ids: Sequence[str], outputs: Outputs | None, rejects: Sequence[Reject]) -> None:
        self.ids += ids
        self.rejects += rejects
        if outputs is not None:
            self.outputs.append(outputs)


def make_part(ids: Sequence[str], outputs: Sequence[Outputs], rejects: Sequence[Reject], *, width: int) -> Part:
    """A part from what the backend gave for its batches.

    Args:
        ids: the readable images.
        outputs: for each batch the logit in the first column and `width` features in the others.
        rejects: the others.
        width: features of an image that are kept, L2-normalised; 0 keeps none.
    """
    rows = np.concatenate([np.empty((0, 1 + width), dtype=np.float32), *outputs])
    kept = None
    if width:
        norms = np.linalg.norm(rows[:, 1:], axis=1, keepdims=True)
        kept = (rows[:, 1:] / np.maximum(norms, 1e-12)).astype(np.float16)
    return Part(ids, rows[:, 0], rejects, kept)
