"""Candidates for the next labels: the nearest neighbours of the labelled anomalies, ranked instead of all images."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Bool

from anomalymatch.active.strategies import Rng
from anomalymatch.backbones.embedding import Embedding
from anomalymatch.backbones.neighbours import NeighbourSearch, open_search
from anomalymatch.checks import check_range
from anomalymatch.types import Label


@dataclass(frozen=True)
class Candidates:
    """Unlabelled images that are ranked in a cycle.

    Attributes:
        ids: the images, in the order of the archive.
        random: number of them that were drawn at random, because there were too few neighbours.
    """

    ids: list[str]
    random: int

    def __str__(self) -> str:
        drawn = f", {self.random:,} of them drawn at random, because there are too few neighbours" * bool(self.random)
        return f"{len(self.ids):,} unlabelled images are ranked as neighbours of labelled anomalies{drawn}"


class NeighbourCandidates:
    """Choice of the nearest neighbours of all labelled anomalies, after SEALS (arXiv 2007.00077, algorithm 1).

    They are searched among the unlabelled images, so that labels never use up all neighbours of an anomaly, as they can
    in the paper. The choice depends on the labels alone, so that a resumed run makes the same one.

    Args:
        embedding: pretrained features, of which those of the last layer measure the similarity, whatever ranks. Its
            `pool` has the images that may be chosen.
        count: number of neighbours of each anomaly.
    """

    def __init__(self, embedding: Embedding, count: int) -> None:
        check_range("al.neighbours", count, low=1)
        self.embedding, self.count = embedding, count

    def choose(self, labels: Mapping[str, str], least: int, rng: Rng) -> Candidates | None:
        """Choose candidates; None if no readable image is labelled anomaly.

        Args:
            labels: label by image id.
            least: number of candidates below which random images of the pool are added.
            rng: random generator of these.
        """
        features = self.embedding.features
        labelled = [id_ for id_ in labels if id_ in features]
        anomalies = [id_ for id_ in labelled if labels[id_] == Label.ANOMALY]
        if not anomalies:
            return None
        allowed = self._in_pool.copy()
        allowed[features.positions(labelled)] = False
        rows = self._search(features.take(anomalies), self.count, allowed)
        missing = least - len(rows)
        drawn = rows[:0]
        if missing > 0:
            allowed[rows] = False
            rest = np.flatnonzero(allowed)
            drawn = rng.choice(rest, min(missing, len(rest)), replace=False)
        chosen = np.sort(np.concatenate([rows, drawn])).tolist()
        return Candidates([features.ids[row] for row in chosen], len(drawn))

    @cached_property
    def _search(self) -> NeighbourSearch:
        return open_search(self.embedding.features, self.embedding.features_folder / "neighbours")

    @cached_property
    def _in_pool(self) -> Bool[np.ndarray, " n"]:
        """True for each row of the features whose image is in the pool."""
        features = self.embedding.features
        mask = np.zeros(len(features.ids), bool)
        mask[features.positions(features.split(self.embedding.default_ids)[0])] = True
        return mask
