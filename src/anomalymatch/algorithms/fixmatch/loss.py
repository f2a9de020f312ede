"""FixMatch (Sohn et al. 2020, arXiv 2001.07685): pseudo-labels of weak views teach the strong views.

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
"""Of the classes, by their number."""


class PseudoLabels(NamedTuple):
    """What the teacher believes of each unlabelled image, and whether it is sure enough to teach.

    A mask is of truth values, or of weights from 0 to 1.
    """

    targets: Int[Tensor, " b"]
    mask: Shaped[Tensor, " b"]


def pseudo_labels(logits: Float[Tensor, "b k"], threshold: float | Float[Tensor, " k"]) -> PseudoLabels:
    """Most probable class of each weak view, and whether its softmax reaches `threshold` (eq. 4: tau).

    No gradient flows back to `logits`. A threshold for each class has shape (k,).
    """
    probability, targets = logits.detach().softmax(dim=-1).max(dim=-1)
    reached = threshold if isinstance(threshold, float) else threshold[targets]
    return PseudoLabels(targets, probability >= reached)


def consistency_loss(logits_s: Float[Tensor, "b k"], pseudo: PseudoLabels) -> Float[Tensor, ""]:
    """Cross-entropy of the strong views against the pseudo-labels, mean over **all** images (eq. 4).

    Images under the threshold count as zero: the loss grows with the share that passes.
    """
    losses = F.cross_entropy(logits_s, pseudo.targets, reduction="none")
    return (losses * pseudo.mask).mean()


def squared_error(
    logits_s: Float[Tensor, "b k"], logits_w: Float[Tensor, "b k"], pseudo: PseudoLabels
) -> Float[Tensor, ""]:
    """Mean teacher's consistency (arXiv 1703.01780): squared difference of the softmaxes, mean over classes and images.

    Images under the threshold count as zero, as in `consistency_loss`; no gradient flows back to `logits_w`.
    """
    difference = logits_s.softmax(dim=-1) - logits_w.detach().softmax(dim=-1)
    return (difference.square().mean(dim=-1) * pseudo.mask).mean()


def pass_counts(pseudo: PseudoLabels, truth: Bool[Tensor, " b"] | None) -> dict[str, Float[Tensor, ""]]:
    """How many images there are, pass, and pass as each class; with truth, also how many of these rightly so.

    A weight between 0 and 1 counts as that part of an image.
    """
    mask = pseudo.mask.float()
    passed = {"": mask} | {f"_{name}": mask * (pseudo.targets == number) for number, name in enumerate(NAMES)}
    counts = {"images": torch.ones_like(mask)} | {f"pass{kind}": value for kind, value in passed.items()}
    if truth is not None:
        right = (pseudo.targets == truth.long()).float()
        counts |= {f"right{kind}": value * right for kind, value in passed.items()}
    return {name: value.sum() for name, value in counts.items()}


def pass_rates(counts: Mapping[str, Float[Tensor, ""]]) -> dict[str, Float[Tensor, ""]]:
    """Of `pass_counts`, be they summed over several batches: shares of all images that pass, and of these rightly so.

    The precision of a class is NaN where nothing passes as that class.
    """
    kinds = [name.removeprefix("pass") for name in counts if name.startswith("pass")]
    rates = {f"pass_rate{kind}": counts[f"pass{kind}"] / counts["images"] for kind in kinds}
    known = [kind for kind in kinds if f"right{kind}" in counts]
    return rates | {f"pseudo_precision{kind}": counts[f"right{kind}"] / counts[f"pass{kind}"] for kind in known}


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
