"""From a checked configuration to objects."""

import logging
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf

from anomalymatch.active.cold_start import ColdStart, Mixed, Shuffled
from anomalymatch.active.cold_start import Diverse as DiverseStart
from anomalymatch.active.loop import ActiveLoop, LoopSpec
from anomalymatch.active.oracles import Oracle, PaperOracle
from anomalymatch.active.strategies import (
    Auto,
    Distinct,
    Diverse,
    ExpectedDiscovery,
    Mixture,
    PerCluster,
    Strategy,
    random,
    top,
    uncertain,
)
from anomalymatch.active.tracking import Tracker
from anomalymatch.algorithms.base import Learner
from anomalymatch.algorithms.novelty.detectors import Detector
from anomalymatch.algorithms.probe.learner import ProbeLearner
from anomalymatch.backbones.embedding import Embedding
from anomalymatch.clustering.analysis import Divider
from anomalymatch.clustering.patches import PatchEmbedding
from anomalymatch.config import compose
from anomalymatch.data.source import ImageSource
from anomalymatch.data.task import Task, make_task
from anomalymatch.errors import AnomalyMatchError, ConfigError
from anomalymatch.types import Label

logger = logging.getLogger(__name__)
DETECTORS = ("knn", "msc", "mahalanobis", "pca_residual")
"""Algorithms that need no anomaly."""
REFERENCES = 100
COLD_STARTS = (*DETECTORS, "diverse", "mixed", "random")


def open_task(dataset: str, *overrides: str) -> Task:
    """Open a data set by its configured name, with the rare class and the held-out split of its configuration.

    Args:
        dataset: `demo`, `folder`, `parquet`, `galaxymnist`, `miniimagenet`, `cifar10` or `galaxyzoo1`.
        overrides: as on the command line: `open_task("folder", "data.root=photos")`.

    Raises:
        ConfigError: if a key or value is wrong.
        DataError: if the images are not there.
    """
    return build_task(compose(f"dataset={dataset}", *overrides))


def make_learner(algorithm: str, task: Task, *overrides: str) -> Learner:
    """Make a learner for `task` by the configured name of its algorithm.

    Args:
        algorithm: `probe`, `fixmatch`, `fixmatch_reference`, `flexmatch`, `freematch`, `softmatch`, `meanteacher`, or,
            without any anomaly, `knn`, `mahalanobis`, `pca_residual` or `msc`.
        task: see `open_task` and `make_task`.
        overrides: as on the command line: `make_learner("fixmatch", task, "model.image_size=128")`.

    Raises:
        ConfigError: if a key or value is wrong.
    """
    config = compose(f"algorithm={algorithm}", *overrides)
    return build_learner(config, task, build_embedding(config, task))


def build_task(config: DictConfig) -> Task:
    """The images and what is rare among them."""
    if config.seed < 0:
        raise ConfigError(f"seed is {config.seed}: it cannot be negative")
    anomaly = config.dataset.anomaly
    several = isinstance(anomaly, ListConfig)
    return make_task(
        build_source(config),
        anomaly=None if anomaly is None else [str(name) for name in anomaly] if several else str(anomaly),
        prevalence=_share(config, "prevalence"),
        holdout=_share(config, "holdout") or 0.0,
        seed=config.seed,
    )


def build_source(config: DictConfig) -> ImageSource:
    """The images alone.

    Raises:
        ConfigError: if the data set has no use for `data.root`, or something is wrong with its settings.
    """
    source = config.dataset.source
    if config.data.root is not None and "root" not in source and "data.root" not in OmegaConf.to_yaml(source):
        raise ConfigError(
            f"data.root={config.data.root} is not used by dataset={config.dataset.name}: add dataset=auto for your own "
            f"images, or leave it out"
        )
    return build(source)


def build_embedding(config: DictConfig, task: Task) -> Embedding:
    """The frozen backbone and its features."""
    model = OmegaConf.to_container(config.model, resolve=True)
    return Embedding(
        **model,  # type: ignore[arg-type]
        source=task.source,
        cache_dir=Path(config.data.cache_dir),
        inference=build(config.inference),
    )


def build_learner(config: DictConfig, task: Task, embedding: Embedding) -> Learner:
    """The algorithm."""
    truth = None if task.anomalies is None else task.truth
    make = build(config.algorithm.learner)
    try:
        return make(embedding, seed=config.seed, truth=truth)
    except TypeError as error:
        unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if unknown is None:
            raise
        raise ConfigError(
            f"algorithm={config.algorithm.name} has no setting algorithm.learner.{unknown[1]}, which the command line "
            "or the experiment sets for another algorithm: leave it out"
        ) from error


def build_detector(config: DictConfig) -> Detector:
    """How unlike the others an image is, as `al.cold_start` says; as `knn` does where that compares nothing."""
    name = "knn" if config.al.cold_start is None else _cold_start(config)
    return build(_with_algorithm(config, name if name in DETECTORS else "knn").algorithm.learner.detector)


