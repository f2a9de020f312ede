"""FixMatch (Sohn et al. 2020, arXiv 2001.07685): pseudo-labels of weak views teach the strong views.

AnomalyMatch (arXiv 2505.03509) uses it with two classes; column 1 of the logits is the anomaly.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 (the field's own abbreviation)
from jaxtyping import Bool, Float, Int
from torch import Tensor


class PseudoLabels(NamedTuple):
    """What the teacher believes of each unlabelled image, and whether it is sure enough to teach."""

    targets: Int[Tensor, " b"]
    mask: Bool[Tensor, " b"]


def pseudo_labels(logits: Float[Tensor, "b k"], threshold: float) -> PseudoLabels:
    """Most probable class of each weak view, and whether its softmax reaches `threshold` (eq. 4: tau).

    No gradient flows back to `logits`.
    """
    probability, targets = logits.detach().softmax(dim=-1).max(dim=-1)
    return PseudoLabels(targets, probability >= threshold)


def consistency_loss(logits_s: Float[Tensor, "b k"], pseudo: PseudoLabels) -> Float[Tensor, ""]:
    """Cross-entropy of the strong views against the pseudo-labels, mean over **all** images (eq. 4).

    Images under the threshold count as zero: the loss grows with the share that passes.
    """
    losses = F.cross_entropy(logits_s, pseudo.targets, reduction="none")
    return (losses * pseudo.mask).mean()


def cosine_7_16(step: int, steps: int) -> float:
    """Learning-rate factor cos(7 pi k / 16 K), FixMatch section 2.4: from 1 at step 0 to 0.195 at the last."""
    return math.cos(7.0 * math.pi * step / (16.0 * max(1, steps)))


def anomaly_logit(logits: Float[Tensor, "b 2"]) -> Float[Tensor, " b"]:
    """Log-odds of the anomaly class; unlike the softmax it keeps its order where probabilities saturate at 1."""
    return logits[:, 1] - logits[:, 0]


def ema_update(averages: list[Tensor], values: list[Tensor], decay: float) -> None:
    """In place: average <- decay * average + (1 - decay) * value, for each pair."""
    if not averages:
        return
    with torch.no_grad():
        torch._foreach_lerp_(averages, values, 1.0 - decay)
