"""Cache on disk for arrays that are expensive to compute: key, lock, atomic write, checksum."""

import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from filelock import FileLock

from anomalymatch.checksums import CHECKSUMS, damaged_files, write_checksums
from anomalymatch.files import atomic_folder, make_folder, remove_leftovers, storage_errors, write_text

logger = logging.getLogger(__name__)
FORMAT = 1
"""Version of the layout on disk; it is part of every key."""
_INFO = "info.json"


class Blocks(NamedTuple):
    """Array that is computed and written block by block along its first axis, in constant memory."""

    shape: tuple[int, ...]
    dtype: str
    blocks: Iterable[np.ndarray]


class CacheEntry(NamedTuple):
    """Arrays by name, mapped from disk and read-only, and the JSON values that were stored with them."""

    arrays: Mapping[str, np.ndarray]
    info: Mapping[str, Any]


Contents = tuple[Mapping[str, np.ndarray | Blocks], Mapping[str, Any]]
"""Arrays to store, whose names become file names, and JSON values such as ids and rejects."""


def cache_key(depends: Mapping[str, object]) -> str:
    """Hash everything that the cached content depends on.

    Args:
        depends: JSON values and arrays by name; all bytes of arrays count, the order of the names does not.
    """
    text = json.dumps({"format": FORMAT, "depends": dict(depends)}, sort_keys=True, default=_describe)
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


@dataclass(frozen=True)
class Cache:
    """Entries on disk, each a folder below `folder` with `.npy` files, `info.json` and checksums.

    An entry is complete or missing, even after a kill. A corrupt entry is reported in the log and treated
    as missing. To resume long work, store it as several entries.
    """

    folder: Path

    def get(self, name: str, compute: Callable[[], Contents]) -> CacheEntry:
        """Return the entry `name`: from disk, or computed now, by one process while the others wait.

        Raises:
            StorageError: if the folder cannot be written to.
        """
        with self.locked():
            return self.read(name) or self.write(name, *compute())

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the lock of the folder against other processes and threads; one thread may take it several times."""
        lock = FileLock(make_folder(self.folder) / ".lock", is_singleton=True)
        with storage_errors(self.folder):
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def read(self, name: str) -> CacheEntry | None:
        """Return the entry `name`; None if it is missing or corrupt, which is logged. The caller holds the lock."""
        path = self.folder / name
        if not path.exists():
            return None
        try:
            sums = json.loads((path / CHECKSUMS).read_text(encoding="utf-8"))
            unchecked = {file.name for file in path.iterdir()} - {CHECKSUMS, *sums}
            if wrong := [*damaged_files(path), *sorted(unchecked)]:
                raise ValueError(f"the checksum of {wrong[0]} is wrong")
            return _load(path)
        except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError) as error:
            logger.warning("The cache entry %s is corrupt (%s): computing it again", path, error)
            return None

    def write(
        self,
        name: str,
        arrays: Mapping[str, np.ndarray | Blocks],
        info: Mapping[str, Any],
        *,
        write_files: Callable[[Path], None] | None = None,
    ) -> CacheEntry:
        """Store the entry `name`, replacing an old one, and return it as it is read. The caller holds the lock.

        Args:
            name: name of the entry.
            arrays: arrays to store.
            info: JSON values to store.
            write_files: writes files of other kinds into the folder that it is called with.

        Raises:
            StorageError: if the folder cannot be written to.
        """
        path = self.folder / name
        remove_leftovers(self.folder)
        with atomic_folder(path) as temporary:
            for key, array in arrays.items():
                _write_array(temporary / f"{key}.npy", array)
            if write_files is not None:
                write_files(temporary)
            write_text(temporary / _INFO, json.dumps(dict(info)))
            write_checksums(temporary)
        return _load(path)


def _load(path: Path) -> CacheEntry:
    arrays = {file.stem: np.load(file, mmap_mode="r", allow_pickle=False) for file in path.glob("*.npy")}
    return CacheEntry(arrays, json.loads((path / _INFO).read_text(encoding="utf-8")))


def _write_array(path: Path, array: np.ndarray | Blocks) -> None:
    # np.save loses the error of a full disk, and a full disk kills a process that writes to a memory map.
    shape, dtype, blocks = array if isinstance(array, Blocks) else (array.shape, array.dtype.str, [array])
    if np.dtype(dtype).hasobject:
        raise TypeError(f"{path.stem} holds Python objects, which would have to be pickled")
    written = 0
    with path.open("wb") as file:
        header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": tuple(map(int, shape))}
        np.lib.format.write_array_header_1_0(file, header)
        for block in blocks:
            file.write(np.ascontiguousarray(block, dtype=dtype).reshape(-1).view(np.uint8).data)
            written += block.size
    if written != math.prod(shape):
        raise ValueError(f"{path.stem}: expected {math.prod(shape):,} numbers for the shape {shape}, got {written:,}")


def _describe(value: object) -> object:
    if isinstance(value, np.ndarray) and not value.dtype.hasobject:
        digest = hashlib.blake2b(np.ascontiguousarray(value).tobytes(), digest_size=12).hexdigest()
        return [value.dtype.str, value.shape, digest]
    raise TypeError(f"a cache key takes JSON values and arrays, not {type(value).__name__}")
