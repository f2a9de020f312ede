"""Zarr stores as a source, with the Parquet file beside them that holds ids and classes."""

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Shaped

from anomalymatch.checks import check_inside
from anomalymatch.data.find import FoundFile, damaged_file, leaves, stamp, walk
from anomalymatch.data.source import hash_rows
from anomalymatch.data.sources.array_file import AUTO, NONE, ArrayFile, bands_and_units
from anomalymatch.data.sources.arrays import ArraySource, Opened, PixelRows, Root
from anomalymatch.errors import DataError, UnreadableImageError
from anomalymatch.text import listed

_BLOSC_HEADER = 16
_ARRAYS, _GROUPS = ("zarr.json", ".zarray"), (".zgroup",)


class ZarrSource(ArraySource):
    """Images in Zarr stores of version 2 or 3, folders or .zip files; see `ArraySource` for the other arguments.

    A store is a group with an array of images, or that array itself. The attributes `bands` and `units` (or `BUNIT`) of
    the array, else of its group, name the bands and their unit. Rows whose chunks hold nothing but the fill value are
    unreadable: a store does not distinguish blank images from lost ones.

    Args:
        root: a store, a folder, or a list.
        metadata: a Parquet file with a row for each image, for a single store; "auto" takes
            `{stem}_metadata.parquet` or `metadata.parquet` beside or inside each store, where there is one, "none"
            takes none. Its columns are those that `ids` and `labels` name.
        **options: arguments of `ArraySource`.

    Raises:
        DataError: if zarr is not installed, or the metadata is missing, no Parquet, or lacks a column or rows.
    """

    dataset = "zarr"
    kind = "a Zarr store"
    suffixes = frozenset({".zip"})
    usual_ids = ("original_filename", "filename", "source_id", "id")
    usual_labels = ("label", "labels")
    stores = True

    def __init__(self, root: Root | None, *, metadata: str | Path = AUTO, **options: Any) -> None:
        self._metadata = metadata
        try:
            import zarr  # noqa: F401
        except ImportError:
            raise DataError('Zarr stores need the package zarr: pip install "anomalymatch[zarr]"') from None
        super().__init__(root, **options)

    def check_found(self, found: Sequence[FoundFile]) -> None:
        """See `ArraySource.check_found`."""
        if self._metadata not in (AUTO, NONE) and len(found) > 1:
            raise DataError(
                f"dataset.source.metadata={self._metadata} is for one store, but there are {len(found)}: put a file "
                "{stem}_metadata.parquet beside each of them, and leave metadata at auto"
            )

    def matches(self, path: Path) -> bool:
        """See `ArraySource.matches`."""
        if path.is_dir():
            return any((path / name).is_file() for name in (*_ARRAYS, *_GROUPS))
        return super().matches(path)

    def describe(self, file: FoundFile) -> ArrayFile:
        """See `ArraySource.describe`."""
        path = file.path
        store, array, common = _open(path, self.images)
        store.close()
        folder = path / array.path if path.is_dir() else None
        witness = path if folder is None else next(folder / name for name in _ARRAYS if (folder / name).is_file())
        ids, classes = self._ids_and_classes(path, array.shape[0] if array.shape else 0)
        bands, units = bands_and_units(dict(array.attrs), common)
        return ArrayFile(
            path=path,
            stem=file.stem,
            array=self.images,
            shape=array.shape,
            dtype=np.dtype(array.dtype),
            stamp=stamp(witness),
            signature=str(stamp(path)) if folder is None else _signature(folder),
            block=array.chunks[0] if array.chunks else 1,
            ids=ids,
            classes=classes,
            bands=bands,
            units=units,
            witness=witness,
        )

    def open_rows(self, path: Path) -> Opened:
        """See `ArraySource.open_rows`."""
        store, array, _ = _open(path, self.images)
        return Opened(_CheckedRows(array, path / array.path if path.is_dir() else None), store.close)

    def metadata_file(self, path: Path) -> Path | None:
        """See `ArraySource.metadata_file`."""
        if self._metadata == NONE:
            return None
        if self._metadata == AUTO:
            places = [folder / name for folder in (path.parent, path) for name in _metadata_names(path)]
            return next((place for place in places if place.is_file()), None)
        file = Path(self._metadata).expanduser()
        if not file.is_file():
            raise DataError(f"{file}: expected a Parquet file with the metadata of {path}, found nothing")
        return file

    def _ids_and_classes(self, store: Path, count: int) -> tuple[list[str] | None, list[str] | None]:
        path = self.metadata_file(store)
        if path is None:
            for option, column in (("ids", self._columns.ids), ("labels", self._columns.labels)):
                if column not in (AUTO, NONE):
                    raise DataError(
                        f"{store}: dataset.source.{option}={column} is a column of the metadata, but there is no file "
                        f"{_metadata_names(store)[0]}; name it by dataset.source.metadata"
                    )
            return None, None
        try:
            names = pq.read_schema(path).names
            return self._columns.read(names, lambda name: _column(path, name), count, path)
        except (OSError, pa.ArrowException) as error:
            raise damaged_file(path, "a Parquet file", error) from None


