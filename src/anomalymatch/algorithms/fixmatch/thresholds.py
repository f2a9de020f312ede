"""How much each pseudo-label teaches: thresholds and weights that follow what the network is sure of, class by class.

FlexMatch (Zhang et al. 2021, arXiv 2110.08263), FreeMatch (Wang et al. 2022, arXiv 2205.07246), SoftMatch (Chen et al.
2023, arXiv 2301.10921), mean teacher (Tarvainen & Valpola 2017, arXiv 1703.01780) and the distribution alignment of
ReMixMatch (Berthelot et al. 2019, arXiv 1911.09785).
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

UNUSED = -1
"""Stands for the pseudo-label of an image of which the network was never sure."""


def flexmatch_thresholds(labels: Int[Tensor, " n"], classes: int, threshold: float) -> Float[Tensor, " k"]:
    """FlexMatch's curriculum: the fewer images a class has won, the lower its threshold.

    With sigma(c) the images whose last sure pseudo-label is c, beta(c) = sigma(c) / max(max sigma, unused images), and
    the threshold is tau M(beta) with the convex M(x) = x / (2 - x). The unused images in the denominator are the
    warm-up: before most images were sure once, all thresholds are low.

    Args:
        labels: last sure pseudo-label of every image of the pool, `UNUSED` where there was none, shape (n,).
        classes: number of classes, k.
        threshold: tau, what the class with most images reaches, and what makes a pseudo-label sure.

    Returns:
        Thresholds in [0, tau], shape (k,).
    """
    unused, won = torch.bincount(labels.long() - UNUSED, minlength=classes + 1).float().split([1, classes])
    status = won / torch.maximum(won.max(), unused).clamp(min=1.0)
    return threshold * status / (2.0 - status)


def freematch_thresholds(confidence: Float[Tensor, ""], means: Float[Tensor, " k"]) -> Float[Tensor, " k"]:
    """FreeMatch's self-adaptive thresholds: the global one, scaled for each class by its share of the largest mean.

    Args:
        confidence: moving average of the largest probability of an image: the global threshold.
        means: moving average of the probability of each class, shape (k,).
    """
    return confidence * means / means.max()


def fairness(
    means_s: Float[Tensor, " k"],
    histogram_s: Float[Tensor, " k"],
    means: Float[Tensor, " k"],
    histogram: Float[Tensor, " k"],
) -> Float[Tensor, ""]:
    """FreeMatch's self-adaptive fairness: minus the cross-entropy of two distributions over the classes.

    Both are mean probability over share of predictions, normalised to sum 1: that of the moving averages, and that of
    the strong views that pass. The sign is the paper's, which adds the term to a loss that is minimised. A class that
    no strong view is predicted to be is left out of the sum (its share is 0, and no gradient could come from it): with
    anomalies at 1 % that is often the anomaly, and the term is 0.

    Args:
        means_s: mean probability of each class over the strong views that pass, up to a factor, shape (k,).
        histogram_s: how many of them are predicted to be each class, up to a factor, shape (k,).
        means: moving average of the mean probability of the weak views, shape (k,).
        histogram: moving average of the share of the weak views that are predicted to be each class, shape (k,).

    Returns:
        The term, at most 0; gradients flow to `means_s`.
    """
    present = histogram_s > 0
    expected = torch.where(histogram > 0, means / histogram, 0.0)
    expected = expected / expected.sum().clamp(min=torch.finfo(expected.dtype).tiny)
    batch = means_s[present] / histogram_s[present]
    return (expected[present] * torch.log(batch / batch.sum())).sum()


def gaussian_weights(
    confidence: Float[Tensor, " b"], mean: Float[Tensor, ""], variance: Float[Tensor, ""], n_sigma: float
) -> Float[Tensor, " b"]:
    """SoftMatch's truncated Gaussian: weight 1 from the mean confidence on, below it exp(-(c - mean)^2 / 2 s^2).

    Args:
        confidence: largest probability of each image, shape (b,).
        mean: of the confidences.
        variance: of the confidences.
        n_sigma: s is the standard deviation divided by this: the larger, the steeper.
    """
    below = (confidence - mean).clamp(max=0.0)
    return torch.exp(-0.5 * (n_sigma * below).square() / variance.clamp(min=torch.finfo(variance.dtype).tiny))


def align(logits: Float[Tensor, "b k"], means: Float[Tensor, " k"], prior: Float[Tensor, " k"]) -> Float[Tensor, "b k"]:
    """ReMixMatch's distribution alignment: probabilities times prior / means, normalised, as logits again.

    Args:
        logits: of the weak views, shape (b, k).
        means: what the network predicts on average, shape (k,).
        prior: what it should predict on average, shape (k,).
    """
    return logits.log_softmax(dim=-1) + prior.log() - means.clamp(min=torch.finfo(means.dtype).tiny).log()


def rampup(step: int, steps: float) -> float:
    """Mean teacher's factor of the consistency loss, exp(-5 (1 - step / steps)^2): from 0.007 to 1, then 1."""
    return 1.0 if step >= steps else math.exp(-5.0 * (1.0 - step / steps) ** 2)
