"""Result of a ranking: one score for each image, and the images that could not be read."""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float64, Int64
from scipy.special import expit

from anomalymatch.checksums import check_file
from anomalymatch.errors import StorageError
from anomalymatch.files import atomic_file, write_csv
from anomalymatch.notebook import Readable, html_table
from anomalymatch.types import Reject

logger = logging.getLogger(__name__)


REPR_IMAGES, SHOWN = 3, 10
"""Number of images that `repr` and a notebook show."""


@dataclass(frozen=True, repr=False)
class Ranking:
    """Scores of images; higher is more anomalous.

    Attributes:
        ids: the images, in the order they were scored.
        logits: log-odds of being an anomaly, which stay distinct where the probability saturates.
        rejects: images that could not be read; they have no score.
        source: reader of the images, for the pictures in a notebook; None shows none.

    Example:
        >>> ranking = am.Ranking(["a", "b", "c"], np.array([-1.0, 2.0, 0.0]))
        >>> ranking.top(2)
        ['b', 'c']
        >>> ranking.ranks.tolist()
        [3, 1, 2]
    """

    ids: Sequence[str]
    logits: Float64[np.ndarray, " n"]
    rejects: Sequence[Reject] = field(default=())
    source: Readable | None = field(default=None, compare=False)

    def __repr__(self) -> str:
        best = ", ".join(f"{id_!r} {score:.3f}" for id_, score in self.score_of_top(REPR_IMAGES).items())
        rejects = f", {len(self.rejects):,} unreadable" if self.rejects else ""
        return f"<Ranking of {len(self):,} images{rejects}; the top: {best}>"

    def _repr_html_(self) -> str:
        """Show the top in a notebook, with pictures if the source is known."""
        rows = [
            {"rank": k, "id": i, "score": f"{s:.4f}"} for k, (i, s) in enumerate(self.score_of_top(SHOWN).items(), 1)
        ]
        return html_table(f"Ranking of {len(self):,} images, {len(self.rejects):,} unreadable", rows, self.source)

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def scores(self) -> Float64[np.ndarray, " n"]:
        """Probability of being an anomaly, for classes balanced as in training."""
        return expit(self.logits)

    @cached_property
    def order(self) -> Int64[np.ndarray, " n"]:
        """Positions from the most to the least anomalous; ties are ordered by id, so the order is unique."""
        return np.lexsort((np.asarray(self.ids, dtype=object), -self.logits)).astype(np.int64)

    @cached_property
    def ranks(self) -> Int64[np.ndarray, " n"]:
        """Rank of each image, 1 for the highest score."""
        ranks = np.empty(len(self), np.int64)
        ranks[self.order] = np.arange(1, len(self) + 1)
        return ranks

    def top(self, k: int) -> list[str]:
        """Return the `k` most anomalous ids, best first."""
        return [self.ids[i] for i in self.order[:k]]

    def score_of_top(self, k: int) -> dict[str, float]:
        """Return the probabilities of the `k` most anomalous ids, best first."""
        return {self.ids[i]: float(self.scores[i]) for i in self.order[:k]}

    def restrict(self, keep: Iterable[str]) -> "Ranking":
        """Return the ranking of `keep` only, with the same scores and in the same order; unknown ids are ignored."""
        wanted = set(keep)
        rows = [i for i, id_ in enumerate(self.ids) if id_ in wanted]
        rejects = [reject for reject in self.rejects if reject.id in wanted]
        return Ranking([self.ids[i] for i in rows], self.logits[rows], rejects, self.source)

    def score_of(self, ids: Iterable[str]) -> dict[str, float]:
        """Return the probabilities by id; ids without a score are left out."""
        wanted = set(ids)
        return {id_: float(s) for id_, s in zip(self.ids, self.scores, strict=True) if id_ in wanted}

    def write(self, path: Path) -> None:
        """Write `id, score, rank, logit` to a Parquet file, atomically."""
        ids = pa.array(self.ids, pa.string())
        columns = {"id": ids, "score": self.scores, "rank": self.ranks, "logit": self.logits}
        with atomic_file(path) as temporary:
            pq.write_table(pa.table(columns), temporary)

    def write_csv(self, path: Path) -> None:
        """Write `rank, id, score, logit` to a CSV file, best first and rounded, atomically."""
        rows = (
            (k, self.ids[i], f"{self.scores[i]:.6f}", f"{self.logits[i]:.4f}")
            for k, i in enumerate(self.order.tolist(), 1)
        )
        write_csv(path, ["rank", "id", "score", "logit"], rows)

    @classmethod
    def read(cls, path: Path) -> "Ranking":
        """Read the Parquet file of a ranking.

        Raises:
            StorageError: if the file is missing or corrupt.
        """
        check_file(path)
        try:
            table = pq.read_table(path, columns=["id", "logit"])
        except (OSError, pa.ArrowException) as error:
            raise StorageError(f"the scores in {path} are missing or corrupt: delete that cycle's folder") from error
        return cls(table["id"].to_pylist(), table["logit"].to_numpy().astype(np.float64))


def write_rejects(rejects: Iterable[Reject], path: Path) -> None:
    """Write `id, reason` of unreadable images to a Parquet file, atomically, and log their number."""
    rows = list(rejects)
    if rows:
        first = rows[0]
        logger.warning(
            "Images that cannot be read: %d, as %s (%s); %s has all", len(rows), first.id, first.reason, path
        )
    table = pa.table(
        {
            "id": pa.array([r.id for r in rows], pa.string()),
            "reason": [r.reason for r in rows] or pa.array([], pa.string()),
        }
    )
    with atomic_file(path) as temporary:
        pq.write_table(table, temporary)
