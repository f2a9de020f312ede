"""Learners that need no labels: they fit a detector on normal images and rank by the distance to them."""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Float64

from anomalymatch.algorithms.base import NOVELTY, StepListener, Truth, ignore_step, require_fitted
from anomalymatch.algorithms.novelty.detectors import Detector, FittedDetector, fit_detector
from anomalymatch.backbones.checkpoint import load_tensors, save_tensors
from anomalymatch.backbones.embedding import Embedding
from anomalymatch.backbones.inference import OutputBatch
from anomalymatch.checks import check_range
from anomalymatch.data.labels import ids_labelled
from anomalymatch.data.stream import collect, none_readable
from anomalymatch.errors import StorageError
from anomalymatch.files import write_text
from anomalymatch.progress import progress
from anomalymatch.ranking import Ranking
from anomalymatch.types import Label

CHUNK = 8192
"""Number of images whose features are in memory at a time."""


class DistanceLearner(ABC):
    """Base class of learners that rank by a distance; the logits are those of `distance_logits`.

    The settings are keys of `conf/algorithm/knn.yaml`. With fewer than `least_normals` images labelled normal, the pool
    is used too, because nearly all of it is normal. Frozen features need no seed, and no distance needs the truth.
    """

    needs_labels, is_detector, trains = False, True, False

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
        check_range("algorithm.learner.drop", drop, low=0, below=1)
        check_range("algorithm.learner.least_normals", least_normals, low=1)
        self.embedding, self.detector, self.seed = embedding, detector, seed
        self.drop, self.least_normals = drop, least_normals
        self.on_step: StepListener = ignore_step
        self._detector: FittedDetector | None = None
        self._place: dict[str, int] = {}

    @abstractmethod
    def features(self, ids: Sequence[str]) -> Iterator[OutputBatch]:
        """Yield batches of L2-normalised features of `ids` in order; the numbers fit in half precision."""

    def rank(self, ids: Sequence[str] | None = None) -> Ranking:
        """See `Learner.rank`; a training image is compared with the others, not with itself."""
        fitted, device = require_fitted(self._detector), self.embedding.inference.torch_device
        wanted = self.embedding.default_ids if ids is None else ids

        def logits(batch: OutputBatch) -> Float64[np.ndarray, " n"]:
            trained = np.array([self._place.get(id_, -1) for id_ in batch.ids], dtype=np.int64)
            return fitted.logits(batch.outputs, trained, device)

        with progress("Ranking", len(wanted)) as advance:
            batches = ((batch.ids, logits(batch), batch.rejects) for batch in self.features(wanted))
            found = collect(batches, np.empty(0), advance)
        return Ranking(found.ids, found.rows, found.rejects, self.embedding.source)

    def save(self, folder: Path) -> None:
        """Save the fitted detector and the ids of the training images."""
        save_tensors(require_fitted(self._detector).tensors(), folder / NOVELTY)
        description = {"detector": type(self.detector).__name__, "learnt_from": list(self._place)}
        write_text((folder / NOVELTY).with_suffix(".json"), json.dumps(description))

    def restore(self, folder: Path) -> None:
        """See `Learner.restore`."""
        path = folder / NOVELTY
        try:
            ids = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))["learnt_from"]
            self._adopt(ids, FittedDetector.from_tensors(self.detector, load_tensors(path)))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StorageError(f"the fitted detector in {path} is missing or corrupt ({error})") from error

    def _training_features(
        self, labels: Mapping[str, str], pool: Sequence[str] | None
    ) -> tuple[list[str], Float32[np.ndarray, "n d"]]:
        """Choose the training images and compute their features; images that cannot be read are left out.

        Raises:
            LabelError: if a label is unknown.
            DataError: if none can be read.
        """
        normals = ids_labelled(labels, Label.NORMAL)
        if len(normals) < self.least_normals:
            rest = self.embedding.default_ids if pool is None else pool
            normals += [id_ for id_ in rest if id_ not in labels]
        return self._read(normals)

    def _read(self, wanted: Sequence[str]) -> tuple[list[str], Float32[np.ndarray, "n d"]]:
        found = collect(self.features(wanted), np.empty((0, 0), np.float32))
        if not found.ids:
            raise none_readable(self.embedding.source, found.rejects)
        return found.ids, found.rows

    def _fit_detector(self, ids: Sequence[str], rows: Float32[np.ndarray, "n d"], drop: float) -> None:
        self._adopt(ids, fit_detector(self.detector, rows, drop=drop, device=self.embedding.inference.torch_device))

    def _adopt(self, ids: Sequence[str], fitted: FittedDetector) -> None:
        self._place, self._detector = {id_: i for i, id_ in enumerate(ids)}, fitted


class NoveltyLearner(DistanceLearner):
    """Learner that ranks by a distance between frozen features."""

    def fit(self, labels: Mapping[str, str], *, pool: Sequence[str] | None = None, cycle: int = 1) -> "NoveltyLearner":
        """See `Learner.fit`; no label is required."""
        self._fit_detector(*self._training_features(labels, pool), self.drop)
        return self

    def features(self, ids: Sequence[str]) -> Iterator[OutputBatch]:
        """Read the features from the cache, see `DistanceLearner.features`."""
        known = self.embedding.features
        for start in range(0, len(ids), CHUNK):
            kept, rejects = known.split(ids[start : start + CHUNK])
            yield OutputBatch(kept, known.take(kept), rejects)
