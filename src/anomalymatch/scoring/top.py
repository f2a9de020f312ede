"""Most anomalous images of an archive."""

import csv
import io
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float32
from scipy.special import expit

from anomalymatch.files import write_text

INTERVAL_S = 30.0


class TopK:
    """The `k` highest logits that were added; equal logits are ordered by id, so the order of adding does not matter.

    Args:
        k: number of images to keep.
        path: CSV that is written during the scoring, every half minute; None for none.
    """

    def __init__(self, k: int, path: Path | None = None) -> None:
        self.k, self.path = k, path
        self._best: list[tuple[float, str]] = []  # (-logit, id), sorted
        self._written = time.monotonic()

    def add(self, ids: Sequence[str], logits: Float32[np.ndarray, " n"]) -> None:
        """Add images with their logits."""
        if self.k and len(ids):
            self._merge(ids, logits)
        if self.path is not None and time.monotonic() - self._written > INTERVAL_S:
            self.write(self.path)
            self._written = time.monotonic()

    def _merge(self, ids: Sequence[str], logits: Float32[np.ndarray, " n"]) -> None:
        threshold = -self._best[-1][0] if len(self._best) == self.k else -np.inf
        candidates = np.flatnonzero(logits >= threshold)
        if len(candidates) > self.k:  # of many, only those that can be among the best, ties included
            worst = np.partition(logits[candidates], -self.k)[-self.k]
            candidates = candidates[logits[candidates] >= worst]
        if len(candidates):
            new = [(-float(logits[i]), ids[int(i)]) for i in candidates]
            self._best = sorted(self._best + new)[: self.k]

    def best(self) -> list[tuple[str, float]]:
        """Return ids and logits, best first."""
        return [(id_, -negative) for negative, id_ in self._best]

    def write(self, path: Path) -> None:
        """Write `rank, id, score, logit` as CSV, atomically."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["rank", "id", "score", "logit"])
        for rank, (id_, logit) in enumerate(self.best(), 1):
            writer.writerow([rank, id_, f"{expit(logit):.6g}", f"{logit:.6g}"])
        write_text(path, text.getvalue())
