"""Expected discovery: a query is also worth what its answer would tell about the images that come after it."""

import numpy as np
from jaxtyping import Float32, Float64, Int64
from scipy.special import expit

from anomalymatch.active.strategies import NO_LABELS, Labels, Rng, check_candidates
from anomalymatch.errors import ConfigError
from anomalymatch.models.embedding import Embedding
from anomalymatch.ranking import Ranking

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
