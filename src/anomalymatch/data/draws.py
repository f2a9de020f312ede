"""Which images the batches of a training hold: their make-up, and the draws that follow from it."""

from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float32, Int64

from anomalymatch.errors import ConfigError

IMAGES_A_CANDIDATE = 5
"""At least, in the pool: of a small one, too, the candidates are a choice."""


@dataclass(frozen=True)
class BatchSpec:
    """The make-up of a batch, which is shared out evenly where several processes train.

    Attributes:
        labelled: labelled images in a batch, of all processes together.
        unlabelled_ratio: unlabelled images for each labelled one (FixMatch: mu).
        iterations: batches in one training.
        workers: processes that prepare batches, for each one that trains; 0 prepares them in the training process.
        candidates: images of the pool that are likely anomalies and come more often than others; see `candidates_of`.
        candidate_share: their share of the unlabelled images in a batch; 0 treats all images alike.
    """

    labelled: int = 16
    unlabelled_ratio: int = 5
    iterations: int = 100
    workers: int = 0
    # Older run folders know nothing of what follows, and go on as they began.
    candidates: int = 0
    candidate_share: float = 0.0

    def __post_init__(self) -> None:
        for name in ("labelled", "unlabelled_ratio", "iterations"):
            if getattr(self, name) < 1:
                raise ConfigError(f"algorithm.learner.batch.{name} is {getattr(self, name)}: it must be at least 1")
        for name in ("workers", "candidates"):
            if getattr(self, name) < 0:
                raise ConfigError(f"algorithm.learner.batch.{name} is {getattr(self, name)}: it cannot be negative")
        if not 0.0 <= self.candidate_share <= 1.0:
            raise ConfigError(
                f"algorithm.learner.batch.candidate_share is {self.candidate_share}: it is a share, from 0 to 1"
            )

    @property
    def unlabelled(self) -> int:
        """Unlabelled images in a batch."""
        return self.labelled * self.unlabelled_ratio

    @property
    def wants_candidates(self) -> bool:
        """Whether some images of the pool come more often than others."""
        return bool(self.candidates and self.candidate_places)

    @property
    def candidate_places(self) -> int:
        """How many unlabelled images of a batch they are."""
        return round(self.candidate_share * self.unlabelled)

    def candidates_of(self, pool: int) -> int:
        """How many of the images of a pool are candidates: a fifth at most."""
        return min(self.candidates, -(-pool // IMAGES_A_CANDIDATE))

    def shared_by(self, processes: int) -> "BatchSpec":
        """What each of `processes` gets of every batch.

        Raises:
            ConfigError: if the labelled images cannot be shared out evenly.
        """
        if self.labelled % processes:
            raise ConfigError(
                f"algorithm.learner.batch.labelled is {self.labelled}: {processes} processes train, "
                f"so it must be a multiple of {processes}"
            )
        return replace(self, labelled=self.labelled // processes)


def balanced_draws(targets: Int64[np.ndarray, " n"], count: int, rng: np.random.Generator) -> Int64[np.ndarray, " m"]:
    """Positions drawn with replacement, each with weight 1 / size of its class: all classes come equally often."""
    weights = 1.0 / np.bincount(targets)[targets]
    return rng.choice(len(targets), count, p=weights / weights.sum())


def epoch_draws(pool: int, count: int, rng: np.random.Generator) -> Int64[np.ndarray, " m"]:
    """Positions in 0 … pool-1, reshuffled for every pass, so that none comes twice before all came once."""
    passes = -(-count // pool)
    return np.concatenate([rng.permutation(pool) for _ in range(passes)])[:count]


def pool_draws(
    pool: int, candidates: Int64[np.ndarray, " c"], spec: BatchSpec, rng: np.random.Generator
) -> Int64[np.ndarray, " m"]:
    """Positions in 0 … pool-1 for all batches, of which `candidates` fill their share of every batch.

    Args:
        pool: size of the pool.
        candidates: positions of the likely anomalies; none of them leaves every batch to the whole pool.
        spec: the make-up of a batch.
        rng: the draws' randomness.
    """
    draws = epoch_draws(pool, spec.iterations * spec.unlabelled, rng)
    own = np.arange(len(draws)) % spec.unlabelled < spec.candidate_places
    if len(candidates) and own.any():
        draws[own] = candidates[epoch_draws(len(candidates), int(own.sum()), rng)]
    return draws


def pool_weights(pool: int, candidates: Int64[np.ndarray, " c"], spec: BatchSpec) -> Float32[np.ndarray, " pool"]:
    """By what each image of the pool counts, so that a mean over the batches of `pool_draws` is one over the pool.

    The inverse of how often it comes, compared with an even draw.

    Args:
        pool: size of the pool.
        candidates: positions of the likely anomalies.
        spec: the make-up of a batch.

    Raises:
        ConfigError: if no image but candidates ever comes: they are no sample of the pool, whatever their weights.
    """
    rates = np.ones(pool, np.float32)
    if len(candidates):
        share = spec.candidate_places / spec.unlabelled
        if share == 1.0:
            raise ConfigError(
                f"algorithm.learner.batch.candidate_share is {spec.candidate_share}: aligning to a rate of anomalies "
                f"in the pool needs other images of it, too, so choose less than 1"
            )
        rates *= 1.0 - share
        rates[candidates] += share * pool / len(candidates)
    return 1.0 / rates
