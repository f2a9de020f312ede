"""A look into the stages of a network: what is fine, faint or a matter of texture, and gone in the last layer.

A network that was trained to name objects forgets such things on the way.
"""

from collections.abc import Sequence
from inspect import signature
from typing import Any, cast

import torch
import torch.nn.functional as F  # noqa: N812 (the field's own abbreviation)
from jaxtyping import Float
from torch import Tensor, nn

MOST_STAGES, FEW_STAGES = 6, 4
"""Of more stages than that, as a transformer's blocks are, so few are taken, evenly."""


def stage_statistics(maps: Sequence[Float[Tensor, "b _ _ _"]]) -> Float[Tensor, "b e"]:
    """Standard deviation and maximum over the image of each channel, each map giving two L2-normalised blocks."""
    blocks = []
    for m in maps:
        deviation = (m.float().var((2, 3), correction=0) + 1e-12).sqrt()  # with a gradient where it vanishes
        blocks += [F.normalize(deviation, dim=1), F.normalize(m.float().amax((2, 3)), dim=1)]
    return torch.cat(blocks, dim=1)


def stages_of(body: nn.Module) -> dict[str, Any]:
    """The arguments of timm's `forward_intermediates` for the feature maps of all stages; none if it has no such."""
    if not hasattr(body, "forward_intermediates"):
        return {}
    model = cast(Any, body)
    if "extra_blocks" in signature(model.forward_intermediates).parameters:  # an EfficientNet's; the first is its stem
        return {"indices": list(range(1, len(model.blocks) + 1)), "extra_blocks": True}
    count = len(model.feature_info)
    chosen = range(count) if count <= MOST_STAGES else [(i + 1) * count // FEW_STAGES - 1 for i in range(FEW_STAGES)]
    return {"indices": list(chosen)}


def stage_width(body: nn.Module, channels: int, size: int) -> int:
    """Number of `stage_statistics` of a timm model for images of `size` squared pixels, as a black one shows."""
    stages = stages_of(body)
    if not stages:
        return 0
    training = body.training
    with torch.inference_mode():
        black = torch.zeros(1, channels, size, size)
        maps = cast(Any, body.eval()).forward_intermediates(black, **stages, intermediates_only=True)
    body.train(training)
    return stage_statistics(maps).shape[1]
