"""Columns of numbers, dates and truth values for orders and range filters, also those of a user's own score file."""

import logging
from collections.abc import Sequence
from enum import StrEnum
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool, Float64, Int32, Int64

from anomalymatch.data.sources.tables import Catalogue, catalogue_table
from anomalymatch.errors import DataError
from anomalymatch.lru import LRU
from anomalymatch.text import from_csv_cell, listed
from anomalymatch.ui.views import ColumnOrder, ColumnRange

logger = logging.getLogger(__name__)
Values = Float64[np.ndarray, " n"]

CACHED_COLUMNS = 8
SAMPLE = 1000
"""First values of a column that show at once that it is text."""
MISSING = pa.array(["", "nan", "null", "none", "n/a", "na", "-", "--"], pa.large_string())
"""Texts that stand for a missing number, in any case."""
DATE = r"^\d{4}-\d\d-\d\d([ T]\d\d:\d\d(:\d\d(\.\d+)?)?(Z|[+-]\d\d:?\d\d)?)?$"
ID_NAMES = ("id", "filename")
LONGEST = 10
"""Longest number on a tile, in characters; a longer one is rounded."""
DATE_LENGTH = 16


class Kind(StrEnum):
    """Kind of the values of a column."""

    NUMBER = "number"
    BOOLEAN = "boolean"
    DATE = "date"


class Columns:
    """Columns of a table that have an order: numbers, dates, and truth values as 0 and 1. Other text has none.

    All that take a column raise a `DataError` if there is no such column.

    Args:
        table: columns of any type, with one row for each image; None for no columns.
    """

    def __init__(self, table: pa.Table | None) -> None:
        self._table = pa.table({}) if table is None else table
        self._values: LRU[str, Values] = LRU(CACHED_COLUMNS)
        self._orders: LRU[ColumnOrder, Int32[np.ndarray, " n"]] = LRU(CACHED_COLUMNS)

    @cached_property
    def kinds(self) -> dict[str, Kind]:
        """Kind of each column that has an order, by name; it reads all columns on first use."""
        kinds = {name: kind_of(as_text(self._table[name])) for name in self._table.column_names}
        return {name: kind for name, kind in kinds.items() if kind is not None}

    def values(self, name: str) -> Values:
        """Return the value of each image, NaN where it is missing; dates become numbers with the same order."""
        return self._values.get(name, partial(self._read, name))

    def order(self, order: ColumnOrder) -> Int32[np.ndarray, " n"]:
        """Return all positions by the values of a column; ties are in order of position, missing values come last."""
        return self._orders.get(order, partial(self._sort, order))

    def within(self, limits: ColumnRange) -> Bool[np.ndarray, " n"]:
        """Return True for each image whose value lies in a range, limits included."""
        values = self.values(limits.column)
        return (values >= limits.low) & (values <= limits.high)

    def limits(self, name: str) -> tuple[float, float]:
        """Return the smallest and the largest finite value of a column."""
        values = self.values(name)
        finite = values[np.isfinite(values)]
        return (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 0.0)

    def texts(self, name: str, positions: Int64[np.ndarray, " k"]) -> list[str]:
        """Return the values of images as short texts; empty where they are missing."""
        kind = self._kind(name)
        return [_shorten(text or "", kind) for text in as_text(self._table[name].take(positions)).to_pylist()]

    def _kind(self, name: str) -> Kind:
        if name not in self.kinds:
            raise DataError(f"there is no column {name} with numbers or dates, only {listed(self.kinds)}")
        return self.kinds[name]

    def _read(self, name: str) -> Values:
        kind, text = self._kind(name), as_text(self._table[name])
        if kind is Kind.DATE:
            ranks = pc.rank(pc.replace_substring(text, "T", " "), sort_keys="ascending", tiebreaker="dense")
            return np.where(text.is_null().to_numpy(zero_copy_only=False), np.nan, ranks.to_numpy().astype(float))
        numbers = text.cast(pa.bool_()).cast(pa.float64()) if kind is Kind.BOOLEAN else as_numbers(text)
        return numbers.to_numpy(zero_copy_only=False)

    def _sort(self, order: ColumnOrder) -> Int32[np.ndarray, " n"]:
        values = self.values(order.column)
        return np.argsort(-values if order.descending else values, kind="stable").astype(np.int32)  # NaN last


