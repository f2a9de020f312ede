"""The local engine: decode ahead in threads, score, write, part by part."""

from collections.abc import Sequence

import numpy as np

from anomalymatch.data.source import ImageSource
from anomalymatch.data.stream import stream_batches
from anomalymatch.progress import Advance
from anomalymatch.scoring.backends import Scorer
from anomalymatch.scoring.parts import Manifest, Part, PartFolder
from anomalymatch.scoring.top import TopK
from anomalymatch.types import Reject


def score_parts(
    source: ImageSource,
    score: Scorer,
    folder: PartFolder,
    parts: Sequence[int],
    *,
    size: int,
    workers: int,
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
        workers: decoding threads.
        top: gets the ids and logits of every part.
        advance: told of every batch.
    """
    manifest = folder.manifest
    chunks = [(part, rows) for part in parts for rows in batches_of(manifest, part)]
    ids = (source.ids[start:stop] for _, (start, stop) in chunks)
    collected = _Collector()
    for index, batch in enumerate(stream_batches(source, ids, size=size, workers=workers)):
        outputs = score(batch.images) if len(batch.ids) else np.empty((0, 1), dtype=np.float32)
        collected.add(batch.ids, outputs, batch.rejects)
        advance(len(batch.ids) + len(batch.rejects))
        part = chunks[index][0]
        if index + 1 == len(chunks) or chunks[index + 1][0] != part:
            done = collected.part(features=manifest.features)
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
        self.outputs: list[np.ndarray] = []
        self.rejects: list[Reject] = []

    def add(self, ids: Sequence[str], outputs: np.ndarray, rejects: Sequence[Reject]) -> None:
        self.ids += ids
        self.rejects += rejects
        if len(ids):
            self.outputs.append(outputs)

    def part(self, *, features: bool) -> Part:
        rows = np.concatenate(self.outputs) if self.outputs else np.empty((0, 1), dtype=np.float32)
        return make_part(self.ids, rows, self.rejects, features=features)


def make_part(ids: Sequence[str], outputs: np.ndarray, rejects: Sequence[Reject], *, features: bool) -> Part:
    """A part from what the backend gave: the logit in the first column, features in the others."""
    kept = None
    if features:
        norms = np.linalg.norm(outputs[:, 1:], axis=1, keepdims=True)
        kept = (outputs[:, 1:] / np.maximum(norms, 1e-12)).astype(np.float16)
    return Part(ids, outputs[:, 0], rejects, kept)
