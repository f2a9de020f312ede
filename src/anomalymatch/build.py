"""Build objects from a composed configuration: the one place that knows how the parts fit together."""

import logging
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
from jaxtyping import Float32, Int64
from omegaconf import DictConfig, OmegaConf

from anomalymatch.active.candidates import NeighbourCandidates
from anomalymatch.active.cold_start import AlternatingOrder, ColdStart
from anomalymatch.active.loop import ActiveLoop, LoopSpec
from anomalymatch.active.oracles import Oracle, PaperOracle
from anomalymatch.active.run_folder import RunReader
from anomalymatch.active.strategies import Strategy, Top
from anomalymatch.active.text_ranker import TextRanker
from anomalymatch.active.tracking import Tracker, Trackers
from anomalymatch.algorithms.base import Learner
from anomalymatch.algorithms.novelty.detectors import Detector
from anomalymatch.algorithms.probe.learner import ProbeLearner, probe_network
from anomalymatch.algorithms.probe.regression import Probe
from anomalymatch.backbones.embedding import Embedding
from anomalymatch.backbones.evidence import evidence_map
from anomalymatch.backbones.image_text import ImageTextEmbedding
from anomalymatch.build_images import build, build_task, open_task
from anomalymatch.checks import check_choice, check_range
from anomalymatch.clustering.analysis import ImageGrouper
from anomalymatch.clustering.patches import PatchEmbedding
from anomalymatch.config import compose
from anomalymatch.data.label_log import LabelLog
from anomalymatch.data.labels import given_labels
from anomalymatch.data.source import ImageSource
from anomalymatch.data.sources.memory import from_images
from anomalymatch.data.task import Task
from anomalymatch.errors import ConfigError, StorageError
from anomalymatch.ranking import Ranking
from anomalymatch.types import Image, Label

if TYPE_CHECKING:
    from anomalymatch.algorithms.adaptation import Adapted
    from anomalymatch.backbones.features import Features
    from anomalymatch.progress import ShowProgress
    from anomalymatch.ui import FeatureStore, LabelService, LiveRanking

logger = logging.getLogger(__name__)


def make_learner(algorithm: str, task: Task, *overrides: str) -> Learner:
    """Make a learner for `task` by the name of its algorithm.

    Args:
        algorithm: `probe`, `fixmatch`, `fixmatch_reference`, `flexmatch`, `freematch`, `softmatch`, `meanteacher`, or,
            without any labelled anomaly, `knn`, `mahalanobis`, `pca_residual` or `msc`.
        task: from `open_task` or `make_task`.
        overrides: as on the command line: `make_learner("fixmatch", task, "model.image_size=128")`. Image size and the
            like are those of the data set that the task was opened with, else those of `dataset=auto`.

    Raises:
        ConfigError: if a key or value is wrong.

    Example:
        >>> learner = am.make_learner("probe", task)
        >>> ranking = learner.fit(labels).rank([id_ for id_ in task.pool if id_ not in labels])
        >>> len(ranking)
        125
    """
    dataset = () if any(word.startswith("dataset=") for word in overrides) else (f"dataset={task.dataset}",)
    config = compose(*dataset, f"algorithm={algorithm}", *overrides)
    return build_learner(config, task, build_embedding(config, task))


