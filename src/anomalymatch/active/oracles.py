"""Oracles: label images in a benchmark, instead of a person."""

from typing import Any, Protocol, runtime_checkable

from anomalymatch.active.strategies import NO_LABELS, LabelMapping, Rng, Strategy
from anomalymatch.data.task import Task
from anomalymatch.ranking import Ranking
from anomalymatch.types import Label


@runtime_checkable
class Oracle(Protocol):
    """Protocol of oracles."""

    def __call__(
        self,
        ranking: Ranking,
        pool: frozenset[str],
        budget: int,
        *,
        rng: Rng,
        last: LabelMapping = NO_LABELS,
        remaining: int = 0,
    ) -> dict[str, Label]:
        """Label up to `budget` images.

        Args:
            ranking: all unlabelled images of the task.
            pool: the unlabelled images that this cycle trained on.
            budget: largest number of labels.
            rng: random generator.
            last: labels from the previous query; empty for the first.
            remaining: number of labels that can still be given after this query.
        """
        ...


class PaperOracle:
    """Oracle of the AnomalyMatch paper: label the top-scored true anomalies and normals of the pool, half each.

    It chooses by the truth, so the anomalies found per label do not measure a method; use `TopKOracle` for that.
    """

    def __init__(self, task: Task, strategy: Strategy) -> None:
        self.task = task

    def __call__(
        self, ranking: Ranking, pool: frozenset[str], budget: int, *, rng: Rng, **_: object
    ) -> dict[str, Label]:
        """See `Oracle`."""
        order = ranking.restrict(pool).top(len(pool))
        truth = self.task.truth(order)
        half = budget // 2
        anomalies = [id_ for id_, rare in zip(order, truth, strict=True) if rare][: budget - half]
        normals = [id_ for id_, rare in zip(order, truth, strict=True) if not rare][:half]
        return {id_: self.task.label(id_) for id_ in (*anomalies, *normals)}


class TopKOracle:
    """Oracle that labels the images of the query strategy, like a person."""

    def __init__(self, task: Task, strategy: Strategy) -> None:
        self.task, self.strategy = task, strategy

    def __call__(
        self, ranking: Ranking, pool: frozenset[str], budget: int, *, rng: Rng, **state: Any
    ) -> dict[str, Label]:
        """See `Oracle`; the strategy gets the other keywords."""
        return {id_: self.task.label(id_) for id_ in self.strategy(ranking, budget, rng=rng, **state)}
