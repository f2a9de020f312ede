"""Files at a URL (S3, HTTP, …) through fsspec: listed, opened, or copied to the cache."""

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import quote, unquote

import fsspec

from anomalymatch.data.download import (
    CHUNK_BYTES,
    CONNECT_TIMEOUT_S,
    READ_TIMEOUT_S,
    InterruptedTransferError,
    Transfer,
    download,
    with_retries,
)
from anomalymatch.data.find import is_hidden
from anomalymatch.data.source import hash_rows
from anomalymatch.errors import DataError

logger = logging.getLogger(__name__)

_HTTP = ("http", "https")
_PROTOCOLS = (*_HTTP, "s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "hf", "ftp", "sftp", "ssh", "smb", "hdfs",
              "webhdfs", "memory")  # fmt: skip
"""Protocols that only transfer files. Others of fsspec run templates of a file or unpickle the metadata of a cache."""
_VERSIONS = ("ETag", "etag", "Last-Modified", "LastModified", "last_modified", "mtime", "updated", "created")


class RemoteFile(NamedTuple):
    """Remote file: path below the root, path in the file system; size in bytes and version, if known."""

    id: str
    path: str
    size: int | None
    version: str


class Remote:
    """URL and its file system, which each process opens for itself.

    Raises:
        DataError: if the protocol is unknown, needs a package that is not installed, or rejects the options.
    """

    def __init__(self, url: str, options: Mapping[str, Any] | None = None) -> None:
        self.url, self.options = url.rstrip("/"), _plain(options or {})
        self.protocol = url.split("://", 1)[0]
        if self.protocol not in _PROTOCOLS or "::" in url:
            raise DataError(f"{url}: the protocol is not one of {', '.join(_PROTOCOLS)}")
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
            raise DataError(f"{self.url}: {self.protocol}:// needs a package that is not installed: {error}") from None
        except Exception as error:
            raise DataError(f"{self.url}: cannot be opened: {transfer_reason(error)}") from None

    @property
    def filesystem(self) -> Any:
        """File system of fsspec."""
        if self._process != os.getpid():  # the thread that serves a connection does not survive a fork
            self._connect()
        return self._fs

    def list(self, suffixes: Sequence[str]) -> list[RemoteFile]:
        """List the files below the URL that end in one of `suffixes`, sorted by path, without hidden files.

        Raises:
            DataError: if the URL cannot be listed.
        """
        try:
            found = with_retries(self._find, self.url)
        except Exception as error:
            raise DataError(f"{self.url}: cannot be listed: {transfer_reason(error)}") from None
        entries = (self._entry(name, info) for name, info in found.items())
        return sorted(e for e in entries if e and e.id.lower().endswith(tuple(suffixes)) and not is_hidden(e.id))

    def _find(self) -> dict[str, dict[str, Any]]:
        self.filesystem.invalidate_cache()
        options = {"on_error": _skip_missing} if self.protocol in _HTTP else {}
        return self.filesystem.find(self.base, detail=True, **options)

    def _entry(self, name: str, info: Mapping[str, Any]) -> RemoteFile | None:
        base = self.base.rstrip("/") + "/"
        if not name.startswith(base):
            return None
        id_ = name[len(base) :]
        if self.protocol in _HTTP:
            id_ = unquote(id_)
            name = base + quote(id_)
        return RemoteFile(id_, name, info.get("size"), _version(info))

    def file(self) -> RemoteFile:
        """Look up the file at the URL itself.

        Raises:
            DataError: if it does not exist.
        """
        return self.with_size(RemoteFile(unquote(PurePosixPath(self.base).name), self.base, None, ""))

    def with_size(self, entry: RemoteFile) -> RemoteFile:
        """Look up size and version of an entry whose listing did not tell them.

        Raises:
            DataError: if it does not exist.
        """
        if entry.size is not None:
            return entry
        try:
            info = with_retries(lambda: self.filesystem.info(entry.path), entry.path)
        except FileNotFoundError:
            raise DataError(f"{self.url}: expected a file, found nothing at {entry.path}") from None
        except Exception as error:
            raise DataError(f"{self.url}: {entry.path} cannot be looked up: {transfer_reason(error)}") from None
        return entry._replace(size=info.get("size"), version=_version(info))

    def copy(self, entry: RemoteFile, target: Path) -> None:
        """Copy a file to `target`, unless a file of its size is there.

        Raises:
            DataError: if it cannot be copied.
            StorageError: if `target` cannot be written.
        """
        if target.is_file() and entry.size not in (None, target.stat().st_size):
            target.unlink()
        plain = self.protocol in _HTTP and not self.options
        connect = None if plain else partial(self._open, entry)
        download(entry.path, target, size=entry.size, connect=connect)

    @contextmanager
    def _open(self, entry: RemoteFile, start: int) -> Iterator[Transfer]:
        try:
            file = self.filesystem.open(entry.path, "rb")
            if start:
                file.seek(start)
        except (FileNotFoundError, PermissionError) as error:
            raise DataError(f"{entry.path}: cannot be copied: {transfer_reason(error)}") from None
        except Exception as error:
            raise InterruptedTransferError(transfer_reason(error)) from None
        with file:
            yield Transfer(start, entry.size, iter(partial(file.read, CHUNK_BYTES), b""))


