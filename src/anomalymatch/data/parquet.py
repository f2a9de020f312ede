"""Parquet shards in the layout of the Hugging Face hub as a source."""

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

from anomalymatch.data._beside import parquet_table
from anomalymatch.data._encoded import EncodedSource
from anomalymatch.data._remote import local_path
from anomalymatch.data._shards import Columns, Shard, fingerprint, scan
from anomalymatch.data.codecs import decode
from anomalymatch.data.rendering import Rendering, band_names
from anomalymatch.data.source import EIGHT_BITS
from anomalymatch.errors import DataError, UnreadableImageError
from anomalymatch.types import Image, Reject

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
