"""Download of one file: resumed after a break, checked, and moved into place when it is complete."""

import hashlib
import logging
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, wait
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import requests
import urllib3
from filelock import FileLock, Timeout

from anomalymatch.errors import AnomalyMatchError, DownloadError
from anomalymatch.files import make_folder, storage_errors
from anomalymatch.progress import progress

logger = logging.getLogger(__name__)
T = TypeVar("T")

CONNECT_TIMEOUT_S = 8.0
"""Longest wait for the first answer of a server."""
READ_TIMEOUT_S = 60.0
"""Longest silence of a server during a transfer."""
PAUSE_S = 1.0
"""Pause after the first failed attempt in seconds, doubled after each further one."""
ATTEMPTS = 4
CHUNK_BYTES = 2**20
_MEGABYTE = 10**6
_FINAL = (AnomalyMatchError, FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)


class Transfer(NamedTuple):
    """Open connection: the first byte it delivers, the size of the whole file if known, and the bytes."""

    start: int
    size: int | None
    chunks: Iterable[bytes]


class InterruptedTransferError(Exception):
    """A transfer ended early; another attempt may succeed."""


Connect = Callable[[int], AbstractContextManager[Transfer]]
"""Opens a file from a given byte on."""


def download(
    url: str, target: Path, *, md5: str | None = None, size: int | None = None, connect: Connect | None = None
) -> Path:
    """Download a file, unless it exists; return its path.

    An incomplete download is kept as `target` + ".part", and a later call resumes it. Only one process downloads a
    file; others wait for it. A broken transfer is resumed up to `ATTEMPTS` - 1 times; a server that cannot be reached
    at first is asked once.

    Args:
        url: address of the file.
        target: path of the file; its folder is created.
        md5: expected checksum; None skips the check.
        size: expected size in bytes; None takes the size that the server gives, if any.
        connect: opens the file from a byte on; None uses HTTP.

    Raises:
        DownloadError: if the server cannot be reached or refuses, or a checksum is wrong.
        StorageError: if `target` cannot be written.
    """
    if not target.exists():
        with download_lock(target), storage_errors(target):
            if not target.exists():
                _fill(url, target, connect or partial(_connect_http, url), md5, size)
                return target
    if wrong := _wrong_checksum(target, md5):
        raise DownloadError(
            f"{target} is damaged or another file ({wrong}): replace it, or delete it to download it again, "
            "or take dataset=demo"
        )
    return target


@contextmanager
def download_lock(target: Path) -> Iterator[None]:
    """Hold the right to write `target` against all other processes."""
    make_folder(target.parent)
    lock = FileLock(target.with_name(f".{target.name}.lock"))
    with storage_errors(target):
        try:
            lock.acquire(timeout=1)
        except Timeout:
            logger.info("Waiting for another process that downloads %s", target)
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


def with_retries(call: Callable[[], T], what: str, *, attempts: int = 3, retry: type[Exception] = Exception) -> T:
    """Return the result of `call`; repeat it with growing pauses if it fails, but not if a file does not exist.

    Raises:
        Exception: the error of the last attempt.
    """
    for attempt in range(attempts - 1):
        try:
            return call()
        except _FINAL:
            raise
        except retry as error:
            logger.info("%s: %s, trying again", what, error or type(error).__name__)
            time.sleep(PAUSE_S * 2**attempt)
    return call()


def with_timeout(seconds: float, call: Callable[[], T]) -> T:
    """Return the result of `call`, also if it blocks without a timeout of its own, as the look-up of a host name does.

    Raises:
        TimeoutError: if it takes longer than `seconds`; its thread is abandoned.
    """
    result: Future[T] = Future()

    def run() -> None:
        try:
            result.set_result(call())
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=run, daemon=True).start()  # an executor would wait for it at exit
    if not wait([result], seconds).done:
        raise TimeoutError(f"no answer within {seconds:g} s")
    return result.result()


def _fill(url: str, target: Path, connect: Connect, md5: str | None, size: int | None) -> None:
    part = target.with_name(f"{target.name}.part")
    reason = ""
    # A resumed part may belong to an older file, so a wrong checksum makes it start from the beginning once.
    for _ in range(2):
        try:
            resumed = with_retries(
                lambda: _transfer(part, connect, size), url, attempts=ATTEMPTS, retry=InterruptedTransferError
            )
        except (InterruptedTransferError, _RefusedError) as error:
            reason = str(error)
            break
        reason = _wrong_checksum(part, md5)
        if not reason:
            part.replace(target)
            return
        part.unlink()
        reason += ", so the download was deleted"
        if not resumed:
            break
    raise DownloadError(
        f"cannot download {url} ({reason}): put the file {target.name} into {target.parent} yourself, or take "
        "dataset=demo"
    )


