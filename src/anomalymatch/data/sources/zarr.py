"""Zarr stores as a source, with the Parquet file beside them that holds ids and classes."""

import hashlib
import os
from collections.abc import Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Shaped

from anomalymatch.data.rendering import Rendering
from anomalymatch.data.source import EIGHT_BITS
from anomalymatch.data.sources.array_parts import (
    AUTO,
    NONE,
    Part,
    Root,
    band_list,
    choose,
    classes,
    find,
    reason,
    stamp,
    texts,
    unit_text,
)
from anomalymatch.data.sources.arrays import CACHE_BYTES, ArraySource, Opened, Rows
from anomalymatch.errors import DataError, UnreadableImageError

IDS = ("original_filename", "filename", "source_id", "id")
LABELS = ("label", "labels")
_BLOSC_HEADER = 16
_ARRAYS, _GROUPS = ("zarr.json", ".zarray"), (".zgroup",)


def zarr_source(
    root: Root | None,
    *,
    name: str = "zarr",
    images: str = "images",
    metadata: str | Path = AUTO,
    ids: str = AUTO,
    labels: str = AUTO,
    class_names: Sequence[str] | None = None,
    labels_file: str | Path | None = None,
    layout: str = "auto",
    bands: Sequence[str] | None = None,
    channels: int | None = None,
    holdout_files: Sequence[str] = (),
    cache_bytes: int = CACHE_BYTES,
    rendering: Rendering = EIGHT_BITS,
) -> ArraySource:
    """Open Zarr stores of version 2 or 3, folders or .zip files, with an array of images.

    Images are rows of integers or floats, (n, h, w), (n, h, w, bands) or (n, bands, h, w). The attributes `bands` and
    `units` (or `BUNIT`) of the array, or else of its group, name the bands and what they measure. Rows of chunks that
    hold nothing but the fill value are unreadable: a store does not tell blank images from those that were lost.

    Args:
        root: a store, a folder in which all stores, at any depth, are read in the order of their paths, or a list.
        name: short name for logs and folders.
        images: name of the array in a group; a store that is itself an array needs none.
        metadata: a Parquet file with a row for each image, for a single store; "auto" takes `{stem}_metadata.parquet`
            or `metadata.parquet` beside or inside of each store, where there is one, "none" takes none.
        ids: column with a unique id for each image; "auto" takes `original_filename`, `filename`, `source_id` or `id`
            where there is one, "none" takes `{stem of the store}/{row:06d}`.
        labels: column with a class for each image; "auto" takes `label` or `labels` where there is one, "none" reads
            no classes.
        class_names: names of the classes 0, 1, …; None takes the numbers themselves.
        labels_file: see `ArraySource`, as for what follows.
        layout: order of the axes.
        bands: names of the bands.
        channels: 1, 3 or 4 for photographs.
        holdout_files: patterns of the stores of an official test split.
        cache_bytes: decoded chunks kept in memory.
        rendering: how pixels become 8-bit channels.

    Raises:
        DataError: if `root` is None, zarr is not installed, a store is missing, is no Zarr, or lacks the array, or if
            the metadata are missing, no Parquet, lack a column or rows; further see `ArraySource`.
    """
    if root is None:
        raise DataError(
            "dataset=zarr needs data.root=PATH, a Zarr store (a folder or .zip), or a folder of such stores"
        )
    _require_zarr()
    stores = find(root, _is_store, "a Zarr store")
    if metadata not in (AUTO, NONE) and len(stores) > 1:
        raise DataError(
            f"dataset.source.metadata={metadata} is for one store, but there are {len(stores)}: put a file "
            "{stem}_metadata.parquet beside each of them, and leave metadata at auto"
        )
    parts = [_scan(path, stem, images, metadata, (ids, labels), class_names) for path, stem, _ in stores]
    source = ArraySource(
        parts,
        partial(_rows, images=images),
        name=name,
        layout=layout,
        bands=bands,
        channels=channels,
        labels_file=labels_file,
        holdout_files=holdout_files,
        cache_bytes=cache_bytes,
        rendering=rendering,
    )
    source.beside = [_metadata_file(path, metadata) for path, *_ in stores]
    return source


