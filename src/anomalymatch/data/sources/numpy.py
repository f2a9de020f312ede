"""NumPy files as a source: stacks of images in .npy and .npz, or one image a file."""

import math
import mmap
import zipfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Shaped

from anomalymatch.data.rendering import Rendering
from anomalymatch.data.source import EIGHT_BITS
from anomalymatch.data.sources.array_parts import AUTO, Part, Root, choose, classes, find, reason, stamp, texts
from anomalymatch.data.sources.arrays import CACHE_BYTES, ArraySource, Opened, Rows
from anomalymatch.errors import DataError

SUFFIXES = frozenset({".npy", ".npz"})
IDS = ("filenames", "ids")
LABELS = ("labels", "label")


def numpy_source(
    root: Root | None,
    *,
    name: str = "numpy",
    images: str = "images",
    ids: str = AUTO,
    labels: str = AUTO,
    class_names: Sequence[str] | None = None,
    each: bool = False,
    labels_file: str | Path | None = None,
    layout: str = "auto",
    bands: Sequence[str] | None = None,
    channels: int | None = None,
    holdout_files: Sequence[str] = (),
    cache_bytes: int = CACHE_BYTES,
    rendering: Rendering = EIGHT_BITS,
) -> ArraySource:
    """Open .npy and .npz files with arrays of images.

    Images are rows of integers or floats, (n, h, w), (n, h, w, bands) or (n, bands, h, w). A .npy is read a row at a
    time. An array in a .npz is checked and unpacked as a whole before its first row is read, and kept if
    `cache_bytes` allow for it; what is larger than the memory belongs into .npy files.

    Args:
        root: a file, a folder in which all files `*.npy` and `*.npz`, at any depth, are read in the order of their
            paths, or a list of both.
        name: short name for logs and folders.
        images: name of the array with the images in a .npz; if there is only one array, its name does not matter.
        ids: name of the array with a unique id for each image in a .npz; "auto" takes `filenames` or `ids` where there
            is one, "none" takes `{file stem}/{row:06d}`, as for every .npy.
        labels: name of the array with a class for each image in a .npz: numbers or strings; "auto" takes `labels` or
            `label` where there is one, "none" reads no classes.
        class_names: names of the classes 0, 1, …; None takes the numbers themselves.
        each: whether each .npy is one image, (h, w), (h, w, bands) or (bands, h, w); its id is its path below `root`.
        labels_file: see `ArraySource`, as for what follows.
        layout: order of the axes.
        bands: names of the bands.
        channels: 1, 3 or 4 for photographs.
        holdout_files: patterns of the files of an official test split.
        cache_bytes: unpacked arrays kept in memory.
        rendering: how pixels become 8-bit channels.

    Raises:
        DataError: if `root` is None, a file is missing, is not of this format or cut short, or lacks an array, or
            if `each` is true for a .npz; further see `ArraySource`.
    """
    if root is None:
        raise DataError("dataset=numpy needs data.root=PATH, a .npy or .npz file, or a folder of such files")
    parts = []
    for path, stem, relative in find(root, _wanted, "a .npy or .npz file"):
        if each and _is_packed(path):
            raise DataError(f"{path}: dataset.source.each=true is for .npy files with one image each, not for .npz")
        try:
            if _is_packed(path):
                parts.append(_packed(path, stem, (images, ids, labels), class_names))
            else:
                parts.append(_plain(path, stem, relative if each else None))
        except DataError:
            raise
        except Exception as error:  # damaged files make the parsers raise anything
            raise DataError(
                f"{path}: expected a .npy or .npz file, but it cannot be read ({reason(error)}); get it again"
            ) from None
    return ArraySource(
        parts,
        partial(_rows, images=images, each=each),
        name=name,
        layout=layout,
        bands=bands,
        channels=channels,
        labels_file=labels_file,
        holdout_files=holdout_files,
        cache_bytes=cache_bytes,
        rendering=rendering,
    )


class _Header(NamedTuple):
    """What stands before the values of an array.

    Attributes:
        shape: of the array.
        fortran: whether the first axis runs fastest.
        dtype: of its values.
        offset: bytes of the header.
    """

    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype[Any]
    offset: int

    @property
    def end(self) -> int:
        """Bytes of header and values."""
        return self.offset + math.prod(self.shape) * self.dtype.itemsize


