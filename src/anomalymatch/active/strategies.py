"""Query strategies: choose the unlabelled images to label next.

`conf/al/strategy/` has one file for each; `al.strategy.name=NAME` selects it. If the file says `_partial_: true`, its
target is called with the `Embedding` and returns the strategy.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from types import MappingProxyType
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32, Float64, Int64
from scipy.special import expit

from anomalymatch.backbones.embedding import Embedding
from anomalymatch.checks import check_range
from anomalymatch.ranking import Ranking
from anomalymatch.types import Label

Rng = np.random.Generator
LabelMapping = Mapping[str, str]
NO_LABELS: LabelMapping = MappingProxyType({})
ROUNDING = 1e-6
"""Largest distance from 1 of the cosine between an image and its copy."""
GroupImages = Callable[[Sequence[str]], Sequence[Sequence[str]]]
"""Function that divides images into groups."""


@runtime_checkable
class Strategy(Protocol):
    """Protocol of query strategies; one that does not use all keywords takes the others as `**_`."""

    def __call__(
        self, ranking: Ranking, count: int, *, rng: Rng, last: LabelMapping = NO_LABELS, remaining: int = 0
    ) -> list[str]:
        """Choose images to label.

        Args:
            ranking: the unlabelled images.
            count: number of images to choose; all are chosen if there are fewer.
            rng: random generator.
            last: labels from the previous query; empty for the first.
            remaining: number of labels that can still be given after this query.

        Returns:
            Ids of the images, in the order in which to show them.
        """
        ...


class Top:
    """Strategy that chooses the highest scores."""

    def __call__(self, ranking: Ranking, count: int, *, rng: Rng, **_: object) -> list[str]:
        """See `Strategy`."""
        return ranking.top(count)


class Uncertain:
    """Strategy that chooses the scores nearest to the decision boundary."""

    def __call__(self, ranking: Ranking, count: int, *, rng: Rng, **_: object) -> list[str]:
        """See `Strategy`."""
        return Ranking(ranking.ids, -np.abs(ranking.logits)).top(count)


class Random:
    """Strategy that chooses images at random."""

    def __call__(self, ranking: Ranking, count: int, *, rng: Rng, **_: object) -> list[str]:
        """See `Strategy`."""
        ids = sorted(ranking.ids)
        return [ids[i] for i in rng.choice(len(ids), min(count, len(ids)), replace=False)]


class Mixture:
    """Strategy that chooses the top and, for the share `explore` of the budget, the most uncertain images."""

    def __init__(self, explore: float) -> None:
        check_range("al.strategy.explore", explore, low=0, high=1)
        self.explore = explore

    def __call__(self, ranking: Ranking, count: int, *, rng: Rng, **_: object) -> list[str]:
        """See `Strategy`."""
        best = ranking.top(count - round(self.explore * count))
        return [*best, *Uncertain()(ranking.without(best), count - len(best), rng=rng)]


class Diverse:
    """Strategy that chooses images of the top that differ from each other, by greedy k-centre on their features.

    Gonzalez (1985): start with the best image, then repeatedly add the candidate farthest from those chosen. Candidates
    are the top `candidates` times the number asked for.
    """

    def __init__(self, embedding: Embedding, candidates: int) -> None:
        check_range("al.strategy.candidates", candidates, low=1)
        self.embedding, self.candidates = embedding, candidates

    def __call__(self, ranking: Ranking, count: int, *, rng: Rng, **_: object) -> list[str]:
        """See `Strategy`."""
        ids = ranking.top(count * self.candidates)
        return [ids[i] for i in k_centres(self.embedding.features.take(ids), count)]


class Distinct:
    """Strategy that chooses the top without near duplicates, such as overlapping cutouts or copies of a file.

    Two images are duplicates if the cosine between their features is at least `similarity`. If there is nothing else
    among the top `candidates` times the number asked for, duplicates come last.
    """

    def __init__(self, embedding: Embedding, candidates: int, similarity: float) -> None:
        check_range("al.strategy.candidates", candidates, low=1)
        check_range("al.strategy.similarity", similarity, above=0, high=1)
        self.embedding, self.candidates, self.similarity = embedding, candidates, similarity

    def __call__(self, ranking: Ranking, count: int, *, rng: Rng, **_: object) -> list[str]:
        """See `Strategy`."""
        ids = ranking.top(count * self.candidates)
        features = self.embedding.features.take(ids)
        features /= np.linalg.norm(features, axis=1, keepdims=True).clip(ROUNDING)  # half precision has rounded them
        chosen: list[int] = []
        for i in range(len(ids)):
            if len(chosen) == count:
                break
            if not chosen or float((features[chosen] @ features[i]).max()) < self.similarity - ROUNDING:
                chosen.append(i)
        duplicates = [i for i in range(len(ids)) if i not in set(chosen)]
        return [ids[i] for i in [*chosen, *duplicates][:count]]


class Auto:
    """Strategy that chooses like `Distinct` while queries find anomalies, and diversifies after one that found none.

    After such a query, `Diverse` chooses half of the images: the ranking may be exhausted or misled.
    """

    def __init__(self, embedding: Embedding, candidates: int, similarity: float) -> None:
        self.distinct = Distinct(embedding, candidates, similarity)
        self.diverse = Diverse(embedding, candidates)

    def __call__(
        self, ranking: Ranking, count: int, *, rng: Rng, last: LabelMapping = NO_LABELS, **_: object
    ) -> list[str]:
        """See `Strategy`."""
        if not last or Label.ANOMALY in last.values():
            return self.distinct(ranking, count, rng=rng)
        best = self.distinct(ranking, count - count // 2, rng=rng)
        return [*best, *self.diverse(ranking.without(best), count - len(best), rng=rng)]


class PerCluster:
    """Strategy that groups the top `candidates` times the number asked for, and takes the best of each group in turn.

    Images without a group come last.
    """

    def __init__(self, embedding: Embedding, grouper: Callable[[Embedding], GroupImages], candidates: int) -> None:
        check_range("al.strategy.candidates", candidates, low=1)
        self.group_images, self.candidates = grouper(embedding), candidates

    def __call__(self, ranking: Ranking, count: int, *, rng: Rng, **_: object) -> list[str]:
        """See `Strategy`."""
        ids = ranking.top(count * self.candidates)
        if len(ids) <= count:
            return ids
        place = {id_: rank for rank, id_ in enumerate(ids)}
        groups = sorted(
            (sorted(group, key=place.__getitem__) for group in self.group_images(ids)), key=lambda g: place[g[0]]
        )
        in_turn = [id_ for round_ in zip_longest(*groups) for id_ in round_ if id_ is not None]
        return [*in_turn, *(id_ for id_ in ids if id_ not in set(in_turn))][:count]


class ExpectedDiscovery:
    """Strategy that maximises the anomalies found over all remaining labels: efficient nonmyopic search.

    Jiang et al. (ICML 2017): the value of an image is its own probability plus the sum of the highest probabilities
    among the others after its answer, averaged over the two answers. A batch is chosen one by one, as if each image had
    turned out to be normal (the pessimistic oracle of Jiang et al., NeurIPS 2018), so that it holds no near duplicates.
    The last query, after which no labels remain, chooses by the probability alone.

    Args:
        embedding: gives the features.
        candidates: number of top images to choose from, as a multiple of the number asked for.
        most_candidates: upper limit of that number; the work grows with its square.
        followed: number of top images whose probabilities are updated after each answer.
        neighbours: number of images whose probabilities an answer changes.
        prior: weight of a predicted probability, in labelled images.
        answer_weight: weight of an answer for an identical image, in labelled images.
        log_odds_shift: subtracted from the logits of a ranking that was trained with equal class weights.
    """

    def __init__(
        self,
        embedding: Embedding,
        *,
        candidates: int,
        most_candidates: int,
        followed: int,
        neighbours: int,
        prior: float,
        answer_weight: float,
        log_odds_shift: float,
    ) -> None:
        counts = {"candidates": candidates, "most_candidates": most_candidates, "followed": followed}
        for key, value in {**counts, "neighbours": neighbours}.items():
            check_range(f"al.strategy.{key}", value, low=1)
        check_range("al.strategy.prior", prior, above=0)
        check_range("al.strategy.answer_weight", answer_weight, low=0)
        self.embedding, self.candidates, self.most_candidates = embedding, candidates, most_candidates
        self.followed, self.neighbours = followed, neighbours
        self.prior, self.answer_weight, self.log_odds_shift = prior, answer_weight, log_odds_shift

    def __call__(self, ranking: Ranking, count: int, *, rng: Rng, remaining: int = 0, **_: object) -> list[str]:
        """See `Strategy`."""
        candidates = max(count, min(count * self.candidates, self.most_candidates))
        followed = ranking.order[: max(self.followed, candidates)]
        ids = [ranking.ids[i] for i in followed]
        if len(ids) <= count:
            return ids
        probability = expit(ranking.logits[followed] - self.log_odds_shift)
        features = self.embedding.features.take(ids)
        weights = self.answer_weight * similarities(features, candidates, self.neighbours)
        chosen: list[int] = []
        while len(chosen) < count:
            free = np.setdiff1d(np.arange(len(weights)), chosen)
            rest = remaining + count - len(chosen) - 1 if remaining else 0
            chosen.append(int(free[expected_finds(probability, weights, free, chosen, rest, self.prior).argmax()]))
            probability = _updated(probability, weights[chosen[-1]], 0.0, self.prior)
        return [ids[i] for i in chosen]


def k_centres(points: Float32[np.ndarray, "n d"], count: int) -> list[int]:
    """Return positions of `points` that cover them greedily, beginning with 0; at most `count`."""
    chosen = [0] if len(points) else []
    distance = np.full(len(points), np.inf)
    while 0 < len(chosen) < min(count, len(points)):
        distance = np.minimum(distance, np.linalg.norm(points - points[chosen[-1]], axis=1))
        distance[chosen] = -1.0
        chosen.append(int(distance.argmax()))
    return chosen


def similarities(points: Float32[np.ndarray, "n d"], rows: int, neighbours: int) -> Float64[np.ndarray, "m n"]:
    """Return similarities in [0, 1] of the first `rows` points to their nearest neighbours; 0 to all others.

    The similarity is the squared cosine between points, relative to their mean; of a point to itself it is 0.
    """
    centred = points.astype(np.float64) - points.mean(axis=0, dtype=np.float64)
    centred /= np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-12)
    cosine = np.maximum(centred[:rows] @ centred.T, 0.0)
    np.fill_diagonal(cosine, 0.0)
    nearest = min(neighbours, len(points))
    least = -np.partition(-cosine, nearest - 1, axis=1)[:, nearest - 1 : nearest]
    return np.where(cosine >= least, cosine, 0.0) ** 2


def expected_finds(
    probability: Float64[np.ndarray, " n"],
    weights: Float64[np.ndarray, "m n"],
    free: Int64[np.ndarray, " f"],
    chosen: list[int],
    rest: int,
    prior: float,
) -> Float64[np.ndarray, " f"]:
    """Return the expected number of anomalies if each of `free` is labelled now, followed by the `rest` most probable.

    `weights[i, j]` is the weight of an answer to image i for image j, in labelled images; `prior` that of a predicted
    probability. `chosen` are images that the query already has.
    """
    sums = []
    for answer in (1.0, 0.0):
        updated = _updated(probability, weights[free], answer, prior)
        updated[:, chosen] = 0.0
        updated[np.arange(len(free)), free] = 0.0
        most = min(rest, updated.shape[1])
        sums.append(
            -np.partition(-updated, most - 1, axis=1)[:, :most].sum(axis=1) if most > 0 else np.zeros(len(free))
        )
    own = probability[free]
    return own * (1.0 + sums[0]) + (1.0 - own) * sums[1]


def _updated(
    probability: Float64[np.ndarray, " n"], weights: Float64[np.ndarray, "*m n"], answer: float, prior: float
) -> np.ndarray:
    """Average predicted probabilities with an answer: `prior` labelled images against `weights`."""
    return (prior * probability + weights * answer) / (prior + weights)
