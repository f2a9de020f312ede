"""Files behind a URL, through fsspec: listed, read whole with retries, or copied to the cache."""

import hashlib
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TypeVar
from urllib.parse import quote, unquote

import fsspec

from anomalymatch.data.download import download_lock, fetch
from anomalymatch.data.find import is_hidden
from anomalymatch.errors import AnomalyMatchError, DataError
from anomalymatch.files import atomic_file
from anomalymatch.progress import progress

logger = logging.getLogger(__name__)
T = TypeVar("T")

TRIES = 3
PAUSE_S = 1.0
"""Pause after the first failure in seconds, doubled after each further one."""
CONNECT_TIMEOUT_S = 10.0
READ_TIMEOUT_S = 60.0
CHUNK_BYTES = 2**22
PACKAGES = {
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "http": "aiohttp requests",
    "https": "aiohttp requests",
    "az": "adlfs",
    "abfs": "adlfs",
    "ssh": "paramiko",
    "sftp": "paramiko",
}
_HTTP = ("http", "https")
_VERSIONS = ("ETag", "etag", "Last-Modified", "LastModified", "last_modified", "mtime", "updated", "created")
_FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
_MEGABYTE = 10**6


class Entry(NamedTuple):
    """A file: its path below the root, its path in the file system, its size in bytes and its version if known."""

    id: str
    path: str
    size: int | None
    version: str


