"""Losses of FixMatch (Sohn et al. 2020, arXiv 2001.07685): pseudo-labels of weak views as targets of strong views.

AnomalyMatch (arXiv 2505.03509) uses it with two classes; column 1 of the logits is the anomaly.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 (the field's own abbreviation)
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

NAMES = ("normal", "anomaly")
"""Names of the classes, by number."""


class PseudoLabels(NamedTuple):
    """Predicted class of each unlabelled image, and a mask (booleans, or weights from 0 to 1) of those in the loss."""

    targets: Int[Tensor, " b"]
    mask: Shaped[Tensor, " b"]


def pseudo_labels(logits: Float[Tensor, "b k"], threshold: float | Float[Tensor, " k"]) -> PseudoLabels:
    """Take the most probable class of each weak view; the mask selects those with a softmax of at least `threshold`.

    Equation 4 of the paper, where the threshold is tau: one number, or one for each class. No gradient flows back.
    """
    probability, targets = logits.detach().softmax(dim=-1).max(dim=-1)
    reached = threshold if isinstance(threshold, float) else threshold[targets]
    return PseudoLabels(targets, probability >= reached)


def consistency_loss(logits_s: Float[Tensor, "b k"], pseudo: PseudoLabels) -> Float[Tensor, ""]:
    """Compute the cross-entropy of the strong views against the pseudo-labels, mean over **all** images (eq. 4).

    Images outside the mask count as zero: the loss grows with the share of images that pass.
    """
    losses = F.cross_entropy(logits_s, pseudo.targets, reduction="none")
    return (losses * pseudo.mask).mean()


def squared_error(
    logits_s: Float[Tensor, "b k"], logits_w: Float[Tensor, "b k"], pseudo: PseudoLabels
) -> Float[Tensor, ""]:
    """Compute the squared difference of the softmaxes, mean over classes and images (mean teacher, arXiv 1703.01780).

    Images outside the mask count as zero, as in `consistency_loss`; no gradient flows back to `logits_w`.
    """
    difference = logits_s.softmax(dim=-1) - logits_w.detach().softmax(dim=-1)
    return (difference.square().mean(dim=-1) * pseudo.mask).mean()


def pass_counts(pseudo: PseudoLabels, truth: Bool[Tensor, " b"] | None) -> dict[str, Float[Tensor, ""]]:
    """Count all images, images that pass, and images that pass as each class; with `truth` also correct ones.

    A mask of 0.3 counts as 0.3 images.
    """
    mask = pseudo.mask.float()
    passed = {"": mask} | {f"_{name}": mask * (pseudo.targets == number) for number, name in enumerate(NAMES)}
    counts = {"images": torch.ones_like(mask)} | {f"pass{kind}": value for kind, value in passed.items()}
    if truth is not None:
        right = (pseudo.targets == truth.long()).float()
        counts |= {f"right{kind}": value * right for kind, value in passed.items()}
    return {name: value.sum() for name, value in counts.items()}


def pass_rates(counts: Mapping[str, Float[Tensor, ""]]) -> dict[str, Float[Tensor, ""]]:
    """Turn `pass_counts`, or their sum over several batches, into pass rates and the precision of pseudo-labels.

    The precision of a class is NaN where no image passes as that class.
    """
    kinds = [name.removeprefix("pass") for name in counts if name.startswith("pass")]
    rates = {f"pass_rate{kind}": counts[f"pass{kind}"] / counts["images"] for kind in kinds}
    known = [kind for kind in kinds if f"right{kind}" in counts]
    return rates | {f"pseudo_precision{kind}": counts[f"right{kind}"] / counts[f"pass{kind}"] for kind in known}


def cosine_7_16(step: int, steps: int) -> float:
    """Compute the learning-rate factor cos(7 pi k / 16 K) of section 2.4: from 1 at step 0 to 0.195 at the last.

    It stays at 0.195 after the last step: a longer training never has a negative rate.
    """
    return math.cos(7.0 * math.pi * min(step / max(1, steps), 1.0) / 16.0)
