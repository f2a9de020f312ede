import hashlib
import http.server
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from anomalymatch.data import download as module
from anomalymatch.data.download import InterruptedTransferError, Transfer, download, with_retries, with_timeout
from anomalymatch.errors import DownloadError, StorageError

CONTENT = bytes(range(256)) * 4000
MD5 = hashlib.md5(CONTENT).hexdigest()


@dataclass
class Server:
    """Behaviour of a server: status codes of its first answers, bytes after which the next ones break; what it saw."""

    content: bytes = CONTENT
    ranges: bool = True
    statuses: list[int] = field(default_factory=list)
    cuts: list[int] = field(default_factory=list)
    length: bool = True
    delay_s: float = 0.0
    asked: list[str | None] = field(default_factory=list)
    url: str = ""


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, state: Server, *connection: Any) -> None:
        self.state = state
        super().__init__(*connection)

    def log_message(self, *_: object) -> None: ...

    def do_GET(self) -> None:
        state, asked = self.state, self.headers["Range"]
        state.asked.append(asked)
        time.sleep(state.delay_s)
        self.close_connection = True
        if state.statuses:
            self.send_error(state.statuses.pop(0))
            return
        total = len(state.content)
        partial = state.ranges and asked is not None
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if partial else 0
        self.send_response(416 if start >= total else 206 if partial else 200)
        if partial:
            self.send_header("Content-Range", f"bytes {'*' if start >= total else f'{start}-{total - 1}'}/{total}")
        if state.length:
            self.send_header("Content-Length", str(max(0, total - start)))
        self.end_headers()
        self.wfile.write(state.content[start : start + state.cuts.pop(0) if state.cuts else total])


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Server]]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(module, "PAUSE_S", 0.01)
    with ExitStack() as stack:

        def begin(**options: Any) -> Server:
            state = Server(**options)
            running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, state))
            stack.enter_context(running)
            threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01}).start()
            stack.callback(running.shutdown)
            state.url = f"http://127.0.0.1:{running.server_port}/data.bin"
            return state

        yield begin


Start = Callable[..., Server]


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "data.bin"


def part(target: Path) -> Path:
    return target.with_name("data.bin.part")


def test_downloads_once(start: Start, target: Path) -> None:
    server = start()
    for _ in range(2):
        assert download(server.url, target, md5=MD5.upper()) == target
    assert target.read_bytes() == CONTENT
    assert server.asked == [None]
    assert not part(target).exists()


@pytest.mark.parametrize(
    ("options", "asked"),
    [
        ({"cuts": [300_000, 100_000]}, [None, "bytes=300000-", "bytes=400000-"]),
        ({"ranges": False, "cuts": [500]}, [None, "bytes=500-"]),
        ({"statuses": [503, 429, 500]}, [None] * 4),
    ],
)
def test_retries_and_resumes(start: Start, target: Path, options: dict[str, object], asked: list[str | None]) -> None:
    server = start(**options)
    download(server.url, target, md5=MD5)
    assert target.read_bytes() == CONTENT
    assert server.asked == asked


def test_part_of_an_earlier_run_is_resumed(start: Start, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ATTEMPTS", 1)
    server = start(cuts=[1000])
    with pytest.raises(DownloadError, match="1,000 "):
        download(server.url, target, md5=MD5)
    assert part(target).read_bytes() == CONTENT[:1000]
    download(server.url, target, md5=MD5)
    assert target.read_bytes() == CONTENT
    assert server.asked == [None, "bytes=1000-"]


def test_break_that_only_the_checksum_can_see(start: Start, target: Path) -> None:
    server = start(cuts=[300_000], length=False)
    with pytest.raises(DownloadError, match=MD5):
        download(server.url, target, md5=MD5)
    download(server.url, target, md5=MD5)
    assert target.read_bytes() == CONTENT


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("old", [CONTENT, b"older and shorter", CONTENT + b"longer", CONTENT[:-1] + b"?"])
def test_complete_part_and_part_of_another_file(start: Start, target: Path, ranges: bool, old: bytes) -> None:
    target.parent.mkdir()
    part(target).write_bytes(old)
    download(start(ranges=ranges).url, target, md5=MD5)
    assert target.read_bytes() == CONTENT


def test_wrong_checksum_deletes_the_part(start: Start, target: Path) -> None:
    server = start(content=b"a login page")
    with pytest.raises(DownloadError) as caught:
        download(server.url, target, md5=MD5)
    for word in (MD5, hashlib.md5(b"a login page").hexdigest(), "data.bin", str(target.parent), "dataset=demo"):
        assert word in str(caught.value)
    assert not target.exists()
    assert not part(target).exists()
    assert len(server.asked) == 1


def test_existing_file_with_a_wrong_checksum_is_kept(target: Path) -> None:
    target.parent.mkdir()
    target.write_bytes(b"mine")
    with pytest.raises(DownloadError, match=MD5):
        download("http://127.0.0.1:1/", target, md5=MD5)
    assert target.read_bytes() == b"mine"


@pytest.mark.parametrize(("status", "asked"), [(404, 1), (503, 4)])
def test_only_temporary_errors_are_retried(start: Start, target: Path, status: int, asked: int) -> None:
    server = start(statuses=[status] * 9)
    with pytest.raises(DownloadError, match=f"{status}.*data.bin"):
        download(server.url, target, md5=MD5)
    assert len(server.asked) == asked


def test_unreachable_and_silent_servers_fail_in_time(
    start: Start, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CONNECT_TIMEOUT_S", 0.2)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    begin = time.monotonic()
    for url in (f"http://127.0.0.1:{port}/data.bin", start(delay_s=1.0).url):
        with pytest.raises(DownloadError, match=rf"{url} .*dataset=demo$"):
            download(url, target, md5=MD5)
    assert time.monotonic() - begin < 0.9


def test_concurrent_calls_download_once(start: Start, target: Path) -> None:
    server = start(delay_s=0.2)
    threads = [threading.Thread(target=download, args=(server.url, target), kwargs={"md5": MD5}) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert target.read_bytes() == CONTENT
    assert server.asked == [None]


def test_other_protocols_resume_too(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PAUSE_S", 0.01)
    starts = []

    @contextmanager
    def connect(start: int) -> Iterator[Transfer]:
        starts.append(start)
        if len(starts) == 2:
            raise InterruptedTransferError("no answer")
        yield Transfer(start, None, [CONTENT[start : start + 600_000]])

    download("s3://bucket/data.bin", target, size=len(CONTENT), connect=connect)
    assert target.read_bytes() == CONTENT
    assert starts == [0, 600_000, 600_000]


def test_errors_of_the_disk_are_not_retried(start: Start, target: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file"):
        download(start().url, tmp_path / "file" / "data.bin")
    target.parent.mkdir()
    part(target).mkdir()
    server = start()
    with pytest.raises(IsADirectoryError):
        download(server.url, target)
    assert len(server.asked) == 1


def test_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PAUSE_S", 0.0)
    errors = [OSError("a"), ValueError("b"), FileNotFoundError("c"), OSError("d")]

    def call() -> None:
        raise errors.pop(0)

    with pytest.raises(FileNotFoundError):
        with_retries(call, "x")
    with pytest.raises(OSError, match="d"):
        with_retries(call, "x", attempts=1)


def test_timeout_passes_results_and_errors_through() -> None:
    assert with_timeout(5.0, lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        with_timeout(5.0, lambda: 1 // 0)
    with pytest.raises(TimeoutError, match=r"0\.05 s"):
        with_timeout(0.05, lambda: time.sleep(0.5))
