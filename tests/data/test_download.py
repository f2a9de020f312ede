import hashlib
import http.server
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from anomalymatch.data.download import fetch, within
from anomalymatch.errors import DownloadError, StorageError

CONTENT = bytes(range(256)) * 4000
MD5 = hashlib.md5(CONTENT).hexdigest()


@dataclass
class Server:
    """What the server does, and what it was asked for."""

    content: bytes = CONTENT
    ranges: bool = True
    statuses: list[int] = field(default_factory=list)
    """Answered first, one a request."""
    cuts: list[int] = field(default_factory=list)
    """After how many bytes the next answers break off."""
    length: bool = True
    delay_s: float = 0.0
    asked: list[str | None] = field(default_factory=list)
    url: str = ""


@contextmanager
def serve(server: Server) -> Iterator[None]:
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None: ...

        def do_GET(self) -> None:
            server.asked.append(self.headers["Range"])
            time.sleep(server.delay_s)
            self.close_connection = True
            if server.statuses:
                self.send_error(server.statuses.pop(0))
                return
            start = int(re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or "bytes=0-")[1])  # type: ignore[index]
            self._answer(start if server.ranges else 0)

        def _answer(self, start: int) -> None:
            total = len(server.content)
            partial = server.ranges and self.headers["Range"]
            if partial and start >= total:
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{total}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(206 if partial else 200)
            if partial:
                self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
            if server.length:
                self.send_header("Content-Length", str(total - start))
            self.end_headers()
            end = start + server.cuts.pop(0) if server.cuts else total
            self.wfile.write(server.content[start:end])

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        server.url = f"http://127.0.0.1:{running.server_port}/data.bin"
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield
        finally:
            running.shutdown()
            thread.join()


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Server]]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    running: list[contextmanager[None]] = []  # type: ignore[valid-type]

    def begin(**options: object) -> Server:
        server = Server(**options)  # type: ignore[arg-type]
        context = serve(server)
        context.__enter__()
        running.append(context)
        return server

    yield begin
    for context in running:
        context.__exit__(None, None, None)


Start = Callable[..., Server]


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "data.bin"


def part(target: Path) -> Path:
    return target.with_name("data.bin.part")


def test_downloads_once(start: Start, target: Path) -> None:
    server = start()
    sha256 = hashlib.sha256(CONTENT).hexdigest()
    for _ in range(2):
        assert fetch(server.url, target, md5=MD5.upper(), sha256=sha256) == target
    assert target.read_bytes() == CONTENT
    assert server.asked == [None]
    assert not part(target).exists()


def test_goes_on_where_it_broke_off(start: Start, target: Path) -> None:
    server = start(cuts=[300_000, 100_000])
    fetch(server.url, target, md5=MD5, backoff_s=0.01)
    assert target.read_bytes() == CONTENT
    assert server.asked == [None, "bytes=300000-", "bytes=400000-"]


def test_break_that_only_the_checksum_can_see(start: Start, target: Path) -> None:
    server = start(cuts=[300_000], length=False)
    with pytest.raises(DownloadError, match="expected the md5"):
        fetch(server.url, target, md5=MD5)
    fetch(server.url, target, md5=MD5)
    assert target.read_bytes() == CONTENT


def test_takes_up_the_part_of_an_earlier_run(start: Start, target: Path) -> None:
    server = start(cuts=[1000])
    with pytest.raises(DownloadError, match="the connection broke after 1,000 bytes"):
        fetch(server.url, target, md5=MD5, attempts=1)
    assert part(target).read_bytes() == CONTENT[:1000]
    fetch(server.url, target, md5=MD5)
    assert target.read_bytes() == CONTENT
    assert server.asked == [None, "bytes=1000-"]


def test_server_that_ignores_ranges_begins_again(start: Start, target: Path) -> None:
    server = start(ranges=False, cuts=[500])
    fetch(server.url, target, md5=MD5, backoff_s=0.01)
    assert target.read_bytes() == CONTENT
    assert server.asked == [None, "bytes=500-"]


