"""Search for the nearest neighbours of images by their features: exact, or by an index of faiss for large archives."""

import logging
import math
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float32, Int64

from anomalymatch.backbones.features import Features, one_thread
from anomalymatch.cache import Cache, cache_key
from anomalymatch.errors import ConfigError
from anomalymatch.progress import Advance, ignore_progress, progress

logger = logging.getLogger(__name__)
EXACT_ROWS = 100_000
"""Number of images up to which the search is exact: one product of all features with those of the queries."""
CELLS = 1.0
"""Cells of an index, in units of the root of its rows: more would take longer to build, and save time in a search."""
TRAINING_ROWS_PER_CELL = 40
ITERATIONS = 10
"""Iterations of k-means that place the cells of an index."""
PROBES = 16
"""Number of cells of an index that are searched for each query."""
FILE = "index.faiss"


@runtime_checkable
class NeighbourSearch(Protocol):
    """Protocol of searches for the nearest neighbours by Euclidean distance."""

    def __call__(
        self, queries: Float32[np.ndarray, "q d"], count: int, allowed: Bool[np.ndarray, " n"]
    ) -> Int64[np.ndarray, " m"]:
        """Return the row numbers of the nearest neighbours of all queries together, each once, in increasing order.

        Args:
            queries: features of the queries.
            count: number of neighbours of each query.
            allowed: rows among which they are searched; with fewer than `count`, all of these are found.
        """
        ...


class ExactSearch:
    """Search through all features."""

    def __init__(self, features: Features) -> None:
        self.features = features

    def __call__(
        self, queries: Float32[np.ndarray, "q d"], count: int, allowed: Bool[np.ndarray, " n"]
    ) -> Int64[np.ndarray, " m"]:
        """See `NeighbourSearch`."""
        wanted, start = -2.0 * queries.T, 0
        rows = np.zeros((0, len(queries)), np.int64)
        distances = np.zeros((0, len(queries)), np.float32)  # squared, without the part of the query
        with one_thread():
            for block in self.features.blocks():
                own = np.flatnonzero(allowed[start : start + len(block)])
                near = np.square(block[own]).sum(axis=1)[:, None] + block[own] @ wanted
                distances = np.concatenate([distances, near])
                rows = np.concatenate([rows, np.repeat(start + own[:, None], len(queries), axis=1)])
                start += len(block)
                if len(distances) > count:
                    best = np.argpartition(distances, count - 1, axis=0)[:count]
                    rows = np.take_along_axis(rows, best, axis=0)
                    distances = np.take_along_axis(distances, best, axis=0)
        return np.unique(rows)


class IndexSearch:
    """Approximate search by an index of faiss, which reads a small part of the features for each query.

    The index is on disk, as large as the features in half precision, and is mapped and checked when it is opened. It is
    built when it is missing or damaged, in up to twice as much memory.

    Args:
        features: features of the archive.
        cache: folder of the index.

    Raises:
        ConfigError: if faiss is not installed.
    """

    def __init__(self, features: Features, cache: Cache) -> None:
        self._faiss = import_faiss(len(features.ids), "or rank all images: al.candidates=all")
        rejects, settings = [reject.id for reject in features.rejects], [CELLS, TRAINING_ROWS_PER_CELL, ITERATIONS]
        name = cache_key({"rows": len(features.ids), "rejects": rejects, "settings": settings})
        with cache.locked():
            if cache.read(name) is None:
                cache.write(name, {}, {}, write_files=partial(self._write, features))
        self._index = self._faiss.read_index(str(cache.folder / name / FILE), self._faiss.IO_FLAG_MMAP)

    def _write(self, features: Features, folder: Path) -> None:
        rows = len(features.ids)
        cells = round(CELLS * math.sqrt(rows))
        sample = features.take_rows(np.arange(0, rows, sample_step(rows, cells)))
        with progress("Index of neighbours", rows) as advance:
            index = build_index(sample, features.blocks(), cells, advance)
        self._faiss.write_index(index, str(folder / FILE))

    def __call__(
        self, queries: Float32[np.ndarray, "q d"], count: int, allowed: Bool[np.ndarray, " n"]
    ) -> Int64[np.ndarray, " m"]:
        """See `NeighbourSearch`; a neighbour in a cell that is not searched is missed."""
        selector = self._faiss.IDSelectorBitmap(np.packbits(allowed, bitorder="little"))
        settings = self._faiss.SearchParametersIVF(sel=selector, nprobe=PROBES)
        rows = self._index.search(queries, count, params=settings)[1]
        return np.unique(rows[rows >= 0]).astype(np.int64)


def open_search(features: Features, folder: Path, *, exact_rows: int = EXACT_ROWS) -> NeighbourSearch:
    """Return the search for an archive: exact up to `exact_rows` images, else by an index that is kept in `folder`.

    Raises:
        ConfigError: if an index is needed and faiss is not installed.
    """
    if len(features.ids) <= exact_rows:
        return ExactSearch(features)
    return IndexSearch(features, Cache(folder))


def import_faiss(rows: int, otherwise: str) -> Any:
    """Import faiss.

    Args:
        rows: number of images to search, for the message.
        otherwise: what to do instead of installing it, for the message.

    Raises:
        ConfigError: if it is not installed.
    """
    try:
        import faiss
    except ImportError as error:
        raise ConfigError(
            f"{rows:,} images to compare with need an index: pip install 'anomalymatch[faiss]', {otherwise}"
        ) from error
    return faiss


def sample_step(rows: int, cells: int) -> int:
    """Return the step between the rows from which the cells of an index are learnt."""
    return max(1, rows // (TRAINING_ROWS_PER_CELL * cells))


def build_index(
    sample: Float32[np.ndarray, "s d"],
    blocks: Iterable[Float32[np.ndarray, "_ d"]],
    cells: int,
    advance: Advance = ignore_progress,
) -> Any:
    """Build an inverted file of faiss with features in half precision; for millions of rows that takes minutes.

    Args:
        sample: every `sample_step`-th row.
        blocks: all rows, block by block.
        cells: number of parts of the index, of which a search looks at a few.
        advance: called with the number of rows that were added.
    """
    import faiss

    index: Any = faiss.index_factory(sample.shape[1], f"IVF{cells},SQfp16")
    index.cp.niter = ITERATIONS
    index.train(sample)
    for block in blocks:
        index.add(block)
        advance(len(block))
    return index
