"""The most anomalous images so far, while an archive is being scored."""

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
    """Keeps the `k` highest logits of all that it is shown; ties go to the smaller id, so the order does not matter."""

    def __init__(self, k: int) -> None:
        self.k = k
        self._best: list[tuple[float, str]] = []  # (-logit, id), sorted

    def add(self, ids: Sequence[str], logits: Float32[np.ndarray, " n"]) -> None:
        """Show it some more."""
        if not self.k or not len(ids):
            return
        bar = -self._best[-1][0] if len(self._best) == self.k else -np.inf
        candidates = np.flatnonzero(logits >= bar)
        if len(candidates) > self.k:  # of many, only those that can be among the best, ties included
            worst = np.partition(logits[candidates], -self.k)[-self.k]
            candidates = candidates[logits[candidates] >= worst]
        if len(candidates):
            new = [(-float(logits[i]), ids[int(i)]) for i in candidates]
            self._best = sorted(self._best + new)[: self.k]

    def best(self) -> list[tuple[str, float]]:
        """Ids and logits, best first."""
        return [(id_, -negative) for negative, id_ in self._best]

    def write(self, path: Path) -> None:
        """Write `rank, id, score, logit` as CSV, atomically."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["rank", "id", "score", "logit"])
        for rank, (id_, logit) in enumerate(self.best(), 1):
            writer.writerow([rank, id_, f"{expit(logit):.6g}", f"{logit:.6g}"])
        write_text(path, text.getvalue())


class RunningTop(TopK):
    """A `TopK` that is on disk while the archive is being scored, at most half a minute old.

    Args:
        k: how many to keep.
        path: the CSV.
    """

    def __init__(self, k: int, path: Path) -> None:
        super().__init__(k)
        self.path = path
        self._written = time.monotonic()

    def add(self, ids: Sequence[str], logits: Float32[np.ndarray, " n"]) -> None:
        """Show it some more."""
        super().add(ids, logits)
        if time.monotonic() - self._written > INTERVAL_S:
            self.write(self.path)
            self._written = time.monotonic()
