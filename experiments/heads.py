"""Define classifiers that were tried in place of the probe's logistic regression, on the same features."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from sklearn import semi_supervised

from anomalymatch.algorithms.base import StepListener, ignore_step
from anomalymatch.backbones.embedding import Embedding
from anomalymatch.data.labels import training_ids
from anomalymatch.ranking import Ranking

NEIGHBOURS = 10
"""Neighbours of an image in the graph of `LabelSpreading`."""


class LabelledHead(ABC):
    """Classifier on the frozen features of all stages; a `Learner` for the benchmark.

    Args:
        embedding: the backbone and the images.
    """

    needs_labels = True

    def __init__(self, embedding: Embedding) -> None:
        self.embedding = embedding
        self.on_step: StepListener = ignore_step

    def fit(self, labels: Mapping[str, str], *, pool: Sequence[str] | None = None, cycle: int = 1) -> None:
        """See `Learner.fit`. Keep the features of the labelled images, centred on the mean of the normals."""
        anomalies, normals = (self._rows(ids) for ids in training_ids(dict(labels)))
        self._centre = normals.mean(axis=0)
        self._anomalies, self._normals = _unit(anomalies - self._centre), _unit(normals - self._centre)

    def rank(self, ids: Sequence[str] | None = None) -> Ranking:
        """See `Learner.rank`."""
        known = self.embedding.probe_features
        wanted = [id_ for id_ in (known.ids if ids is None else ids) if id_ in known]
        rows = _unit(self._rows(wanted) - self._centre)
        return Ranking(wanted, self.score(rows, self._anomalies, self._normals).astype(np.float64))

    def save(self, folder: Path) -> None:
        """Not supported."""
        raise NotImplementedError

    def restore(self, folder: Path) -> None:
        """Not supported."""
        raise NotImplementedError

    @abstractmethod
    def score(self, rows: np.ndarray, anomalies: np.ndarray, normals: np.ndarray) -> np.ndarray:
        """Score rows of length one; a higher score is more anomalous."""

    def _rows(self, ids: Sequence[str]) -> np.ndarray:
        features = self.embedding.probe_features
        return features.take(ids) * features.scaling.scale


class Prototype(LabelledHead):
    """Cosine to the mean of the labelled anomalies minus the cosine to the mean of the normals (arXiv 1703.05175)."""

    def score(self, rows: np.ndarray, anomalies: np.ndarray, normals: np.ndarray) -> np.ndarray:
        """See `LabelledHead.score`."""
        near, far = (_unit(side.mean(axis=0, keepdims=True))[0] for side in (anomalies, normals))
        return rows @ near - rows @ far


class NearestLabelled(LabelledHead):
    """Mean cosine to the five nearest labelled anomalies minus that to the five nearest labelled normals."""

    neighbours = 5

    def score(self, rows: np.ndarray, anomalies: np.ndarray, normals: np.ndarray) -> np.ndarray:
        """See `LabelledHead.score`."""
        near, far = (self._nearest(rows @ side.T) for side in (anomalies, normals))
        return near - far

    def _nearest(self, cosines: np.ndarray) -> np.ndarray:
        count = min(self.neighbours, cosines.shape[1])
        return np.sort(cosines, axis=1)[:, -count:].mean(axis=1)


class LabelSpreading(LabelledHead):
    """scikit-learn's label spreading on a graph of nearest neighbours (Zhou et al., NIPS 2003)."""

    def score(self, rows: np.ndarray, anomalies: np.ndarray, normals: np.ndarray) -> np.ndarray:
        """See `LabelledHead.score`."""
        targets = np.repeat([1, 0, -1], [len(anomalies), len(normals), len(rows)])
        model = semi_supervised.LabelSpreading(kernel="knn", n_neighbors=NEIGHBOURS)
        model.fit(np.concatenate([anomalies, normals, rows]), targets)
        return model.label_distributions_[-len(rows) :, 1]


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
