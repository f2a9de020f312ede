"""HDF5 files as a source: arrays of pixels, or encoded images of variable length."""

import faulthandler
import os
import signal
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from anomalymatch.checks import check_inside
from anomalymatch.data.find import FoundFile, damaged_file, stamp
from anomalymatch.data.sources.array_file import ArrayFile, bands_and_units
from anomalymatch.data.sources.arrays import ArraySource, Opened
from anomalymatch.data.warning_filter import ignore_warnings
from anomalymatch.errors import DataError
from anomalymatch.text import listed


class HDF5Source(ArraySource):
    """Images in a dataset of HDF5 files; see `ArraySource` for the arguments.

    Images may also be JPEG, PNG or similar files, each as bytes: a dataset (n,) of variable-length uint8, of opaque
    bytes or of byte strings. The attributes `bands` and `units` (or `BUNIT`) of the dataset, else of the file, name the
    bands and their unit.
    """

    dataset = "hdf5"
    kind = "an HDF5 file"
    suffixes = frozenset({".h5", ".hdf5"})

    def check_found(self, found: Sequence[FoundFile]) -> None:
        """Refuse files on which the HDF5 library crashes or hangs, as it does on some damaged ones.

        They are read in a child process first, all but their images.
        """
        seconds = 60 + sum(stamp(file.path)[0] for file in found) // 10**7
        if not hasattr(os, "fork") or _survives(lambda: [self.describe(file) for file in found], seconds):
            return
        for file in found:
            if not _survives(lambda file=file: self.describe(file), seconds):  # type: ignore[misc]
                raise damaged_file(file.path, self.kind, DataError("the HDF5 library crashes on it, or hangs"))

    def describe(self, file: FoundFile) -> ArrayFile:
        """See `ArraySource.describe`."""
        path = file.path
        with _open(path) as opened:
            images = _dataset(opened, path, self.images)
            encoded = _is_encoded(images)
            if not encoded and images.dtype.kind not in "iufb":
                raise DataError(
                    f"{path}: expected integers, floats, booleans, or encoded images as bytes in {self.images}, "
                    f"found {images.dtype}"
                )
            count = images.shape[0] if images.shape else 0
            ids, classes = self._columns.read(opened, lambda name: _dataset(opened, path, name)[()], count, path)
            bands, units = bands_and_units(images.attrs, opened.attrs)
            return ArrayFile(
                path=path,
                stem=file.stem,
                array=self.images,
                shape=images.shape,
                dtype=images.dtype,
                stamp=stamp(path),
                encoded=encoded,
                block=images.chunks[0] if images.chunks and not encoded else 1,
                ids=ids,
                classes=classes,
                bands=bands,
                units=units,
            )

    def open_rows(self, path: Path) -> Opened:
        """See `ArraySource.open_rows`."""
        file = _open(path)
        return Opened(file[self.images], file.close)


def _survives(read: Callable[[], object], seconds: int) -> bool:
    """Tell whether a function comes back within a time, with a result or an exception, from a child process."""
    with ignore_warnings(__name__):  # about forks beside threads: h5py holds its lock meanwhile
        child = os.fork()
    if not child:
        with suppress(BaseException):
            faulthandler.disable()
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(seconds)
            read()
        os._exit(0)
    return os.waitpid(child, 0)[1] == 0


def _open(path: Path) -> h5py.File:
    # Read-only and some network file systems refuse locks.
    return h5py.File(path, "r", locking=False)


def _dataset(file: h5py.File, path: Path, name: str) -> h5py.Dataset:
    found: Any = file.get(name)
    if not isinstance(found, h5py.Dataset):
        raise DataError(f"{path}: there is no dataset {name}, found {listed(file)}")
    outside = found.file.filename != file.filename or found.external is not None or found.is_virtual
    check_inside(path, f"its dataset {name} lies in other files (external link, external storage or virtual)", outside)
    return found


def _is_encoded(images: h5py.Dataset) -> bool:
    """Tell whether each row holds the bytes of an image file; an array of pixels never has the shape (n,)."""
    pieces = h5py.check_vlen_dtype(images.dtype)
    whole = h5py.check_string_dtype(images.dtype) is not None or images.dtype.kind in "SV"
    return images.ndim == 1 and images.dtype.names is None and (whole or pieces == np.uint8)