def is_remote(root: object) -> bool:
    """Tell whether `root` is a URL such as s3://… or https://…; `file://` is a local path."""
    return isinstance(root, str) and "://" in root and not root.startswith("file://")


def local_path(
    root: str | Path,
    cache_dir: str | Path | None,
    suffixes: Sequence[str],
    storage_options: Mapping[str, Any] | None = None,
) -> Path:
    """Return a local path: `root` itself, or a copy of a URL in `cache_dir`, made on the first call.

    Args:
        root: path, or URL of a file or folder.
        cache_dir: folder of the copies, which are kept for each version of the original.
        suffixes: lower-case suffixes of the files to copy from a folder; a URL that ends in one is a single file.
        storage_options: options of the URL's file system.

    Raises:
        DataError: if the URL cannot be read, has no such file, or needs a package that is not installed.
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
        entry = remote.file()
        target = cache / hash_entries(remote.url, [entry])[:16] / entry.id
        remote.copy(entry, target)
        return target
    entries = [remote.with_size(entry) for entry in remote.list(suffixes)]
    if not entries:
        raise DataError(f"{root}: expected files that end in {', '.join(suffixes)}, found none")
    folder = cache / hash_entries(remote.url, entries)[:16] / (PurePosixPath(remote.base).name or "root")
    for entry in entries:
        remote.copy(entry, folder / entry.id)
    return folder


def transfer_reason(error: Exception) -> str:
    """Return the kind of an error and the first line of its message."""
    if isinstance(error, FileNotFoundError):
        return "it is not there"
    return ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])


def hash_entries(salt: str, entries: Sequence[RemoteFile]) -> str:
    """Hash names, sizes and versions of files."""
    return hash_rows(salt, ((entry.id, entry.size, entry.version) for entry in entries))


def _plain(value: Any) -> Any:
    """Convert mappings and sequences of a configuration to dict and list, which file systems expect."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, Sequence) and not isinstance(value, str) else value


def _version(info: Mapping[str, Any]) -> str:
    return next((str(info[key]) for key in _VERSIONS if info.get(key)), "")


def _timeouts(protocol: str) -> dict[str, Any]:
    """Return file system options without which a silent server would block forever."""
    if protocol not in _HTTP:
        return {}
    import aiohttp

    timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S, sock_read=READ_TIMEOUT_S)
    return {"client_kwargs": {"timeout": timeout}}


def _skip_missing(error: Exception) -> None:
    """Skip a dead link in a listing; raise any other error, so that a failed listing does not look empty."""
    if not isinstance(error, FileNotFoundError):
        raise error
    logger.warning("Left out a link that leads nowhere: %s", error)
