"""Fractional whitening of a probe's features by the covariance of the pool, with powers that are chosen out of fold."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.metrics import average_precision_score
from sklearn.model_selection import StratifiedKFold

from anomalymatch import Label
from anomalymatch.algorithms.probe.regression import Probe, ProbeSpec, fit_logistic, self_train
from anomalymatch.backbones.embedding import Embedding
from anomalymatch.backbones.features import SAMPLE, Scaling
from anomalymatch.data.labels import training_ids

FLOOR = 1e-3
"""Share of the mean variance that is added to each: the smallest hold the rounding of half precision."""


@dataclass(frozen=True)
class Axes:
    """Principal axes of each block of scaled features, as columns, and the variance of the pool along each axis.

    A linear model on coordinates along the axes is one on the features, with the same regularisation. There, whitening
    only multiplies columns.
    """

    scaling: Scaling
    vectors: Sequence[np.ndarray]
    variances: Sequence[np.ndarray]

    @classmethod
    def measure(cls, rows: np.ndarray, scaling: Scaling) -> "Axes":
        """Measure the axes on features of the pool."""
        found = []
        for block in scaling.blocks:
            part = rows[:, block] * scaling.scale[block]
            part -= part.mean(axis=0)
            found.append(np.linalg.eigh((part.T @ part / len(part)).astype(np.float64)))
        variances, vectors = zip(*found, strict=True)
        return cls(scaling, [each.astype(np.float32) for each in vectors], [np.maximum(v, 0.0) for v in variances])

    def rotate(self, rows: np.ndarray) -> np.ndarray:
        """Return the coordinates of features along the axes."""
        parts = zip(self.scaling.blocks, self.vectors, strict=True)
        return np.concatenate([rows[:, b] * self.scaling.scale[b] @ vectors for b, vectors in parts], axis=1)

    def factors(self, block: int, power: float) -> np.ndarray:
        """Return variance^(-power / 2) for each coordinate; the mean squared length of centred rows stays the same."""
        own = self.variances[block]
        factor = (own + FLOOR * own.mean()) ** (-power / 2)
        return (factor * np.sqrt(own.sum() / (own * factor**2).sum())).astype(np.float32)


class WhitenedProbe:
    """Probe on whitened features of an embedding.

    Args:
        embedding: the features; its pool is whitened.
        spec: settings of the probe.
        powers: powers of the covariance, of which each block gets the best out of fold; one power is not compared.
        least: labelled anomalies from which features are whitened.
    """

    def __init__(self, embedding: Embedding, spec: ProbeSpec, powers: Sequence[float], least: int) -> None:
        self.embedding, self.spec, self.powers, self.least = embedding, spec, powers, least
        ids = embedding.probe_features.split(embedding.default_ids)[0]
        self.place = {id_: i for i, id_ in enumerate(ids)}
        rows = embedding.probe_features.take(ids)
        self.axes = Axes.measure(rows[:: max(1, len(rows) // SAMPLE)], embedding.scaling)
        self.rows = self.axes.rotate(rows)

    def logits(self, labels: dict[str, Label], wanted: Sequence[str]) -> np.ndarray:
        """Fit the labels, with self-training on the rest of the pool, and return log-odds of images of the pool."""
        anomalies, normals = training_ids(labels)
        rest = [id_ for id_ in self.place if id_ not in labels]
        rest = rest[:: max(1, len(rest) // self.spec.pool_images)]
        rare, common, pool = (self._take(ids) for ids in (anomalies, normals, rest))
        powers = self.powers if len(anomalies) >= self.least else (0.0,)
        scaling = choose_whitening(rare, common, pool, self.axes, powers, self.spec)
        turned = self.axes.rotate(self.embedding.reoriented_features(anomalies, self.spec.orientations))
        return self_train(rare, common, pool, self.spec, scaling, turned=turned).last.logits(self._take(wanted))

    def _take(self, ids: Sequence[str]) -> np.ndarray:
        return self.rows[[self.place[id_] for id_ in ids]]


def choose_whitening(
    anomalies: np.ndarray, normals: np.ndarray, pool: np.ndarray, axes: Axes, powers: Sequence[float], spec: ProbeSpec
) -> Scaling:
    """Choose the power of each block, and return the factors of the coordinates.

    Each block alone ranks the held-out labels of a fold and the whole pool, whose images count as normals. The power
    with the highest average precision, the mean of all folds, wins.
    """
    chosen = []
    for number, block in enumerate(axes.scaling.blocks):
        found = [axes.factors(number, power) for power in powers]
        rows = anomalies[:, block], normals[:, block], pool[:, block]
        scores = [0.0] if len(found) == 1 else [_precision_in_pool(*rows, factor, spec) for factor in found]
        chosen.append(found[int(np.argmax(scores))])
    return Scaling(axes.scaling.blocks, np.concatenate(chosen))


def _precision_in_pool(
    anomalies: np.ndarray, normals: np.ndarray, pool: np.ndarray, factor: np.ndarray, spec: ProbeSpec
) -> float:
    basis, reduced = np.linalg.qr((np.concatenate([anomalies, normals]) * factor).T)  # the fits are the same in it
    rows, targets = reduced.T, np.repeat([True, False], [len(anomalies), len(normals)])
    scores = []
    for train, test in StratifiedKFold(spec.folds, shuffle=True, random_state=0).split(rows, targets):
        rare, common = (rows[train[targets[train] == wanted]] for wanted in (True, False))
        probe = fit_logistic(rare, common, inverse_regularisation=spec.inverse_regularisation)
        unlabelled = Probe(factor * (basis @ probe.coefficients), probe.intercept).logits(pool)
        truth = np.concatenate([targets[test], np.zeros(len(pool), dtype=bool)])
        scores.append(average_precision_score(truth, np.concatenate([probe.logits(rows[test]), unlabelled])))
    return float(np.mean(scores))
