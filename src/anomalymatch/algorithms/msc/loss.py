"""Mean-shifted contrastive loss (Reiss & Hoshen, arXiv 2106.03844): contrast around the mean of the normal images.

Pretrained features lie in a narrow cone. The usual contrast around the origin pulls them out of it and loses what
separates normal from anomalous; a contrast around their own mean keeps them near it.
"""

import torch
import torch.nn.functional as F  # noqa: N812 (the field's own abbreviation)
from jaxtyping import Bool, Float
from torch import Tensor

ROUNDING = 10
"""Distance from the centre, in rounding errors, below which a feature has no direction."""


def mean_shifted(features: Float[Tensor, "n d"], centre: Float[Tensor, " d"]) -> Float[Tensor, "n d"]:
    """Compute unit vectors from the centre to each feature: (f - c) / |f - c| (section 3.2).

    Args:
        features: L2-normalised features.
        centre: mean of the normal training features; zero leaves the features as they are.

    Raises:
        ValueError: if a feature equals the centre or is not finite, so that it has no direction.
    """
    lost = int((~has_direction(features, centre)).sum())
    if lost:
        raise ValueError(
            f"{lost} of {len(features)} features equal the centre or are not finite: they have no direction from it"
        )
    shifted = features - centre
    return shifted / shifted.norm(dim=1, keepdim=True)


def has_direction(features: Float[Tensor, "n d"], centre: Float[Tensor, " d"]) -> Bool[Tensor, " n"]:
    """Return for each feature whether it is finite and differs from the centre by more than rounding."""
    distance = (features - centre).norm(dim=1)
    return (distance > ROUNDING * torch.finfo(distance.dtype).eps) & distance.isfinite()


def nt_xent(a: Float[Tensor, "b d"], b: Float[Tensor, "b d"], temperature: float) -> Float[Tensor, ""]:
    """Compute the normalised-temperature cross-entropy of two views (SimCLR, Chen et al. 2020, eq. 1).

    Each of the 2 b views, which are unit vectors, has to recognise the other view of its image among all views but
    itself. A lower temperature weights similar images more.

    Raises:
        ValueError: if there are fewer than two images.
    """
    count = len(a)
    if count < 2:
        raise ValueError(f"the contrastive loss compares images: expected at least 2 in a batch, got {count}")
    views = torch.cat([a, b])
    similarities = views @ views.T / temperature
    itself = torch.eye(2 * count, dtype=torch.bool, device=views.device)
    partners = torch.arange(2 * count, device=views.device).roll(count)
    return F.cross_entropy(similarities.masked_fill(itself, -torch.inf), partners)


def mean_shifted_contrastive(
    a: Float[Tensor, "b d"], b: Float[Tensor, "b d"], centre: Float[Tensor, " d"], temperature: float
) -> Float[Tensor, ""]:
    """Compute `nt_xent` of L2-normalised features in the mean-shifted space (eq. 5 of the paper).

    Raises:
        ValueError: if a feature equals the centre, or there are fewer than two images.
    """
    return nt_xent(mean_shifted(a, centre), mean_shifted(b, centre), temperature)


def angular_term(a: Float[Tensor, "b d"], b: Float[Tensor, "b d"], centre: Float[Tensor, " d"]) -> Float[Tensor, ""]:
    """Compute minus the mean cosine to the centre, summed over both views, which keeps images close to their mean.

    The centre is normalised, so the weight of the term does not depend on the width of the cone.

    Raises:
        ValueError: if the centre is zero, which has no direction.
    """
    length = centre.norm()
    if not length > ROUNDING * torch.finfo(centre.dtype).eps:
        raise ValueError("the centre of the features is zero: it has no direction to stay close to")
    return -((a + b) @ (centre / length)).mean()