def build_divider(config: DictConfig, embedding: Embedding) -> Divider:
    """What groups images by what is odd about them, while somebody waits: a sample stands for all of them.

    `clustering.spec.references` is its size; see experiments/README.md, 8, for what a small one costs.
    """
    patches, spec = PatchEmbedding(embedding, build(config.clustering.patches)), build(config.clustering.spec)
    return Divider(patches, replace(spec, references=spec.references or REFERENCES), config.seed)


def build_loop(config: DictConfig) -> ActiveLoop:
    """Everything together."""
    task = build_task(config)
    embedding = build_embedding(config, task)
    learner = build_learner(config, task, embedding)
    compare = config.al.compare_probe and not isinstance(learner, ProbeLearner)
    return ActiveLoop(
        task,
        learner if config.al.cold_start is None else ColdStart(learner, _first(config, task, embedding)),
        _oracle(config, task, embedding),
        given={id_: Label(label) for id_, label in task.source.labels.items()},
        baseline=_probe(config, embedding) if compare else None,
        spec=LoopSpec(
            cycles=config.al.cycles,
            budget=config.al.budget,
            pool_size=config.al.pool_size,
            anomalies=config.al.initial.anomalies,
            normals=config.al.initial.normals,
            audit=config.al.audit,
        ),
        seed=config.seed,
    )


def _first(config: DictConfig, task: Task, embedding: Embedding) -> Learner:
    """What ranks while labels are missing."""
    name = _cold_start(config)
    if name == "random":
        return Shuffled(embedding, seed=config.seed)
    if name == "diverse":
        return DiverseStart(embedding, seed=config.seed)
    if name == "mixed":
        return Mixed(_novel(config, "knn", task, embedding), DiverseStart(embedding, seed=config.seed))
    return _novel(config, name, task, embedding)


def _novel(config: DictConfig, name: str, task: Task, embedding: Embedding) -> Learner:
    return build_learner(_with_algorithm(config, name), task, embedding)


def _cold_start(config: DictConfig) -> str:
    name = config.al.cold_start
    if name not in COLD_STARTS:
        raise ConfigError(f"al.cold_start is {name!r}: choose one of {', '.join(COLD_STARTS)}, or null")
    return str(name)


def _with_algorithm(config: DictConfig, name: str) -> DictConfig:
    """An algorithm as its own file says; all that the file refers to is that of this job."""
    config = OmegaConf.masked_copy(config, [str(key) for key in config if key != "algorithm"])
    config.algorithm = compose(f"algorithm={name}")._get_node("algorithm")
    return config


def _probe(config: DictConfig, embedding: Embedding) -> ProbeLearner:
    return ProbeLearner(embedding, probe=build(config.probe))


def build_tracker(config: DictConfig, folder: Path) -> Tracker:
    """W&B, or nothing."""
    plain: Any = OmegaConf.to_container(config, resolve=True)
    return build(config.logger)(folder=folder, config=plain)


def build(node: DictConfig) -> Any:
    """Hydra's `instantiate`, with our own errors as they were raised and everything else as a `ConfigError`.

    Raises:
        ConfigError: if an argument is unknown or wrong.
    """
    try:
        return instantiate(node)
    except InstantiationException as error:
        if isinstance(error.__cause__, AnomalyMatchError):
            raise error.__cause__ from None
        raise ConfigError(f"{node._target_}: {error.__cause__ or error}") from error


def _share(config: DictConfig, key: str) -> float | None:
    value = config.dataset[key]
    if value is None or (isinstance(value, (int, float)) and not isinstance(value, bool)):
        return None if value is None else float(value)
    raise ConfigError(f"dataset.{key}={value} is not a number")


def _oracle(config: DictConfig, task: Task, embedding: Embedding) -> Oracle | None:
    strategy, name = build_strategy(config, embedding), config.al.strategy.name
    oracle: Oracle | None = None if task.anomalies is None else build(config.oracle.answer)(task, strategy)
    if name != "top" and oracle is None:
        logger.warning("al.strategy.name=%s is not used: it is for a benchmark, whose truth answers what it asks", name)
    elif name != "top" and isinstance(oracle, PaperOracle):
        logger.warning("al.strategy.name=%s is not used: this oracle chooses by the truth; add oracle=top_k", name)
    return oracle


def build_strategy(config: DictConfig, embedding: Embedding) -> Strategy:
    """What chooses the images to label."""
    chosen = config.al.strategy
    made: dict[str, Callable[[], Strategy]] = {
        "top": lambda: top,
        "uncertain": lambda: uncertain,
        "random": lambda: random,
        "mixture": lambda: Mixture(chosen.explore),
        "distinct": lambda: Distinct(embedding, chosen.candidates, chosen.similarity),
        "diverse": lambda: Diverse(embedding, chosen.candidates),
        "auto": lambda: Auto(embedding, chosen.candidates, chosen.similarity),
        "expected": lambda: ExpectedDiscovery(embedding, chosen.candidates, chosen.horizon),
        "per_cluster": lambda: PerCluster(build_divider(config, embedding), chosen.candidates),
    }
    if chosen.name not in made:
        raise ConfigError(f"al.strategy.name is {chosen.name!r}: choose one of {', '.join(made)}")
    return made[chosen.name]()