class Remote:
    """A URL and the file system behind it, which each process opens for itself.

    Args:
        url: of a file or folder.
        options: what the file system is opened with.

    Raises:
        DataError: if the protocol is unknown, needs a package that is not installed, or refuses the options.
    """

    def __init__(self, url: str, options: Mapping[str, Any] | None = None) -> None:
        self.url, self.options = url.rstrip("/"), _plain(options or {})
        self.protocol = url.split("://", 1)[0]
        self._connect()

    def __getstate__(self) -> dict[str, Any]:
        return {"url": self.url, "options": self.options}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def _connect(self) -> None:
        self._process = os.getpid()
        try:
            self._fs, self.base = fsspec.core.url_to_fs(self.url, **(_timeouts(self.protocol) | self.options))
        except ImportError as error:
            package = PACKAGES.get(self.protocol)
            hint = f"pip install {package}" if package else str(error)
            raise DataError(f"{self.url}: {self.protocol}:// needs a package that is not installed: {hint}") from None
        except Exception as error:
            raise DataError(f"{self.url}: cannot be opened: {reason(error)}") from None

    @property
    def filesystem(self) -> Any:
        """The file system of fsspec."""
        if self._process != os.getpid():  # the thread that serves a connection does not survive a fork
            self._connect()
        return self._fs

    def list(self, suffixes: Sequence[str]) -> list[Entry]:
        """List the files below the URL that end in one of `suffixes`, sorted by path; hidden ones are left out.

        Raises:
            DataError: if it cannot be listed.
        """
        try:
            found = with_retries(self._find, self.url)
        except Exception as error:
            raise DataError(f"{self.url}: cannot be listed: {reason(error)}") from None
        entries = (self._entry(name, info) for name, info in found.items())
        return sorted(e for e in entries if e and e.id.lower().endswith(tuple(suffixes)) and not is_hidden(e.id))

    def _find(self) -> dict[str, dict[str, Any]]:
        self.filesystem.invalidate_cache()
        options = {"on_error": _note_missing} if self.protocol in _HTTP else {}
        return self.filesystem.find(self.base, detail=True, **options)

    def _entry(self, name: str, info: Mapping[str, Any]) -> Entry | None:
        base = self.base.rstrip("/") + "/"
        if not name.startswith(base):
            return None
        id_ = name[len(base) :]
        if self.protocol in _HTTP:
            id_ = unquote(id_)
            name = base + quote(id_)
        return Entry(id_, name, info.get("size"), _version(info))

    def info(self) -> Entry:
        """Describe the one file that the URL names.

        Raises:
            DataError: if it is not there.
        """
        return self._described(Entry(unquote(PurePosixPath(self.base).name), self.base, None, ""))

    def _described(self, entry: Entry) -> Entry:
        if entry.size is not None:
            return entry
        try:
            info = with_retries(lambda: self.filesystem.info(entry.path), entry.path)
        except FileNotFoundError:
            raise DataError(f"{self.url}: expected a file, found nothing at {entry.path}") from None
        except Exception as error:
            raise DataError(f"{self.url}: {entry.path} cannot be looked up: {reason(error)}") from None
        return entry._replace(size=info.get("size"), version=_version(info))

    def copy(self, entry: Entry, target: Path) -> None:
        """Copy a file to `target`, unless it is there with the right size.

        Raises:
            DataError: if it cannot be fetched whole.
            StorageError: if `target` cannot be written.
        """
        if _is_complete(target, entry):
            return
        target.unlink(missing_ok=True)
        if self.protocol in _HTTP and not self.options:  # resumes what broke off, also in an earlier process
            fetch(entry.path, target, md5=None)
        else:
            with download_lock(target):
                self._transfer(entry, target)
        if not _is_complete(target, entry):
            size = target.stat().st_size
            target.unlink()
            raise DataError(f"{entry.path}: got {size:,} of {entry.size or 0:,} bytes, so what came was deleted")

    def _transfer(self, entry: Entry, target: Path) -> None:
        if _is_complete(target, entry):  # another process was faster
            return
        size = max(1, (entry.size or 0) // _MEGABYTE)
        try:
            with (
                atomic_file(target) as part,
                part.open("wb") as file,
                progress(f"Copying {target.name}", size, "MB") as advance,
            ):
                with_retries(lambda: self._append(entry, file, advance), entry.path)
        except AnomalyMatchError:
            raise
        except Exception as error:
            raise DataError(f"{entry.path}: cannot be copied: {reason(error)}") from None

    def _append(self, entry: Entry, file: Any, advance: Any) -> None:
        with self.filesystem.open(entry.path, "rb") as opened:
            if file.tell():  # go on where the last attempt broke off
                opened.seek(file.tell())
            while chunk := opened.read(CHUNK_BYTES):
                file.write(chunk)
                advance(max(1, len(chunk) // _MEGABYTE))


def is_remote(root: object) -> bool:
    """Whether `root` is a URL: s3://…, https://…; but `file://` is this machine."""
    return isinstance(root, str) and "://" in root and not root.startswith("file://")


def local_path(
    root: str | Path,
    cache_dir: str | Path | None,
    suffixes: Sequence[str],
    storage_options: Mapping[str, Any] | None = None,
) -> Path:
    """Return a path on this machine: `root` itself, or for a URL a copy in `cache_dir`, made on the first call.

    Args:
        root: a path, or the URL of a file or folder.
        cache_dir: where copies are kept, each under the version of its original.
        suffixes: of the files to copy from a folder, in lower case; a URL that ends so is a single file.
        storage_options: what the file system is opened with.

    Raises:
        DataError: if the URL cannot be read, holds no such file, or needs a package that is not installed.
        StorageError: if the cache cannot be written.
    """
    if isinstance(root, Path) or not is_remote(root):
        text = str(root)
        return Path(unquote(text.removeprefix("file://")) if text.startswith("file://") else text).expanduser()
    if cache_dir is None:
        raise DataError(f"{root}: set dataset.source.cache_dir to the folder that is to hold the copy of it")
    remote = Remote(root, storage_options)
    cache = Path(cache_dir).expanduser() / "remote"
    if remote.url.lower().endswith(tuple(suffixes)):
        entry = remote.info()
        target = cache / digest(remote.url, [entry])[:16] / entry.id
        remote.copy(entry, target)
        return target
    entries = [remote._described(entry) for entry in remote.list(suffixes)]
    if not entries:
        raise DataError(f"{root}: expected files that end in {', '.join(suffixes)}, found none")
    folder = cache / digest(remote.url, entries)[:16] / (PurePosixPath(remote.base).name or "root")
    for entry in entries:
        remote.copy(entry, folder / entry.id)
    return folder


def with_retries(call: Callable[[], T], what: str) -> T:
    """Return what `call` returns; try three times, with growing pauses, unless the file is not there.

    Raises:
        Exception: whatever the last attempt raised.
    """
    for attempt in range(TRIES - 1):
        try:
            return call()
        except _FINAL:
            raise
        except Exception as error:  # clients have errors of their own for a broken connection
            logger.info("%s: %s, trying again", what, reason(error))
            time.sleep(PAUSE_S * 2**attempt)
    return call()


def reason(error: Exception) -> str:
    """The first line of what `error` says, or its kind."""
    if isinstance(error, FileNotFoundError):
        return "it is not there"
    text = str(error).strip().split("\n", 1)[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def digest(salt: str, entries: Sequence[Entry]) -> str:
    """Hash names, sizes and versions."""
    sha = hashlib.sha256(salt.encode())
    for entry in entries:
        sha.update(f"\n{entry.id}\0{entry.size}\0{entry.version}".encode())
    return sha.hexdigest()


def _plain(value: Any) -> Any:
    """Dictionaries and lists of a configuration as those of Python, which file systems expect."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, Sequence) and not isinstance(value, str) else value


def _version(info: Mapping[str, Any]) -> str:
    return next((str(info[key]) for key in _VERSIONS if info.get(key)), "")


def _is_complete(target: Path, entry: Entry) -> bool:
    return target.is_file() and entry.size in (None, target.stat().st_size)


def _timeouts(protocol: str) -> dict[str, Any]:
    """Without them a server that falls silent would be waited for."""
    if protocol not in _HTTP:
        return {}
    import aiohttp

    timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S, sock_read=READ_TIMEOUT_S)
    return {"client_kwargs": {"timeout": timeout}}


def _note_missing(error: Exception) -> None:
    """A dead link in a listing is left out; a listing that could not be read must not pass for an empty one."""
    if not isinstance(error, FileNotFoundError):
        raise error
    logger.warning("left out a link that leads nowhere: %s", error)
