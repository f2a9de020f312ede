"""NumPy files as a source: stacks of images in .npy and .npz, or one image in each file."""

import logging
import math
import mmap
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Shaped

from anomalymatch.data.find import FoundFile, stamp
from anomalymatch.data.sources.array_file import AUTO, ArrayFile
from anomalymatch.data.sources.arrays import ArraySource, Opened, Root, is_narrow
from anomalymatch.errors import DataError
from anomalymatch.text import listed

logger = logging.getLogger(__name__)


class NumpySource(ArraySource):
    """Images in .npy and .npz files; see `ArraySource` for the other arguments.

    A .npy file is read row by row and has neither ids nor classes. The only array of a .npz file may have any name. It
    is unpacked as a whole before its first row is read, and kept if `cache_bytes` allows; use .npy files for arrays
    larger than the memory.

    Args:
        root: a file, a folder, or a list.
        each: whether each .npy file is one image, (h, w), (h, w, bands) or (bands, h, w); its id is its path below
            `root`. None takes files (h, w), and (h, w, bands) with fewer than 8 bands, as one image each, and says so.
        **options: arguments of `ArraySource`.

    Raises:
        DataError: if `each` is true and there is a .npz file, or a file is cut short.
    """

    dataset = "numpy"
    kind = "a .npy or .npz file"
    suffixes = frozenset({".npy", ".npz"})

    def __init__(self, root: Root | None, *, each: bool | None = None, **options: Any) -> None:
        self.each = each
        super().__init__(root, **options)
        guessed = [file for file in self.files if file.single] if each is None else []
        if guessed:
            logger.warning(
                "%s and %d other files are taken as one image each, of the shape %s; set dataset.source.each=false if "
                "they are stacks of images, or true to say so",
                guessed[0].path,
                len(guessed) - 1,
                guessed[0].shape[1:],
            )

    def _is_single(self, shape: Sequence[int]) -> bool:
        layout_known = self.layout != AUTO
        return (len(shape) == 2 or (is_narrow(shape) and not layout_known)) if self.each is None else self.each

    def describe(self, file: FoundFile) -> ArrayFile:
        """See `ArraySource.describe`."""
        return self._describe_packed(file) if _is_packed(file.path) else self._describe_plain(file)

    def open_rows(self, path: Path) -> Opened:
        """See `ArraySource.open_rows`."""
        if _is_packed(path):
            return Opened(_Packed(path, self.images), lambda: None)  # the file is closed after each access
        rows = _Mapped(path)
        return Opened(rows, rows.close)

    def _describe_plain(self, file: FoundFile) -> ArrayFile:
        with file.path.open("rb") as opened:
            header = _header(opened)
        changed, single = stamp(file.path), self._is_single(header.shape)
        _check_length(file.path, "it", header, changed[0])
        return ArrayFile(
            path=file.path,
            stem=file.stem,
            array="it",
            shape=(1, *header.shape) if single else header.shape,
            dtype=header.dtype,
            stamp=changed,
            single=single,
            ids=[file.relative] if single else None,
        )

    def _describe_packed(self, file: FoundFile) -> ArrayFile:
        if self.each:
            raise DataError(
                f"{file.path}: dataset.source.each=true is for .npy files with one image each, not for .npz"
            )
        with zipfile.ZipFile(file.path) as archive:
            name = _images(archive, file.path, self.images)
            with archive.open(f"{name}.npy") as member:
                header = _header(member)
            _check_length(file.path, name, header, archive.getinfo(f"{name}.npy").file_size)
            if header.end > (most := _memory() // 2):
                raise DataError(
                    f"{file.path}: {name} unpacks to {header.end:,} bytes, but at most {most:,} fit into the memory; "
                    "store it as .npy, which is read row by row"
                )
            single = self.each is None and self._is_single(header.shape)
            shape = (1, *header.shape) if single else header.shape
            count = shape[0] if shape else 0
            ids, classes = self._columns.read(_arrays(archive), lambda name: _array(archive, name), count, file.path)
            return ArrayFile(
                path=file.path,
                stem=file.stem,
                array=name,
                shape=shape,
                single=single,
                dtype=header.dtype,
                stamp=stamp(file.path),
                block=max(count, 2),  # a single row is cached too, because reading it unpacks the whole array
                ids=ids,
                classes=classes,
            )


class _Header(NamedTuple):
    """Header of an array: its shape, order of axes, number type, and the length of the header in bytes."""

    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype[Any]
    offset: int

    @property
    def end(self) -> int:
        return self.offset + math.prod(self.shape) * self.dtype.itemsize


class _Mapped:
    """Memory-mapped .npy file; each access checks its length, because reading beyond the end kills the process."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            header = _header(file)
            self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.end = header.end
        order: Literal["F", "C"] = "F" if header.fortran else "C"
        self.array: np.ndarray | None = np.ndarray(header.shape, header.dtype, self.map, header.offset, order=order)

    def __getitem__(self, rows: Any) -> np.ndarray:
        if self.array is None or self.map.size() < self.end:
            raise ValueError("the file has been cut short")
        return np.array(self.array[rows])

    def close(self) -> None:
        self.array = None  # an mmap cannot be closed while an array uses it
        self.map.close()


class _Packed:
    """Array in a .npz file, unpacked at each access."""

    def __init__(self, path: Path, images: str) -> None:
        self.path, self.images = path, images

    def __getitem__(self, rows: Any) -> np.ndarray:
        with zipfile.ZipFile(self.path) as archive:
            return _array(archive, _images(archive, self.path, self.images))[rows]


def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _is_packed(path: Path) -> bool:
    return path.suffix.lower() == ".npz"


def _header(file: Any) -> _Header:
    version = np.lib.format.read_magic(file)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
    if read is None:
        raise ValueError(f"version {version} of the format is for tables, which are no images")
    shape, fortran, dtype = read(file)
    return _Header(shape, fortran, dtype, file.tell())


def _check_length(path: Path, name: str, header: _Header, size: int) -> None:
    if size != header.end:
        raise DataError(f"{path}: expected {header.end:,} bytes in {name} by its header, found {size:,}; get it again")


def _arrays(archive: zipfile.ZipFile) -> list[str]:
    return [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]


def _images(archive: zipfile.ZipFile, path: Path, images: str) -> str:
    """Return the name of the array with the images: `images`, or the only one."""
    names = _arrays(archive)
    if images in names:
        return images
    if len(names) != 1:
        raise DataError(f"{path}: there is no array {images}, found {listed(names)}")
    return names[0]


def _array(archive: zipfile.ZipFile, name: str) -> Shaped[np.ndarray, "..."]:
    with archive.open(f"{name}.npy") as member:
        return np.lib.format.read_array(member, allow_pickle=False)