def rank(images: Any, labels: Any = None, *overrides: str, algorithm: str | None = None) -> Ranking:
    """Rank images by a few labels: `rank(paths, {"a.jpg": "anomaly", "b.jpg": "normal"}).top(10)`.

    Args:
        images: an array (n, h, w) or (n, h, w, bands), a list of arrays or paths, a data frame with a column of paths,
            a data set of torchvision or Hugging Face, a task, or the path of a folder or archive.
        labels: anomaly, normal, unsure or artefact, by id, or one for each image, with None for images without a label;
            of a data frame also the name of the column. Without labels, the most unusual images come first.
        overrides: as on the command line, see `make_learner`.
        algorithm: see `make_learner`; None takes `probe`, and `knn` if there are no labels.

    Returns:
        The ranking of the images without a label.

    Raises:
        DataError: if the images are of no known kind, or missing.
        LabelError: if a label is unknown, or all images with labels are of one class.

    Example:
        >>> images = np.random.default_rng(0).integers(0, 255, (20, 64, 64, 3), dtype=np.uint8)
        >>> ranking = am.rank(images, {"3": "anomaly", "5": "normal", "8": "normal"})
        >>> len(ranking)
        17
    """
    if isinstance(images, Task | str | os.PathLike):
        task = images if isinstance(images, Task) else open_task("auto", f"data.root={os.fspath(images)}")
        known = task.labels | given_labels(labels, task.source.ids)
    else:
        task = from_images(images, labels)
        known = task.labels
    learner = make_learner(algorithm or ("probe" if known else "knn"), task, *overrides)
    return learner.fit(known).rank([id_ for id_ in task.pool if id_ not in known])


def build_embedding(config: DictConfig, task: Task) -> Embedding:
    """Build the frozen backbone with its features of the images of `task`."""
    model = OmegaConf.to_container(config.model, resolve=True)
    return Embedding(
        **model,  # type: ignore[arg-type]
        source=task.source,
        pool=task.pool,
        cache_dir=Path(config.data.cache_dir),
        inference=build(config.inference),
    )


def make_text_ranker(task: Task, descriptions: str | Sequence[str], *overrides: str) -> TextRanker:
    """Make a learner that ranks the images of `task` by a description, without any label.

    `make_text_ranker(task, "a ring galaxy").rank().top(20)` are the 20 images that fit it best.

    Args:
        task: from `open_task` or `make_task`.
        descriptions: what to look for, in words; of several descriptions, an image has to fit one.
        overrides: as on the command line: `text=clip`, `text.model=local-dir:models/mine`, `inference.device=cpu`.

    Raises:
        ConfigError: if a key or value is wrong, or open_clip is not installed.

    Example:
        >>> ranker = am.make_text_ranker(task, "a ring galaxy", "text.model=local-dir:models/mine")
        >>> len(ranker.rank().top(20))
        20
    """
    return TextRanker(build_image_text(compose(*overrides), task), descriptions)


def build_image_text(config: DictConfig, task: Task) -> ImageTextEmbedding:
    """Build the image-text model with its embeddings of the images of `task`."""
    return ImageTextEmbedding(
        build(config.text),
        source=task.source,
        cache_dir=Path(config.data.cache_dir),
        inference=build(config.inference),
        pool=task.pool,
    )


def build_adaptation(config: DictConfig, task: Task) -> "Callable[..., Adapted]":
    """Build the function that adapts the backbone in a folder; the steps of its training are passed on.

    Labels serve the check of the result alone: those that came with the images, else a sample of the true classes.
    """
    # Imported late: the other commands do not need lightly.
    from anomalymatch.algorithms.adaptation import AdaptationSpec, Recipe, adapt

    settings = cast(dict[str, Any], OmegaConf.to_container(config.adapt, resolve=True))
    spec = AdaptationSpec(**{field.name: settings[field.name] for field in fields(AdaptationSpec)})
    check_range("adapt.minutes", config.adapt.minutes, above=0, null=True)
    check_range("trainer.workers", config.trainer.workers, low=0)
    augmentation = build(config.augment)
    recipe = Recipe(
        name=config.adapt.name,
        method=build(config.adapt.method),
        spec=spec,
        optimizer=build(config.adapt.optimizer),
        trainer=build(config.trainer.lightning),
        view=augmentation.contrastive(task.source.channels, spec.image_size),
        workers=config.trainer.workers,
        minutes=config.adapt.minutes,
        seed=config.seed,
    )
    embedding = build_embedding(config, task)
    embedding = replace(embedding, stages=False, orientations=1, crops=0, tiles=1)
    return partial(adapt, embedding, task.pool, known_anomalies(task, config.seed), recipe)