@pytest.mark.parametrize("ranges", [True, False])
def test_complete_part_is_only_checked(start: Start, target: Path, ranges: bool) -> None:
    target.parent.mkdir()
    part(target).write_bytes(CONTENT)
    fetch(start(ranges=ranges).url, target, md5=MD5)
    assert target.read_bytes() == CONTENT


@pytest.mark.parametrize("old", [b"older and of another length", CONTENT + b"longer", CONTENT[:-1] + b"?"])
def test_part_of_another_file_is_dropped(start: Start, target: Path, old: bytes) -> None:
    target.parent.mkdir()
    part(target).write_bytes(old)
    fetch(start().url, target, md5=MD5, backoff_s=0.01)
    assert target.read_bytes() == CONTENT


def test_wrong_checksum_deletes_the_part_and_says_so(start: Start, target: Path) -> None:
    server = start(content=b"a login page")
    with pytest.raises(DownloadError) as caught:
        fetch(server.url, target, md5=MD5)
    message = str(caught.value)
    assert (
        f"expected the md5 {MD5}, got {hashlib.md5(b'a login page').hexdigest()}, so what came was deleted" in message
    )
    assert f"put the file data.bin into {target.parent} yourself, or take dataset=demo" in message
    assert not target.exists()
    assert not part(target).exists()
    assert len(server.asked) == 1


def test_wrong_sha256_is_noticed_too(start: Start, target: Path) -> None:
    with pytest.raises(DownloadError, match="expected the sha256 00, got"):
        fetch(start().url, target, md5=None, sha256="00")


def test_present_file_with_a_wrong_checksum_is_kept(target: Path) -> None:
    target.parent.mkdir()
    target.write_bytes(b"mine")
    with pytest.raises(DownloadError, match=r"data\.bin is damaged or another file .* delete it to download it again"):
        fetch("http://127.0.0.1:1/", target, md5=MD5)
    assert target.read_bytes() == b"mine"


def test_busy_server_is_asked_again(start: Start, target: Path) -> None:
    server = start(statuses=[503, 429, 500])
    fetch(server.url, target, md5=MD5, backoff_s=0.01)
    assert len(server.asked) == 4
    assert target.read_bytes() == CONTENT


def test_refusal_is_final(start: Start, target: Path) -> None:
    server = start(statuses=[404])
    with pytest.raises(DownloadError, match=r"\(the server answers 404 Not Found\): put the file data\.bin"):
        fetch(server.url, target, md5=MD5)
    assert len(server.asked) == 1


def test_gives_up_after_so_many_attempts(start: Start, target: Path) -> None:
    server = start(statuses=[503] * 9)
    with pytest.raises(DownloadError, match="answers 503"):
        fetch(server.url, target, md5=MD5, attempts=3, backoff_s=0.01)
    assert len(server.asked) == 3


def test_no_server_fails_at_once(target: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    begin = time.monotonic()
    with pytest.raises(DownloadError, match=r"there is no connection to it.* or take dataset=demo$"):
        fetch(f"http://127.0.0.1:{port}/data.bin", target, md5=MD5)
    assert time.monotonic() - begin < 2


def test_silent_server_fails_in_time(start: Start, target: Path) -> None:
    server = start(delay_s=1.0)
    begin = time.monotonic()
    with pytest.raises(DownloadError, match="does not answer in time"):
        fetch(server.url, target, md5=MD5, connect_timeout_s=0.2)
    assert time.monotonic() - begin < 0.8


def test_two_at_once_download_once(start: Start, target: Path) -> None:
    server = start(delay_s=0.2)
    threads = [threading.Thread(target=fetch, args=(server.url, target), kwargs={"md5": MD5}) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert target.read_bytes() == CONTENT
    assert server.asked == [None]


def test_folder_that_cannot_be_written(start: Start, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="a file stands where a folder is needed"):
        fetch(start().url, tmp_path / "file" / "data.bin", md5=MD5)


def test_within_hands_on_results_and_errors() -> None:
    assert within(5.0, lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        within(5.0, lambda: 1 // 0)
    with pytest.raises(TimeoutError, match=r"no answer within 0\.05 s"):
        within(0.05, lambda: time.sleep(0.5))
