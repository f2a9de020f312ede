"""Frozen stages of a backbone in training, computed by OpenVINO in a third of PyTorch's time."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from jaxtyping import Float, UInt8
from timm.models.efficientnet import EfficientNet
from torch import Tensor, nn

from anomalymatch.backbones.inference import Inference
from anomalymatch.backbones.network import Backbone
from anomalymatch.backbones.openvino import Forward
from anomalymatch.backbones.stages import count_first_stages, lower_maps, stage_statistics, upper_features


@contextmanager
def accelerate_frozen_stages(
    backbones: Sequence[Backbone],
    inference: Inference,
    *,
    device: torch.device,
    size: int,
    batch_size: int,
    count: int,
) -> Iterator[None]:
    """Compute the frozen stages of these backbones with OpenVINO within the block, where that pays, in full precision.

    Args:
        backbones: backbones of one architecture with equal frozen stages, batch norms included.
        inference: settings; its backend decides.
        device: device of the training; nothing changes unless it is a CPU.
        size: side of the images in pixels.
        batch_size: most batches are multiples of this.
        count: approximate number of images to come.
    """
    first = backbones[0]
    stages = count_frozen_stages(first.body) if device.type == "cpu" else 0
    forward = None
    if stages:
        lower, channels = FrozenStages(first.fused(), stages), first.mean.shape[1]
        with torch.inference_mode():
            shape = lower.maps(torch.zeros(1, channels, size, size, dtype=torch.uint8))[-1].shape[1:]
        forward = inference.convert(lower, channels=channels, size=size, batch_size=batch_size, count=count, bf16=False)
    if forward is not None:
        for backbone in backbones:
            backbone.shortcut = Shortcut(backbone, stages, shape, forward)
    try:
        yield
    finally:
        for backbone in backbones:
            backbone.shortcut = None


class FrozenStages(nn.Module):
    """Stem and first `count` stages of an EfficientNet."""

    def __init__(self, backbone: Backbone, count: int) -> None:
        super().__init__()
        self.backbone, self.count = backbone, count

    def maps(self, images: UInt8[Tensor, "b c h w"]) -> list[Float[Tensor, "b _ _ _"]]:
        """Compute the feature map of each stage."""
        return lower_maps(cast(EfficientNet, self.backbone.body), self.backbone.normalise(images), self.count)

    def forward(self, images: UInt8[Tensor, "b c h w"]) -> Float[Tensor, "b e"]:
        """Compute the last map, flattened, and the statistics of all maps if the backbone has stage features."""
        maps = self.maps(images)
        rows = [maps[-1].flatten(1)]
        if self.backbone.stage_features:
            rows.append(stage_statistics(maps))
        return torch.cat(rows, dim=1)


class Shortcut:
    """Features of a backbone whose first `count` stages `forward` computes, as `FrozenStages` does.

    `shape` is that of the last of their maps: channels, height, width.
    """

    def __init__(self, backbone: Backbone, count: int, shape: Sequence[int], forward: Forward) -> None:
        self.backbone, self.count, self.shape, self.forward = backbone, count, tuple(shape), forward

    def __call__(self, images: UInt8[Tensor, "b c h w"]) -> Float[Tensor, "b d"]:
        """Compute what `Backbone.forward` computes."""
        rows = torch.from_numpy(self.forward(images))
        below, statistics = rows.split([math.prod(self.shape), rows.shape[1] - math.prod(self.shape)], dim=1)
        x = below.unflatten(1, self.shape).to(self.backbone.mean.dtype).contiguous(memory_format=torch.channels_last)
        last, maps = upper_features(cast(EfficientNet, self.backbone.body), x, self.count)
        if not self.backbone.stage_features:
            return last
        return torch.cat([last.float(), statistics, *([stage_statistics(maps)] if maps else [])], dim=1)


def count_frozen_stages(body: nn.Module) -> int:
    """Count the first stages of an EfficientNet in which nothing is trained; 0 for any other model."""
    return count_first_stages(body, lambda name: not _is_trained(body.get_submodule(name)))


def _is_trained(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())
