"""Fixtures of the page: a real service on images in memory, and NiceGUI's simulated user without its pytest plugin."""

import asyncio
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

# See tests/conftest.py: modules that the library is the first to import would be compiled again.
import nicegui
import numpy as np
import plotly.graph_objects  # noqa: F401
import pytest
from nicegui.storage import Storage
from nicegui.testing import User, general, user_simulation


def encode(images: Any) -> np.ndarray:
    """Compute two features of each image: its brightest value and a constant, as a unit vector."""
    rows = np.array([[image.max() / 100.0, 1.0] for image in images], dtype=np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


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
def make_service(
    make_source: Callable[..., Any],
    make_features: Callable[..., Any],
    finish_training: Callable[..., None],
    tmp_path: Path,
) -> Iterator[Callable[..., Any]]:
    """Open a `LabelService` on images in memory, or on `source`.

    Each tenth image is rare, and its features show it. With `trained`, the run has a finished training whose scores
    fall with the position, so that the images are ranked before the first label.
    """
    from anomalymatch.algorithms.probe.regression import ProbeSpec
    from anomalymatch.types import Reject
    from anomalymatch.ui import FirstOrder, LabelService, LiveRanking, build_feature_store

    opened = []

    def make(
        count: int = 40,
        *,
        source: Any = None,
        trained: bool = False,
        novelty: np.ndarray | None = None,
        first: FirstOrder = FirstOrder.NOVEL,
        needs_labels: bool = True,
        **options: Any,
    ) -> LabelService:
        source = source or make_source(count, **{"size": 16} | options)
        images = source.read(source.ids)
        bad = {i for i, image in enumerate(images) if isinstance(image, Reject)}
        rows = encode([np.zeros((1, 1, 3)) if i in bad else image for i, image in enumerate(images)])
        kept = {"compression": "exact", "dimensions": 2, "folder": tmp_path}
        store = build_feature_store(make_features(rows, list(source.ids), bad=bad), source.ids, **kept)
        probe = ProbeSpec(
            inverse_regularisation=100.0,
            rounds=0,
            confidence=0.8,
            weight=0.25,
            limit=10,
            orientations=1,
            calibration="none",
            folds=5,
            pool_images=10_000,
        )
        run = tmp_path / "run"
        run.mkdir(exist_ok=True)
        if trained:
            finish_training(run, 1, source.ids, np.linspace(4, -4, len(source.ids)))
        service = LabelService(
            run,
            source,
            LiveRanking(store, probe, seed=0, novelty=novelty, first=first),
            encode=encode,
            training_steps=1000,
            cache=tmp_path / "thumbnails",
            workers=2,
            seed=0,
            needs_labels=needs_labels,
            divide=lambda ids, normals, count: [ids[k :: count or 3] for k in range(count or 3)],
        )
        opened.append(service)
        return service

    yield make
    for service in opened:
        service.close()


@pytest.fixture
def visit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[Any, Callable[..., Awaitable[None]]], None]:
    """Open the page of a service as a simulated user: `visit(service, act)` awaits `act(user)`.

    An error that NiceGUI would only log fails the test.
    """
    monkeypatch.setattr(Storage, "path", tmp_path / "storage")  # otherwise it is the working directory
    # It collects garbage before and after, which takes a second while the whole library is loaded.
    monkeypatch.setattr(general, "gc", SimpleNamespace(collect=lambda: 0))
    from anomalymatch.ui.web.page import build_page

    kept = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "anomalymatch"}

    async def simulate(service: Any, act: Callable[[User], Awaitable[None]]) -> None:
        errors: list[Exception] = []
        async with user_simulation(root=lambda: None) as user:
            nicegui.app.on_exception(errors.append)
            build_page(service)
            await user.open("/")
            await act(user)
            if errors:
                raise errors[0]

    def run(service: Any, act: Callable[[User], Awaitable[None]]) -> None:
        try:
            asyncio.run(simulate(service, act))
        finally:
            sys.modules.update(kept)  # the simulation removes the modules of pages

    return run


@pytest.fixture
def wait_for() -> Callable[..., None]:
    """Wait in a thread until a condition holds."""
    import time

    def wait(condition: Callable[[], object], seconds: float = 30) -> None:
        give_up = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < give_up, "the condition was not met in time"
            time.sleep(0.01)

    return wait