class _CheckedRows:
    """Rows of an array; missing chunks, which zarr reads as the fill value, and short ones raise an error.

    `folder` holds its chunks; it is None inside a .zip, which has checksums.
    """

    def __init__(self, array: Any, folder: Path | None) -> None:
        self.array = array
        self.fill = array.dtype.type(0) if array.fill_value is None else array.fill_value
        blosc = array.shards is None and array.compressors and "Blosc" in type(array.compressors[-1]).__name__
        self.blosc_folder = folder if blosc else None

    def __getitem__(self, rows: slice) -> PixelRows:
        if self.blosc_folder is not None:
            self._check_lengths(self.blosc_folder, rows.start // self.array.chunks[0])
        values = np.asarray(self.array[rows])
        if values.size and (np.isnan(values).all() if self.fill != self.fill else (values == self.fill).all()):
            raise UnreadableImageError("its chunk is missing, or blank")
        return values

    def _check_lengths(self, folder: Path, block: int) -> None:
        """Compare the length of each chunk with its header, because Blosc decodes a truncated chunk into noise."""
        others = zip(self.array.shape[1:], self.array.chunks[1:], strict=True)
        for place in product([block], *(range(-(-length // chunk)) for length, chunk in others)):
            file = folder / self.array.metadata.encode_chunk_key(place)
            if file.is_file():
                with file.open("rb") as opened:
                    header = opened.read(_BLOSC_HEADER)
                claimed = int.from_bytes(header[12:_BLOSC_HEADER], "little")
                if len(header) < _BLOSC_HEADER or claimed != file.stat().st_size:
                    raise UnreadableImageError("its chunk has been cut short, or is damaged")


def _open(path: Path, images: str) -> tuple[Any, Any, Any]:
    """Return the open store, its array of images, and the attributes of the group around the array."""
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
            raise DataError(f"{path}: there is no array {images} in this store, found {listed(node)}")
        _refuse_pickles(path, array)
    except BaseException:
        store.close()
        raise
    return store, array, attributes


def _refuse_pickles(path: Path, array: Any) -> None:
    """Refuse filters that unpickle, because unpickling can run any program."""
    steps = [*array.filters, *array.compressors]
    if any("pickle" in f"{type(step).__name__} {getattr(step, 'codec_id', '')}".lower() for step in steps):
        raise DataError(
            f"{path}: its array is packed by pickle, which is not safe to read; write it with another codec"
        )


def _signature(folder: Path) -> str:
    """Hash names, sizes and times of all files below `folder`, because chunks can change one by one."""
    rows = []
    for found in walk(folder):
        for file in found.files:
            if file.is_symlink():
                check_inside(folder, f"its file {file.name} is a link out of it", leaves(file.path, folder))
            rows.append((found.path + file.name, *stamp(file)))
    return hash_rows("zarr", rows)


def _metadata_names(store: Path) -> tuple[str, str]:
    stem = store.name.removesuffix(".zip").removesuffix(".zarr")
    return f"{stem}_metadata.parquet", "metadata.parquet"


def _column(path: Path, name: str) -> Shaped[np.ndarray, " n"]:
    column = pq.read_table(path, columns=[name])[name]
    if pa.types.is_integer(column.type) and not column.null_count:
        return column.to_numpy()
    values = np.empty(len(column), dtype=object)
    values[:] = column.to_pylist()
    return values
