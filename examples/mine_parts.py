"""Add a source, a query strategy and a method of your own: docs/how-to/extend.md.

python -m anomalymatch.run --config-dir mine/conf dataset=squares algorithm=centroid al.strategy.name=every_other
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

import anomalymatch as am


class Squares(am.ImageSource):
    """Noise, with a bright square in every tenth image."""

    def __init__(self, count: int) -> None:
        ids = [f"image-{number:04d}" for number in range(count)]
        truth = {id_: "plain" if number % 10 else "square" for number, id_ in enumerate(ids)}
        super().__init__(name="squares", ids=ids, fingerprint=f"squares {count}", truth=truth)

    def load(self, position: int) -> np.ndarray:
        """Return the pixels of one image."""
        image = np.random.default_rng(position).integers(0, 120, (32, 32, 3), dtype=np.uint8)
        if position % 10 == 0:
            image[8:16, 8:16] = 250
        return image


class EveryOther:
    """Query strategy that chooses every second image of the top."""

    def __call__(self, ranking: am.Ranking, count: int, **_: object) -> list[str]:
        """Return the ids to label."""
        return ranking.top(2 * count)[::2]


class Centroid:
    """Method that ranks by the similarity to the mean of the labelled anomalies."""

    needs_labels, is_detector, trains = True, False, False

    def __init__(self, embedding, *, seed: int, truth=None) -> None:
        self.embedding, self.direction = embedding, None
        self.on_step = print  # is called with the losses of each step of a training, of which there is none

    def fit(self, labels: Mapping[str, str], *, pool: Sequence[str] | None = None, cycle: int = 1) -> "Centroid":
        """Learn from the labels."""
        anomalies = [id_ for id_, label in labels.items() if label == "anomaly"]
        self.direction = self.embedding.features.take(anomalies).mean(axis=0).astype(np.float64)
        return self

    def rank(self, ids: Sequence[str] | None = None) -> am.Ranking:
        """Score images; a higher score is more anomalous."""
        features = self.embedding.features
        readable, rejects = features.split(self.embedding.default_ids if ids is None else ids)
        return am.Ranking(readable, features.project(self.direction)[features.positions(readable)], rejects)

    def save(self, folder: Path) -> None:
        """Write what `restore` needs, so that a run can be resumed."""
        save_file({"direction": self.direction}, folder / "centroid.safetensors")

    def restore(self, folder: Path) -> None:
        """Read what `save` wrote."""
        self.direction = load_file(folder / "centroid.safetensors")["direction"]
