"""HDF5 files that hold decoded images as one array."""

import hashlib
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import h5py
import numpy as np

from anomalymatch.data.codecs import MODES, with_channels
from anomalymatch.data.rendering import band_names
from anomalymatch.data.source import BaseSource
from anomalymatch.errors import DataError, UnreadableImageError
from anomalymatch.types import Image, Pixels, Reject

_CHUNK_CACHE_BYTES = 2**25


class Hdf5Source(BaseSource):
    """Images in a dataset (n, h, w, c) or (n, h, w) of 8-bit integers; several files follow one another.

    Ids are `{file stem}/{row:06d}`. Setting up reads the labels and no image.

    Args:
        files: the files, no two with the same stem.
        name: short name for logs and folders.
        images: name of the dataset with the images.
        labels: name of the dataset with a class for each image: numbers, or strings; None reads no classes.
        class_names: names of the classes 0, 1, …; None takes the numbers themselves.
        channels: channels of the images that are returned; grey is repeated, colour is averaged as in television.
        holdout_files: those of `files` that are the official test split.

    Raises:
        DataError: if a file is missing, is no HDF5, or lacks a dataset, or one has another shape or type.
    """

    def __init__(
        self,
        files: Sequence[Path],
        *,
        name: str = "hdf5",
        images: str = "images",
        labels: str | None = "labels",
        class_names: Sequence[str] | None = None,
        channels: int = 3,
        holdout_files: Sequence[Path] = (),
    ) -> None:
        self._files = list(files)
        self._images = images
        self._state = _State()
        if len({file.stem for file in files}) < len(files):
            raise DataError(f"{name}: two of the files {', '.join(map(str, files))} have the same name, rename one")
        tables = [_scan(file, images, labels, class_names) for file in files]
        self.shapes = [table.shape for table in tables]
        self._starts = np.cumsum([0] + [table.shape[0] for table in tables])
        names = [
            [f"{file.stem}/{row:06d}" for row in range(n)] for file, (n, *_) in zip(files, self.shapes, strict=True)
        ]
        ids = [id_ for file in names for id_ in file]
        classes = [label for table in tables for label in table.classes or ()]
        super().__init__(
            name=name,
            ids=ids,
            bands=band_names(None, channels),
            fingerprint=_fingerprint(files, f"hdf5 {images} {self.shapes} {channels}"),
            truth=dict(zip(ids, classes, strict=True)) if labels is not None else None,
            holdout=frozenset(
                id_ for file, part in zip(files, names, strict=True) if file in holdout_files for id_ in part
            ),
        )

    def __getstate__(self) -> dict[str, object]:
        return {key: value for key, value in self.__dict__.items() if key != "_state"}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state, _state=_State())

    def read(self, ids: Sequence[str]) -> list[Image | Reject]:
        """See `ImageSource.read`; rows are fetched in the order in which they lie in the files."""
        order = sorted(range(len(ids)), key=lambda i: self._position[ids[i]])
        images = {i: self._read(ids[i]) for i in order}
        return [images[i] for i in range(len(ids))]

    def _load(self, position: int) -> Pixels:
        file = int(np.searchsorted(self._starts, position, side="right")) - 1
        row = position - int(self._starts[file])
        state = self._state
        if state.pid != os.getpid():
            state = self._state = _State()
        try:
            with state.lock:
                if file not in state.files:
                    state.files[file] = _open(self._files[file])
                pixels = state.files[file][self._images][row]
        except (OSError, KeyError, ValueError) as error:
            raise UnreadableImageError(f"row {row} of {self._files[file]} cannot be read: {error}") from None
        return with_channels(pixels, len(self.bands))


def hdf5_source(
    files: str | Path | Sequence[str | Path],
    *,
    name: str = "hdf5",
    images: str = "images",
    labels: str | None = "labels",
    class_names: Sequence[str] | None = None,
    channels: int = 3,
) -> Hdf5Source:
    """Build an `Hdf5Source` from configuration values; see there."""
    paths = [Path(file).expanduser() for file in ([files] if isinstance(files, str | Path) else files)]
    return Hdf5Source(paths, name=name, images=images, labels=labels, class_names=class_names, channels=channels)


@dataclass
class _State:
    """What belongs to one process: open files and locks do not survive a fork."""

    pid: int = field(default_factory=os.getpid)
    lock: threading.Lock = field(default_factory=threading.Lock)
    files: dict[int, h5py.File] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Table:
    shape: tuple[int, ...]
    classes: list[str] | None


def _open(file: Path) -> h5py.File:
    # Unlocked, because a lock is refused on read-only and on some network file systems.
    return h5py.File(file, "r", locking=False, rdcc_nbytes=_CHUNK_CACHE_BYTES)


def _scan(file: Path, images: str, labels: str | None, class_names: Sequence[str] | None) -> _Table:
    if not file.is_file():
        raise DataError(f"{file}: expected an HDF5 file, found nothing")
    try:
        with _open(file) as opened:
            table = _dataset(file, opened, images)
            _check(file, images, table)
            classes = None if labels is None else _classes(file, opened, labels, table.shape[0], class_names)
            return _Table(table.shape, classes)
    except OSError as error:
        raise DataError(f"{file}: expected an HDF5 file, but it cannot be read ({error}); get it again") from None


def _dataset(file: Path, opened: h5py.File, name: str) -> h5py.Dataset:
    if not isinstance(opened.get(name), h5py.Dataset):
        raise DataError(f"{file}: there is no dataset {name}, found {', '.join(opened) or 'nothing'}")
    return opened[name]


def _check(file: Path, name: str, table: h5py.Dataset) -> None:
    colour = table.shape[3] if table.ndim == 4 else 1
    if table.ndim not in (3, 4) or colour not in MODES or table.dtype != np.uint8:
        raise DataError(
            f"{file}: expected images of the shape (n, h, w) or (n, h, w, 1, 3 or 4) and the type uint8 in {name}, "
            f"found {table.shape} and {table.dtype}"
        )


def _classes(file: Path, opened: h5py.File, name: str, n: int, class_names: Sequence[str] | None) -> list[str]:
    values = _dataset(file, opened, name)[:]
    if values.shape != (n,):
        raise DataError(f"{file}: expected {n:,} labels in {name}, one per image, found the shape {values.shape}")
    if class_names is None or values.dtype.kind not in "iu":
        return [value.decode() if isinstance(value, bytes) else str(value) for value in values.tolist()]
    if n and (values.min() < 0 or values.max() >= len(class_names)):
        raise DataError(
            f"{file}: expected labels from 0 to {len(class_names) - 1} in {name} for the classes "
            f"{', '.join(class_names)}, found {values.min()} to {values.max()}"
        )
    return [class_names[value] for value in values.tolist()]


def _fingerprint(files: Sequence[Path], salt: str) -> str:
    digest = hashlib.sha256(salt.encode())
    for file in files:
        stat = file.stat()
        digest.update(f"\n{file.name}\0{stat.st_size}\0{stat.st_mtime_ns}".encode())
    return digest.hexdigest()
