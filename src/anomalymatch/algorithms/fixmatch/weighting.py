"""What turns weak logits into pseudo-labels and their weights, with the state that this needs.

The state is in buffers, so that it is saved and moves with the LightningModule, and follows from the images of all
processes, so that it is the same in each of them. Every training begins with a fresh one: the pool is another then.
"""

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F  # noqa: N812 (the field's own abbreviation)
from jaxtyping import Float, Int
from torch import Tensor, nn

from anomalymatch.algorithms.fixmatch.loss import NAMES, PseudoLabels, pseudo_labels
from anomalymatch.algorithms.fixmatch.thresholds import (
    UNUSED,
    align,
    fairness,
    flexmatch_thresholds,
    freematch_thresholds,
    gaussian_weights,
)
from anomalymatch.algorithms.processes import gathered, over_processes
from anomalymatch.errors import ConfigError

KEY = "algorithm.learner.loss"
CLASSES = len(NAMES)


class Weighting(nn.Module, ABC):
    """Gives each weak view its pseudo-label and a weight between 0 and 1.

    Args:
        pool: unlabelled images in the pool.
        threshold: the softmax from which a pseudo-label teaches; None where there is no fixed one.
    """

    def __init__(self, pool: int, threshold: float | None) -> None:
        super().__init__()
        if threshold is not None and not 0.0 < threshold <= 1.0:
            raise ConfigError(f"{KEY}.threshold is {threshold}: it must lie in (0, 1]")
        self.pool, self.threshold = pool, threshold
        self.in_force: dict[str, Float[Tensor, ""]] = {}

    @abstractmethod
    def forward(self, logits: Float[Tensor, "b k"], i_ulb: Int[Tensor, " b"]) -> PseudoLabels:
        """Pseudo-labels of one batch.

        Args:
            logits: of the weak views, after any alignment; no gradient flows back to them.
            i_ulb: position of each image in the pool.

        What adapts is in `in_force` afterwards, by the name that it is logged under.
        """

    def penalty(self, logits_s: Float[Tensor, "b k"], pseudo: PseudoLabels) -> Float[Tensor, ""] | None:
        """A further term of the loss, with its weight; None where there is none.

        Args:
            logits_s: of the strong views.
            pseudo: what `forward` gave for the same images.
        """
        return None

    def _cut(self, logits: Tensor, thresholds: Float[Tensor, " k"]) -> PseudoLabels:
        self.in_force = {f"threshold_{name}": value for name, value in zip(NAMES, thresholds, strict=True)}
        return pseudo_labels(logits, thresholds)


class FixedThreshold(Weighting):
    """FixMatch: one threshold for all classes, or, with None, every image teaches."""

    def forward(self, logits: Float[Tensor, "b k"], i_ulb: Int[Tensor, " b"]) -> PseudoLabels:
        """See `Weighting.forward`."""
        return pseudo_labels(logits, 0.0 if self.threshold is None else float(self.threshold))


class FlexMatch(Weighting):
    """Curriculum pseudo-labelling (Zhang et al. 2021, arXiv 2110.08263): a threshold for each class.

    It remembers the last sure pseudo-label of each image of the pool; the thresholds of a batch follow from what was
    remembered before it. Several processes share their memory.
    """

    labels: Tensor

    def __init__(self, pool: int, threshold: float | None) -> None:
        super().__init__(pool, threshold)
        if threshold is None:
            raise ConfigError(f"{KEY}.threshold is null: FlexMatch lowers one for each class, so it needs a number")
        self.register_buffer("labels", torch.full((pool,), UNUSED, dtype=torch.int8))

    def forward(self, logits: Float[Tensor, "b k"], i_ulb: Int[Tensor, " b"]) -> PseudoLabels:
        """See `Weighting.forward`."""
        assert self.threshold is not None
        pseudo = self._cut(logits, flexmatch_thresholds(self.labels, CLASSES, self.threshold))
        targets, sure = pseudo_labels(logits, float(self.threshold))
        images, targets = gathered(i_ulb), gathered(torch.where(sure, targets, UNUSED))
        for number in range(CLASSES):  # an image that a small pool gives twice has one label, the same everywhere
            self.labels[images[targets == number]] = number
        return pseudo


class FreeMatch(Weighting):
    """Self-adaptive thresholds and fairness (Wang et al. 2022, arXiv 2205.07246).

    Args:
        pool: not needed.
        threshold: must be None, it finds its own.
        momentum: of the moving averages, which begin at 1 / classes.
        fairness: weight of the fairness term.
    """

    confidence: Tensor
    means: Tensor
    histogram: Tensor

    def __init__(self, pool: int, threshold: float | None, *, momentum: float, fairness: float) -> None:
        super().__init__(pool, threshold)
        _refuse_threshold(threshold, "FreeMatch")
        _check_momentum(f"{KEY}.weighting.momentum", momentum)
        if not fairness >= 0.0:
            raise ConfigError(f"{KEY}.weighting.fairness is {fairness}: it cannot be negative")
        self.momentum, self.fairness = momentum, fairness
        self.register_buffer("confidence", torch.tensor(1.0 / CLASSES))
        self.register_buffer("means", torch.full((CLASSES,), 1.0 / CLASSES))
        self.register_buffer("histogram", torch.full((CLASSES,), 1.0 / CLASSES))

    def forward(self, logits: Float[Tensor, "b k"], i_ulb: Int[Tensor, " b"]) -> PseudoLabels:
        """See `Weighting.forward`; the averages take this batch in first."""
        probabilities = gathered(logits.float().softmax(dim=-1))
        confidence, predicted = probabilities.max(dim=-1)
        self.confidence.lerp_(confidence.mean(), 1.0 - self.momentum)
        self.means.lerp_(probabilities.mean(dim=0), 1.0 - self.momentum)
        self.histogram.lerp_(F.one_hot(predicted, CLASSES).float().mean(dim=0), 1.0 - self.momentum)
        return self._cut(logits, freematch_thresholds(self.confidence, self.means))

    def penalty(self, logits_s: Float[Tensor, "b k"], pseudo: PseudoLabels) -> Float[Tensor, ""]:
        """See `Weighting.penalty`: the fairness of the strong views that pass."""
        mask = pseudo.mask.float()[:, None]
        probabilities = logits_s.float().softmax(dim=-1)
        means = (mask * probabilities).mean(dim=0)
        histogram = (mask * F.one_hot(probabilities.argmax(dim=-1), CLASSES)).mean(dim=0)
        # The value is that of all processes, the gradient of this one's share; averaged, the gradients are right.
        means = means + (over_processes(means.detach()) - means.detach())
        return self.fairness * fairness(means, over_processes(histogram), self.means, self.histogram)


