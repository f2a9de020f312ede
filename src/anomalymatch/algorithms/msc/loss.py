"""The mean-shifted contrastive loss (Reiss & Hoshen, arXiv 2106.03844): contrast around the mean of the normal images.

Pretrained features lie in a narrow cone. Contrasted around the origin, as usual, they are pulled out of it, and what
tells normal from anomalous is lost; contrasted around their own mean they stay near it.
"""

import torch
import torch.nn.functional as F  # noqa: N812 (the field's own abbreviation)
from jaxtyping import Bool, Float
from torch import Tensor

ROUNDING = 10
"""A feature this many rounding errors from the centre has no direction from there."""


def mean_shifted(features: Float[Tensor, "n d"], centre: Float[Tensor, " d"]) -> Float[Tensor, "n d"]:
    """Unit vectors from the centre to each feature: (f - c) / |f - c| (section 3.2).

    Args:
        features: L2-normalised features.
        centre: mean of the normal training features; zero leaves the features as they are.

    Raises:
        ValueError: if a feature equals the centre, or is not finite: it has no direction, and would give NaN.
    """
    lost = int((~has_direction(features, centre)).sum())
    if lost:
        raise ValueError(
            f"{lost} of {len(features)} features equal the centre or are not finite: they have no direction from it"
        )
    shifted = features - centre
    return shifted / shifted.norm(dim=1, keepdim=True)


def has_direction(features: Float[Tensor, "n d"], centre: Float[Tensor, " d"]) -> Bool[Tensor, " n"]:
    """Whether each feature is finite and differs from the centre by more than rounding."""
    distance = (features - centre).norm(dim=1)
    return (distance > ROUNDING * torch.finfo(distance.dtype).eps) & distance.isfinite()


def nt_xent(a: Float[Tensor, "b d"], b: Float[Tensor, "b d"], temperature: float) -> Float[Tensor, ""]:
    """Normalised-temperature cross-entropy of two views (SimCLR, Chen et al. 2020, eq. 1).

    Each of the 2 b views has to recognise the other view of its image among all views but itself.

    Args:
        a: unit vectors of the first views.
        b: unit vectors of the second views, in the same order.
        temperature: divides the cosine similarities; smaller weighs the most similar images more.

    Raises:
        ValueError: if there are fewer than two images, so that nothing is to be told apart.
    """
    count = len(a)
    if count < 2:
        raise ValueError(f"the contrastive loss tells images apart: expected at least 2 in a batch, got {count}")
    views = torch.cat([a, b])
    similarities = views @ views.T / temperature
    itself = torch.eye(2 * count, dtype=torch.bool, device=views.device)
    partners = torch.arange(2 * count, device=views.device).roll(count)
    return F.cross_entropy(similarities.masked_fill(itself, -torch.inf), partners)


def mean_shifted_contrastive(
    a: Float[Tensor, "b d"], b: Float[Tensor, "b d"], centre: Float[Tensor, " d"], temperature: float
) -> Float[Tensor, ""]:
    """NT-Xent in the mean-shifted space (eq. 5 of the paper).

    Args:
        a: L2-normalised features of the first views.
        b: those of the second views, in the same order.
        centre: see `mean_shifted`.
        temperature: see `nt_xent`.

    Raises:
        ValueError: if a feature equals the centre, or there are fewer than two images.
    """
    return nt_xent(mean_shifted(a, centre), mean_shifted(b, centre), temperature)


def angular_term(a: Float[Tensor, "b d"], b: Float[Tensor, "b d"], centre: Float[Tensor, " d"]) -> Float[Tensor, ""]:
    """Minus the mean cosine to the centre, summed over both views: it keeps normal images close to their mean.

    Only the direction of the centre counts, so that the term has the same weight however wide the cone is.

    Raises:
        ValueError: if the centre is zero, which has no direction.
    """
    length = centre.norm()
    if not length > ROUNDING * torch.finfo(centre.dtype).eps:
        raise ValueError("the centre of the features is zero: it has no direction to stay close to")
    return -((a + b) @ (centre / length)).mean()
