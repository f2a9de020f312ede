"""Oracles: who answers, in a benchmark, instead of a person."""

from typing import Protocol, runtime_checkable

from anomalymatch.active.strategies import NO_LABELS, Labels, Rng, Strategy
from anomalymatch.data.task import Task
from anomalymatch.ranking import Ranking
from anomalymatch.types import Label


@runtime_checkable
class Oracle(Protocol):
    """Answers queries."""

    def __call__(
        self, ranking: Ranking, pool: frozenset[str], budget: int, *, rng: Rng, last: Labels = NO_LABELS
    ) -> dict[str, Label]:
        """Label up to `budget` images.

        Args:
            ranking: all unlabelled images of the task.
            pool: the current pool, the part of them that this cycle trained on.
            budget: how many labels it may give.
            rng: its randomness.
            last: what the query before this one brought; nothing before the first.
        """
        ...


class PaperOracle:
    """The protocol of AnomalyMatch: it labels top-scored true anomalies and normals of the current pool, half each.

    It uses the truth to choose, so what it finds per label is no measure of a method; `TopKOracle` is the honest one.
    """

    def __init__(self, task: Task, strategy: Strategy) -> None:
        self.task = task

    def __call__(
        self, ranking: Ranking, pool: frozenset[str], budget: int, *, rng: Rng, last: Labels = NO_LABELS
    ) -> dict[str, Label]:
        """See `Oracle`."""
        order = [ranking.ids[i] for i in ranking.order if ranking.ids[i] in pool]
        truth = self.task.truth(order)
        half = budget // 2
        anomalies = [id_ for id_, rare in zip(order, truth, strict=True) if rare][: budget - half]
        normals = [id_ for id_, rare in zip(order, truth, strict=True) if not rare][:half]
        return {id_: self.task.label(id_) for id_ in (*anomalies, *normals)}


class TopKOracle:
    """Labels what the query strategy shows (by default the top of all unlabelled images), whatever it is."""

    def __init__(self, task: Task, strategy: Strategy) -> None:
        self.task, self.strategy = task, strategy

    def __call__(
        self, ranking: Ranking, pool: frozenset[str], budget: int, *, rng: Rng, last: Labels = NO_LABELS
    ) -> dict[str, Label]:
        """See `Oracle`."""
        return {id_: self.task.label(id_) for id_ in self.strategy(ranking, budget, rng=rng, last=last)}
