"""Adaptive thresholds and weights of pseudo-labels.

FlexMatch (Zhang et al. 2021, arXiv 2110.08263), FreeMatch (Wang et al. 2022, arXiv 2205.07246), SoftMatch (Chen et al.
2023, arXiv 2301.10921), mean teacher (Tarvainen & Valpola 2017, arXiv 1703.01780) and the distribution alignment of
ReMixMatch (Berthelot et al. 2019, arXiv 1911.09785).
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

UNUSED = -1
"""Pseudo-label of an image whose confidence never reached the threshold."""


def flexmatch_thresholds(labels: Int[Tensor, " n"], classes: int, threshold: float) -> Float[Tensor, " k"]:
    """Compute FlexMatch's thresholds, which are lower for classes with fewer confident images.

    Let sigma(c) be the number of images whose last confident pseudo-label is c. Then beta(c) = sigma(c) / max(max
    sigma, unused images), and the threshold is tau M(beta) with the convex M(x) = x / (2 - x). The unused images in the
    denominator are the warm-up: all thresholds are low until most images have had a confident pseudo-label.

    Args:
        labels: last confident pseudo-label of every image of the pool, `UNUSED` where there was none.
        classes: number of classes, k.
        threshold: tau, the threshold of the class with most images, and the confidence from which labels are counted.
    """
    unused, won = torch.bincount(labels.long() - UNUSED, minlength=classes + 1).float().split([1, classes])
    status = won / torch.maximum(won.max(), unused).clamp(min=1.0)
    return threshold * status / (2.0 - status)


def freematch_thresholds(confidence: Float[Tensor, ""], means: Float[Tensor, " k"]) -> Float[Tensor, " k"]:
    """Compute FreeMatch's thresholds: a global one, scaled for each class by its mean over the largest mean.

    The global one is `confidence`, the moving average of the largest probability of an image.
    """
    return confidence * means / means.max()


def fairness(
    means_s: Float[Tensor, " k"],
    histogram_s: Float[Tensor, " k"],
    means: Float[Tensor, " k"],
    histogram: Float[Tensor, " k"],
) -> Float[Tensor, ""]:
    """Compute FreeMatch's fairness term: minus the cross-entropy of two distributions over the classes.

    Both distributions are mean probability divided by share of predictions, normalised to sum 1: one of the moving
    averages, one of the strong views that pass. The sign is the paper's, which adds the term to a loss that is
    minimised. A class without predictions among the strong views is left out of the sum, as no gradient could come
    from it. With 1 % anomalies that is often the anomaly class, and the term is 0.

    Args:
        means_s: mean probability of each class over the strong views that pass, up to a factor.
        histogram_s: how many of them are predicted to be each class, up to a factor.
        means: moving average of the mean probability of the weak views.
        histogram: moving average of the share of the weak views that are predicted to be each class.

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
    """Compute SoftMatch's truncated Gaussian weights: 1 above the mean confidence, exp(-(c - mean)^2 / 2 s^2) below.

    The confidence c is the largest probability of an image, and s the standard deviation divided by `n_sigma`.
    """
    below = (confidence - mean).clamp(max=0.0)
    return torch.exp(-0.5 * (n_sigma * below).square() / variance.clamp(min=torch.finfo(variance.dtype).tiny))


def align(logits: Float[Tensor, "b k"], means: Float[Tensor, " k"], prior: Float[Tensor, " k"]) -> Float[Tensor, "b k"]:
    """Align predictions to a prior (ReMixMatch): multiply the probabilities by prior / means, return logits."""
    return logits.log_softmax(dim=-1) + prior.log() - means.clamp(min=torch.finfo(means.dtype).tiny).log()


def rampup(step: int, steps: float) -> float:
    """Compute mean teacher's factor of the consistency loss, exp(-5 (1 - step / steps)^2): from 0.007 to 1, then 1."""
    return 1.0 if step >= steps else math.exp(-5.0 * (1.0 - step / steps) ** 2)
