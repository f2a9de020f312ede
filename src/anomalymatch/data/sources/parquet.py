"""Parquet shards in the layout of the Hugging Face hub as a source."""

import hashlib
import json
import os
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Int64

from anomalymatch.data.codecs import decode
from anomalymatch.data.remote import local_path
from anomalymatch.data.rendering import Rendering, band_names
from anomalymatch.data.source import EIGHT_BITS
from anomalymatch.data.sources.encoded import EncodedSource
from anomalymatch.data.sources.tables import parquet_table
from anomalymatch.errors import DataError, UnreadableImageError
from anomalymatch.types import Image, Reject

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


CACHE_BYTES = 2**28
_BATCH_BYTES = 2**26
_OPEN_FILES = 64

Positions = Int64[np.ndarray, " n"]


class ParquetSource(EncodedSource):
    """Encoded images in a column of Parquet files.

    The column is a struct{bytes, path} or plain binary. Ids come from `id_column`, else from the paths where every
    image has one and no two are the same, else they are `{file stem}/{row:07d}`. Setting up reads no image. Reading
    goes from row group to row group and keeps the latest of them in memory, still encoded.

    Args:
        root: one file, or a folder in which all files `*.parquet`, at any depth, are read in the order of their paths.
        name: short name for logs and folders.
        image_column: the column with the images.
        label_column: the column with the classes (integers with names in the hub's metadata, or anything that prints);
            None reads no classes, and so does a set without a column "label".
        id_column: a column with a unique id for each image.
        channels: channels of the decoded images.
        holdout_files: patterns of file names, "test-*" for example, whose images are the official test split.
        cache_bytes: how many bytes of row groups each process keeps; the one in use is kept whatever its size.
        rendering: how pixels become 8-bit channels.

    Raises:
        DataError: if the files are missing, no Parquet, lack a column or a label, or hold ids that are null or not
            unique, or if a pattern matches no file.
    """

    def __init__(
        self,
        root: Path,
        *,
        name: str = "parquet",
        image_column: str = "image",
        label_column: str | None = "label",
        id_column: str | None = None,
        channels: int = 3,
        holdout_files: Sequence[str] = (),
        cache_bytes: int = CACHE_BYTES,
        rendering: Rendering = EIGHT_BITS,
    ) -> None:
        shards = scan(root, Columns(image_column, label_column, id_column))
        ids = _ids(root, shards, id_column)
        rows = [n for shard in shards for n in shard.group_rows]
        self._groups = [(i, group) for i, shard in enumerate(shards) for group in range(len(shard.group_rows))]
        self._starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(rows, dtype=np.int64)])
        self._own = [name for name in (image_column, label_column) if name]
        self._row_groups = _RowGroups([shard.file for shard in shards], image_column, cache_bytes)
        super().__init__(
            name=name,
            ids=ids,
            bands=band_names(None, channels),
            rendering=rendering,
            fingerprint=fingerprint(shards, f"parquet {image_column} {id_column} {channels}"),
            truth=_truth(root, shards, ids),
            holdout=_holdout(root, shards, ids, holdout_files),
        )

    def read(self, ids: Sequence[str]) -> list[Image | Reject]:
        """See `ImageSource.read`; each row group is fetched once, in whatever order its ids come."""
        positions = np.array([self._position[id_] for id_ in ids], dtype=np.int64)
        groups = self._group_of(positions)
        results: dict[int, Image | Reject] = {}
        for group, members in groupby(np.argsort(groups, kind="stable").tolist(), key=groups.tolist().__getitem__):
            results.update(self._read_group(group, list(members), ids, positions))
        return [results[i] for i in range(len(ids))]

    def _read_group(
        self, group: int, members: Sequence[int], ids: Sequence[str], positions: Positions
    ) -> Iterator[tuple[int, Image | Reject]]:
        """Decode the images of `ids` at the indices `members`, all of them in one row group."""
        try:
            column = self._row_groups.get(*self._groups[group])
        except UnreadableImageError as error:
            yield from ((i, Reject(ids[i], str(error))) for i in members)
            return
        for i in members:
            try:
                data = _row(column, int(positions[i] - self._starts[group]))
                yield i, self.rendering(decode(data, len(self.bands)), self.bands)
            except UnreadableImageError as error:
                yield i, Reject(ids[i], str(error))

    def metadata(self) -> pa.Table | None:
        """The columns beside images and classes as text, a row for each image; None without any."""
        counts: Counter[int] = Counter()
        for (file, _), rows in zip(self._groups, np.diff(self._starts).tolist(), strict=True):
            counts[file] += rows
        return parquet_table([(file, counts[i]) for i, file in enumerate(self._row_groups.files)], self._own)

    def _encoded(self, position: int) -> bytes:
        group = int(self._group_of(np.array([position]))[0])
        return _row(self._row_groups.get(*self._groups[group]), position - int(self._starts[group]))

    def _group_of(self, positions: Positions) -> Positions:
        return np.searchsorted(self._starts, positions, side="right") - 1


