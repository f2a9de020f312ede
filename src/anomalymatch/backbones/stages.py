"""Statistics of the feature maps of a network's stages: fine structure and texture that the last layer forgets."""

from collections.abc import Iterator, Sequence
from inspect import signature
from typing import Any, cast

import torch
import torch.nn.functional as F  # noqa: N812 (the field's own abbreviation)
from jaxtyping import Float
from torch import Tensor, nn

MAX_STAGES, FEW_STAGES = 6, 4
"""Of more stages than `MAX_STAGES`, such as the blocks of a transformer, `FEW_STAGES` are taken at even distances."""
VARIANCE_FLOOR = 1e-12


def stage_statistics(maps: Sequence[Float[Tensor, "b _ _ _"]]) -> Float[Tensor, "b e"]:
    """Compute standard deviation and maximum of each channel over the image: two L2-normalised blocks for each map."""
    blocks = []
    for m in maps:
        # PyTorch warns about the variance of an empty batch, in which no image can be read.
        variance = m.float().var((2, 3), correction=0) if len(m) else m.float().sum((2, 3))
        deviation = (variance + VARIANCE_FLOOR).sqrt()  # with a gradient where it vanishes
        blocks += [F.normalize(deviation, dim=1), F.normalize(m.float().amax((2, 3)), dim=1)]
    return torch.cat(blocks, dim=1)


def stage_evidence(
    maps: Sequence[Float[Tensor, "b _ _ _"]], weights: Float[Tensor, " e"]
) -> Iterator[Float[Tensor, "b _ _"]]:
    """Divide the inner product of `stage_statistics` with `weights` among the cells of each map, exactly.

    Each cell has its share of the variance of a channel, which is its squared distance to the mean. The maximum belongs
    to the cell where it lies, or in equal parts to all such cells. The norms of the blocks are taken as constants.
    """
    blocks = iter(weights.split([m.shape[1] for m in maps for _ in range(2)]))
    for m in map(Tensor.float, maps):
        squares = (m - m.mean((2, 3), keepdim=True)).square() + VARIANCE_FLOOR
        deviation = squares.mean((2, 3)).sqrt()
        spread = F.normalize(deviation, dim=1) * next(blocks) / squares.sum((2, 3))
        highest = m.amax((2, 3), keepdim=True)
        at = (m == highest).float()
        peak = F.normalize(highest[..., 0, 0], dim=1) * next(blocks) / at.sum((2, 3))
        yield torch.einsum("bchw,bc->bhw", squares, spread) + torch.einsum("bchw,bc->bhw", at, peak)


def stage_options(body: nn.Module) -> dict[str, Any]:
    """Return the arguments of timm's `forward_intermediates` for the maps of all stages; {} without that method."""
    if not hasattr(body, "forward_intermediates"):
        return {}
    model = cast(Any, body)
    if "extra_blocks" in signature(model.forward_intermediates).parameters:  # an EfficientNet's; the first is its stem
        return {"indices": list(range(1, len(model.blocks) + 1)), "extra_blocks": True}
    count = len(model.feature_info)
    chosen = range(count) if count <= MAX_STAGES else [(i + 1) * count // FEW_STAGES - 1 for i in range(FEW_STAGES)]
    return {"indices": list(chosen)}


def stage_width(body: nn.Module, channels: int, size: int) -> int:
    """Return the number of `stage_statistics` of a timm model for images of `size` squared pixels."""
    options = stage_options(body)
    if not options:
        return 0
    training = body.training
    with torch.inference_mode():
        black = torch.zeros(1, channels, size, size)
        maps = cast(Any, body.eval()).forward_intermediates(black, **options, intermediates_only=True)
    body.train(training)
    return stage_statistics(maps).shape[1]
