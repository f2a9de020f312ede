"""Files from the web: resumed where they broke off, checked, and never seen half done."""

import hashlib
import logging
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO, TypeVar

import requests
import urllib3
from filelock import FileLock, Timeout

from anomalymatch.errors import DownloadError
from anomalymatch.files import make_folder, storage_errors
from anomalymatch.progress import progress

logger = logging.getLogger(__name__)

CHUNK_BYTES = 2**18
_MEGABYTE = 10**6
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class _Request:
    url: str
    target: Path
    md5: str | None
    sha256: str | None
    connect_timeout_s: float
    read_timeout_s: float

    @property
    def part(self) -> Path:
        return self.target.with_name(f"{self.target.name}.part")

    def error(self, reason: str) -> DownloadError:
        return DownloadError(
            f"cannot download {self.url} ({reason}): put the file {self.target.name} into {self.target.parent} "
            "yourself, or take dataset=demo"
        )


class _BrokenOffError(Exception):
    """The transfer did not come to its end; another attempt may."""


class _UnreachableError(_BrokenOffError):
    """There is no connection to the server."""


def fetch(
    url: str,
    target: Path,
    *,
    md5: str | None,
    sha256: str | None = None,
    connect_timeout_s: float = 8.0,
    read_timeout_s: float = 30.0,
    attempts: int = 4,
    backoff_s: float = 1.0,
) -> Path:
    """Download `url` to `target`, unless it is there; return `target`.

    Until its checksum is right the file is called `target` + ".part"; a later call goes on where it broke off. Two
    processes with the same target wait for one another.

    Args:
        url: what to download.
        target: where to; its folder is created.
        md5: the expected checksum, None does not check.
        sha256: another expected checksum.
        connect_timeout_s: seconds until the server must have begun to answer.
        read_timeout_s: seconds without a byte after which the connection counts as broken.
        attempts: how often to try; a server that cannot be reached at all is tried once.
        backoff_s: pause after the first failure in seconds, doubled after each further one.

    Raises:
        DownloadError: if the server cannot be reached or refuses, or a checksum is wrong.
        StorageError: if `target` cannot be written.
    """
    request = _Request(url, target, md5, sha256, connect_timeout_s, read_timeout_s)
    if not target.exists():
        with download_lock(target):
            if not target.exists():
                with storage_errors(target):
                    _attempt(request, attempts, backoff_s)
                    request.part.replace(target)
                return target
    _verify_present(request)
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
            logger.info("waiting for another process that downloads %s", target)
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


def within(seconds: float, call: Callable[[], _T]) -> _T:
    """Return what `call` returns, but wait no longer than `seconds`: a look-up of a host name knows no timeout.

    Raises:
        TimeoutError: if it takes longer; it is left to end by itself.
    """
    results: list[_T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(call())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError(f"no answer within {seconds:g} s")
    return results[0]


def _attempt(request: _Request, attempts: int, backoff_s: float) -> None:
    """Fill and check the part file, trying again when the connection breaks."""
    for attempt in range(attempts):
        last = attempt == attempts - 1
        resumed = request.part.exists()
        try:
            _transfer(request)
        except _BrokenOffError as error:
            if last or (attempt == 0 and isinstance(error, _UnreachableError)):
                raise request.error(str(error)) from None
            logger.info("%s: %s, trying again", request.url, error)
            time.sleep(backoff_s * 2**attempt)
            continue
        wrong = _wrong_checksum(request, request.part)
        if not wrong:
            return
        request.part.unlink()
        # What was resumed may have been the beginning of an older file: once more from the start.
        if last or not resumed:
            raise request.error(f"{wrong}, so what came was deleted")


def _transfer(request: _Request) -> None:
    """Bring the part file to its full size, or raise `_BrokenOffError`."""
    have = request.part.stat().st_size if request.part.exists() else 0
    with _connect(request, have) as response:
        start, total = _extent(response, have)
        if response.status_code == 416 and total == have:
            return
        if response.status_code == 416 or start not in (0, have):
            request.part.unlink()
            raise _BrokenOffError(f"the server cannot continue after byte {have:,}")
        with request.part.open("ab" if start else "wb") as file:
            _copy(request, response, file, start, total)
    size = request.part.stat().st_size
    if total is not None and size != total:
        raise _BrokenOffError(f"got {size:,} of {total:,} bytes")


def _connect(request: _Request, have: int) -> requests.Response:
    # The file as it is: where it is packed on the way, neither its size nor its checksum is right.
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    timeout = (request.connect_timeout_s, request.read_timeout_s)
    try:
        response = within(
            request.connect_timeout_s,
            lambda: requests.get(request.url, headers=headers, stream=True, timeout=timeout),
        )
    except (requests.RequestException, TimeoutError) as error:
        raise _connection_error(error) from None
    if response.status_code in (200, 206) or (response.status_code == 416 and have):
        return response
    response.close()
    answer = f"the server answers {response.status_code} {response.reason}"
    if response.status_code in (408, 429) or response.status_code >= 500:
        raise _BrokenOffError(answer)
    raise request.error(answer)


def _connection_error(error: Exception) -> _BrokenOffError:
    if isinstance(error, TimeoutError | requests.Timeout):
        return _UnreachableError("the server does not answer in time")
    if isinstance(error, requests.exceptions.SSLError):
        return _UnreachableError("its certificate cannot be verified")
    if isinstance(error, requests.ConnectionError):
        cut = error.args and isinstance(error.args[0], urllib3.exceptions.ProtocolError)
        return _BrokenOffError("the connection broke") if cut else _UnreachableError("there is no connection to it")
    return _UnreachableError(type(error).__name__)


def _extent(response: requests.Response, have: int) -> tuple[int, int | None]:
    """Return the first byte that the response holds and the size of the whole file, None if that is unknown."""
    length = response.headers.get("Content-Length", "")
    size = int(length) if length.isdecimal() else None
    if response.status_code == 200:
        return 0, size
    found = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)", response.headers.get("Content-Range", ""))
    if not found:
        return have, None if size is None or response.status_code == 416 else have + size
    return int(found[1] or 0), int(found[2]) if found[2] != "*" else None


def _copy(request: _Request, response: requests.Response, file: BinaryIO, start: int, total: int | None) -> None:
    with progress(f"Downloading {request.target.name}", max(1, (total or 0) // _MEGABYTE), "MB") as advance:
        advance(start // _MEGABYTE)
        done = start
        try:
            for chunk in response.raw.stream(CHUNK_BYTES, decode_content=False):
                file.write(chunk)
                advance((done + len(chunk)) // _MEGABYTE - done // _MEGABYTE)
                done += len(chunk)
        except urllib3.exceptions.HTTPError:
            raise _BrokenOffError(f"the connection broke after {done:,} bytes") from None


def _verify_present(request: _Request) -> None:
    wrong = _wrong_checksum(request, request.target)
    if wrong:
        raise DownloadError(
            f"{request.target} is damaged or another file ({wrong}): replace it, or delete it to download it again, "
            "or take dataset=demo"
        )


def _wrong_checksum(request: _Request, file: Path) -> str:
    """Say what is wrong with the checksums of `file`; nothing if they are right."""
    with file.open("rb") as opened:
        for name, expected in (("md5", request.md5), ("sha256", request.sha256)):
            if expected is None:
                continue
            opened.seek(0)
            # MD5 guards against accidents only, which also systems that forbid it for security allow.
            found = hashlib.file_digest(opened, partial(hashlib.new, name, usedforsecurity=False)).hexdigest()
            if found != expected.lower():
                return f"expected the {name} {expected}, got {found}"
    return ""