def parquet_source(
    root: str | Path | None,
    *,
    name: str = "parquet",
    image_column: str = "image",
    label_column: str | None = "label",
    id_column: str | None = None,
    channels: int = 3,
    holdout_files: Sequence[str] = (),
    cache_bytes: int = CACHE_BYTES,
    cache_dir: str | Path | None = None,
    storage_options: Mapping[str, Any] | None = None,
    rendering: Rendering = EIGHT_BITS,
) -> ParquetSource:
    """Build a `ParquetSource` from configuration values; see there. Shards at a URL are copied to `cache_dir` first.

    Raises:
        DataError: if `root` is None, too.
    """
    if root is None:
        raise DataError("dataset=parquet needs data.root=PATH, a Parquet file or the folder that holds such files")
    return ParquetSource(
        local_path(root, cache_dir, (".parquet",), storage_options),
        name=name,
        image_column=image_column,
        label_column=label_column,
        id_column=id_column,
        channels=channels,
        holdout_files=list(holdout_files),
        cache_bytes=cache_bytes,
        rendering=rendering,
    )


def _row(column: pa.ChunkedArray, row: int) -> bytes:
    if row >= len(column):
        raise UnreadableImageError("its file has lost rows since the set was opened")
    data = column[row].as_py()
    if data is None:
        raise UnreadableImageError("there are no bytes in the image column")
    return data


def _ids(root: Path, shards: Sequence[Shard], id_column: str | None) -> list[str]:
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


def _truth(root: Path, shards: Sequence[Shard], ids: Sequence[str]) -> dict[str, str] | None:
    with_labels = [shard for shard in shards if shard.labels is not None]
    if not with_labels:
        return None
    labels = list(chain.from_iterable(shard.labels or [None] * sum(shard.group_rows) for shard in shards))
    truth = {id_: label for id_, label in zip(ids, labels, strict=True) if label is not None}
    if len(truth) < len(ids):
        missing = next(id_ for id_ in ids if id_ not in truth)
        raise DataError(
            f"{root}: {len(ids) - len(truth):,} of {len(ids):,} images have no label, the first is {missing}; "
            "set dataset.source.label_column=null to read the images without classes"
        )
    return truth


def _holdout(root: Path, shards: Sequence[Shard], ids: Sequence[str], patterns: Sequence[str]) -> frozenset[str]:
    unused = [pattern for pattern in patterns if not any(fnmatch(shard.file.name, pattern) for shard in shards)]
    if unused:
        raise DataError(f"{root}: no file matches {', '.join(unused)}, correct dataset.source.holdout_files")
    holdout: list[str] = []
    start = 0
    for shard in shards:
        end = start + sum(shard.group_rows)
        if any(fnmatch(shard.file.name, pattern) for pattern in patterns):
            holdout += ids[start:end]
        start = end
    return frozenset(holdout)


@dataclass
class _State:
    """What belongs to one process: open files and locks do not survive a fork."""

    pid: int = field(default_factory=os.getpid)
    lock: threading.Lock = field(default_factory=threading.Lock)
    files: OrderedDict[int, pq.ParquetFile] = field(default_factory=OrderedDict)
    columns: OrderedDict[tuple[int, int], pa.ChunkedArray] = field(default_factory=OrderedDict)
    n_bytes: int = 0


class _RowGroups:
    """The image column of the row groups used last, encoded, up to a number of bytes; safe in threads and forks."""

    def __init__(self, files: Sequence[Path], column: str, cache_bytes: int) -> None:
        self.files = list(files)
        self.column = column
        self.cache_bytes = cache_bytes
        self._state = _State()

    def __getstate__(self) -> dict[str, object]:
        return {key: value for key, value in self.__dict__.items() if key != "_state"}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state, _state=_State())

    def get(self, file: int, group: int) -> pa.ChunkedArray:
        """Return the encoded images of a row group, as slices of one buffer.

        Raises:
            UnreadableImageError: if the file is gone or damaged.
        """
        state = self._state
        if state.pid != os.getpid():
            state = self._state = _State()
        with state.lock:
            if (file, group) in state.columns:
                state.columns.move_to_end((file, group))
                return state.columns[file, group]
            try:
                column = self._fetch(state, file, group)
            except (OSError, IndexError, pa.ArrowException) as error:
                reason = str(error).split("\n", 1)[0]
                raise UnreadableImageError(
                    f"row group {group} of {self.files[file]} cannot be read: {reason}"
                ) from None
            self._keep(state, (file, group), column)
            return column

    def _keep(self, state: _State, key: tuple[int, int], column: pa.ChunkedArray) -> None:
        state.columns[key] = column
        state.n_bytes += column.nbytes
        while state.n_bytes > self.cache_bytes and len(state.columns) > 1:
            state.n_bytes -= state.columns.popitem(last=False)[1].nbytes

    def _fetch(self, state: _State, file: int, group: int) -> pa.ChunkedArray:
        parquet = self._open(state, file)
        is_struct = pa.types.is_struct(parquet.schema_arrow.field(self.column).type)
        name = f"{self.column}.bytes" if is_struct else self.column
        # In pieces, because Arrow cannot read more than 2 GiB of a nested column at once.
        size = max(1, parquet.metadata.row_group(group).total_byte_size)
        rows = max(1, parquet.metadata.row_group(group).num_rows * _BATCH_BYTES // size)
        batches = parquet.iter_batches(rows, row_groups=[group], columns=[name], use_threads=False)
        arrays = [batch.column(0) for batch in batches]
        return pa.chunked_array([array.flatten()[0] if is_struct else array for array in arrays])

    def _open(self, state: _State, file: int) -> pq.ParquetFile:
        if file not in state.files:
            state.files[file] = pq.ParquetFile(self.files[file])
            if len(state.files) > _OPEN_FILES:
                state.files.popitem(last=False)[1].close()
        state.files.move_to_end(file)
        return state.files[file]
