"""Novelty of all images of an archive: an order that needs no labels, computed once and cached on disk."""

import logging
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float32, Int64

from anomalymatch.algorithms.novelty.detectors import Detector, FittedDetector, fit_detector
from anomalymatch.cache import Cache, cache_key
from anomalymatch.errors import DataError
from anomalymatch.progress import progress
from anomalymatch.ui.features import FeatureStore

logger = logging.getLogger(__name__)
SAMPLE = 4096
"""Images that all others are compared with: nearly all are normal, and a million images take seconds."""
BLOCK = 8192
_SEED = 0
_CPU = torch.device("cpu")


def compute_novelty(store: FeatureStore, detector: Detector, *, folder: Path) -> Float32[np.ndarray, " n"] | None:
    """Score all images with a detector that is fitted on a random sample of them.

    Args:
        store: features of the archive; the last layer is used.
        detector: the kind of distance.
        folder: cache folder of the features; the scores are stored below it.

    Returns:
        Scores by position, NaN for unreadable images; None if the images are too few or all equal.

    Raises:
        StorageError: if the scores cannot be written.
    """
    store = store.last_layer
    rng = np.random.default_rng(_SEED)
    places = np.sort(rng.choice(len(store.positions), min(SAMPLE, len(store.positions)), replace=False))
    rows = store.rows(store.positions[places])
    key = cache_key({"detector": repr(detector), "positions": store.positions, "rows": rows})

    def compute() -> tuple[dict[str, np.ndarray], dict[str, object]]:
        fitted = fit_detector(detector, rows, drop=0.0, device=_CPU)
        return {"scores": _score(store, fitted, places)}, {}

    try:
        entry = Cache(folder / "novelty").get(key, compute)
    except DataError as error:
        logger.info("The images are not ordered by novelty: %s", error)
        return None
    scores = np.full(len(store.ids), np.nan, dtype=np.float32)
    scores[store.positions] = entry.arrays["scores"]
    return scores


def _score(store: FeatureStore, fitted: FittedDetector, places: Int64[np.ndarray, " s"]) -> Float32[np.ndarray, " m"]:
    """Score the readable images; an image of the sample is compared with the rest of the sample."""
    own = np.full(len(store.positions), -1, dtype=np.int64)
    own[places] = np.arange(len(places))
    scores = np.empty(len(own), dtype=np.float32)
    with progress("Comparing images", len(own)) as advance:
        for start in range(0, len(own), BLOCK):
            block = slice(start, start + BLOCK)
            positions = store.positions[block]
            scores[block] = fitted.logits(store.rows(positions), own[block], _CPU)
            advance(len(positions))
    return scores
