"""What Parquet shards say about themselves without reading an image: row groups, ids, classes, footers."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from anomalymatch.errors import DataError

DEFAULT_LABELS = "label"
REJECTS_FILE = "rejects.parquet"
"""Written by `anomalymatch.data.convert` beside its shards; it holds no images."""
_TAIL_BYTES = 8
_MAGIC = b"PAR1"


@dataclass(frozen=True, slots=True)
class Columns:
    """Names of the columns to read; `label` and `id` may be None."""

    image: str
    label: str | None
    id: str | None


@dataclass(frozen=True, slots=True)
class Shard:
    """One file.

    Attributes:
        file: the file.
        stem: its name without suffix; its path below the root where two files have the same name.
        group_rows: rows of each row group.
        keys: the id column as strings, or without one the paths of the images; None where there are no paths.
        labels: class name of each row, None without such a column.
    """

    file: Path
    stem: str
    group_rows: list[int]
    keys: list[str | None] | None
    labels: list[str | None] | None


def find_shards(root: Path) -> list[Path]:
    """List the Parquet files at or below `root`, hidden ones left out, sorted by path.

    Raises:
        DataError: if there are none.
    """
    if root.is_file():
        return [root]
    if not root.is_dir():
        raise DataError(f"{root}: expected a Parquet file or a folder with such files, found nothing")
    files = sorted(
        file
        for file in root.rglob("*.parquet")
        if file.is_file()
        and file.name != REJECTS_FILE
        and not any(part.startswith(".") for part in file.relative_to(root).parts)
    )
    if not files:
        raise DataError(f"{root}: expected files that end in .parquet, found none")
    return files


def scan(root: Path, columns: Columns) -> list[Shard]:
    """Read everything but the images of all files at or below `root`.

    Raises:
        DataError: if a file is no Parquet or lacks a column.
    """
    files = find_shards(root)
    stems = [file.stem for file in files]
    if len(set(stems)) < len(stems):
        stems = [file.relative_to(root).with_suffix("").as_posix() for file in files]
    return [_scan(file, stem, columns) for file, stem in zip(files, stems, strict=True)]


def fingerprint(shards: Sequence[Shard], salt: str) -> str:
    """Hash names, sizes and footers, which hold row counts, offsets and statistics, but no times."""
    digest = hashlib.sha256(salt.encode())
    for shard in shards:
        size, footer = _footer(shard.file)
        digest.update(f"\n{shard.stem}\0{size}\0".encode())
        digest.update(footer)
    return digest.hexdigest()


def image_columns(file: Path) -> list[str]:
    """Name the columns of `file` that can hold encoded images, in their order."""
    try:
        schema = pq.read_schema(file)
    except (OSError, pa.ArrowException) as error:
        raise _no_parquet(file, error) from None
    return [column.name for column in schema if _is_struct(column.type) or _is_binary(column.type)]


def _scan(file: Path, stem: str, columns: Columns) -> Shard:
    try:
        with pq.ParquetFile(file) as parquet:
            schema = parquet.schema_arrow
            label = _label_column(file, schema, columns.label)
            key = _key_column(file, schema, columns)
            table = parquet.read(columns=[column for column in (key, label) if column], use_threads=False)
            groups = [parquet.metadata.row_group(i).num_rows for i in range(parquet.num_row_groups)]
    except (OSError, pa.ArrowException) as error:
        raise _no_parquet(file, error) from None
    labels = None if label is None else _class_names(table[label], _names(schema, label))
    return Shard(file, stem, groups, None if key is None else _strings(table, key), labels)


def _no_parquet(file: Path, error: Exception) -> DataError:
    reason = str(error).split("\n", 1)[0].rstrip(". ")
    return DataError(f"{file}: expected a Parquet file, but it cannot be read ({reason}); download it again")


def _key_column(file: Path, schema: pa.Schema, columns: Columns) -> str | None:
    image = _require(file, schema, columns.image, "image_column")
    if not (_is_struct(image.type) or _is_binary(image.type)):
        raise DataError(
            f"{file}: expected encoded images, struct{{bytes, path}} or binary, in the column {columns.image}, "
            f"found {image.type}; name another one by image_column"
        )
    if columns.id is not None:
        return _require(file, schema, columns.id, "id_column").name
    has_paths = _is_struct(image.type) and image.type.get_field_index("path") >= 0
    return f"{columns.image}.path" if has_paths else None


def _label_column(file: Path, schema: pa.Schema, label: str | None) -> str | None:
    if label is None or (label == DEFAULT_LABELS and label not in schema.names):
        return None
    return _require(file, schema, label, "label_column").name


def _require(file: Path, schema: pa.Schema, column: str, option: str) -> pa.Field:
    if column not in schema.names:
        raise DataError(f"{file}: there is no column {column}, set {option} to one of {', '.join(schema.names)}")
    return schema.field(column)


def _is_struct(kind: pa.DataType) -> bool:
    return pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0


def _is_binary(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _strings(table: pa.Table, key: str) -> list[str | None]:
    column = table[key] if key in table.column_names else table[key.removesuffix(".path")]
    if pa.types.is_struct(column.type):
        column = pa.chunked_array([chunk.flatten()[0] for chunk in column.chunks], type=column.type.field(0).type)
    return [None if value is None else str(value) for value in column.to_pylist()]


def _class_names(column: pa.ChunkedArray, names: list[str] | None) -> list[str | None]:
    """Turn labels into class names; null, and integers outside of `names` as the hub's -1, have none."""
    values = column.to_pylist()
    if names is None or not pa.types.is_integer(column.type):
        return [None if value is None else str(value) for value in values]
    return [names[value] if value is not None and 0 <= value < len(names) else None for value in values]


def _names(schema: pa.Schema, label: str) -> list[str] | None:
    """Find the names of the classes in the hub's metadata; whatever has another form counts as none."""
    try:
        metadata: Any = json.loads((schema.metadata or {})[b"huggingface"])
        names = metadata["info"]["features"][label]["names"]
    except (KeyError, TypeError, ValueError):
        return None
    return [str(name) for name in names] if isinstance(names, list) and names else None


def _footer(file: Path) -> tuple[int, bytes]:
    """Return the size of `file` and the bytes of its footer, whose length stands before the magic number at the end."""
    with file.open("rb") as opened:
        size = opened.seek(0, 2)
        opened.seek(max(0, size - _TAIL_BYTES))
        tail = opened.read()
        opened.seek(max(0, size - _TAIL_BYTES - int.from_bytes(tail[:4], "little")))
        return size, opened.read()
