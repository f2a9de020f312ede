"""What an archive tells of its images beside the pixels, as one table of text with a row for each image."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from anomalymatch.data._columns import Catalogue
from anomalymatch.errors import DataError

logger = logging.getLogger(__name__)

MAX_BYTES = 2**28
"""Of text in a table; columns beyond it are left out."""
_AT_ONCE = 16


def catalogue_table(path: Path) -> pa.Table | None:
    """All columns of a catalogue that hold one value a row, as text; None if there are none.

    Raises:
        DataError: if the file is gone or damaged.
    """
    catalogue = Catalogue(path)
    columns = _Columns(str(path))
    for start in range(0, len(catalogue.names), _AT_ONCE):
        if columns.full:
            break
        names = catalogue.names[start : start + _AT_ONCE]
        for name, array in _read(catalogue, names).items():
            columns.add(name, array)
    return columns.table()


def parquet_table(files: Sequence[tuple[Path | None, int]], leave_out: Sequence[str] = ()) -> pa.Table | None:
    """The columns of Parquet files, one behind the other, that hold one value a row, as text; None if there are none.

    Args:
        files: each with its number of rows; None stands for rows of which nothing is known.
        leave_out: columns that are no news, the images above all.

    Raises:
        DataError: if a file is gone, damaged, or has another number of rows.
    """
    schemas = [None if path is None else _schema(path) for path, _ in files]
    names = dict.fromkeys(field.name for schema in schemas if schema is not None for field in schema)
    columns = _Columns(", ".join(str(path) for path, _ in files[:3] if path is not None))
    for name in names:
        if name in leave_out or columns.full:
            continue
        parts = [_part(path, count, name, schema) for (path, count), schema in zip(files, schemas, strict=True)]
        if all(part is not None for part in parts):
            columns.add(name, pa.chunked_array(parts))
    return columns.table()


class _Columns:
    """Columns that are collected until they are too large."""

    def __init__(self, source: str) -> None:
        self.source, self.columns, self.left_out, self.n_bytes = source, dict[str, Any](), list[str](), 0

    @property
    def full(self) -> bool:
        return self.n_bytes > MAX_BYTES

    def add(self, name: str, array: Any) -> None:
        if self.n_bytes + array.nbytes > MAX_BYTES:
            logger.warning("%s: the column %s is too large to be shown or searched", self.source, name)
        else:
            self.columns[name] = array
            self.n_bytes += array.nbytes

    def table(self) -> pa.Table | None:
        return pa.table(self.columns) if self.columns else None


def _read(catalogue: Catalogue, names: Sequence[str]) -> dict[str, Any]:
    """Columns as text; those that hold no text, lists of numbers for example, are passed over."""
    try:
        return catalogue.read([], names)
    except DataError:
        found: dict[str, Any] = {}
        for name in names:
            try:
                found |= catalogue.read([], [name])
            except DataError:
                continue
        return found


def _schema(path: Path) -> pa.Schema:
    try:
        return pq.read_schema(path)
    except (OSError, pa.ArrowException) as error:
        raise _damaged(path, error) from None


def _part(path: Path | None, count: int, name: str, schema: pa.Schema | None) -> Any:
    """One file's share of a column; None if it holds something else than text."""
    if path is None or schema is None or name not in schema.names:
        return pa.nulls(count, pa.large_string())
    kind = schema.field(name).type
    if pa.types.is_nested(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return None
    try:
        column = pq.read_table(path, columns=[name])[name]
        text = pc.cast(column, pa.large_string()).combine_chunks()
    except pa.ArrowNotImplementedError:
        return None
    except (OSError, pa.ArrowException) as error:
        raise _damaged(path, error) from None
    if len(text) != count:
        raise DataError(f"{path}: expected {count:,} rows, one for each image, found {len(text):,}")
    return text


def _damaged(path: Path, error: Exception) -> DataError:
    reason = str(error).split("\n", 1)[0].rstrip(". ")
    return DataError(f"{path}: expected a Parquet file, but it cannot be read ({reason})")
