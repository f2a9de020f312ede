"""Weightings of pseudo-labels: FixMatch's fixed threshold, FlexMatch, FreeMatch and SoftMatch, and alignment.

Their state is in buffers, so it is saved and moved with the LightningModule. It follows from the images of all
processes, so it is the same in each of them. Every training begins with a new state, because the pool is another one.
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
from anomalymatch.algorithms.lightning import gather, mean_over_processes
from anomalymatch.checks import check_range
from anomalymatch.errors import ConfigError

KEY = "algorithm.learner.loss"
CLASSES = len(NAMES)


class Weighting(nn.Module, ABC):
    """Base class of modules that give each weak view a pseudo-label and a weight between 0 and 1.

    Args:
        pool: number of unlabelled images in the pool.
        threshold: softmax from which a pseudo-label is used; None if the weighting has no fixed threshold.
    """

    def __init__(self, pool: int, threshold: float | None) -> None:
        super().__init__()
        check_range(f"{KEY}.threshold", threshold, above=0, high=1, null=True)
        self.pool, self.threshold = pool, threshold
        self.state_to_log: dict[str, Float[Tensor, ""]] = {}
        """Adaptive values after the last batch, by the names that they are logged under."""

    @abstractmethod
    def forward(self, logits: Float[Tensor, "b k"], i_ulb: Int[Tensor, " b"]) -> PseudoLabels:
        """Compute the pseudo-labels of one batch and update the state.

        Args:
            logits: predictions for the weak views, after any alignment; no gradient flows back to them.
            i_ulb: position of each image in the pool.
        """

    def penalty(self, logits_s: Float[Tensor, "b k"], pseudo: PseudoLabels) -> Float[Tensor, ""] | None:
        """Compute a further, weighted term of the loss from the strong views; None if there is none."""
        return None

    def _by_class(self, logits: Tensor, thresholds: Float[Tensor, " k"]) -> PseudoLabels:
        self.state_to_log = {f"threshold_{name}": value for name, value in zip(NAMES, thresholds, strict=True)}
        return pseudo_labels(logits, thresholds)


class FixedThreshold(Weighting):
    """FixMatch: one threshold for all classes; None uses every image."""

    def forward(self, logits: Float[Tensor, "b k"], i_ulb: Int[Tensor, " b"]) -> PseudoLabels:
        """See `Weighting.forward`."""
        return pseudo_labels(logits, 0.0 if self.threshold is None else float(self.threshold))


class FlexMatch(Weighting):
    """Curriculum pseudo-labelling (Zhang et al. 2021, arXiv 2110.08263): a threshold for each class.

    It remembers the last confident pseudo-label of each image of the pool; the thresholds of a batch follow from the
    labels before that batch. Several processes share one memory.
    """

    labels: Tensor

    def __init__(self, pool: int, threshold: float | None) -> None:
        super().__init__(pool, threshold)
        if threshold is None:
            raise ConfigError(f"{KEY}.threshold is null: FlexMatch lowers it for each class, so it needs a number")
        self.register_buffer("labels", torch.full((pool,), UNUSED, dtype=torch.int8))

    def forward(self, logits: Float[Tensor, "b k"], i_ulb: Int[Tensor, " b"]) -> PseudoLabels:
        """See `Weighting.forward`."""
        assert self.threshold is not None
        pseudo = self._by_class(logits, flexmatch_thresholds(self.labels, CLASSES, self.threshold))
        targets, confident = pseudo_labels(logits, float(self.threshold))
        images, targets = gather(i_ulb), gather(torch.where(confident, targets, UNUSED))
        for number in range(CLASSES):  # an image that occurs twice in a batch gets one label, the same everywhere
            self.labels[images[targets == number]] = number
        return pseudo


class _Adaptive(Weighting):
    """Weighting that adapts its threshold by moving averages, so that none is given."""

    def __init__(self, pool: int, threshold: float | None, momentum: float) -> None:
        super().__init__(pool, threshold)
        check_range(f"{KEY}.weighting.momentum", momentum, low=0, below=1)
        if threshold is not None:
            raise ConfigError(
                f"{KEY}.threshold is {threshold}: {type(self).__name__} adapts its threshold, so it must be null"
            )
        self.momentum = momentum


class FreeMatch(_Adaptive):
    """Self-adaptive thresholds and fairness (Wang et al. 2022, arXiv 2205.07246).

    The moving averages begin at 1 / classes; `fairness` is the weight of the fairness term.
    """

    confidence: Tensor
    means: Tensor
    histogram: Tensor

    def __init__(self, pool: int, threshold: float | None, *, momentum: float, fairness: float) -> None:
        super().__init__(pool, threshold, momentum)
        check_range(f"{KEY}.weighting.fairness", fairness, low=0)
        self.fairness = fairness
        self.register_buffer("confidence", torch.tensor(1.0 / CLASSES))
        self.register_buffer("means", torch.full((CLASSES,), 1.0 / CLASSES))
        self.register_buffer("histogram", torch.full((CLASSES,), 1.0 / CLASSES))

    def forward(self, logits: Float[Tensor, "b k"], i_ulb: Int[Tensor, " b"]) -> PseudoLabels:
        """See `Weighting.forward`; the averages include this batch."""
        probabilities = gather(logits.float().softmax(dim=-1))
        confidence, predicted = probabilities.max(dim=-1)
        self.confidence.lerp_(confidence.mean(), 1.0 - self.momentum)
        self.means.lerp_(probabilities.mean(dim=0), 1.0 - self.momentum)
        self.histogram.lerp_(F.one_hot(predicted, CLASSES).float().mean(dim=0), 1.0 - self.momentum)
        return self._by_class(logits, freematch_thresholds(self.confidence, self.means))

    def penalty(self, logits_s: Float[Tensor, "b k"], pseudo: PseudoLabels) -> Float[Tensor, ""]:
        """Compute the fairness of the strong views that pass."""
        mask = pseudo.mask.float()[:, None]
        probabilities = logits_s.float().softmax(dim=-1)
        means = (mask * probabilities).mean(dim=0)
        histogram = (mask * F.one_hot(probabilities.argmax(dim=-1), CLASSES)).mean(dim=0)
        # The value is that of all processes, the gradient that of this one's share: averaged gradients are correct.
        means = means + (mean_over_processes(means.detach()) - means.detach())
        return self.fairness * fairness(means, mean_over_processes(histogram), self.means, self.histogram)


class SoftMatch(_Adaptive):
    """Truncated Gaussian weights of the confidence after uniform alignment (Chen et al. 2023, arXiv 2301.10921).

    Only the weights use the alignment: the pseudo-labels are those of the logits as given. The moving mean begins at
    1 / classes, the variance at 1; `n_sigma` is the standard deviation of the confidences over that of the Gaussian.
    """

    mean: Tensor
    variance: Tensor

    def __init__(self, pool: int, threshold: float | None, *, momentum: float, n_sigma: float) -> None:
        super().__init__(pool, threshold, momentum)
        check_range(f"{KEY}.weighting.n_sigma", n_sigma, low=0)
        self.n_sigma = n_sigma
        self.uniform = Alignment(prior=1.0 / CLASSES, momentum=momentum)
        self.register_buffer("mean", torch.tensor(1.0 / CLASSES))
        self.register_buffer("variance", torch.tensor(1.0))

    def forward(self, logits: Float[Tensor, "b k"], i_ulb: Int[Tensor, " b"]) -> PseudoLabels:
        """See `Weighting.forward`; the averages include this batch."""
        confidence = self.uniform(logits).softmax(dim=-1).amax(dim=-1)
        everywhere = gather(confidence)
        self.mean.lerp_(everywhere.mean(), 1.0 - self.momentum)
        if len(everywhere) > 1:  # one image has no variance
            self.variance.lerp_(everywhere.var(), 1.0 - self.momentum)
        self.state_to_log = {"confidence_mean": self.mean.clone(), "confidence_deviation": self.variance.sqrt()}
        weights = gaussian_weights(confidence, self.mean, self.variance, self.n_sigma)
        return PseudoLabels(logits.detach().argmax(dim=-1), weights)


class Alignment(nn.Module):
    """Distribution alignment (ReMixMatch, Berthelot et al. 2019, arXiv 1911.09785) to a known rate of anomalies.

    The rate is that of the pool. Candidates hold several times as many anomalies, which alignment would otherwise
    remove. So the mean prediction is weighted such that a batch counts as an even sample of the pool.

    Args:
        prior: rate of anomalies in the pool; None aligns nothing.
        momentum: momentum of the mean prediction. The paper takes the mean over the last 128 batches; this is the plain
            mean over all batches until there are 1 / (1 - momentum) of them, and a moving average from then on.
    """

    prior: Tensor
    means: Tensor
    batches: Tensor

    def __init__(self, *, prior: float | None, momentum: float) -> None:
        super().__init__()
        check_range(f"{KEY}.alignment.momentum", momentum, low=0, below=1)
        check_range(f"{KEY}.alignment.prior", prior, above=0, below=1, null=True)
        self.aligns, self.momentum = prior is not None, momentum
        if prior is None:
            return
        self.register_buffer("prior", torch.tensor([1.0 - prior, prior]))
        self.register_buffer("means", torch.full((CLASSES,), 1.0 / CLASSES))
        self.register_buffer("batches", torch.tensor(0.0))

    def forward(self, logits: Float[Tensor, "b k"], weights: Float[Tensor, " b"] | None = None) -> Float[Tensor, "b k"]:
        """Align the predictions for weak views; no gradient flows back to aligned logits.

        Args:
            logits: predictions for the weak views.
            weights: see `pool_weights`; None if every image of the pool is drawn equally often.
        """
        if not self.aligns:
            return logits
        logits = logits.detach().float()
        self.batches += 1.0
        newest = (1.0 / self.batches).clamp(min=1.0 - self.momentum)
        own = logits.new_ones(len(logits)) if weights is None else weights.to(logits)
        total = mean_over_processes((own[:, None] * logits.softmax(dim=-1)).sum(dim=0))
        self.means.lerp_(total / total.sum(), newest)
        return align(logits, self.means, self.prior)
