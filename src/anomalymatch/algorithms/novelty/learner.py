"""Learners that need no anomaly: they learn what is normal, and rank by the distance to it."""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float32

from anomalymatch.algorithms.base import NOVELTY, Truth
from anomalymatch.algorithms.lightning import StepListener, ignore_step
from anomalymatch.algorithms.novelty.detectors import Detector, FittedDetector, fit_detector
from anomalymatch.backbones.checkpoint import load_tensors, save_tensors
from anomalymatch.backbones.embedding import Embedding
from anomalymatch.backbones.inference import OutputBatch
from anomalymatch.data.labels import ids_labelled
from anomalymatch.errors import ConfigError, DataError, StorageError
from anomalymatch.files import write_text
from anomalymatch.progress import progress
from anomalymatch.ranking import Ranking
from anomalymatch.types import Label, Reject

CHUNK = 8192
"""Images whose features are in memory at a time while ranking."""


class DistanceLearner(ABC):
    """What they share. The `logits` of the ranking are standardised distances (see `functional.novelty.surprise`).

    Args:
        embedding: the pretrained backbone and the images.
        detector: the kind of distance.
        drop: share of the training images that score highest, and are left out: they may be hidden anomalies.
        least_normals: from this many images labelled normal on, they alone are learnt from; with fewer, the pool is,
            too, of which nearly all is normal.
    """

    needs_labels, is_detector, trains = False, True, False

    def __init__(self, embedding: Embedding, *, detector: Detector, drop: float, least_normals: int) -> None:
        if not 0.0 <= drop < 1.0:
            raise ConfigError(f"algorithm.learner.drop is {drop}: it must lie in [0, 1)")
        if least_normals < 1:
            raise ConfigError(f"algorithm.learner.least_normals is {least_normals}: it must be at least 1")
        self.embedding, self.detector = embedding, detector
        self.drop, self.least_normals = drop, least_normals
        self.on_step: StepListener = ignore_step
        self._novelty: FittedDetector | None = None
        self._place: dict[str, int] = {}

    @abstractmethod
    def features(self, ids: Sequence[str]) -> Iterator[OutputBatch]:
        """L2-normalised features of `ids`, in order, batch by batch; they are numbers of half precision."""

    def rank(self, ids: Sequence[str] | None = None) -> Ranking:
        """See `Learner.rank`. An image that was learnt from is compared with the others."""
        novelty, device = self._fitted(), self.embedding.inference.torch_device
        wanted = self.embedding.source.ids if ids is None else ids
        kept: list[str] = []
        rejects: list[Reject] = []
        logits = [np.empty(0)]
        with progress("Ranking", len(wanted)) as advance:
            for batch in self.features(wanted):
                trained = np.array([self._place.get(id_, -1) for id_ in batch.ids], dtype=np.int64)
                logits.append(novelty.logits(batch.outputs, trained, device))
                kept += batch.ids
                rejects += batch.rejects
                advance(len(batch.ids) + len(batch.rejects))
        return Ranking(kept, np.concatenate(logits), rejects)

    def save(self, folder: Path) -> None:
        """See `Learner.save`: what was learnt, and from which images."""
        save_tensors(self._fitted().tensors(), folder / NOVELTY)
        description = {"detector": type(self.detector).__name__, "learnt_from": list(self._place)}
        write_text((folder / NOVELTY).with_suffix(".json"), json.dumps(description))

    def restore(self, folder: Path) -> None:
        """See `Learner.restore`."""
        path = folder / NOVELTY
        try:
            ids = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))["learnt_from"]
            self._adopt(ids, FittedDetector.of(self.detector, load_tensors(path)))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StorageError(f"what was learnt in {path} is missing or corrupt ({error})") from error

    def _training_features(
        self, labels: Mapping[str, str], pool: Sequence[str] | None
    ) -> tuple[list[str], Float32[np.ndarray, "n d"]]:
        """The readable images to learn from, and their features.

        Raises:
            LabelError: if a label is unknown.
            DataError: if none can be read.
        """
        normals = ids_labelled(labels, Label.NORMAL)
        if len(normals) < self.least_normals:
            rest = self.embedding.source.ids if pool is None else pool
            normals += [id_ for id_ in rest if id_ not in labels]
        return self._read(normals)

    def _read(self, wanted: Sequence[str]) -> tuple[list[str], Float32[np.ndarray, "n d"]]:
        batches = list(self.features(wanted))
        ids = [id_ for batch in batches for id_ in batch.ids]
        if not ids:
            raise DataError(f"none of the {len(wanted)} images to learn from can be read")
        return ids, np.concatenate([batch.outputs for batch in batches])

    def _learn(self, ids: Sequence[str], rows: Float32[np.ndarray, "n d"], drop: float) -> None:
        self._adopt(ids, fit_detector(self.detector, rows, drop=drop, device=self.embedding.inference.torch_device))

    def _adopt(self, ids: Sequence[str], novelty: FittedDetector) -> None:
        self._place, self._novelty = {id_: i for i, id_ in enumerate(ids)}, novelty

    def _fitted(self) -> FittedDetector:
        if self._novelty is None:
            raise RuntimeError("call fit or restore before rank or save")
        return self._novelty


class NoveltyLearner(DistanceLearner):
    """Distances between frozen features: nothing trains.

    Args:
        embedding, detector, drop, least_normals: see `DistanceLearner`.
        seed, truth: all learners are built alike; this one has no randomness and needs no truth.
    """

    def __init__(
        self,
        embedding: Embedding,
        *,
        detector: Detector,
        drop: float,
        least_normals: int,
        seed: int = 0,
        truth: Truth | None = None,
    ) -> None:
        super().__init__(embedding, detector=detector, drop=drop, least_normals=least_normals)

    def fit(self, labels: Mapping[str, str], *, pool: Sequence[str] | None = None, cycle: int = 1) -> None:
        """See `Learner.fit`; any labels will do, or none."""
        self._learn(*self._training_features(labels, pool), self.drop)

    def features(self, ids: Sequence[str]) -> Iterator[OutputBatch]:
        """See `DistanceLearner.features`: those of the cache."""
        known = self.embedding.features
        reasons = {reject.id: reject for reject in known.rejects}
        for start in range(0, len(ids), CHUNK):
            chunk = ids[start : start + CHUNK]
            kept = [id_ for id_ in chunk if id_ not in reasons]
            yield OutputBatch(kept, known.take(kept), [reasons[id_] for id_ in chunk if id_ in reasons])
