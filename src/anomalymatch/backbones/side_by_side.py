"""Several networks side by side: what one of them overlooks, another one sees."""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F  # noqa: N812 (the field's own abbreviation)
from jaxtyping import Float
from timm.models import group_parameters
from torch import Tensor, nn

SEPARATOR = "+"
"""Between the names of networks that stand side by side."""
Statistics = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and standard deviation by channel."""


class SideBySide(nn.Module):
    """Timm models without classifier as one: their features one after the other, each model's L2-normalised.

    Features of one model are then as far apart as those of any other, however large its numbers are.

    Args:
        models: the timm models.
        channels: of the images.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, models: Sequence[nn.Module], channels: int) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)
        self.num_features = sum(feature_width(model) for model in models)
        self.register_buffer("mean", torch.zeros(len(models), channels, 1, 1))
        self.register_buffer("std", torch.ones(len(models), channels, 1, 1))

    def set_statistics(self, statistics: Sequence[Statistics]) -> None:
        """Of the pixels that each model was trained on, 1 being white."""
        mean, std = (torch.tensor(values)[..., None, None] for values in zip(*statistics, strict=True))
        self.mean.copy_(mean)
        self.std.copy_(std)

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d"]:
        """Features of images whose pixels lie between 0 and 1."""
        seen = (model((images - self.mean[i]) / self.std[i]) for i, model in enumerate(self.models))
        return torch.cat([F.normalize(features, dim=-1) for features in seen], dim=-1)

    def group_matcher(self, coarse: bool = False) -> Callable[[str], int]:
        """As timm's models have it: the layer group of a parameter. The last groups of all models are one."""
        places: dict[str, int] = {}
        for i, model in enumerate(self.models):
            groups = group_parameters(model, cast(Any, model).group_matcher(coarse=coarse), return_values=False)
            for place, group in enumerate(sorted(groups, reverse=True)):
                places |= {f"models.{i}.{name}": -place for name in groups[group]}
        return places.__getitem__


def feature_width(body: nn.Module) -> int:
    """Pooled features of a timm model; some end in a hidden layer of another width than that of their last map."""
    return int(cast(int, getattr(body, "head_hidden_size", None) or body.num_features))