def known_anomalies(task: Task, seed: int, most: int = 2000) -> dict[str, bool]:
    """Return True for each image of the pool known as an anomaly, False for at most `most` known as normal."""
    known = {
        id_: label == Label.ANOMALY for id_, label in task.labels.items() if label in (Label.ANOMALY, Label.NORMAL)
    }
    if task.anomalies is not None:
        known = {id_: bool(rare) for id_, rare in zip(task.pool, task.truth(task.pool), strict=True)}
    pool = frozenset(task.pool)
    normals = [id_ for id_, rare in known.items() if not rare and id_ in pool]
    chosen = np.random.default_rng(seed).permutation(len(normals))[:most]
    anomalies = [id_ for id_, rare in known.items() if rare and id_ in pool]
    return dict.fromkeys(anomalies, True) | {normals[i]: False for i in sorted(chosen)}


# --- the loop ---------------------------------------------------------------------------------------------------


def build_loop(config: DictConfig, task: Task | None = None) -> ActiveLoop:
    """Build the active-learning loop with all its parts; `task` may be given, if it is built already."""
    task = build_task(config) if task is None else task
    embedding = build_embedding(config, task)
    logger.debug("Backbone: %s", embedding.spec)  # reports a wrong model before anything is written
    learner = build_learner(config, task, embedding)
    cold = build_cold_start(config, task, embedding)
    described = None if config.al.describe is None else TextRanker(build_image_text(config, task), config.al.describe)
    if described is not None:
        cold = described if cold is None else AlternatingOrder(described, cold)
    check_choice("al.candidates", config.al.candidates, ("all", "neighbours"))
    candidates = NeighbourCandidates(embedding, config.al.neighbours)  # reports a wrong number in any case
    compare = config.al.compare_probe and not isinstance(learner, ProbeLearner)
    return ActiveLoop(
        task,
        learner if cold is None else ColdStart(learner, cold),
        _oracle(config, task, embedding),
        given=task.labels,
        baseline=ProbeLearner(embedding, probe=build(config.probe)) if compare else None,
        described=described,
        candidates=candidates if config.al.candidates == "neighbours" else None,
        spec=LoopSpec(
            cycles=config.al.cycles,
            budget=config.al.budget,
            pool_size=config.al.pool_size,
            anomalies=config.al.initial.anomalies,
            normals=config.al.initial.normals,
            audit=config.al.audit,
            audit_tops=tuple(config.al.audit_tops),
            stopping=build(config.al.stopping),
        ),
        seed=config.seed,
    )


def build_learner(config: DictConfig, task: Task, embedding: Embedding) -> Learner:
    """Build the learner of the algorithm."""
    return _learner(
        build(config.algorithm.learner), config, task, embedding, name=config.algorithm.name, key="algorithm"
    )


def build_cold_start(config: DictConfig, task: Task, embedding: Embedding) -> Learner | None:
    """Build the learner that ranks while labels are missing; None without a cold start."""
    cold = _settings(config, config.al.cold_start)
    if cold.learner is None:
        return None
    parts = {
        str(name): build(_settings(config, part).learner)
        for name, part in cold.items()
        if isinstance(part, DictConfig) and name != "learner"
    }
    make = partial(build(cold.learner), **parts)
    return _learner(make, config, task, embedding, name=cold.name, key="al.cold_start")


def build_detector(config: DictConfig, default: DictConfig) -> Detector:
    """Build the novelty detector of the cold start, or that of the algorithm `default` if the cold start has none."""
    cold = config.al.cold_start
    algorithms = [cold.get("novelty"), cold, default]
    return next(
        build(_settings(config, node).learner.detector)
        for node in algorithms
        if node is not None and node.learner is not None and "detector" in node.learner
    )


def build_grouper(config: DictConfig, embedding: Embedding) -> ImageGrouper:
    """Build the function that groups images by kind while somebody waits."""
    return build(config.clustering.grouper)(embedding)


