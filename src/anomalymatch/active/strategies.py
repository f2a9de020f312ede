"""Query strategies: which unlabelled images to show next."""

from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from types import MappingProxyType
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32

from anomalymatch.errors import ConfigError
from anomalymatch.models.embedding import Embedding
from anomalymatch.ranking import Ranking
from anomalymatch.types import Label

Rng = np.random.Generator
Labels = Mapping[str, str]
NO_LABELS: Labels = MappingProxyType({})
ROUNDING = 1e-6
"""By how much the cosine of an image with its copy falls short of one."""


@runtime_checkable
class Strategy(Protocol):
    """Chooses images to label."""

    def __call__(self, ranking: Ranking, count: int, *, rng: Rng, last: Labels = NO_LABELS) -> list[str]:
        """Choose.

        Args:
            ranking: the unlabelled images.
            count: how many of them; all, if there are fewer.
            rng: its randomness.
            last: what the query before this one brought; nothing before the first.

        Returns:
            Their ids, in the order in which to show them.
        """
        ...


def top(ranking: Ranking, count: int, *, rng: Rng, last: Labels = NO_LABELS) -> list[str]:
    """The highest scores."""
    return ranking.top(count)


def uncertain(ranking: Ranking, count: int, *, rng: Rng, last: Labels = NO_LABELS) -> list[str]:
    """The scores nearest to the decision boundary."""
    return Ranking(ranking.ids, -np.abs(ranking.logits)).top(count)


def random(ranking: Ranking, count: int, *, rng: Rng, last: Labels = NO_LABELS) -> list[str]:
    """Any images."""
    ids = sorted(ranking.ids)
    return [ids[i] for i in rng.choice(len(ids), min(count, len(ids)), replace=False)]


class Diverse:
    """Images of the top that differ from each other: greedy k-centre in feature space.

    Gonzalez (1985): start with the best, then always take the candidate farthest from those already taken.

    Args:
        embedding: gives the features.
        candidates: how many of the top compete, as a multiple of the number asked for.
    """

    def __init__(self, embedding: Embedding, candidates: int) -> None:
        check_candidates(candidates)
        self.embedding, self.candidates = embedding, candidates

    def __call__(self, ranking: Ranking, count: int, *, rng: Rng, last: Labels = NO_LABELS) -> list[str]:
        """See `Strategy`."""
        ids = ranking.top(count * self.candidates)
        return [ids[i] for i in k_centres(self.embedding.features.take(ids), count)]


class Distinct:
    """The top without repetitions: of images that are nearly the same, the best alone.

    Overlapping cutouts, neighbouring frames and copies of a file would else take labels that tell nothing new.

    Args:
        embedding: gives the features.
        candidates: how many of the top are looked at, as a multiple of the number asked for.
        similarity: cosine of two images' features from which they are nearly the same.
    """

    def __init__(self, embedding: Embedding, candidates: int, similarity: float) -> None:
        check_candidates(candidates)
        if not 0 < similarity <= 1:
            raise ConfigError(f"al.strategy.similarity is {similarity}: it must be above 0 and at most 1")
        self.embedding, self.candidates, self.similarity = embedding, candidates, similarity

    def __call__(self, ranking: Ranking, count: int, *, rng: Rng, last: Labels = NO_LABELS) -> list[str]:
        """See `Strategy`; repetitions come last, where nothing else is left."""
        ids = ranking.top(count * self.candidates)
        rows = self.embedding.features.take(ids)
        rows /= np.linalg.norm(rows, axis=1, keepdims=True).clip(ROUNDING)  # half precision: not quite of length one
        chosen: list[int] = []
        for i in range(len(ids)):
            if len(chosen) == count:
                break
            if not chosen or float((rows[chosen] @ rows[i]).max()) < self.similarity - ROUNDING:
                chosen.append(i)
        repeated = [i for i in range(len(ids)) if i not in set(chosen)]
        return [ids[i] for i in [*chosen, *repeated][:count]]


class Mixture:
    """The top and, for a part of the budget, what the ranking is least sure of.

    Args:
        explore: that part.
    """

    def __init__(self, explore: float) -> None:
        if not 0 <= explore <= 1:
            raise ConfigError(f"al.strategy.explore is {explore}: it must be between 0 and 1")
        self.explore = explore

    def __call__(self, ranking: Ranking, count: int, *, rng: Rng, last: Labels = NO_LABELS) -> list[str]:
        """See `Strategy`; the top comes first."""
        best = top(ranking, count - round(self.explore * count), rng=rng)
        rest = ranking.restrict(set(ranking.ids).difference(best))
        return [*best, *uncertain(rest, count - len(best), rng=rng)]


class Auto:
    """What the last query brought decides: as long as it found something, the top without repetitions, as `Distinct`.

    After a query that found nothing, half of the budget is for images of the top that differ, as `Diverse`: the ranking
    has run dry, or was misled.

    Args:
        embedding, candidates, similarity: see `Distinct`.
    """

    def __init__(self, embedding: Embedding, candidates: int, similarity: float) -> None:
        self.distinct = Distinct(embedding, candidates, similarity)
        self.diverse = Diverse(embedding, candidates)

    def __call__(self, ranking: Ranking, count: int, *, rng: Rng, last: Labels = NO_LABELS) -> list[str]:
        """See `Strategy`; the top comes first."""
        if not last or Label.ANOMALY in last.values():
            return self.distinct(ranking, count, rng=rng)
        best = self.distinct(ranking, count - count // 2, rng=rng)
        rest = ranking.restrict(set(ranking.ids).difference(best))
        return [*best, *self.diverse(rest, count - len(best), rng=rng)]


class PerCluster:
    """Images of the top evenly over its kinds: in turn the best of each group, so that no kind takes all labels.

    Args:
        divide: finds groups among images, as `clustering.divide.Divider` does.
        candidates: how many of the top are grouped, as a multiple of the number asked for.
    """

    def __init__(self, divide: Callable[[Sequence[str]], Sequence[Sequence[str]]], candidates: int) -> None:
        check_candidates(candidates)
        self.divide, self.candidates = divide, candidates

    def __call__(self, ranking: Ranking, count: int, *, rng: Rng, last: Labels = NO_LABELS) -> list[str]:
        """See `Strategy`; what is in no group comes last."""
        ids = ranking.top(count * self.candidates)
        if len(ids) <= count:
            return ids
        place = {id_: rank for rank, id_ in enumerate(ids)}
        kinds = sorted((sorted(group, key=place.__getitem__) for group in self.divide(ids)), key=lambda g: place[g[0]])
        turns = [id_ for turn in zip_longest(*kinds) for id_ in turn if id_ is not None]
        return [*turns, *(id_ for id_ in ids if id_ not in set(turns))][:count]


def check_candidates(candidates: int) -> None:
    """Refuse less than the images asked for.

    Raises:
        ConfigError: with what to set.
    """
    if candidates < 1:
        raise ConfigError(f"al.strategy.candidates is {candidates}: it must be at least 1")


def k_centres(points: Float32[np.ndarray, "n d"], count: int) -> list[int]:
    """Rows of `points` that cover them greedily, the first row first; all of them if there are at most `count`."""
    chosen = [0] if len(points) else []
    distance = np.full(len(points), np.inf)
    while 0 < len(chosen) < min(count, len(points)):
        distance = np.minimum(distance, np.linalg.norm(points - points[chosen[-1]], axis=1))
        distance[chosen] = -1.0
        chosen.append(int(distance.argmax()))
    return chosen
