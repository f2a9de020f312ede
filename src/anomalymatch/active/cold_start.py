"""Rankers for runs without labels; `ColdStart` switches to the learner once both classes are labelled.

`conf/al/cold_start/` has one file for each ranker; `al.cold_start=NAME` selects it. Detectors such as knn serve, too.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float64
from scipy.special import logit

from anomalymatch.active.strategies import k_centres
from anomalymatch.algorithms.base import COLD, Learner, StepListener, Truth, ignore_step
from anomalymatch.backbones.embedding import Embedding
from anomalymatch.checks import check_range
from anomalymatch.data.labels import have_both_classes
from anomalymatch.evaluation.ranks import interleave, midranks
from anomalymatch.files import write_text
from anomalymatch.ranking import Ranking


class ColdStart:
    """Learner that ranks by `cold`, which needs no labels, until both classes are labelled, and then by `learner`."""

    needs_labels = False

    def __init__(self, learner: Learner, cold: Learner) -> None:
        self.learner, self.cold = learner, cold
        self.on_step: StepListener = ignore_step
        self._current = learner

    def first(self, pool: Sequence[str], ids: Sequence[str], count: int) -> list[str]:
        """Choose the first `count` of `ids` to label, after learning from `pool`."""
        self.cold.fit({}, pool=pool, cycle=0)
        return self.cold.rank(ids).top(count)

    def fit(self, labels: Mapping[str, str], *, pool: Sequence[str] | None = None, cycle: int = 1) -> "ColdStart":
        """See `Learner.fit`; no label is needed."""
        warm = have_both_classes(labels) or not self.learner.needs_labels
        self._current = self.learner if warm else self.cold
        self._current.on_step = self.on_step
        self._current.fit(labels, pool=pool, cycle=cycle)
        return self

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


class RandomOrder:
    """Learner that ranks readable images in random order; `truth` is ignored, as all learners are built alike."""

    needs_labels, is_detector, trains = False, False, False

    def __init__(self, embedding: Embedding, *, seed: int, truth: Truth | None = None) -> None:
        self.embedding, self.seed = embedding, seed
        self.on_step: StepListener = ignore_step

    def fit(self, labels: Mapping[str, str], *, pool: Sequence[str] | None = None, cycle: int = 1) -> "RandomOrder":
        """Do nothing: the order follows from the seed."""
        return self

    def rank(self, ids: Sequence[str] | None = None) -> Ranking:
        """See `Learner.rank`; the `logits` are log-odds of the rank, from first to last."""
        readable, rejects = self.embedding.features.split(self.embedding.default_ids if ids is None else ids)
        return Ranking(readable, logit(midranks(self.values(readable))), rejects)

    def values(self, ids: Sequence[str]) -> Float64[np.ndarray, " n"]:
        """Draw a number for each image; the highest comes first."""
        return np.random.default_rng([self.seed, 0xC01D]).random(len(ids))

    def save(self, folder: Path) -> None:
        """Do nothing: everything follows from the seed."""

    def restore(self, folder: Path) -> None:
        """Do nothing: everything follows from the seed."""


class KCentreOrder(RandomOrder):
    """Learner that ranks a diverse subset first and the rest in random order.

    The subset are `centres` images chosen by greedy k-centre from a random sample of `candidates`.
    """

    def __init__(
        self, embedding: Embedding, *, centres: int, candidates: int, seed: int, truth: Truth | None = None
    ) -> None:
        super().__init__(embedding, seed=seed)
        check_range("al.cold_start.learner.centres", centres, low=1)
        check_range("al.cold_start.learner.candidates", candidates, low=1)
        self.centres, self.candidates = centres, candidates

    def values(self, ids: Sequence[str]) -> Float64[np.ndarray, " n"]:
        """See `RandomOrder.values`."""
        values = super().values(ids)
        sample = np.argsort(-values, kind="stable")[: self.candidates]
        centres = sample[k_centres(self.embedding.features.take([ids[i] for i in sample]), self.centres)]
        values[centres] = 1.0 + np.arange(len(centres), 0, -1)
        return values


class AlternatingOrder:
    """Learner that ranks by two others in turn: the first image of each, then the second of each, and so on."""

    needs_labels, is_detector, trains = False, False, False

    def __init__(self, first: Learner, second: Learner) -> None:
        self.learners = first, second
        self.on_step: StepListener = ignore_step

    def fit(
        self, labels: Mapping[str, str], *, pool: Sequence[str] | None = None, cycle: int = 1
    ) -> "AlternatingOrder":
        """See `Learner.fit`."""
        for learner in self.learners:
            learner.on_step = self.on_step
            learner.fit(labels, pool=pool, cycle=cycle)
        return self

    def rank(self, ids: Sequence[str] | None = None) -> Ranking:
        """See `Learner.rank`; the `logits` are log-odds of the rank, from first to last."""
        first, second = (learner.rank(ids) for learner in self.learners)
        rejects = {reject.id: reject for ranking in (first, second) for reject in ranking.rejects}
        if rejects:  # a file that one could read, the other perhaps could not
            first, second = (r.restrict(id_ for id_ in r.ids if id_ not in rejects) for r in (first, second))
        places = {id_: place for place, id_ in enumerate(first.ids)}
        order = interleave(*(np.array([places[id_] for id_ in r.top(len(r))], dtype=np.int64) for r in (first, second)))
        logits = np.empty(len(order))
        logits[order] = -logit(midranks(np.arange(len(order))))
        return Ranking(first.ids, logits, list(rejects.values()), first.source)

    def save(self, folder: Path) -> None:
        """See `Learner.save`."""
        for learner in self.learners:
            learner.save(folder)

    def restore(self, folder: Path) -> None:
        """See `Learner.restore`."""
        for learner in self.learners:
            learner.restore(folder)


class MixedOrder(AlternatingOrder):
    """Learner that alternates between novel and diverse images.

    Each finds what the other misses: a rare class need not look odd (photographs of one class among a hundred), and odd
    images may be few of those that cover an archive. experiments/README.md, 10, has the figures.
    """

    def __init__(
        self,
        embedding: Embedding,
        *,
        novelty: Callable[..., Learner],
        diverse: Callable[..., Learner],
        seed: int,
        truth: Truth | None = None,
    ) -> None:
        self.novelty, self.diverse = novelty(embedding, seed=seed), diverse(embedding, seed=seed)
        super().__init__(self.novelty, self.diverse)