def build_label_service(
    config: DictConfig, page: DictConfig, run: Path, source: ImageSource, *, trust: bool = False
) -> "LabelService":
    """Build the service of the labelling page on a run folder, with `page`, the node `ui` of the labelling command.

    Features that are not cached are computed in the background. `trust` lets trainings use classes of the user's own.

    Raises:
        AnomalyMatchError: if a setting is wrong, as far as this is known within `SETTLE_S`.
    """
    # Imported late: the other commands do not need it.
    from anomalymatch.ui import FirstOrder, LabelService, LiveRanking, build_feature_store, compute_novelty
    from anomalymatch.ui.columns import read_scores
    from anomalymatch.ui.features import EXACT_BYTES, check_compression
    from anomalymatch.ui.keys import read_kinds
    from anomalymatch.ui.preparation import SETTLE_S

    check_compression(page.compression, page.dimensions)
    kinds = read_kinds(page.kinds)
    scores = None if page.scores is None else read_scores(Path(page.scores).expanduser(), source.ids)
    task = Task(source, source.ids, [], None)
    text = build_image_text(config, task)
    descriptions: Sequence[str] = ()
    if config.al.describe is not None:  # reports what is wrong before the features are computed
        descriptions = TextRanker(text, config.al.describe).descriptions
    embedding = build_embedding(config, task)
    detector = build_detector(config, page.novelty)
    first_orders = {"none": FirstOrder.DIVERSE} | {order.name.lower(): order for order in FirstOrder}
    # The classes of the learner and of the cold start, if there is one.
    learner, *rankers = (build(node.learner).func for node in (config.algorithm, config.al.cold_start) if node.learner)
    probe = build(config.probe)

    def locate(fitted: Probe, image: Image) -> Float32[np.ndarray, "s s"]:
        network = probe_network(embedding, fitted).eval().to(embedding.inference.torch_device)
        return evidence_map(network, image, source.rendering.fit)

    def reorient(store: "FeatureStore", at: Int64[np.ndarray, " a"]) -> Float32[np.ndarray, "t d"]:
        return store.encode(embedding.reoriented_features([source.ids[i] for i in at], probe.orientations))

    def prepare(show: "ShowProgress", use: "Callable[[LiveRanking], None]") -> "LiveRanking":
        first = first_orders.get(config.al.cold_start.name, FirstOrder.NOVEL)
        folder = embedding.features_folder
        store_of = partial(build_feature_store, ids=source.ids, dimensions=page.dimensions, folder=folder, show=show)

        def use_part(features: "Features") -> None:
            images = sum(len(shard.ids) for shard in features.shards)
            if 2 * images * features.dimensions <= EXACT_BYTES:  # a larger part would be compressed, for a short time
                store = store_of(features, compression="exact", is_part=True)
                use(LiveRanking(store, probe, seed=config.seed, first=first))

        store = store_of(embedding.load_features(show, use_part), compression=page.compression)
        import_module("sklearn.linear_model")  # here, in the background, so that the first label does not wait for it
        novelty = compute_novelty(store, detector, folder=folder, show=show)
        turned = partial(reorient, store)
        return LiveRanking(store, probe, seed=config.seed, novelty=novelty, first=first, reorient=turned)

    service = LabelService(
        run,
        source,
        prepare,
        encode=embedding.encode,
        locate=locate,
        # A detector trains for epochs, so that its number of steps is not known in advance.
        training_steps=0 if any(c.is_detector and c.trains for c in (learner, *rankers)) else config.trainer.iterations,
        cache=Path(config.data.cache_dir) / "thumbnails",
        workers=config.inference.workers,
        seed=config.seed,
        divide=build_grouper(config, embedding),
        needs_labels=learner.needs_labels and not any(cold_start.trains for cold_start in rankers),
        stopping=build(config.al.stopping),
        text=text,
        descriptions=descriptions,
        scores=scores,
        trust=trust,
    )
    try:
        service.groups.bind(kinds)
        service.add_given_labels(source.labels)
        service.preparation.settle(SETTLE_S)
    except BaseException:
        service.close()
        raise
    return service


def build_strategy(config: DictConfig, embedding: Embedding) -> Strategy:
    """Build the query strategy."""
    settings = cast(dict[str, Any], OmegaConf.to_container(config.al.strategy, resolve=True))
    strategy = build(OmegaConf.create({key: value for key, value in settings.items() if key != "name"}))
    return strategy(embedding) if isinstance(strategy, partial) else strategy


