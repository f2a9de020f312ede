"""Stages that do not learn, computed apart from those that do: OpenVINO takes a third of PyTorch's time for them."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile
from typing import Any, cast

import torch
from jaxtyping import Float, UInt8
from timm.models.efficientnet import EfficientNet
from torch import Tensor, nn

from anomalymatch.backbones.inference import Inference
from anomalymatch.backbones.network import Backbone
from anomalymatch.backbones.openvino import Forward
from anomalymatch.backbones.stages import stage_statistics


class FrozenStages(nn.Module):
    """The stem and the first stages of an EfficientNet.

    Args:
        backbone: whose they are.
        count: of these stages, the stem not counted.
    """

    def __init__(self, backbone: Backbone, count: int) -> None:
        super().__init__()
        self.backbone, self.count = backbone, count

    def maps(self, images: UInt8[Tensor, "b c h w"]) -> list[Float[Tensor, "b _ _ _"]]:
        """What each stage puts out."""
        return cast(Any, self.backbone.body).forward_intermediates(
            self.backbone.normalise(images),
            indices=list(range(1, self.count + 1)),
            extra_blocks=True,
            stop_early=True,
            intermediates_only=True,
        )

    def forward(self, images: UInt8[Tensor, "b c h w"]) -> Float[Tensor, "b e"]:
        """The last map, flattened, and then the statistics of all, where the backbone puts those out."""
        maps = self.maps(images)
        rows = [maps[-1].flatten(1)]
        if self.backbone.stage_features:
            rows.append(stage_statistics(maps))
        return torch.cat(rows, dim=1)


class Shortcut:
    """The features of a backbone by two ways: up to a stage as `forward` computes it, from there on as it is.

    Args:
        backbone: of which the upper stages learn.
        count: of the stages below.
        shape: of the feature map between them: channels, height, width.
        forward: computes `FrozenStages` of so many stages.
    """

    def __init__(self, backbone: Backbone, count: int, shape: Sequence[int], forward: Forward) -> None:
        self.backbone, self.count, self.shape, self.forward = backbone, count, tuple(shape), forward

    def __call__(self, images: UInt8[Tensor, "b c h w"]) -> Float[Tensor, "b d"]:
        """See `Backbone.forward`."""
        rows = torch.from_numpy(self.forward(images))
        below, statistics = rows.split([math.prod(self.shape), rows.shape[1] - math.prod(self.shape)], dim=1)
        body = cast(EfficientNet, self.backbone.body)
        x = below.unflatten(1, self.shape).to(self.backbone.mean.dtype).contiguous(memory_format=torch.channels_last)
        maps = []
        for stage in body.blocks[self.count :]:
            x = stage(x)
            maps.append(x)
        last = cast(Tensor, body.forward_head(body.bn2(body.conv_head(x))))
        if not self.backbone.stage_features:
            return last
        return torch.cat([last.float(), statistics, *([stage_statistics(maps)] if maps else [])], dim=1)


def frozen_stages(body: nn.Module) -> int:
    """How many of the first stages of an EfficientNet have nothing that learns; none in any other model."""
    if not isinstance(body, EfficientNet) or _learns(body.conv_stem) or _learns(body.bn1):
        return 0
    return len(list(takewhile(lambda stage: not _learns(stage), body.blocks)))


@contextmanager
def frozen_apart(
    backbones: Sequence[Backbone],
    inference: Inference,
    *,
    device: torch.device,
    size: int,
    batch_size: int,
    count: int,
) -> Iterator[None]:
    """Within it the frozen stages of these backbones are computed by OpenVINO, where that pays, in full precision.

    Args:
        backbones: of one architecture, whose frozen stages are the same, batch norms included.
        inference: says whether and how.
        device: on which they are trained; on any but a processor, all stays as it is.
        size: side of the images in pixels.
        batch_size: of which most batches are multiples.
        count: of the images that are to come, about.
    """
    first = backbones[0]
    stages = frozen_stages(first.body) if device.type == "cpu" else 0
    forward = None
    if stages:
        lower, channels = FrozenStages(first.folded(), stages), first.mean.shape[1]
        with torch.inference_mode():
            shape = lower.maps(torch.zeros(1, channels, size, size, dtype=torch.uint8))[-1].shape[1:]
        forward = inference.converted(
            lower, channels=channels, size=size, batch_size=batch_size, count=count, bf16=False
        )
    if forward is not None:
        for backbone in backbones:
            backbone.shortcut = Shortcut(backbone, stages, shape, forward)
    try:
        yield
    finally:
        for backbone in backbones:
            backbone.shortcut = None


def _learns(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())
