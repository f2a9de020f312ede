"""How unlike the others each image of an archive is: an order that needs no label, computed once and kept on disk."""

import hashlib
import logging
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from jaxtyping import Float32, Int64

from anomalymatch.algorithms.novelty.detectors import Detector, FittedDetector, fit_detector
from anomalymatch.backbones.checkpoint import load_tensors, save_tensors
from anomalymatch.errors import DataError, StorageError
from anomalymatch.files import make_folder
from anomalymatch.progress import progress
from anomalymatch.ui.features import FeatureBank

logger = logging.getLogger(__name__)
SAMPLE = 4096
"""Images that all others are compared with: nearly all of a sample is normal, and a million images take seconds."""
BLOCK = 8192
_SEED = 0
_CPU = torch.device("cpu")


def novelty_of(bank: FeatureBank, detector: Detector, count: int, *, folder: Path) -> Float32[np.ndarray, " n"] | None:
    """Scores of all images by `detector`, fitted on a sample of them; see `functional.novelty.surprise`.

    Args:
        bank: features of the archive.
        detector: the kind of distance.
        count: `n`, images of the archive.
        folder: where the scores are kept.

    Returns:
        NaN for images that cannot be read; None if there are too few images, or all are equal, and none is novel.

    Raises:
        StorageError: if the scores cannot be written.
    """
    rng = np.random.default_rng(_SEED)
    places = np.sort(rng.choice(len(bank.positions), min(SAMPLE, len(bank.positions)), replace=False))
    rows = bank.rows(bank.positions[places])
    path = folder / f"novelty-{_digest(bank, detector, rows)}.safetensors"
    with FileLock(make_folder(folder) / "novelty.lock"):
        found = _read(path)
        if found is None:
            try:
                novelty = fit_detector(detector, rows, drop=0.0, device=_CPU)
            except DataError as error:
                logger.info("No order by novelty: %s", error)
                return None
            found = _scores(bank, novelty, places)
            save_tensors({"logits": torch.from_numpy(found)}, path)
    logits = np.full(count, np.nan, dtype=np.float32)
    logits[bank.positions] = found
    return logits


def _scores(bank: FeatureBank, novelty: FittedDetector, places: Int64[np.ndarray, " s"]) -> Float32[np.ndarray, " m"]:
    """Of the readable images, in order; an image of the sample is compared with the rest of it."""
    own = np.full(len(bank.positions), -1, dtype=np.int64)
    own[places] = np.arange(len(places))
    found = np.empty(len(own), dtype=np.float32)
    with progress("Comparing images", len(own)) as advance:
        for start in range(0, len(own), BLOCK):
            block = slice(start, start + BLOCK)
            positions = bank.positions[block]
            found[block] = novelty.logits(bank.rows(positions), own[block], _CPU)
            advance(len(positions))
    return found


def _read(path: Path) -> Float32[np.ndarray, " m"] | None:
    try:
        return load_tensors(path)["logits"].numpy() if path.exists() else None
    except (StorageError, KeyError) as error:
        logger.warning("The novelty of the images in %s is corrupt (%s): computing it again", path, error)
        return None


def _digest(bank: FeatureBank, detector: Detector, rows: Float32[np.ndarray, "s d"]) -> str:
    """Of everything that the scores follow from, but for the features outside of the sample."""
    digest = hashlib.blake2b(repr(detector).encode(), digest_size=8)
    digest.update(bank.positions.tobytes())
    digest.update(rows.tobytes())
    return digest.hexdigest()
