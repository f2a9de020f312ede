"""Fixtures for short trainings on sixty small images."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pytorch_lightning import Callback, Trainer
from torch import nn
from torch.utils.data import DataLoader

TINY = (
    "algorithm.learner.batch.labelled=4",
    "algorithm.learner.batch.unlabelled_ratio=2",
    "trainer.iterations=3",
    # So that a few steps change something.
    "algorithm.learner.optimizer.lr=0.05",
)
# So that a network without pretrained weights, too, makes pseudo-labels.
LOW = ("algorithm.learner.loss.threshold=0.5",)
WORDS = {
    "fixmatch": (*TINY, *LOW),
    "fixmatch_reference": (*TINY, *LOW),
    "flexmatch": (*TINY, *LOW),
    "freematch": TINY,
    "softmatch": TINY,
    "meanteacher": TINY,
    "msc": ("algorithm.learner.epochs=2", "algorithm.learner.batch_size=16", "algorithm.learner.optimizer.lr=0.5"),
    "knn": ("algorithm.learner.detector.neighbours=2",),
}


@pytest.fixture
def small(make_source: Any) -> Any:
    """Task with sixty images, for a training of a few steps."""
    from anomalymatch.data.task import make_task

    return make_task(make_source(60, size=32), anomaly="rare")


@pytest.fixture
def labels(small: Any) -> Any:
    """Labels of two anomalies and six normals."""
    from anomalymatch.data.task import initial_labels

    return initial_labels(small, anomalies=2, normals=6, seed=0)


@pytest.fixture
def make(small: Any, make_embedding: Any) -> Callable[..., Any]:
    """Make a learner by its name, with overrides and values of the embedding."""
    from anomalymatch.build import build_learner
    from anomalymatch.config import compose
    from anomalymatch.data.task import make_task

    def make_learner(algorithm: str = "fixmatch", *overrides: str, source: Any = None, **model: Any) -> Any:
        config = compose(f"algorithm={algorithm}", *WORDS.get(algorithm, ()), *overrides)
        task = small if source is None else make_task(source)
        return build_learner(config, task, make_embedding(task.source, pool=task.pool, **model))

    return make_learner


@pytest.fixture
def train_with_lightning(tmp_path: Path) -> Callable[..., set[tuple[bool, bool]]]:
    """Train on batches; return whether a network was in training mode at each step, and each of its batch norms."""

    def train(module: Any, batches: list[Any], network: nn.Module) -> set[tuple[bool, bool]]:
        modes = set()

        class Modes(Callback):
            def on_train_batch_end(self, *_: Any) -> None:
                norms = [part for part in network.modules() if isinstance(part, nn.BatchNorm2d)]
                modes.update((network.training, norm.training) for norm in norms)

        unused = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
        options = {"max_steps": len(batches), "accelerator": "cpu", "default_root_dir": tmp_path}
        trainer = Trainer(**options, **dict.fromkeys(unused, False), callbacks=[Modes()])
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*LeafSpec", FutureWarning)  # Lightning's own, with a new torch
            # Of batch norms that keep their statistics.
            warnings.filterwarnings("ignore", category=UserWarning, module="pytorch_lightning")
            trainer.fit(module, DataLoader(batches, batch_size=None))
        return modes

    return train


@pytest.fixture
def scores_of(make: Any, small: Any, labels: Any) -> Callable[..., Any]:
    """The logits of all images by a learner after so many cycles."""

    def scores(algorithm: str, *overrides: str, cycles: int = 1, **model: Any) -> Any:
        learner = make(algorithm, *overrides, **model)
        for cycle in range(1, cycles + 1):
            learner.fit(labels, pool=small.pool, cycle=cycle)
        return learner.rank([*small.pool, *small.holdout]).logits

    return scores


@pytest.fixture(scope="module")
def known_scores() -> dict[Any, Any]:
    """Results of `plain_scores` in this module."""
    return {}


@pytest.fixture
def plain_scores(scores_of: Any, known_scores: Any) -> Callable[..., Any]:
    """Scores to compare a change with, computed once in a module for each set of overrides."""

    def scores(algorithm: str, *overrides: str, cycles: int = 1) -> Any:
        key = (algorithm, overrides, cycles)
        if key not in known_scores:
            known_scores[key] = scores_of(algorithm, *overrides, cycles=cycles)
        return known_scores[key]

    return scores