def _shorten(text: str, kind: Kind) -> str:
    if kind is Kind.DATE:
        return text.replace("T", " ")[:DATE_LENGTH].removesuffix(" 00:00")
    return f"{float(text):.6g}" if kind is Kind.NUMBER and len(text) > LONGEST else text


def as_text(column: pa.Array | pa.ChunkedArray) -> pa.Array:
    """Convert a column to trimmed text with null for missing values; one that cannot be text is null everywhere."""
    try:
        text = pc.utf8_trim_whitespace(column.cast(pa.large_string()))
    except pa.ArrowException:  # lists and structures
        return pa.nulls(len(column), pa.large_string())
    text = text.combine_chunks() if isinstance(text, pa.ChunkedArray) else text
    return pc.if_else(pc.is_in(pc.ascii_lower(text), value_set=MISSING), None, text)


def as_numbers(text: pa.Array) -> pa.Array:
    """Convert texts to 64-bit floating-point numbers.

    Raises:
        pa.ArrowInvalid: if one of them is not a number.
    """
    return text.cast(pa.float64())


def kind_of(text: pa.Array) -> Kind | None:
    """Return the kind of a column; None if it is neither numbers, dates nor truth values, or has no values."""
    known = text.drop_null()
    if not len(known):
        return None
    tests = {
        Kind.NUMBER: _are_numbers,
        Kind.BOOLEAN: lambda texts: pc.all(pc.is_in(pc.ascii_lower(texts), value_set=_TRUTH)).as_py(),
        Kind.DATE: lambda texts: pc.all(pc.match_substring_regex(texts, DATE)).as_py(),
    }
    return next((kind for kind, test in tests.items() if test(known[:SAMPLE]) and test(known)), None)


_TRUTH = pa.array(["true", "false"], pa.large_string())


def _are_numbers(texts: pa.Array) -> bool:
    try:
        as_numbers(texts)
    except pa.ArrowInvalid:
        return False
    return True


def read_scores(path: Path, ids: Sequence[str]) -> pa.Table:
    """Read the columns of a score file that have an order, as text, with a row for each of `ids`.

    Args:
        path: CSV, Parquet, FITS or VOTable with a column `id` or `filename` and at least one column of numbers. It may
            name only some of the images: the others have null. Ids of other images are not used, with a warning.
        ids: all images.

    Raises:
        DataError: if the file is missing or damaged, has no ids or no numbers, names an image twice, or names none.
    """
    if not path.is_file():
        raise DataError(f"ui.scores is {path}: expected a file, found {'a folder' if path.is_dir() else 'nothing'}")
    catalogue = Catalogue(path)
    key = catalogue.find(*ID_NAMES)
    table = catalogue_table(path)
    if key is None or table is None or key not in table.column_names:
        raise DataError(f"{path}: scores need a column {' or '.join(ID_NAMES)}, found {listed(catalogue.names)}")
    own = [name for name in table.column_names if name != key and kind_of(as_text(table[name])) is not None]
    if not own:
        raise DataError(f"{path}: scores need a column of numbers beside {key}, found {listed(catalogue.names)}")
    named = pa.array([from_csv_cell(name or "") for name in table[key].to_pylist()], pa.large_string())
    counts = pc.value_counts(named)
    twice = counts.filter(pc.greater(counts.field("counts"), 1)).field("values")
    if len(twice):
        raise DataError(f"{path}: {len(twice):,} ids occur more than once, the first is {twice[0]}")
    known = pa.array(list(ids), pa.large_string())
    unknown = named.filter(pc.invert(pc.is_in(named, value_set=known)))
    if len(unknown) == len(named):
        raise DataError(f"{path}: it names none of the {len(ids):,} images, whose ids are like {ids[0]!r}")
    if len(unknown):
        text = "%s: %s of %s ids are not in the archive and are not used; the first is %s"
        logger.warning(text, path, f"{len(unknown):,}", f"{len(named):,}", unknown[0])
    return table.select(own).take(pc.index_in(known, value_set=named))


def add_scores(metadata: pa.Table | None, scores: pa.Table | None) -> pa.Table | None:
    """Add the columns of a score file to the metadata; a name that is taken gets "(scores)" behind it."""
    if metadata is None or scores is None:
        return scores if metadata is None else metadata
    for name in scores.column_names:
        free = name
        while free in metadata.column_names:
            free += " (scores)"
        metadata = metadata.append_column(free, scores[name])
    return metadata
