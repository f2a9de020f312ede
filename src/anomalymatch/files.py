"""Atomic writes of files and folders, and clear errors when the storage refuses."""

import csv
import errno
import io
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from anomalymatch.errors import StorageError
from anomalymatch.text import csv_cell, safe_name

_REASONS = {
    errno.ENOSPC: "the disk is full: free some space",
    errno.EFBIG: "the file would be larger than the operating system allows (ulimit -f)",
    errno.EDQUOT: "the disk quota is used up: free some space",
    errno.EROFS: "the file system is read-only: choose another folder",
    errno.EACCES: "permission denied: choose a folder you can write to",
    errno.EPERM: "permission denied: choose a folder you can write to",
    errno.ENOTDIR: "a file stands where a folder is needed: choose another folder",
    errno.EEXIST: "a file stands where a folder is needed: choose another folder",
}
_HOST = safe_name(socket.gethostname())
_TEMPORARY = re.compile(r"\..+\.([\w-]+)-(\d+)-\w+\.part")
"""Name of a temporary file or folder, with the machine and the process that writes it."""


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Convert operating system errors while writing `path` to a `StorageError` that says what to do.

    Raises:
        StorageError: if the disk is full, the folder read-only or a file in the way.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _REASONS:
            raise
        raise StorageError(f"cannot write {path}: {_REASONS[error.errno]}") from error


def make_folder(path: Path) -> Path:
    """Create a folder with its parents if it does not exist, and return it."""
    with storage_errors(path):
        path.mkdir(parents=True, exist_ok=True)
    return path


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, which is synced and renamed to `path` when the block succeeds.

    If the process is killed, the old file (or none) is left, never half of the new one.
    """
    make_folder(path.parent)
    with storage_errors(path):
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=_prefix(path), suffix=".part")
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            _sync(temporary)
            os.chmod(temporary, 0o666 & ~_umask())
            os.replace(temporary, path)
            _sync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`, which replaces `path` when the block succeeds."""
    make_folder(path.parent)
    with storage_errors(path):
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=_prefix(path), suffix=".part"))
        try:
            yield temporary
            for entry in (temporary, *temporary.rglob("*")):
                if entry.is_file():
                    _sync(entry)
                elif entry.is_dir():
                    _sync_folder(entry)
            os.chmod(temporary, 0o777 & ~_umask())
            if path.exists():
                shutil.rmtree(path)
            os.replace(temporary, path)
            _sync_folder(path.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` atomically, as UTF-8."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write a table to a CSV file, atomically, with texts as `csv_cell` makes them."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([csv_cell(cell) if isinstance(cell, str) else cell for cell in row] for row in rows)
    write_text(path, text.getvalue())


def _prefix(path: Path) -> str:
    return f".{path.name}.{_HOST}-{os.getpid()}-"


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    """Sync the names in a folder: without this, a power cut can undo a rename."""
    if os.name == "posix":
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a network file system that cannot
                raise
        finally:
            os.close(handle)


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files and folders that killed processes have left in `folder`, not below it.

    Their names hold the process; those of living processes stay.
    """
    for path in folder.glob(".*.part"):
        found = _TEMPORARY.fullmatch(path.name)
        if found is None or found[1] != _HOST or _is_alive(int(found[2])):
            continue
        with suppress(OSError):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


def _is_alive(process: int) -> bool:
    if os.name != "posix":
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