def build_patches(config: DictConfig, source: ImageSource) -> PatchEmbedding:
    """Build the patches of the images of `source`."""
    embedding = build_embedding(config, Task(source, source.ids, [], None))
    return PatchEmbedding(embedding, build(config.clustering.patches))


class Selection(NamedTuple):
    """Images to group, images labelled normal to compare them with, and the choice in words."""

    ids: list[str]
    normals: list[str]
    description: str


def select_images(config: DictConfig, source: ImageSource) -> Selection:
    """Select the images to group: the top of a run, its images with the label `labelled`, or all of the source.

    Raises:
        ConfigError: if a setting is wrong.
        StorageError: if the run has no finished cycle.
    """
    check_choice("labelled", config.labelled, list(Label), null=True)
    if config.run is None:
        if config.labelled is not None:
            raise ConfigError("labelled needs run=RUN: without a run there are no labels")
        return Selection(list(source.ids), [], "all images")
    check_range("top", config.top, low=2)
    run = Path(config.run).expanduser()
    log = LabelLog.of_run(run)
    try:
        labels = log.current()
    finally:
        log.close()
    known = set(source.ids)
    normals = [id_ for id_, label in labels.items() if label == Label.NORMAL and id_ in known]
    if config.labelled is not None:
        ids = sorted(id_ for id_, label in labels.items() if label == config.labelled and id_ in known)
        return Selection(ids, [] if config.labelled == Label.NORMAL else normals, f"labelled {config.labelled}")
    reader = RunReader(run)
    cycle = reader.finished_cycles()
    if cycle < 1:
        raise StorageError(f"run={config.run}: no cycle of it is finished, so there is no ranking")
    ranking = reader.ranking(cycle)
    rest = ranking.restrict(set(ranking.ids) & known - set(normals))
    return Selection(rest.top(config.top), normals, f"the {min(config.top, len(rest)):,} top-ranked of cycle {cycle}")


def build_tracker(config: DictConfig, folder: Path, *, name: str = "", sweep: str | None = None) -> Tracker:
    """Build the tracker of all loggers, for a run with a name (default: that of the folder), perhaps of a sweep."""
    if "_target_" in config.logger:
        raise ConfigError("logger: the folder is of a version with a single logger: add logger=wandb, or another")
    plain: Any = OmegaConf.to_container(config, resolve=True)
    start = {"folder": folder, "config": plain, "name": name or folder.name, "sweep": sweep}
    trackers: list[Tracker] = []
    try:
        for node in config.logger.values():
            trackers.append(build(node)(**start))
    except BaseException:
        Trackers(trackers).finish()
        raise
    return Trackers(trackers)


def _settings(config: DictConfig, node: DictConfig) -> DictConfig:
    """Return the settings of `algorithm=` where `node` names the same algorithm, else `node` itself."""
    return config.algorithm if node.name == config.algorithm.name else node


def _learner(make: Any, config: DictConfig, task: Task, embedding: Embedding, *, name: str, key: str) -> Learner:
    truth = None if task.anomalies is None else task.truth
    try:
        return make(embedding, seed=config.seed, truth=truth)
    except TypeError as error:
        unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if unknown is None:
            raise
        raise ConfigError(
            f"{key}={name} has no setting {key}.learner.{unknown[1]}, which the command line or the experiment sets "
            f"for another algorithm: leave it out"
        ) from error


def _oracle(config: DictConfig, task: Task, embedding: Embedding) -> Oracle | None:
    strategy, name = build_strategy(config, embedding), config.al.strategy.name
    oracle: Oracle | None = None if task.anomalies is None else build(config.oracle.answer)(task, strategy)
    if not isinstance(strategy, Top) and oracle is None:
        logger.warning("al.strategy.name=%s is not used: without dataset.anomaly no oracle answers queries", name)
    elif not isinstance(strategy, Top) and isinstance(oracle, PaperOracle):
        logger.warning("al.strategy.name=%s is not used: this oracle chooses by the truth; add oracle=top_k", name)
    return oracle