class _Written:
    """Rows of an array of which something has been written: absent chunks are read as the fill value.

    Args:
        array: the open array.
        folder: where its chunks are, None inside of a .zip, which has checksums.
    """

    def __init__(self, array: Any, folder: Path | None) -> None:
        self.array = array
        self.fill = array.dtype.type(0) if array.fill_value is None else array.fill_value
        blosc = array.shards is None and array.compressors and "Blosc" in type(array.compressors[-1]).__name__
        self.blosc_folder = folder if blosc else None

    def __getitem__(self, rows: slice) -> Rows:
        if self.blosc_folder is not None:
            self._check_lengths(self.blosc_folder, rows.start // self.array.chunks[0])
        values = np.asarray(self.array[rows])
        if values.size and (np.isnan(values).all() if self.fill != self.fill else (values == self.fill).all()):
            raise UnreadableImageError("its chunk is missing, or blank")
        return values

    def _check_lengths(self, folder: Path, block: int) -> None:
        """Blosc decodes what has been cut short into noise, so the length that a chunk claims is compared before."""
        others = zip(self.array.shape[1:], self.array.chunks[1:], strict=True)
        for place in product([block], *(range(-(-length // chunk)) for length, chunk in others)):
            file = folder / self.array.metadata.encode_chunk_key(place)
            if file.is_file():
                with file.open("rb") as opened:
                    header = opened.read(_BLOSC_HEADER)
                claimed = int.from_bytes(header[12:_BLOSC_HEADER], "little")
                if len(header) < _BLOSC_HEADER or claimed != file.stat().st_size:
                    raise UnreadableImageError("its chunk has been cut short, or is damaged")


def _require_zarr() -> None:
    try:
        import zarr  # noqa: F401
    except ImportError:
        raise DataError('Zarr stores need the package zarr: pip install "anomalymatch[zarr]"') from None


def _is_store(path: Path) -> bool:
    if path.is_dir():
        return any((path / name).is_file() for name in (*_ARRAYS, *_GROUPS))
    return path.suffix.lower() == ".zip" and path.is_file()


def _open(path: Path, images: str) -> tuple[Any, Any, Any]:
    """Return an open store, its array of images, and the attributes of the group around that."""
    import zarr
    from zarr.storage import LocalStore, ZipStore

    store: Any = LocalStore(path, read_only=True) if path.is_dir() else ZipStore(path, mode="r")
    try:
        node: Any = zarr.open(store, mode="r")
        if isinstance(node, zarr.Array):
            array, attributes = node, {}
        else:
            array, attributes = node.get(images), dict(node.attrs)
        if not isinstance(array, zarr.Array):
            raise DataError(f"{path}: there is no array {images} in this store, found {', '.join(node) or 'nothing'}")
        _refuse_pickles(path, array)
    except BaseException:
        store.close()
        raise
    return store, array, attributes


def _refuse_pickles(path: Path, array: Any) -> None:
    """A filter can unpickle what it reads, and unpickling can run any program."""
    steps = [*array.filters, *array.compressors]
    if any("pickle" in f"{type(step).__name__} {getattr(step, 'codec_id', '')}".lower() for step in steps):
        raise DataError(
            f"{path}: its array is packed by pickle, which is not safe to read; write it with another codec"
        )


def _rows(path: Path, images: str) -> Opened:
    store, array, _ = _open(path, images)
    return Opened(_Written(array, path / array.path if path.is_dir() else None), store.close)


def _scan(
    path: Path,
    stem: str,
    images: str,
    metadata: str | Path,
    columns: tuple[str, str],
    class_names: Sequence[str] | None,
) -> Part:
    try:
        store, array, common = _open(path, images)
        store.close()
        own = dict(array.attrs)
        folder = path / array.path if path.is_dir() else None
    except DataError:
        raise
    except Exception as error:  # damaged stores make the library raise anything
        raise DataError(
            f"{path}: expected a Zarr store, but it cannot be read ({reason(error)}); get it again"
        ) from None
    witness = path if folder is None else next(folder / name for name in _ARRAYS if (folder / name).is_file())
    found_ids, found_classes = _metadata(path, metadata, columns, class_names, array.shape[0] if array.shape else 0)
    return Part(
        path=path,
        stem=stem,
        array=images,
        shape=array.shape,
        dtype=np.dtype(array.dtype),
        stamp=stamp(witness),
        signature=str(stamp(path)) if folder is None else _tree(folder),
        block=array.chunks[0] if array.chunks else 1,
        ids=found_ids,
        classes=found_classes,
        bands=band_list(own.get("bands", common.get("bands"))),
        units=unit_text(*(attributes.get(key) for attributes in (own, common) for key in ("units", "BUNIT"))),
        witness=witness,
    )


def _tree(folder: Path) -> str:
    """Hash names, sizes and times of all files below `folder`: chunks can change one by one."""
    digest = hashlib.sha256()
    for top, folders, files in os.walk(folder):
        folders.sort()
        for name in sorted(files):
            stat = os.stat(os.path.join(top, name))
            digest.update(f"{os.path.relpath(top, folder)}/{name}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _metadata(
    store: Path, metadata: str | Path, columns: tuple[str, str], class_names: Sequence[str] | None, count: int
) -> tuple[list[str] | None, list[str] | None]:
    """Return the ids and classes that the metadata of a store give."""
    path = _metadata_file(store, metadata)
    if path is None:
        for option, column in zip(("ids", "labels"), columns, strict=True):
            if column not in (AUTO, NONE):
                raise DataError(
                    f"{store}: dataset.source.{option}={column} is a column of the metadata, but there is no file "
                    f"{_names(store)[0]}; name it by dataset.source.metadata"
                )
        return None, None
    try:
        there = pq.read_schema(path).names
        id_column = choose("ids", columns[0], IDS, there, path)
        label_column = choose("labels", columns[1], LABELS, there, path)
        table = pq.read_table(path, columns=[name for name in (id_column, label_column) if name])
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: expected a Parquet file, but it cannot be read ({reason(error)})") from None
    return (
        None if id_column is None else texts(_column(table, id_column), id_column, "ids", count, path),
        None if label_column is None else classes(_column(table, label_column), label_column, class_names, count, path),
    )


def _column(table: pa.Table, name: str) -> Shaped[np.ndarray, " n"]:
    column = table[name]
    if pa.types.is_integer(column.type) and not column.null_count:
        return column.to_numpy()
    values = np.empty(len(column), dtype=object)
    values[:] = column.to_pylist()
    return values


def _names(store: Path) -> tuple[str, str]:
    stem = store.name.removesuffix(".zip").removesuffix(".zarr")
    return f"{stem}_metadata.parquet", "metadata.parquet"


def _metadata_file(store: Path, metadata: str | Path) -> Path | None:
    if metadata == NONE:
        return None
    if metadata == AUTO:
        places = [folder / name for folder in (store.parent, store) for name in _names(store)]
        return next((place for place in places if place.is_file()), None)
    path = Path(metadata).expanduser()
    if not path.is_file():
        raise DataError(f"{path}: expected a Parquet file with the metadata of {store}, found nothing")
    return path