def _transfer(part: Path, connect: Connect, size: int | None) -> bool:
    """Complete the part file; tell whether it was resumed.

    Raises:
        InterruptedTransferError: if it is not complete.
    """
    have = part.stat().st_size if part.exists() else 0
    with connect(have) as transfer:
        total = transfer.size if size is None else size
        if transfer.start not in (0, have) or (total is not None and have > total):
            part.unlink()
            raise InterruptedTransferError(f"the server cannot resume after byte {have:,}")
        with (
            part.open("ab" if transfer.start else "wb") as file,
            progress(f"Downloading {part.stem}", max(1, (total or 0) // _MEGABYTE), "MB") as advance,
        ):
            done = transfer.start
            advance(done // _MEGABYTE)
            for chunk in _received(transfer.chunks, done):
                file.write(chunk)
                advance((done + len(chunk)) // _MEGABYTE - done // _MEGABYTE)
                done += len(chunk)
    if total is not None and done != total:
        raise InterruptedTransferError(f"got {done:,} of {total:,} bytes")
    return transfer.start > 0


def _received(chunks: Iterable[bytes], done: int) -> Iterator[bytes]:
    """Yield chunks; errors of the connection, unlike those of the disk, count as interruptions."""
    try:
        for chunk in chunks:
            yield chunk
            done += len(chunk)
    except Exception as error:  # clients have their own errors for a broken connection
        kind = type(error).__name__
        raise InterruptedTransferError(f"the connection broke after {done:,} bytes, {kind}") from None


class _RefusedError(DownloadError):
    """The server cannot be reached or refuses the file; another attempt is useless."""


@contextmanager
def _connect_http(url: str, start: int) -> Iterator[Transfer]:
    # Without compression, which would change size and checksum.
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
    timeout = (CONNECT_TIMEOUT_S, READ_TIMEOUT_S)
    try:
        response = with_timeout(
            CONNECT_TIMEOUT_S, lambda: requests.get(url, headers=headers, stream=True, timeout=timeout)
        )
    except (requests.RequestException, TimeoutError) as error:
        raise _connection_error(error, resumed=start > 0) from None
    with response:
        answer = f"the server answers {response.status_code} {response.reason}"
        if response.status_code in (408, 429) or response.status_code >= 500:
            raise InterruptedTransferError(answer)
        if response.status_code not in (200, 206) and not (response.status_code == 416 and start):
            raise _RefusedError(answer)
        first, size = _extent(response, start)
        if response.status_code == 416:  # nothing comes after `start`: the part is complete, or of another file
            yield Transfer(start if size == start else -1, size, ())
        else:
            yield Transfer(first, size, response.raw.stream(CHUNK_BYTES, decode_content=False))


def _connection_error(error: Exception, *, resumed: bool) -> Exception:
    unreachable = InterruptedTransferError if resumed else _RefusedError
    if isinstance(error, TimeoutError | requests.Timeout):
        return unreachable("the server does not answer in time")
    if isinstance(error, requests.exceptions.SSLError):
        return _RefusedError("its certificate cannot be verified")
    if isinstance(error, requests.ConnectionError):
        if error.args and isinstance(error.args[0], urllib3.exceptions.ProtocolError):
            return InterruptedTransferError("the connection broke")
        return unreachable("there is no connection to it")
    return _RefusedError(type(error).__name__)


def _extent(response: requests.Response, start: int) -> tuple[int, int | None]:
    """Return the first byte of the response and the size of the whole file, None if that is unknown."""
    length = response.headers.get("Content-Length", "")
    size = int(length) if length.isdecimal() else None
    if response.status_code == 200:
        return 0, size
    found = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)", response.headers.get("Content-Range", ""))
    if not found:
        return start, None if size is None or response.status_code == 416 else start + size
    return int(found[1] or 0), int(found[2]) if found[2] != "*" else None


def _wrong_checksum(file: Path, md5: str | None) -> str:
    """Describe a wrong checksum of `file`; empty if it is right, or unknown."""
    if md5 is None:
        return ""
    with file.open("rb") as opened:
        # MD5 guards against accidents only, which systems that forbid it for security allow.
        found = hashlib.file_digest(opened, partial(hashlib.md5, usedforsecurity=False)).hexdigest()
    return "" if found == md5.lower() else f"expected the md5 {md5}, got {found}"
