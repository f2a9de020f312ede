"""What ranks while there are no labels yet, and hands over when there are."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float64
from scipy.special import logit

from anomalymatch.active.strategies import k_centres
from anomalymatch.algorithms.base import COLD, Learner
from anomalymatch.algorithms.lightning import StepListener, ignore_step
from anomalymatch.backbones.embedding import Embedding
from anomalymatch.data.labels import have_both_classes
from anomalymatch.evaluation.ranks import interleave, midranks
from anomalymatch.files import write_text
from anomalymatch.ranking import Ranking

CENTRES, CANDIDATES = 200, 5_000


class ColdStart:
    """Ranks by `cold` until there are an anomaly and a normal, by `learner` from then on.

    Args:
        learner: the configured algorithm.
        cold: one that needs no labels.
    """

    needs_labels = False

    def __init__(self, learner: Learner, cold: Learner) -> None:
        self.learner, self.cold = learner, cold
        self.on_step: StepListener = ignore_step
        self._current = learner

    def first(self, pool: Sequence[str], ids: Sequence[str], count: int) -> list[str]:
        """The first `count` images to label.

        Args:
            pool: images to learn from.
            ids: images to choose from.
            count: how many.
        """
        self.cold.fit({}, pool=pool, cycle=0)
        return self.cold.rank(ids).top(count)

    def fit(self, labels: Mapping[str, str], *, pool: Sequence[str] | None = None, cycle: int = 1) -> None:
        """See `Learner.fit`; any labels will do, or none."""
        warm = have_both_classes(labels) or not self.learner.needs_labels
        self._current = self.learner if warm else self.cold
        self._current.on_step = self.on_step
        self._current.fit(labels, pool=pool, cycle=cycle)

    def rank(self, ids: Sequence[str] | None = None) -> Ranking:
        """See `Learner.rank`."""
        return self._current.rank(ids)

    def save(self, folder: Path) -> None:
        """See `Learner.save`."""
        self._current.save(folder)
        if self._current is self.cold:
            write_text(folder / COLD, "ranked without an anomaly and a normal\n")

    def restore(self, folder: Path) -> None:
        """See `Learner.restore`."""
        self._current = self.cold if (folder / COLD).exists() else self.learner
        self._current.restore(folder)


class Shuffled:
    """Any order: what every cold start has to beat. Images that cannot be read are left out.

    Args:
        embedding: the images.
        seed: of the order.
    """

    needs_labels = False

    def __init__(self, embedding: Embedding, *, seed: int) -> None:
        self.embedding, self.seed = embedding, seed
        self.on_step: StepListener = ignore_step

    def fit(self, labels: Mapping[str, str], *, pool: Sequence[str] | None = None, cycle: int = 1) -> None:
        """There is nothing to learn."""

    def rank(self, ids: Sequence[str] | None = None) -> Ranking:
        """See `Learner.rank`; the `logits` are log-odds of the rank, from first to last."""
        features = self.embedding.features
        reasons = {reject.id: reject for reject in features.rejects}
        wanted = features.ids if ids is None else [id_ for id_ in ids if id_ not in reasons]
        rejects = list(features.rejects) if ids is None else [reasons[id_] for id_ in ids if id_ in reasons]
        return Ranking(wanted, logit(midranks(self.values(wanted))), rejects)

    def values(self, ids: Sequence[str]) -> Float64[np.ndarray, " n"]:
        """A number for each image; the highest comes first."""
        return np.random.default_rng([self.seed, 0xC01D]).random(len(ids))

    def save(self, folder: Path) -> None:
        """Everything follows from the seed."""

    def restore(self, folder: Path) -> None:
        """Everything follows from the seed."""


class Diverse(Shuffled):
    """Images that differ from each other first, by greedy k-centre on a random sample; then any order."""

    def values(self, ids: Sequence[str]) -> Float64[np.ndarray, " n"]:
        """See `Shuffled.values`."""
        values = super().values(ids)
        sample = np.argsort(-values, kind="stable")[:CANDIDATES]
        centres = sample[k_centres(self.embedding.features.take([ids[i] for i in sample]), CENTRES)]
        values[centres] = 1.0 + np.arange(len(centres), 0, -1)
        return values


class Mixed:
    """By turns what is novel and what differs from the rest: each finds what the other misses.

    What is rare need not be odd (a class of photographs among a hundred), and what is odd may be few of the images that
    cover an archive; experiments/README.md, 10, has the figures.

    Args:
        novel: ranks by how unlike the others an image is.
        diverse: ranks by how well an image covers what the ones before it leave out.
    """

    needs_labels = False

    def __init__(self, novel: Learner, diverse: Learner) -> None:
        self.novel, self.diverse = novel, diverse
        self.on_step: StepListener = ignore_step

    def fit(self, labels: Mapping[str, str], *, pool: Sequence[str] | None = None, cycle: int = 1) -> None:
        """See `Learner.fit`."""
        for learner in (self.novel, self.diverse):
            learner.on_step = self.on_step
            learner.fit(labels, pool=pool, cycle=cycle)

    def rank(self, ids: Sequence[str] | None = None) -> Ranking:
        """See `Learner.rank`; the `logits` are log-odds of the rank, from first to last."""
        novel, diverse = self.novel.rank(ids), self.diverse.rank(ids)
        places = {id_: place for place, id_ in enumerate(novel.ids)}
        orders = [np.array([places[id_] for id_ in ranking.top(len(ranking))]) for ranking in (novel, diverse)]
        turns = interleave(*orders)
        logits = np.empty(len(turns))
        logits[turns] = -logit(midranks(np.arange(len(turns))))
        return Ranking(novel.ids, logits, novel.rejects)

    def save(self, folder: Path) -> None:
        """See `Learner.save`."""
        self.novel.save(folder)

    def restore(self, folder: Path) -> None:
        """See `Learner.restore`."""
        self.novel.restore(folder)