class _Mapped:
    """A .npy file mapped into memory; its length is checked before each reading: behind its end a program would die."""

    def __init__(self, path: Path, each: bool) -> None:
        with path.open("rb") as file:
            header = _header(file)
            self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.end = header.end
        order: Literal["F", "C"] = "F" if header.fortran else "C"
        array: Rows = np.ndarray(header.shape, header.dtype, self.map, header.offset, order=order)
        self.array: Rows | None = array[None] if each else array

    def __getitem__(self, rows: slice) -> Rows:
        if self.array is None or self.map.size() < self.end:
            raise ValueError("the file has been cut short")
        return np.array(self.array[rows])

    def close(self) -> None:
        self.array = None  # a map in use cannot be closed
        self.map.close()


class _Packed:
    """An array in a .npz, which is unpacked at each reading: all its rows are one block."""

    def __init__(self, path: Path, images: str) -> None:
        self.path = path
        self.images = images

    def __getitem__(self, rows: slice) -> Rows:
        with zipfile.ZipFile(self.path) as archive:
            return _member(archive, _images(archive, self.path, self.images))[rows]

    def close(self) -> None:
        """The file is closed already."""


def _wanted(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and path.is_file()


def _is_packed(path: Path) -> bool:
    return path.suffix.lower() == ".npz"


def _rows(path: Path, images: str, each: bool) -> Opened:
    rows = _Packed(path, images) if _is_packed(path) else _Mapped(path, each)
    return Opened(rows, rows.close)


def _header(file: Any) -> _Header:
    version = np.lib.format.read_magic(file)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
    if read is None:
        raise ValueError(f"version {version} of the format is for tables, which are no images")
    shape, fortran, dtype = read(file)
    return _Header(shape, fortran, dtype, file.tell())


def _plain(path: Path, stem: str, id_: str | None) -> Part:
    """Describe a .npy file, as one image with this id if there is one."""
    with path.open("rb") as file:
        header = _header(file)
    size, mtime = stamp(path)
    if size != header.end:
        raise DataError(f"{path}: expected {header.end:,} bytes by its header, found {size:,}; get it again")
    return Part(
        path=path,
        stem=stem,
        array="it",
        shape=header.shape if id_ is None else (1, *header.shape),
        dtype=header.dtype,
        stamp=(size, mtime),
        signature=f"{size} {mtime}",
        ids=None if id_ is None else [id_],
    )


def _packed(path: Path, stem: str, names: tuple[str, str, str], class_names: Sequence[str] | None) -> Part:
    size, mtime = stamp(path)
    with zipfile.ZipFile(path) as archive:
        name = _images(archive, path, names[0])
        with archive.open(f"{name}.npy") as member:
            header = _header(member)
        length = archive.getinfo(f"{name}.npy").file_size
        if length != header.end:
            raise DataError(f"{path}: expected {header.end:,} bytes in {name} by its header, found {length:,}")
        there = _arrays(archive)
        id_name = choose("ids", names[1], IDS, there, path)
        label_name = choose("labels", names[2], LABELS, there, path)
        n = header.shape[0] if header.shape else 0
        return Part(
            path=path,
            stem=stem,
            array=name,
            shape=header.shape,
            dtype=header.dtype,
            stamp=(size, mtime),
            signature=f"{size} {mtime}",
            block=max(n, 2),  # also a single row is kept, because unpacking it takes all of the file
            ids=None if id_name is None else texts(_member(archive, id_name), id_name, "ids", n, path),
            classes=None
            if label_name is None
            else classes(_member(archive, label_name), label_name, class_names, n, path),
        )


def _arrays(archive: zipfile.ZipFile) -> list[str]:
    return [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]


def _images(archive: zipfile.ZipFile, path: Path, images: str) -> str:
    """Name the array with the images: the one of this name, or the only one."""
    there = _arrays(archive)
    if images in there:
        return images
    if len(there) != 1:
        raise DataError(f"{path}: there is no array {images}, found {', '.join(there) or 'nothing'}")
    return there[0]


def _member(archive: zipfile.ZipFile, name: str) -> Shaped[np.ndarray, "..."]:
    with archive.open(f"{name}.npy") as member:
        return np.lib.format.read_array(member, allow_pickle=False)
