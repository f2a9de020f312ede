"""Ensemble of backbones: the features of several timm models side by side."""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F  # noqa: N812 (the field's own abbreviation)
from jaxtyping import Float
from timm.models import group_parameters
from torch import Tensor, nn

from anomalymatch.backbones.tokens import feature_width, pooled_features

PixelStatistics = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and standard deviation of each channel."""


class FeatureEnsemble(nn.Module):
    """Concatenation of the L2-normalised features of several timm models without classifiers."""

    mean: Tensor
    std: Tensor

    def __init__(self, models: Sequence[nn.Module], channels: int) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)
        self.num_features = sum(feature_width(model) for model in models)
        self.register_buffer("mean", torch.zeros(len(models), channels, 1, 1))
        self.register_buffer("std", torch.ones(len(models), channels, 1, 1))

    def set_statistics(self, statistics: Sequence[PixelStatistics]) -> None:
        """Set mean and standard deviation of the pixels that each model was trained on; white is 1."""
        mean, std = (torch.tensor(values)[..., None, None] for values in zip(*statistics, strict=True))
        self.mean.copy_(mean)
        self.std.copy_(std)

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d"]:
        """Compute the features of images with pixels between 0 and 1."""
        rows = (pooled_features(model, self.normalise(images, i)) for i, model in enumerate(self.models))
        return torch.cat([F.normalize(row, dim=-1) for row in rows], dim=-1)

    def normalise(self, images: Float[Tensor, "b c h w"], model: int) -> Float[Tensor, "b c h w"]:
        """Normalise images with pixels between 0 and 1 by the statistics of one of the models."""
        return (images - self.mean[model]) / self.std[model]

    def group_matcher(self, coarse: bool = False) -> Callable[[str], int]:
        """Return the layer group of each parameter, as timm's models do; the last groups of all models are one."""
        places: dict[str, int] = {}
        for i, model in enumerate(self.models):
            groups = group_parameters(model, cast(Any, model).group_matcher(coarse=coarse), return_values=False)
            for place, group in enumerate(sorted(groups, reverse=True)):
                places |= {f"models.{i}.{name}": -place for name in groups[group]}
        return places.__getitem__
