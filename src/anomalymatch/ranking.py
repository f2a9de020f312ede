"""Result of a ranking: one score for each image, and the images that could not be read."""

import csv
import io
import logging
from collections.abc import Collection, Iterable, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Bool, Float64, Int64
from scipy.special import expit

from anomalymatch.checksums import check_file
from anomalymatch.errors import StorageError
from anomalymatch.files import atomic_file
from anomalymatch.notebook import Readable, html_table
from anomalymatch.text import csv_cell
from anomalymatch.types import Reject

logger = logging.getLogger(__name__)


REPR_IMAGES, SHOWN, COLUMNS = 3, 10, 5
"""Number of images that `repr` and a notebook show, and of those in a row of a plot."""
CSV_ROWS = 2**17
"""Rows of a CSV file that are formatted at once."""
EXACT_DECIMALS = 1e9
"""Numbers up to which Arrow rounds decimals as Python does."""


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
        negative = -self.logits
        order = np.argsort(negative).astype(np.int64)
        ordered = negative[order]
        same = (ordered[1:] == ordered[:-1]) | (np.isnan(ordered[1:]) & np.isnan(ordered[:-1]))
        if same.any():
            tied = np.append(False, same) | np.append(same, False)
            # Python sorts in one pass what ascends already, as the ids of most archives do.
            by_id = np.array(sorted(np.sort(order[tied]).tolist(), key=self.ids.__getitem__))
            order[tied] = by_id[np.argsort(negative[by_id], kind="stable")]
        return order

    @cached_property
    def ranks(self) -> Int64[np.ndarray, " n"]:
        """Rank of each image, 1 for the highest score."""
        ranks = np.empty(len(self), np.int64)
        ranks[self.order] = np.arange(1, len(self) + 1)
        return ranks

    def top(self, k: int, *, without: Set[str] = frozenset()) -> list[str]:
        """Return the `k` most anomalous ids that are not in `without`, best first."""
        found: list[str] = []
        step = max(k, 1)
        for start in range(0, len(self), step):
            if len(found) >= k:
                break
            rows = self.order[start : start + step].tolist()
            found += [id_ for i in rows if (id_ := self.ids[i]) not in without]
        return found[:k]

    def score_of_top(self, k: int) -> dict[str, float]:
        """Return the probabilities of the `k` most anomalous ids, best first."""
        return {self.ids[i]: float(expit(self.logits[i])) for i in self.order[:k]}

    def restrict(self, keep: Iterable[str]) -> "Ranking":
        """Return the ranking of `keep` only, with the same scores and in the same order; unknown ids are ignored."""
        wanted = keep if isinstance(keep, Set) else list(keep)
        rejected = {reject.id for reject in self.rejects}
        missing = rejected.intersection(wanted) if rejected else rejected
        readable = [id_ for id_ in wanted if id_ not in missing] if missing else wanted
        return self._part(self._among(readable), [reject for reject in self.rejects if reject.id in missing])

    def without(self, drop: Collection[str]) -> "Ranking":
        """Return the ranking of all images but `drop`, with the same scores and in the same order."""
        kept = [reject for reject in self.rejects if reject.id not in drop]
        return self._part(~self._among(frozenset(drop)), kept)

    def score_of(self, ids: Iterable[str]) -> dict[str, float]:
        """Return the probabilities by id; ids without a score are left out."""
        mask = self._among(frozenset(ids))
        return dict(zip(compress(self.ids, mask.tobytes()), expit(self.logits[mask]).tolist(), strict=True))

    def _among(self, ids: Set[str] | list[str]) -> Bool[np.ndarray, " n"]:
        """Return True for each image of `ids`."""
        if isinstance(ids, list):  # a run's rankings begin with its pool and end with its held-out split
            for block in (slice(len(ids)), slice(len(self) - len(ids), len(self))):
                if self.ids[block] == ids:
                    mask = np.zeros(len(self), bool)
                    mask[block] = True
                    return mask
            ids = frozenset(ids)
        return np.fromiter(map(ids.__contains__, self.ids), bool, len(self))

    def _part(self, mask: Bool[np.ndarray, " n"], rejects: Sequence[Reject]) -> "Ranking":
        part = Ranking(list(compress(self.ids, mask.tobytes())), self.logits[mask], rejects, self.source)
        kept = self.order[mask[self.order]]
        part.__dict__["order"] = (np.cumsum(mask) - 1)[kept]  # the cached property: a part need not be sorted again
        return part

    def to_pandas(self) -> Any:
        """Return a data frame of pandas with the columns rank, id, score and logit, best first.

        Raises:
            ModuleNotFoundError: if pandas is not installed.
        """
        import pandas as pd

        ids = [self.ids[i] for i in self.order]
        columns = {"rank": np.arange(1, len(self) + 1), "id": ids, "score": self.scores[self.order]}
        return pd.DataFrame(columns | {"logit": self.logits[self.order]})

    def plot(self, k: int = 10) -> Any:
        """Draw the `k` most anomalous images, if their source is known, above the histogram of all scores.

        Returns:
            A figure of Matplotlib, which a notebook shows: `ranking.plot().savefig("ranking.png")`.
        """
        import matplotlib.pyplot as plt

        top = self.score_of_top(k if self.source is not None else 0)
        images = self.source.read(list(top)) if self.source is not None else []
        columns = min(len(top), COLUMNS) or 1
        rows = -(-len(top) // columns)
        figure = plt.figure(figsize=(10, 2.2 * rows + 2.5), layout="constrained")
        grid = figure.add_gridspec(rows + 1, columns)
        for place, (id_, image) in enumerate(zip(top, images, strict=True)):
            axes = figure.add_subplot(grid[place // columns, place % columns], xticks=[], yticks=[])
            axes.set_title(f"{place + 1}: {top[id_]:.3f}", fontsize="small")
            axes.set_xlabel(f"…{id_[-18:]}" if len(id_) > 20 else id_, fontsize="x-small", parse_math=False)
            if isinstance(image, Reject):
                axes.text(0.5, 0.5, "unreadable", ha="center", va="center")
            else:
                axes.imshow(image[..., :3] if image.shape[2] >= 3 else image[..., 0], cmap="gray")
        axes = figure.add_subplot(grid[rows, :], xlabel="score", ylabel="images", yscale="log")
        axes.hist(self.scores, bins=50, range=(0, 1))
        plt.close(figure)  # a notebook shows the returned figure, and no second time that of pyplot
        return figure

    def write(self, path: Path) -> None:
        """Write `id, score, rank, logit` to a Parquet file, atomically."""
        ids = pa.array(self.ids, pa.string())
        columns = {"id": ids, "score": self.scores, "rank": self.ranks, "logit": self.logits}
        with atomic_file(path) as temporary:
            pq.write_table(pa.table(columns), temporary, use_dictionary=False)  # no value occurs often

    def write_csv(self, path: Path) -> None:
        """Write `rank, id, score, logit` to a CSV file, best first and rounded, atomically."""
        _ = self.order, self.scores  # computed once, before the threads ask
        ids = pa.array(self.ids, pa.large_string())
        with atomic_file(path) as temporary, temporary.open("wb") as file, ThreadPoolExecutor() as pool:
            file.write(b"rank,id,score,logit\n")
            for lines in pool.map(partial(self._csv_lines, ids), range(0, len(self), CSV_ROWS)):
                file.write(lines)
                file.write(b"\n")

    def _csv_lines(self, ids: pa.LargeStringArray, start: int) -> pa.Buffer:
        """Format `CSV_ROWS` lines of a CSV file from the rank `start` + 1 on."""
        rows = self.order[start : start + CSV_ROWS]
        columns = [
            pc.cast(pa.array(np.arange(start + 1, start + 1 + len(rows))), pa.string()),
            _csv_ids(ids.take(pa.array(rows)).cast(pa.string())),
            _decimals(self.scores[rows], 6),
            _decimals(self.logits[rows], 4),
        ]
        lines = pc.binary_join_element_wise(*columns, ",")
        return pc.binary_join(pa.ListArray.from_arrays([0, len(lines)], lines), "\n")[0].as_buffer()

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


def _csv_ids(ids: pa.Array) -> pa.Array:
    """Format ids as cells of a CSV file: quoted where needed, and as `csv_cell` where they look like formulas."""
    special = pc.match_substring_regex(ids, r"""^'*[=+\-@\t\r\n]|[",\r\n]""")
    cells = []
    for id_ in ids.filter(special).to_pylist():
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerow([csv_cell(id_)])
        cells.append(text.getvalue()[:-1])
    return pc.replace_with_mask(ids, special, pa.array(cells, pa.string()))


def _decimals(values: Float64[np.ndarray, " n"], digits: int) -> pa.Array:
    """Format numbers with `digits` digits after the point, as `format` does."""
    negative_zero = np.signbit(values) & (values > -(10.0**-digits))
    special = negative_zero | ~(np.abs(values) < EXACT_DECIMALS)
    rounded = pc.cast(pa.array(np.where(special, 0.0, values)), pa.decimal128(38, digits))
    texts = [f"{value:.{digits}f}" for value in values[special].tolist()]
    return pc.replace_with_mask(pc.cast(rounded, pa.string()), pa.array(special), pa.array(texts, pa.string()))


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
