"""Fixtures of the page: a real service on images in memory, and NiceGUI's simulated user without its pytest plugin."""

import asyncio
import os
import shutil
import struct
import sys
import threading
import time
import zlib
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

# See tests/conftest.py: modules that the library is the first to import would be compiled again.
import nicegui
import numpy as np
import plotly.graph_objects  # noqa: F401
import pytest
from nicegui import background_tasks
from nicegui.storage import Storage
from nicegui.testing import User, general, user_simulation


def encode(images: Any) -> np.ndarray:
    """Compute two features of each image: its brightest value and a constant, as a unit vector."""
    rows = np.array([[image.max() / 100.0, 1.0] for image in images], dtype=np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.fixture
def png_claiming() -> Callable[[int, int], bytes]:
    """Make a PNG of a few kilobytes whose header claims a width and a height."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    def make(width: int, height: int) -> bytes:
        header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
        body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(10**6))) + chunk(b"IEND", b"")
        return b"\x89PNG\r\n\x1a\n" + body

    return make


@pytest.fixture
def count_calls() -> Callable[..., Any]:
    """Slow a function down; the attribute `most` of the result is the largest number of calls at the same time."""
    lock = threading.Lock()

    def counting(function: Callable[..., Any]) -> Any:
        def slow(*args: Any, **options: Any) -> Any:
            with lock:
                slow.busy += 1
                slow.most = max(slow.most, slow.busy)
            time.sleep(0.02)
            with lock:
                slow.busy -= 1
            return function(*args, **options)

        slow.busy = slow.most = 0
        return slow

    return counting


@pytest.fixture
def make_features() -> Callable[..., Any]:
    """Build `Features` from rows, in shards; positions in `bad` cannot be read."""
    from anomalymatch.backbones.features import Features, Shard
    from anomalymatch.types import Reject

    def make(rows: np.ndarray, ids: list[str], *, bad: Any = (), shard: int = 5000, stage_width: int = 0) -> Features:
        shards = []
        for start in range(0, len(ids), shard):
            part = range(start, min(start + shard, len(ids)))
            kept = [i for i in part if i not in bad]
            rejects = [Reject(ids[i], f"reason {i}") for i in part if i in bad]
            shards.append(Shard([ids[i] for i in kept], rows[kept].astype(np.float16), rejects))
        return Features(shards, stage_width=stage_width)

    return make


@pytest.fixture
def make_store(make_features: Callable[..., Any], tmp_path: Path) -> Callable[..., Any]:
    """Build an exact feature store from rows; positions in `bad` cannot be read."""
    from anomalymatch.ui import build_feature_store

    def make(rows: np.ndarray, ids: Any = None, *, bad: Any = ()) -> Any:
        ids = [f"i{i}" for i in range(len(rows))] if ids is None else ids
        features = make_features(rows, list(ids), bad=bad)
        return build_feature_store(features, ids, compression="exact", dimensions=rows.shape[1], folder=tmp_path)

    return make


@pytest.fixture
def finish_training() -> Callable[..., None]:
    """Write a finished training cycle, as far as the page reads it."""
    from anomalymatch.active.run_folder import SCORES, RunFolder, to_json
    from anomalymatch.algorithms.base import COLD
    from anomalymatch.ranking import Ranking

    def finish(run: Path, cycle: int, ids: Any, logits: Any, *, cold: bool = False) -> None:
        folder = RunFolder(run)
        with folder.write_cycle(cycle) as path:
            Ranking(list(ids), np.asarray(logits, dtype=np.float64)).write(path / SCORES)
            (path / "metrics.json").write_text(to_json({"cycle": cycle}))
            if cold:
                (path / COLD).touch()
        folder.close()

    return finish


@pytest.fixture
def spec() -> Any:
    """Settings of a probe without self-training."""
    from probes import SELF_TRAINING

    return replace(SELF_TRAINING, rounds=0)


@pytest.fixture
def make_service(
    make_source: Callable[..., Any],
    make_store: Callable[..., Any],
    finish_training: Callable[..., None],
    spec: Any,
    tmp_path: Path,
) -> Iterator[Callable[..., Any]]:
    """Open a `LabelService` on images in memory, or on `source`.

    Each tenth image is rare, and its features show it. With `trained`, the run has a finished training whose scores
    fall with the position, so that the images are ranked before the first label. `prepare` replaces the function that
    returns the live ranking.
    """
    from anomalymatch.evaluation.advice import StoppingRule
    from anomalymatch.types import Reject
    from anomalymatch.ui import FirstOrder, LabelService, LiveRanking

    opened = []

    def make(
        count: int = 40,
        *,
        source: Any = None,
        trained: bool = False,
        novelty: np.ndarray | None = None,
        first: FirstOrder = FirstOrder.NOVEL,
        needs_labels: bool = True,
        text: Any = None,
        descriptions: Any = (),
        scores: Any = None,
        prepare: Any = None,
        **options: Any,
    ) -> LabelService:
        source = source or make_source(count, **{"size": 16} | options)
        images = source.read(source.ids)
        bad = {i for i, image in enumerate(images) if isinstance(image, Reject)}
        rows = encode([np.zeros((1, 1, 3)) if i in bad else image for i, image in enumerate(images)])
        store = make_store(rows, source.ids, bad=bad)
        run = tmp_path / "run"
        run.mkdir(exist_ok=True)
        if trained:
            finish_training(run, 1, source.ids, np.linspace(4, -4, len(source.ids)))
        live = LiveRanking(store, replace(spec, inverse_regularisation=100.0), seed=0, novelty=novelty, first=first)
        service = LabelService(
            run,
            source,
            prepare or (lambda *_: live),
            encode=encode,
            locate=lambda probe, image: np.resize([2, -1, *probe.coefficients], (8, 8)).astype(np.float32),
            training_steps=1000,
            cache=tmp_path / "thumbnails",
            workers=2,
            seed=0,
            needs_labels=needs_labels,
            text=text,
            descriptions=descriptions,
            scores=scores,
            stopping=StoppingRule(40, 20, 3, 0.1, 0.1),
            divide=lambda ids, normals, count: [ids[k :: count or 3] for k in range(count or 3)],
        )
        opened.append(service)
        if prepare is None:
            service.preparation.wait()
        return service

    yield make
    for service in opened:
        service.close()


@pytest.fixture
def service(make_service: Callable[..., Any]) -> Any:
    """60 images, ranked by position."""
    return make_service(60, trained=True)


@pytest.fixture
def visit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """Open the page of a service as a simulated user: `visit(service, act)` awaits `act(user)`.

    Further arguments are those of `build_page`. An error that NiceGUI would only log fails the test.
    """
    monkeypatch.setattr(Storage, "path", tmp_path / "storage")  # otherwise it is the working directory
    # It collects garbage before and after, which takes a second while the whole library is loaded.
    monkeypatch.setattr(general, "gc", SimpleNamespace(collect=lambda: 0))
    from anomalymatch.ui.web.page import build_page

    kept = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "anomalymatch"}

    async def simulate(service: Any, act: Callable[[User], Awaitable[None]], options: Any) -> None:
        errors: list[Exception] = []
        async with user_simulation(root=lambda: None) as user:
            nicegui.app.on_exception(errors.append)
            build_page(service, **options)
            await user.open("/")
            await act(user)
            if errors:
                raise errors[0]

    def run(service: Any, act: Callable[[User], Awaitable[None]], **options: Any) -> None:
        try:
            asyncio.run(simulate(service, act, options))
        finally:
            sys.modules.update(kept)  # the simulation removes the modules of pages
            # A thread may have created one after NiceGUI's end; the next simulation would wait for its end for ever.
            background_tasks.running_tasks.clear()

    return run


@pytest.fixture
def check_headers() -> Callable[[Any], None]:
    """Check that a response has the headers that protect the page."""

    def check(headers: Any) -> None:
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["cross-origin-resource-policy"] == "same-origin"
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
        assert not [name for name in headers if name.startswith("access-control")]

    return check


@pytest.fixture(scope="module")  # its event loop must not run during other tests
def chromium() -> Iterator[Any]:
    """Headless browser; tests are skipped without one."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    with sync_api.sync_playwright() as playwright:
        names = ("chromium", "chromium-browser", "google-chrome")
        found = [os.environ.get("CHROMIUM"), *map(shutil.which, names), playwright.chromium.executable_path]
        path = next((path for path in found if path and Path(path).exists()), None)
        if path is None:
            pytest.skip("no Chromium: install it, or set CHROMIUM to where it is")
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(chromium: Any) -> Iterator[Callable[..., Any]]:
    """Open the page of a command in a new browser context; it must not request other servers."""
    from browser import Page

    contexts, pages = [], []

    def opening(command: Any, *, path: str = "", ready: bool = True, **options: Any) -> Any:
        context = chromium.new_context(**{"viewport": {"width": 1440, "height": 900}} | options)
        contexts.append(context)
        pages.append(Page(context, command.url, path, ready))
        return pages[-1]

    yield opening
    for context in contexts:
        context.close()
    assert [page.foreign for page in pages if page.foreign] == []


@pytest.fixture(scope="session")
def cache_word(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Override of the cache folder, which all commands of a test run share."""
    return f"data.cache_dir={tmp_path_factory.mktemp('cache')}"


@pytest.fixture(scope="session")
def demo_words(cache_word: str) -> list[str]:
    """Overrides of a command on a small demo."""
    from browser import SMALL

    return [*SMALL, cache_word]