class SoftMatch(Weighting):
    """Truncated Gaussian weights of the confidence after uniform alignment (Chen et al. 2023, arXiv 2301.10921).

    The alignment is for the weights alone: the pseudo-labels are those of the logits as they come.

    Args:
        pool: not needed.
        threshold: must be None, there is none.
        momentum: of the moving averages; the mean begins at 1 / classes, the variance at 1.
        n_sigma: how many times narrower than the confidences the Gaussian is.
    """

    mean: Tensor
    variance: Tensor

    def __init__(self, pool: int, threshold: float | None, *, momentum: float, n_sigma: float) -> None:
        super().__init__(pool, threshold)
        _refuse_threshold(threshold, "SoftMatch")
        _check_momentum(f"{KEY}.weighting.momentum", momentum)
        if not n_sigma >= 0.0:
            raise ConfigError(f"{KEY}.weighting.n_sigma is {n_sigma}: it cannot be negative")
        self.momentum, self.n_sigma = momentum, n_sigma
        self.uniform = Alignment(prior=1.0 / CLASSES, momentum=momentum)
        self.register_buffer("mean", torch.tensor(1.0 / CLASSES))
        self.register_buffer("variance", torch.tensor(1.0))

    def forward(self, logits: Float[Tensor, "b k"], i_ulb: Int[Tensor, " b"]) -> PseudoLabels:
        """See `Weighting.forward`; the averages take this batch in first."""
        confidence = self.uniform(logits).softmax(dim=-1).amax(dim=-1)
        everywhere = gathered(confidence)
        self.mean.lerp_(everywhere.mean(), 1.0 - self.momentum)
        if len(everywhere) > 1:  # one image has no variance
            self.variance.lerp_(everywhere.var(), 1.0 - self.momentum)
        self.in_force = {"confidence_mean": self.mean.clone(), "confidence_deviation": self.variance.sqrt()}
        weights = gaussian_weights(confidence, self.mean, self.variance, self.n_sigma)
        return PseudoLabels(logits.detach().argmax(dim=-1), weights)


class Alignment(nn.Module):
    """Distribution alignment of ReMixMatch (Berthelot et al. 2019, arXiv 1911.09785) to a known rate of anomalies.

    The rate is that of the pool. Where a batch is no even sample of it, the mean is taken with the weights that make
    it one: candidates hold several times as many anomalies, which alignment would otherwise take away.

    Args:
        prior: rate of anomalies in the pool; None aligns nothing.
        momentum: of the mean prediction. The paper takes the mean over the last 128 batches; this is the plain mean
            over all batches until there are 1 / (1 - momentum) of them, and a moving average from then on.
    """

    prior: Tensor
    means: Tensor
    batches: Tensor

    def __init__(self, *, prior: float | None, momentum: float) -> None:
        super().__init__()
        _check_momentum(f"{KEY}.alignment.momentum", momentum)
        self.aligns, self.momentum = prior is not None, momentum
        if prior is None:
            return
        if not 0.0 < prior < 1.0:
            raise ConfigError(f"{KEY}.alignment.prior is {prior}: it must lie in (0, 1), or be null")
        self.register_buffer("prior", torch.tensor([1.0 - prior, prior]))
        self.register_buffer("means", torch.full((CLASSES,), 1.0 / CLASSES))
        self.register_buffer("batches", torch.tensor(0.0))

    def forward(self, logits: Float[Tensor, "b k"], weights: Float[Tensor, " b"] | None = None) -> Float[Tensor, "b k"]:
        """The logits of weak views, aligned; no gradient flows back to those that it aligns.

        Args:
            logits: of the weak views.
            weights: see `data.draws.pool_weights`; None where every image of the pool comes equally often.
        """
        if not self.aligns:
            return logits
        logits = logits.detach().float()
        self.batches += 1.0
        newest = (1.0 / self.batches).clamp(min=1.0 - self.momentum)
        own = logits.new_ones(len(logits)) if weights is None else weights.to(logits)
        total = over_processes((own[:, None] * logits.softmax(dim=-1)).sum(dim=0))
        self.means.lerp_(total / total.sum(), newest)
        return align(logits, self.means, self.prior)


def _refuse_threshold(threshold: float | None, name: str) -> None:
    if threshold is not None:
        raise ConfigError(f"{KEY}.threshold is {threshold}: {name} follows the confidences instead, leave it null")


def _check_momentum(key: str, momentum: float) -> None:
    if not 0.0 <= momentum < 1.0:
        raise ConfigError(f"{key} is {momentum}: it must lie in [0, 1)")
