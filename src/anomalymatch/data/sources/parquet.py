"""Parquet shards in the layout of the Hugging Face hub as a source."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from operator import attrgetter, methodcaller
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from anomalymatch.data.find import FoundFile, damaged_file, find_files, held_out
from anomalymatch.data.sources.encoded import EncodedSource, Listing, check_complete
from anomalymatch.data.sources.tables import parquet_table
from anomalymatch.errors import DataError, UnreadableImageError
from anomalymatch.lru import LRU
from anomalymatch.text import listed, reason

DEFAULT_LABELS = "label"
REJECTS_FILE = "rejects.parquet"
"""File that `anomalymatch.data.convert` writes beside its shards; it holds no images."""
CACHE_BYTES = 2**28
OPEN_FILES = 64
_BATCH_BYTES = 2**26
_TAIL_BYTES = 8


class ParquetSource(EncodedSource):
    """Encoded images in a column of Parquet files; see `EncodedSource` for the other arguments.

    The column is a struct{bytes, path} or binary of any kind. Ids come from `id_column`, else from the paths if every
    image has one and all are different, else they are `{file stem}/{row:07d}`. Opening reads no image. Reading goes
    by row groups and caches the latest of them in memory, still encoded.

    Args:
        root: a file, a folder that is searched for *.parquet at any depth, or a URL of either.
        name: short name for logs and folders.
        image_column: column with the images.
        label_column: column with the classes (integers with names in the hub's metadata, or any other values); None
            reads no classes, and neither does a set without a column "label".
        id_column: column with a unique id for each image.
        holdout_files: patterns of file names, "test-*" for example, whose images are the official test split.
        cache_bytes: bytes of row groups that each process caches; at least one is kept.
        **options: arguments of `EncodedSource`.

    Raises:
        DataError: also if files lack a column or a label, or hold ids that are null or not unique, or if a pattern
            matches no file.
    """

    dataset = "parquet"
    expected = "a Parquet file or the folder that holds such files"
    suffixes = (".parquet",)

    def __init__(
        self,
        root: str | Path | None,
        *,
        name: str = "parquet",
        image_column: str = "image",
        label_column: str | None = DEFAULT_LABELS,
        id_column: str | None = None,
        holdout_files: Sequence[str] = (),
        cache_bytes: int = CACHE_BYTES,
        **options: Any,
    ) -> None:
        self._columns = _Columns(image_column, label_column, id_column)
        self._holdout_files, self._name = holdout_files, name
        self._opened: LRU[int, pq.ParquetFile] = LRU(OPEN_FILES, close=methodcaller("close"))
        self._cached: LRU[tuple[int, int], pa.ChunkedArray] = LRU(cache_bytes, cost=attrgetter("nbytes"))
        super().__init__(root, **options)

    def list_images(self, place: Path, cache_dir: Path | None) -> Listing:
        """See `EncodedSource.list_images`."""
        self._shards = shards = [_scan(file, self._columns) for file in find_shards(place)]
        ids = _ids(place, shards, self._columns.id)
        rows = [n for shard in shards for n in shard.group_rows]
        self._groups = [(i, group) for i, shard in enumerate(shards) for group in range(len(shard.group_rows))]
        self._starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(rows, dtype=np.int64)])
        return Listing(
            ids=ids,
            fingerprint=_fingerprint(shards, f"parquet {self._columns.image} {self._columns.id}"),
            classes=_truth(place, shards, ids),
            holdout=held_out(_ids_by_file(shards, ids), self._holdout_files),
            name=self._name,
        )

    def read_bytes(self, position: int) -> bytes:
        """See `EncodedSource.read_bytes`."""
        group = int(np.searchsorted(self._starts, position, side="right")) - 1
        column, row = self._column(group), position - int(self._starts[group])
        if row >= len(column):
            raise UnreadableImageError("its file has lost rows since the set was opened")
        data = column[row].as_py()
        if data is None:
            raise UnreadableImageError("there are no bytes in the image column")
        return data

    def metadata(self) -> pa.Table | None:
        """Return the columns beside images and classes; see `ImageSource.metadata`."""
        own = [name for name in (self._columns.image, self._columns.label) if name]
        return parquet_table([(shard.file, sum(shard.group_rows)) for shard in self._shards], own)

    def _column(self, group: int) -> pa.ChunkedArray:
        """Return the encoded images of a row group."""
        file, number = self._groups[group]
        try:
            with self._cached.use((file, number), partial(self._fetch, file, number)) as column:
                return column
        except (OSError, IndexError, pa.ArrowException) as error:
            raise UnreadableImageError(
                f"row group {number} of {self._shards[file].file} cannot be read: {reason(error)}"
            ) from None

    def _fetch(self, file: int, number: int) -> pa.ChunkedArray:
        with self._opened.use(file, partial(pq.ParquetFile, self._shards[file].file)) as parquet:
            is_struct = pa.types.is_struct(parquet.schema_arrow.field(self._columns.image).type)
            name = f"{self._columns.image}.bytes" if is_struct else self._columns.image
            # In batches, because Arrow cannot read more than 2 GiB of a nested column at once.
            size = max(1, parquet.metadata.row_group(number).total_byte_size)
            rows = max(1, parquet.metadata.row_group(number).num_rows * _BATCH_BYTES // size)
            batches = parquet.iter_batches(rows, row_groups=[number], columns=[name], use_threads=False)
            arrays = [batch.column(0) for batch in batches]
        return pa.chunked_array([array.flatten()[0] if is_struct else array for array in arrays])


def find_shards(root: Path) -> list[FoundFile]:
    """List the Parquet files at or below `root`, sorted by path."""
    return find_files(root, lambda path: path.suffix == ".parquet" and path.name != REJECTS_FILE, "a Parquet file")


def image_columns(file: Path) -> list[str]:
    """Return the names of the columns of `file` that can hold encoded images."""
    try:
        schema = pq.read_schema(file)
    except (OSError, pa.ArrowException) as error:
        raise damaged_file(file, "a Parquet file", error) from None
    return [column.name for column in schema if _is_struct(column.type) or _is_binary(column.type)]


@dataclass(frozen=True, slots=True)
class _Columns:
    """Names of the columns to read."""

    image: str
    label: str | None
    id: str | None


@dataclass(frozen=True, slots=True)
class _Shard:
    """One Parquet file; `stem` is its name in ids.

    `keys` has the values of the id column, or without one the paths of the images. `labels` has the class of each row.
    """

    file: Path
    stem: str
    group_rows: list[int]
    keys: list[str | None] | None
    labels: list[str | None] | None


def _scan(found: FoundFile, columns: _Columns) -> _Shard:
    """Read everything but the images of a file."""
    file = found.path
    try:
        with pq.ParquetFile(file) as parquet:
            schema = parquet.schema_arrow
            label = _label_column(file, schema, columns.label)
            key = _key_column(file, schema, columns)
            table = parquet.read(columns=[column for column in (key, label) if column], use_threads=False)
            groups = [parquet.metadata.row_group(i).num_rows for i in range(parquet.num_row_groups)]
    except (OSError, pa.ArrowException) as error:
        raise damaged_file(file, "a Parquet file", error) from None
    labels = None if label is None else _class_names(table[label], _hub_names(schema, label))
    return _Shard(file, found.stem, groups, None if key is None else _strings(table, key), labels)


def _key_column(file: Path, schema: pa.Schema, columns: _Columns) -> str | None:
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
    field = _require(file, schema, label, "label_column")
    if pa.types.is_nested(field.type):
        raise DataError(
            f"{file}: expected one class for each image in the column {label}, found {field.type}, which is none; name "
            "another column by dataset.source.label_column, or set it to null"
        )
    return field.name


def _require(file: Path, schema: pa.Schema, column: str, option: str) -> pa.Field:
    if column not in schema.names:
        raise DataError(f"{file}: there is no column {column}, set {option} to one of {listed(schema.names)}")
    return schema.field(column)


def _is_struct(kind: pa.DataType) -> bool:
    return pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 and _is_binary(kind.field("bytes").type)


def _is_binary(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return _is_binary(kind.value_type)
    tests = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view, pa.types.is_fixed_size_binary)
    return any(test(kind) for test in tests)


def _strings(table: pa.Table, key: str) -> list[str | None]:
    column = table[key] if key in table.column_names else table[key.removesuffix(".path")]
    if pa.types.is_struct(column.type):
        column = pa.chunked_array([chunk.flatten()[0] for chunk in column.chunks], type=column.type.field(0).type)
    return [None if value is None else str(value) for value in column.to_pylist()]


def _class_names(column: pa.ChunkedArray, names: list[str] | None) -> list[str | None]:
    """Turn labels into class names; None for null and for integers outside `names`, such as the hub's -1."""
    values = column.to_pylist()
    if names is None or not pa.types.is_integer(column.type):
        return [None if value is None else str(value) for value in values]
    return [names[value] if value is not None and 0 <= value < len(names) else None for value in values]


def _hub_names(schema: pa.Schema, label: str) -> list[str] | None:
    """Return the names of the classes in the hub's metadata; None if it has another form."""
    try:
        metadata: Any = json.loads((schema.metadata or {})[b"huggingface"])
        names = metadata["info"]["features"][label]["names"]
    except (KeyError, TypeError, ValueError):
        return None
    return [str(name) for name in names] if isinstance(names, list) and names else None


def _footer(file: Path) -> tuple[int, bytes]:
    """Return the size of a file and its footer, whose length precedes the magic number at the end."""
    with file.open("rb") as opened:
        size = opened.seek(0, 2)
        opened.seek(max(0, size - _TAIL_BYTES))
        tail = opened.read()
        opened.seek(max(0, size - _TAIL_BYTES - int.from_bytes(tail[:4], "little")))
        return size, opened.read()


def _fingerprint(shards: Sequence[_Shard], salt: str) -> str:
    """Hash names, sizes and footers; a footer holds row counts, offsets and statistics, but no times."""
    digest = hashlib.sha256(salt.encode())
    for shard in shards:
        size, footer = _footer(shard.file)
        digest.update(f"\n{shard.stem}\0{size}\0".encode())
        digest.update(footer)
    return digest.hexdigest()


def _ids(root: Path, shards: Sequence[_Shard], id_column: str | None) -> list[str]:
    keys = list(chain.from_iterable(shard.keys or [None] * sum(shard.group_rows) for shard in shards))
    named = [key for key in keys if key]
    if len(named) == len(keys) == len(set(named)):
        return named
    if id_column is None:
        return [f"{shard.stem}/{row:07d}" for shard in shards for row in range(sum(shard.group_rows))]
    if len(named) < len(keys):
        raise DataError(
            f"{root}: the id_column {id_column} is empty in {len(keys) - len(named):,} of {len(keys):,} rows"
        )
    key, n = Counter(named).most_common(1)[0]
    raise DataError(f"{root}: the ids in the id_column {id_column} must be unique, but {key!r} occurs {n:,} times")


def _ids_by_file(shards: Sequence[_Shard], ids: Sequence[str]) -> Iterator[tuple[Path, Sequence[str]]]:
    start = 0
    for shard in shards:
        end = start + sum(shard.group_rows)
        yield shard.file, ids[start:end]
        start = end


def _truth(root: Path, shards: Sequence[_Shard], ids: Sequence[str]) -> dict[str, str] | None:
    with_labels = [shard for shard in shards if shard.labels is not None]
    if not with_labels:
        return None
    labels = list(chain.from_iterable(shard.labels or [None] * sum(shard.group_rows) for shard in shards))
    truth = {id_: label for id_, label in zip(ids, labels, strict=True) if label is not None}
    check_complete(root, truth, ids, "label_column")
    return truth
