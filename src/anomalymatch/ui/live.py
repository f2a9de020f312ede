"""Rankings on the feature store: a probe that is fitted again after every label, and novelty without labels."""

import logging
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float32, Int64

from anomalymatch.active.strategies import k_centres
from anomalymatch.algorithms.novelty.detectors import Detector, FittedDetector, fit_detector
from anomalymatch.algorithms.probe.regression import Probe, ProbeSpec, self_train
from anomalymatch.cache import Cache, cache_key
from anomalymatch.errors import DataError
from anomalymatch.progress import ShowProgress, progress
from anomalymatch.ui.features import FeatureStore
from anomalymatch.ui.views import FirstOrder

logger = logging.getLogger(__name__)
Reorient = Callable[[Int64[np.ndarray, " a"]], Float32[np.ndarray, "t d"]]
"""Computes features of mirrored and rotated images, given their positions."""
ASSUMED_NORMALS = 200
FIRST_SAMPLE = 5_000
NOVELTY_SAMPLE = 4096
"""Images that all others are compared with: nearly all are normal, and a million images take seconds."""
NOVELTY_BLOCK = 8192
NONE = np.empty(0, dtype=np.int64)
_SEED = 0
_CPU = torch.device("cpu")


class LiveRanking:
    """Ranking of an archive by a probe on its feature store; a million images take a fraction of a second.

    Args:
        store: features of the archive.
        probe: settings of the probe.
        seed: seed of the images that stand for the archive: pool, assumed normals, first batch.
        novelty: novelty of each image, see `compute_novelty`; None if it is unknown.
        first: the order before the first ranking; `DIVERSE` replaces an order that needs an unknown novelty.
        reorient: adds mirrored and rotated views of the labelled anomalies to the training; None adds none.

    Attributes:
        fitted: the last probe, on the features of the backbone; None before the first.
    """

    def __init__(
        self,
        store: FeatureStore,
        probe: ProbeSpec,
        *,
        seed: int,
        novelty: Float32[np.ndarray, " n"] | None = None,
        first: FirstOrder = FirstOrder.MIXED,
        reorient: Reorient | None = None,
    ) -> None:
        self.store, self.probe, self.seed, self.novelty, self.reorient = store, probe, seed, novelty, reorient
        needs_novelty = first in (FirstOrder.MIXED, FirstOrder.NOVEL)
        self.first = FirstOrder.DIVERSE if needs_novelty and novelty is None else first
        self.fitted: Probe | None = None
        # Evenly spaced as in the probe's learner, but fixed: one label must not replace the whole pool.
        self._pool = store.positions[:: max(1, len(store.positions) // probe.pool_images)]

    @cached_property
    def _pool_rows(self) -> Float32[np.ndarray, "p d"]:
        return self.store.rows(self._pool)

    def fit(
        self,
        anomalies: Int64[np.ndarray, " a"],
        normals: Int64[np.ndarray, " b"],
        examples: Float32[np.ndarray, "e d"],
        others: Int64[np.ndarray, " o"] = NONE,
    ) -> Float32[np.ndarray, " n"] | None:
        """Fit the probe and return log-odds of all images, NaN for unreadable ones; None without an anomaly.

        While fewer than `ASSUMED_NORMALS` images are labelled normal, random unlabelled images fill the gap: anomalies
        are rare, so most of these are normal. The labelled normals alone do not represent the archive: they come from
        the top of a ranking and look like anomalies.

        Args:
            anomalies: positions of the images labelled anomaly.
            normals: positions of the images labelled normal.
            examples: features of further anomalies that are not in the archive.
            others: positions of images with other labels, which do not count as unlabelled.
        """
        probe = self._fit_probe(anomalies, normals, examples, others)
        self.fitted = None if probe is None else Probe(self.store.direction(probe.coefficients), probe.intercept)
        return None if probe is None else self.store.project(probe.coefficients, probe.intercept)

    def fit_kind(
        self, kind: Int64[np.ndarray, " a"], rest: Int64[np.ndarray, " b"], others: Int64[np.ndarray, " o"]
    ) -> Float32[np.ndarray, " n"] | None:
        """Return log-odds of all images as `fit` does, for one kind of anomaly against the rest.

        Args:
            kind: positions of the anomalies of the kind.
            rest: positions of the images labelled normal, and of the anomalies of other kinds.
            others: see `fit`.
        """
        probe = self._fit_probe(kind, rest, np.empty((0, self.store.dimensions), np.float32), others)
        return None if probe is None else self.store.project(probe.coefficients, probe.intercept)

    def _fit_probe(
        self,
        anomalies: Int64[np.ndarray, " a"],
        normals: Int64[np.ndarray, " b"],
        examples: Float32[np.ndarray, "e d"],
        others: Int64[np.ndarray, " o"],
    ) -> Probe | None:
        taken = np.concatenate([anomalies, normals, others])
        anomalies, normals = (group[self.store.has(group)] for group in (anomalies, normals))
        normals = np.concatenate([normals, self._assumed_normals(taken, ASSUMED_NORMALS - len(normals))])
        positive = np.concatenate([self.store.rows(anomalies), examples])
        if not len(positive) or not len(normals):
            return None
        unlabelled = ~np.isin(self._pool, taken) if self.probe.rounds else np.zeros(len(self._pool), dtype=bool)
        views = self.reorient(anomalies) if self.reorient else None
        pool, known = self._pool_rows[unlabelled], self.store.rows(normals)
        return self_train(positive, known, pool, self.probe, self.store.scaling, turned=views).probe

    def first_batch(self, count: int) -> Int64[np.ndarray, " k"]:
        """Return positions of up to `count` diverse images to start with."""
        return self.diverse(self._draw(FIRST_SAMPLE), count)

    def diverse(self, candidates: Int64[np.ndarray, " c"], count: int) -> Int64[np.ndarray, " k"]:
        """Return up to `count` readable candidates that cover all of them greedily; the first candidate stays first."""
        readable = candidates[self.store.has(candidates)]
        return readable[k_centres(self.store.last_layer.rows(readable), count)]

    def _assumed_normals(self, taken: Int64[np.ndarray, " t"], count: int) -> Int64[np.ndarray, " k"]:
        drawn = self._draw(ASSUMED_NORMALS + len(taken))
        return drawn[~np.isin(drawn, taken)][: max(0, count)]

    def _draw(self, count: int) -> Int64[np.ndarray, " k"]:
        """Draw random readable images; a larger draw begins with the smaller one."""
        positions = self.store.positions
        return positions[np.random.default_rng(self.seed).permutation(len(positions))[:count]]


def compute_novelty(
    store: FeatureStore, detector: Detector, *, folder: Path, show: ShowProgress = progress
) -> Float32[np.ndarray, " n"] | None:
    """Score all images with a detector that is fitted on a random sample of them.

    Args:
        store: features of the archive; the last layer is used.
        detector: the kind of distance.
        folder: cache folder of the features; the scores are stored below it.
        show: shows the progress.

    Returns:
        Scores by position, NaN for unreadable images; None if the images are too few or all equal.

    Raises:
        StorageError: if the scores cannot be written.
    """
    store = store.last_layer
    rng = np.random.default_rng(_SEED)
    places = np.sort(rng.choice(len(store.positions), min(NOVELTY_SAMPLE, len(store.positions)), replace=False))
    rows = store.rows(store.positions[places])
    key = cache_key({"detector": repr(detector), "positions": store.positions, "rows": rows})

    def compute() -> tuple[dict[str, np.ndarray], dict[str, object]]:
        fitted = fit_detector(detector, rows, drop=0.0, device=_CPU)
        return {"scores": _novelty_scores(store, fitted, places, show)}, {}

    try:
        entry = Cache(folder / "novelty").get(key, compute)
    except DataError as error:
        logger.info("The images are not ordered by novelty: %s", error)
        return None
    scores = np.full(len(store.ids), np.nan, dtype=np.float32)
    scores[store.positions] = entry.arrays["scores"]
    return scores


def _novelty_scores(
    store: FeatureStore, fitted: FittedDetector, places: Int64[np.ndarray, " s"], show: ShowProgress
) -> Float32[np.ndarray, " m"]:
    """Score the readable images; an image of the sample is compared with the rest of the sample."""
    own = np.full(len(store.positions), -1, dtype=np.int64)
    own[places] = np.arange(len(places))
    scores = np.empty(len(own), dtype=np.float32)
    with show("Comparing images", len(own)) as advance:
        for start in range(0, len(own), NOVELTY_BLOCK):
            block = slice(start, start + NOVELTY_BLOCK)
            positions = store.positions[block]
            scores[block] = fitted.logits(store.rows(positions), own[block], _CPU)
            advance(len(positions))
    return scores
