"""A learner without a network, to look at the loop alone, and the parts around it."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest


class ScriptedLearner:
    """Ranks by a number that it draws for each image and cycle; remembers what it was given."""

    needs_labels = True

    def __init__(self, task: Any) -> None:
        self.task, self.cycle, self.calls = task, 0, []
        self.on_step = lambda row: None

    def fit(self, labels: Any, *, pool: Any = None, cycle: int = 1) -> None:
        self.calls.append({"labels": dict(labels), "pool": list(pool), "cycle": cycle})
        self.on_step({"step": 0.0, "loss_lb": 1.0 / cycle})
        self.cycle = cycle

    def rank(self, ids: Any = None) -> Any:
        from anomalymatch.ranking import Ranking
        from anomalymatch.types import Reject

        ids = self.task.source.ids if ids is None else ids
        bad = getattr(self.task.source, "unreadable", set())
        kept = [id_ for id_ in ids if id_ not in bad]
        logits = [np.random.default_rng([self.cycle, *id_.encode()]).normal() for id_ in kept]
        return Ranking(kept, np.array(logits), [Reject(id_, "the file is truncated") for id_ in ids if id_ in bad])

    def save(self, folder: Path) -> None:
        (folder / "weights.safetensors").write_text(json.dumps(self.cycle))
        (folder / "weights.json").write_text("{}")

    def restore(self, folder: Path) -> None:
        self.cycle = json.loads((folder / "weights.safetensors").read_text())


@pytest.fixture
def loop_of() -> Callable[..., Any]:
    """Make a loop around a scripted learner."""
    from anomalymatch.active.loop import ActiveLoop, LoopSpec
    from anomalymatch.active.oracles import TopKOracle
    from anomalymatch.active.strategies import Top
    from anomalymatch.evaluation.advice import StoppingRule

    def make(task: Any, *, seed: int = 0, oracle: Any = TopKOracle, given: Any = None, **spec: Any) -> ActiveLoop:
        values = {"cycles": 3, "budget": 5, "pool_size": None, "anomalies": 2, "normals": 6, "audit": 0}
        values = {**values, "audit_tops": (), "stopping": StoppingRule(40, 20, 3, 0.1, 0.1), **spec}
        return ActiveLoop(
            task,
            ScriptedLearner(task),
            None if task.anomalies is None else oracle(task, Top()),
            given=given or {},
            baseline=None,
            spec=LoopSpec(**values),
            seed=seed,
        )

    return make


class Killed(BaseException):
    """Like a kill, nothing catches it."""


@pytest.fixture
def killed_at(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Return a context in which the process seems to be killed when a function is called for the `number`-th time."""

    @contextmanager
    def killed(owner: Any, name: str, number: int) -> Iterator[None]:
        real, calls = getattr(owner, name), []

        def kill(*args: Any, **kwargs: Any) -> Any:
            calls.append(None)
            if len(calls) == number:
                raise Killed
            return real(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, kill)
            with pytest.raises(Killed):
                yield

    return killed


@pytest.fixture
def run_in(without_pictures: None) -> Callable[..., Any]:
    """Run a loop in a folder; the rows, and the tracker that listened."""
    from anomalymatch.active.run_folder import RunFolder
    from anomalymatch.active.tracking import Tracker

    class Tracked(Tracker):
        """A tracker that keeps what it was told."""

        def __init__(self) -> None:
            self.steps, self.cycles, self.points = [], [], []

        def log_step(self, cycle: int, row: Any) -> None:
            self.steps.append((cycle, dict(row)))

        def log_cycle(self, cycle: int, row: Any, folder: Any, points: Any) -> None:
            self.cycles.append((cycle, row))
            self.points.append(points)

    def run(loop: Any, path: Path) -> tuple[list[Any], Any]:
        folder, tracker = RunFolder(path), Tracked()
        try:
            return loop.run(folder, tracker), tracker
        finally:
            folder.close()

    return run
