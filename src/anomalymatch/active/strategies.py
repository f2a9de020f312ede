"""Query strategies: which unlabelled images to show next."""

from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from types import MappingProxyType
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32, Float64, Int64
from scipy.special import expit

from anomalymatch.backbones.embedding import Embedding
from anomalymatch.errors import ConfigError
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


FOLLOWED, NEIGHBOURS = 2000, 30
"""Images of the top whose probabilities are followed, and how many of them an answer moves."""
COMPETING = 500
"""Images that compete at most, or as many as are asked for: the work of a query grows with the square of that."""
PRIOR, LIKENESS = 2.0, 8.0
"""What a ranking's own probability weighs, and what an answer weighs for an image that looks the same."""
BALANCED = 2.0
"""By how much the log-odds of a ranking are taken to be too high, for which both classes weighed the same."""


class ExpectedDiscovery:
    """Efficient nonmyopic search (Jiang et al., ICML 2017): the most anomalies in all, not in this round.

    The value of an image is its own probability, and the sum of the highest probabilities among the others after its
    answer, averaged over the two answers. A batch is chosen one by one, as if each image had turned out to be normal
    (the pessimistic oracle of Jiang et al., NeurIPS 2018), so that it does not ask the same thing twice.

    Args:
        embedding: gives the features.
        candidates: how many of the top compete, as a multiple of the number asked for, up to `COMPETING`.
        horizon: labels that can still be given, this query's included.
    """

    def __init__(self, embedding: Embedding, candidates: int, horizon: int) -> None:
        check_candidates(candidates)
        if horizon < 1:
            raise ConfigError(f"al.strategy.horizon is {horizon}: it must be at least 1")
        self.embedding, self.candidates, self.horizon = embedding, candidates, horizon

    def __call__(self, ranking: Ranking, count: int, *, rng: Rng, last: Labels = NO_LABELS) -> list[str]:
        """See `Strategy`."""
        competing = max(count, min(count * self.candidates, COMPETING))
        followed = ranking.order[: max(FOLLOWED, competing)]
        ids = [ranking.ids[i] for i in followed]
        if len(ids) <= count:
            return ids
        chance = expit(ranking.logits[followed] - BALANCED)
        weights = LIKENESS * likeness(self.embedding.features.take(ids), competing)
        chosen: list[int] = []
        while len(chosen) < count:
            free = np.setdiff1d(np.arange(len(weights)), chosen)
            gains = values(chance, weights, free, chosen, self.horizon - len(chosen) - 1)
            chosen.append(int(free[gains.argmax()]))
            chance = _moved(chance, weights[chosen[-1]], 0.0)
        return [ids[i] for i in chosen]


def likeness(points: Float32[np.ndarray, "n d"], rows: int) -> Float64[np.ndarray, "m n"]:
    """How like the first `rows` points are to each of their nearest neighbours, from 0 to 1; 0 to all others.

    It is the squared cosine between the points as seen from their mean; a point counts as no neighbour of itself.
    """
    centred = points.astype(np.float64) - points.mean(axis=0, dtype=np.float64)
    centred /= np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-12)
    cosine = np.maximum(centred[:rows] @ centred.T, 0.0)
    np.fill_diagonal(cosine, 0.0)
    nearest = min(NEIGHBOURS, len(points))
    least = -np.partition(-cosine, nearest - 1, axis=1)[:, nearest - 1 : nearest]
    return np.where(cosine >= least, cosine, 0.0) ** 2


def values(
    chance: Float64[np.ndarray, " n"],
    weights: Float64[np.ndarray, "m n"],
    free: Int64[np.ndarray, " f"],
    chosen: list[int],
    rest: int,
) -> Float64[np.ndarray, " f"]:
    """Anomalies expected if each of `free` is asked now, and then the `rest` likeliest of those not yet `chosen`.

    Args:
        chance: probability of each image.
        weights: of an answer to each of the first `m` images, for each image.
        free: which of these `m` could be asked.
        chosen: images that are being asked already.
        rest: labels that are left after this one.
    """
    after = []
    for answer in (1.0, 0.0):
        then = _moved(chance, weights[free], answer)
        then[:, chosen] = 0.0
        then[np.arange(len(free)), free] = 0.0
        most = min(rest, then.shape[1])
        after.append(-np.partition(-then, most - 1, axis=1)[:, :most].sum(axis=1) if most > 0 else np.zeros(len(free)))
    own = chance[free]
    return own * (1.0 + after[0]) + (1.0 - own) * after[1]


def _moved(chance: Float64[np.ndarray, " n"], weights: Float64[np.ndarray, "*m n"], answer: float) -> np.ndarray:
    """The probabilities after an answer: a ranking's own counts as `PRIOR` labelled images, the answer as `weights`."""
    return (PRIOR * chance + weights * answer) / (PRIOR + weights)
