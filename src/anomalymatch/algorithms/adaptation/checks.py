"""Checks of adapted features: recognition of images among others, spread, and agreement of neighbours with labels."""

import math
from typing import NamedTuple

import torch.nn.functional as F  # noqa: N812 (the field's own abbreviation)
from jaxtyping import Bool, Float
from torch import Tensor


def instance_accuracy(a: Float[Tensor, "n d"], b: Float[Tensor, "n d"]) -> float:
    """Compute how often the nearest second view, by cosine, of a first view is of the same image.

    Collapsed features, which are all equal, have an accuracy of 0: a tie with another image is no recognition.
    """
    similarities = F.normalize(a.double(), dim=1) @ F.normalize(b.double(), dim=1).T
    own = similarities.diagonal().clone()
    others = similarities.fill_diagonal_(-math.inf).max(dim=1).values
    return float((own > others).double().mean())


def spread(features: Float[Tensor, "n d"]) -> float:
    """Compute the root mean squared distance of L2-normalised features from their mean.

    1 is a spread in all directions, 0 a collapse to one point.
    """
    unit = F.normalize(features.double(), dim=1)
    return float((unit - unit.mean(dim=0)).square().sum(dim=1).mean().sqrt())


def neighbours_agree(features: Float[Tensor, "n d"], anomaly: Bool[Tensor, " n"]) -> Bool[Tensor, " n"]:
    """Return for each image whether the nearest other one, by cosine, has the same label."""
    unit = F.normalize(features.double(), dim=1)
    nearest = (unit @ unit.T).fill_diagonal_(-math.inf).argmax(dim=1)
    return anomaly[nearest] == anomaly


class Agreement(NamedTuple):
    """Agreement of nearest neighbours with labels, before and after; both classes have the same weight."""

    before: float
    after: float
    error: float
    """Standard error of the difference, from the images that changed."""

    @property
    def is_worse(self) -> bool:
        """True if it has fallen by more than its standard error."""
        return self.after < self.before - self.error


def compare_agreement(before: Bool[Tensor, " n"], after: Bool[Tensor, " n"], anomaly: Bool[Tensor, " n"]) -> Agreement:
    """Compare `neighbours_agree` of two sets of features of the same images, paired by image."""
    means, variance = [], 0.0
    for of_class in (anomaly, ~anomaly):
        one, other = before[of_class].double(), after[of_class].double()
        means.append((float(one.mean()), float(other.mean())))
        variance += float((other - one).var(correction=0)) / len(one)
    was, now = (sum(values) / 2 for values in zip(*means, strict=True))
    return Agreement(was, now, math.sqrt(variance) / 2)
