"""A learner without a network, to look at the loop alone, and the parts around it."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
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


class Tracked:
    """A tracker that keeps what it was told."""

    def __init__(self) -> None:
        self.steps, self.cycles, self.points = [], [], []

    def log_step(self, cycle: int, row: Any) -> None:
        self.steps.append((cycle, dict(row)))

    def log_cycle(self, cycle: int, row: Any, folder: Any, points: Any) -> None:
        self.cycles.append((cycle, row))
        self.points.append(points)

    def log_groups(self, rows: Any, pictures: Any) -> None:
        raise AssertionError("the loop makes no groups")

    def finish(self) -> None:
        pass


@pytest.fixture
def task(make_source: Any) -> Any:
    """100 images, 10 of them rare, of which 80 and 8 are in the pool."""
    from anomalymatch.data.task import make_task

    return make_task(make_source(100, size=16), anomaly="rare")


@pytest.fixture
def make_embedding(tmp_path: Path) -> Callable[..., Any]:
    """The features of a tiny network with random weights."""
    from anomalymatch.models.embedding import Embedding
    from anomalymatch.models.inference import Inference

    def make(source: Any, **changes: Any) -> Embedding:
        values: dict[str, Any] = {"name": "test_efficientnet", "weights": "none", "image_size": 32, "bn_momentum": 0.01}
        values["inference"] = Inference(device="cpu", precision="fp32", workers=1)
        return Embedding(**values | changes, source=source, cache_dir=tmp_path / "cache")

    return make


@pytest.fixture
def loop_of() -> Callable[..., Any]:
    """Make a loop around a scripted learner."""
    from anomalymatch.active.loop import ActiveLoop, LoopSpec
    from anomalymatch.active.oracles import TopKOracle
    from anomalymatch.active.strategies import top

    def make(task: Any, *, seed: int = 0, oracle: Any = TopKOracle, given: Any = None, **spec: Any) -> ActiveLoop:
        values = {"cycles": 3, "budget": 5, "pool_size": None, "anomalies": 2, "normals": 6} | spec
        return ActiveLoop(
            task,
            ScriptedLearner(task),
            None if task.anomalies is None else oracle(task, top),
            given=given or {},
            baseline=None,
            spec=LoopSpec(**values),
            seed=seed,
        )

    return make


@pytest.fixture
def run_in(without_pictures: None) -> Callable[..., Any]:
    """Run a loop in a folder; the rows, and the tracker that listened."""
    from anomalymatch.active.run_folder import RunFolder

    def run(loop: Any, path: Path) -> tuple[list[Any], Tracked]:
        folder, tracker = RunFolder(path), Tracked()
        try:
            return loop.run(folder, tracker), tracker
        finally:
            folder.close()

    return run


@pytest.fixture
def events() -> Callable[..., Any]:
    """The label log of a run folder."""
    from anomalymatch.data.label_log import LabelLog

    def read(path: Path) -> list[Any]:
        log = LabelLog(path / "labels.sqlite")
        try:
            return log.events()
        finally:
            log.close()

    return read


@pytest.fixture
def comparable(events: Any) -> Callable[..., Any]:
    """What must be equal in two runs of the same numbers: everything but the clock."""

    def read(path: Path) -> dict[str, Any]:
        with (path / "metrics.csv").open(newline="") as file:
            rows = [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]
        return {
            "metrics": rows,
            "log": [(e.id, e.label, e.annotator, e.cycle, e.score) for e in events(path)],
            "labels.csv": (path / "labels.csv").read_text(),
            "rejects": pq.read_table(path / "rejects.parquet").to_pydict(),
            "scores": {p.parent.name: pq.read_table(p).to_pydict() for p in path.glob("cycles/??/scores.parquet")},
            "weights": {p.parent.name + p.name: p.read_bytes() for p in path.glob("cycles/??/*.safetensors")},
            "steps": {p.parent.name: p.read_text() for p in path.glob("cycles/??/steps.csv")},
        }

    return read


TINY = (
    "algorithm.learner.batch.labelled=4",
    "algorithm.learner.batch.unlabelled_ratio=2",
    "trainer.iterations=3",
    # So that a few steps change something.
    "algorithm.learner.optimizer.lr=0.05",
)
# So that a network without pretrained weights, too, makes pseudo-labels.
LOW = ("algorithm.learner.loss.threshold=0.5",)
LOWERED = {"fixmatch": LOW, "fixmatch_reference": LOW, "flexmatch": LOW}


@pytest.fixture
def small(make_source: Any) -> Any:
    """Sixty images for a training of a few steps."""
    from anomalymatch.data.task import make_task

    return make_task(make_source(60, size=32), anomaly="rare")


@pytest.fixture
def labels(small: Any) -> Any:
    """What it begins with."""
    from anomalymatch.data.task import initial_labels

    return initial_labels(small, anomalies=2, normals=6, seed=0)


@pytest.fixture
def make(small: Any, make_embedding: Any) -> Callable[..., Any]:
    """Make a learner by its name, with overrides and values of the embedding."""
    from anomalymatch.build import build_learner
    from anomalymatch.config import compose

    def make_learner(algorithm: str = "fixmatch", *overrides: str, **model: Any) -> Any:
        tiny = () if algorithm == "probe" else (*TINY, *LOWERED.get(algorithm, ()))
        config = compose(f"algorithm={algorithm}", *tiny, *overrides)
        return build_learner(config, small, make_embedding(small.source, **model))

    return make_learner


@pytest.fixture
def scores_of(make: Any, small: Any, labels: Any) -> Callable[..., Any]:
    """The logits of all images by a learner after so many cycles."""

    def scores(algorithm: str, *overrides: str, cycles: int = 1, **model: Any) -> Any:
        learner = make(algorithm, *overrides, **model)
        for cycle in range(1, cycles + 1):
            learner.fit(labels, pool=small.pool, cycle=cycle)
        return learner.rank([*small.pool, *small.holdout]).logits

    return scores
