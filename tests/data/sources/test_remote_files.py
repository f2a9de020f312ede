import functools
import http.server
import io
import multiprocessing
import pickle
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp  # noqa: F401 (imported from inside of the library it would be compiled anew)
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from pictures import colours, png, write_zip

from anomalymatch.data import download, remote
from anomalymatch.data.remote import is_remote, local_path
from anomalymatch.data.sources.folder import FolderSource
from anomalymatch.data.sources.parquet import ParquetSource
from anomalymatch.data.sources.zip import ZipSource
from anomalymatch.errors import DataError
from anomalymatch.types import Reject


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "PAUSE_S", 0.01)


@pytest.fixture
def memory(memory: MemoryFileSystem) -> MemoryFileSystem:
    for value, name in enumerate(["b.png", "a.PNG", "sub/é ü.png", ".hidden.png", "notes.txt"]):
        memory.pipe(f"/set/{name}", png(value))
    return memory


@dataclass
class Server:
    """Requests to the server of a folder, and the number of failures it begins with."""

    url: str = ""
    asked: list[str] = field(default_factory=list)
    failures: int = 0
    secret: str | None = None


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    state = Server()
    (tmp_path / "www").mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None: ...

        def do_GET(self) -> None:
            state.asked.append(self.path)
            if state.secret and self.headers["X-Secret"] != state.secret:
                self.send_error(403)
            elif state.failures and self.path.endswith(".png"):
                state.failures -= 1
                self.send_error(503)
            else:
                super().do_GET()

    handler = functools.partial(Handler, directory=str(tmp_path / "www"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as opened:
        thread = threading.Thread(target=opened.serve_forever, daemon=True)
        thread.start()
        state.url = f"http://127.0.0.1:{opened.server_port}"
        yield state
        opened.shutdown()


def test_opening_reads_no_image(memory: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MemoryFileSystem, "cat_file", None)
    assert len(FolderSource("memory://set").ids) == 3


def test_failed_requests_are_repeated_then_rejected(memory: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch) -> None:
    source = FolderSource("memory://set")
    original, tries = MemoryFileSystem.cat_file, [0]

    def fail(self: Any, path: str, *rest: Any, times: int = 2) -> bytes:
        tries[0] += 1
        if tries[0] <= times:
            raise TimeoutError("too slow")
        return original(self, path, *rest)

    monkeypatch.setattr(MemoryFileSystem, "cat_file", fail)
    assert source.read(["b.png"])[0][0, 0, 0] == 0
    assert tries == [3]
    tries[0] = 0
    monkeypatch.setattr(MemoryFileSystem, "cat_file", functools.partialmethod(fail, times=99))
    assert source.read(["b.png"]) == [Reject("b.png", "cannot be fetched: TimeoutError: too slow")]
    assert tries == [3]


def test_vanished_changed_and_broken_images_are_rejected(memory: MemoryFileSystem) -> None:
    memory.pipe("/set/text.png", b"no image")
    source = FolderSource("memory://set")
    memory.rm("/set/b.png")
    memory.pipe("/set/a.PNG", png(1) + b"more")
    gone, changed, text, good = source.read(["b.png", "a.PNG", "text.png", "sub/é ü.png"])
    assert gone == Reject("b.png", "cannot be fetched: it is not there")
    assert isinstance(changed, Reject)
    assert "bytes where" in changed.reason
    assert isinstance(text, Reject)
    assert good[0, 0, 0] == 2


def test_several_images_are_fetched_at_once(memory: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch) -> None:
    original, barrier = MemoryFileSystem.cat_file, threading.Barrier(3, timeout=10)

    def wait(self: Any, path: str) -> bytes:
        barrier.wait()
        return original(self, path)

    monkeypatch.setattr(MemoryFileSystem, "cat_file", wait)
    assert colours(FolderSource("memory://set")) == [1, 0, 2]


def _read_in_child(source: FolderSource, queue: Any) -> None:
    queue.put(colours(source))


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_other_processes(server: Server, tmp_path: Path) -> None:
    for value in range(3):
        (tmp_path / f"www/{value}.png").write_bytes(png(value))
    source = FolderSource(server.url)
    assert colours(source) == [0, 1, 2]
    assert colours(pickle.loads(pickle.dumps(source))) == [0, 1, 2]
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=_read_in_child, args=(source, queue))
    child.start()
    child.join(20)
    assert queue.get() == [0, 1, 2]
    assert colours(source) == [0, 1, 2]


def test_images_over_http(server: Server, tmp_path: Path) -> None:
    (tmp_path / "www/images/sub").mkdir(parents=True)
    for value, name in enumerate(["a.png", "sub/é ü#1.png"]):
        (tmp_path / "www/images" / name).write_bytes(png(value))
    source = FolderSource(f"{server.url}/images/")
    assert (source.ids, source.name) == (["a.png", "sub/é ü#1.png"], "images")
    server.failures = 2
    assert colours(source) == [0, 1]
    (tmp_path / "www/images/a.png").unlink()
    assert source.read(["a.png"]) == [Reject("a.png", "cannot be fetched: it is not there")]


def test_storage_options_reach_the_file_system(server: Server, tmp_path: Path) -> None:
    (tmp_path / "www/a.png").write_bytes(png(5))
    write_zip(tmp_path / "www/a.zip", {"x.png": 6})
    server.secret = "s"
    options = {"headers": {"X-Secret": "s"}}
    with pytest.raises(DataError, match="cannot be listed"):
        FolderSource(server.url)
    assert colours(FolderSource(server.url, storage_options=options)) == [5]
    assert colours(ZipSource(f"{server.url}/a.zip", cache_dir=tmp_path / "cache", storage_options=options)) == [6]


def test_single_files_are_copied_once(server: Server, tmp_path: Path) -> None:
    write_zip(tmp_path / "www/a.zip", {"x.png": 6})
    url, cache = f"{server.url}/a.zip", tmp_path / "cache"
    source = ZipSource(url, cache_dir=cache)
    assert (source.ids, source.name, colours(source)) == (["x.png"], "a", [6])
    server.asked.clear()
    assert ZipSource(url, cache_dir=cache).fingerprint == source.fingerprint
    assert server.asked == []
    copy = next(cache.rglob("a.zip"))
    copy.write_bytes(b"cut")
    assert colours(ZipSource(url, cache_dir=cache)) == [6]
    write_zip(tmp_path / "www/a.zip", {"x.png": 7, "y.png": 8})
    assert colours(ZipSource(url, cache_dir=cache)) == [7, 8]


def test_shards_of_a_folder_are_copied(memory: MemoryFileSystem, tmp_path: Path) -> None:
    for shard in range(2):
        buffer = io.BytesIO()
        pq.write_table(pa.table({"image": pa.array([png(shard)], pa.binary())}), buffer)
        memory.pipe(f"/hub/data/{shard}.parquet", buffer.getvalue())
    source = ParquetSource("memory://hub", cache_dir=tmp_path)
    assert source.ids == ["0/0000000", "1/0000000"]
    assert colours(source) == [0, 1]
    assert ParquetSource("memory://hub/data/1.parquet", cache_dir=str(tmp_path)).ids == ["1/0000000"]


def test_copying_resumes(memory: MemoryFileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = bytes(range(256)) * 40
    memory.pipe("/a.bin", content)
    monkeypatch.setattr(remote, "CHUNK_BYTES", 1000)
    reads: list[int] = []

    class Broken(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            reads.append(self.tell())
            if len(reads) in (4, 8):
                raise OSError("the connection broke")
            return super().read(size)

    monkeypatch.setattr(MemoryFileSystem, "open", lambda self, path, mode: Broken(content))
    assert local_path("memory://a.bin", tmp_path, (".bin",)).read_bytes() == content
    assert reads[:5] == [0, 1000, 2000, 3000, 3000]


def test_listed_paths_stay_in_the_cache(
    memory: MemoryFileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {"/set/../../evil.zip": {"size": 1}, "/set/ok/../../../evil.zip": {"size": 1}, "/other/a.zip": {"size": 1}}
    monkeypatch.setattr(MemoryFileSystem, "find", lambda *_, **__: found)
    with pytest.raises(DataError, match=r"expected files that end in \.zip, found none"):
        local_path("memory://set", tmp_path, (".zip",))


def test_local_paths_are_no_urls(tmp_path: Path) -> None:
    (tmp_path / "a b.png").write_bytes(png(4))
    source = FolderSource(f"file://{str(tmp_path).replace(' ', '%20')}")
    assert source.folder == tmp_path
    assert colours(source) == [4]
    assert local_path("~/x", None, ()) == Path.home() / "x"
    assert all(is_remote(root) for root in ["s3://b/k", "memory://x"])
    assert not any(is_remote(root) for root in ["a/b", "file:///a", Path("x"), None])


def test_messages(memory: MemoryFileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(message: str, root: str, **options: Any) -> None:
        with pytest.raises(DataError, match=message):
            (ZipSource if root.endswith(".zip") else FolderSource)(root, **options)

    refused(r"memory://none: .*no images in it, expected files that end in \.bmp", "memory://none")
    nothing = r"expected a file, found nothing at "
    refused(rf"memory://none\.zip: {nothing}/none\.zip", "memory://none.zip", cache_dir=tmp_path)
    refused(r"set dataset\.source\.cache_dir to the folder", "memory://none.zip")
    for url in ("nope://x", "reference://x", "filecache://x", "memory://x::zip://y"):
        refused(f"{url}: the protocol is not one of", url)
    monkeypatch.setitem(sys.modules, "s3fs", None)
    refused(r"s3:// needs a package that is not installed: .*s3fs", "s3://bucket/folder")
    monkeypatch.setattr(MemoryFileSystem, "find", lambda *_, **__: (_ for _ in ()).throw(PermissionError("no entry")))
    refused("memory://set: cannot be listed: PermissionError: no entry", "memory://set")
    refused(r"cannot be listed|no images in it", "http://127.0.0.1:9/images")
    refused(rf"{nothing}http://127\.0\.0\.1:9/a\.zip", "http://127.0.0.1:9/a.zip", cache_dir=tmp_path)
