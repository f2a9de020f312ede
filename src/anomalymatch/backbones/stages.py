"""Statistics of the feature maps of a network's stages: fine structure and texture that the last layer forgets."""

from collections.abc import Callable, Iterator, Sequence
from inspect import signature
from itertools import takewhile
from typing import Any, cast

import torch
import torch.nn.functional as F  # noqa: N812 (the field's own abbreviation)
from jaxtyping import Float
from timm.models.efficientnet import EfficientNet
from torch import Tensor, nn

VARIANCE_FLOOR = 1e-12


def stage_statistics(maps: Sequence[Float[Tensor, "b _ _ _"]]) -> Float[Tensor, "b e"]:
    """Compute standard deviation and maximum of each channel over the image: two L2-normalised blocks for each map."""
    blocks = []
    for m in maps:
        # PyTorch warns about the variance of an empty batch, in which no image can be read.
        variance = m.float().var((2, 3), correction=0) if m.shape[0] else m.float().sum((2, 3))
        deviation = (variance + VARIANCE_FLOOR).sqrt()  # with a gradient where it vanishes
        blocks += [F.normalize(deviation, dim=1), F.normalize(m.float().amax((2, 3)), dim=1)]
    return torch.cat(blocks, dim=1)


def stage_evidence(
    maps: Sequence[Float[Tensor, "b _ _ _"]], weights: Float[Tensor, "*b e"]
) -> Iterator[Float[Tensor, "b _ _"]]:
    """Divide the inner product of `stage_statistics` with `weights` among the cells of each map, exactly.

    Each cell has its share of the variance of a channel, which is its squared distance to the mean. The maximum belongs
    to the cell where it lies, or in equal parts to all such cells. The norms of the blocks are taken as constants.

    Args:
        maps: maps of each stage.
        weights: the same for all images, or those of each.
    """
    blocks = iter(weights.split([m.shape[1] for m in maps for _ in range(2)], dim=-1))
    for m in map(Tensor.float, maps):
        squares = (m - m.mean((2, 3), keepdim=True)).square() + VARIANCE_FLOOR
        deviation = squares.mean((2, 3)).sqrt()
        spread = F.normalize(deviation, dim=1) * next(blocks) / squares.sum((2, 3))
        highest = m.amax((2, 3), keepdim=True)
        at = (m == highest).float()
        peak = F.normalize(highest[..., 0, 0], dim=1) * next(blocks) / at.sum((2, 3))
        yield torch.einsum("bchw,bc->bhw", squares, spread) + torch.einsum("bchw,bc->bhw", at, peak)


def feature_reductions(body: nn.Module) -> list[int]:
    """Return the side of the image over that of each feature map; none for a model without `forward_intermediates`."""
    if not hasattr(body, "forward_intermediates"):
        return []
    return [int(info["reduction"]) for info in cast(Any, body).feature_info]


def stage_options(body: nn.Module) -> dict[str, Any]:
    """Return the arguments of timm's `forward_intermediates` for the maps of the stages; {} without that method.

    Those are all stages of a pyramid, and the blocks of a transformer at a quarter, half and three quarters.
    """
    reductions = feature_reductions(body)
    if not reductions:
        return {}
    model = cast(Any, body)
    if "extra_blocks" in signature(model.forward_intermediates).parameters:  # an EfficientNet's; the first is its stem
        return {"indices": list(range(1, len(model.blocks) + 1)), "extra_blocks": True}
    return {"indices": _blocks(reductions, 1, 2, 3) if _is_isotropic(reductions) else list(range(len(reductions)))}


def lower_maps(body: EfficientNet, images: Float[Tensor, "b c h w"], count: int) -> list[Float[Tensor, "b _ _ _"]]:
    """Compute the feature maps of the first `count` stages of an EfficientNet."""
    options = {"indices": list(range(1, count + 1)), "extra_blocks": True, "stop_early": True}
    return cast(Any, body).forward_intermediates(images, **options, intermediates_only=True)


def upper_features(
    body: EfficientNet, below: Float[Tensor, "b _ _ _"], count: int
) -> tuple[Float[Tensor, "b d"], list[Float[Tensor, "b _ _ _"]]]:
    """Compute the pooled features and the maps of the upper stages from the map of stage `count`.

    timm cannot start a forward pass in the middle; a test compares these steps with its own.
    """
    maps = [below]
    for stage in body.blocks[count:]:
        maps.append(stage(maps[-1]))
    return cast(Tensor, body.forward_head(body.bn2(body.conv_head(maps[-1])))), maps[1:]


def count_first_stages(body: nn.Module, holds: Callable[[str], bool]) -> int:
    """Count the first stages of an EfficientNet whose modules all have a property, the stem's too; 0 for other models.

    Args:
        body: a timm model.
        holds: whether the module of that name has the property.
    """
    if not isinstance(body, EfficientNet) or not holds("conv_stem") or not holds("bn1"):
        return 0
    return len(list(takewhile(holds, (f"blocks.{i}" for i in range(len(body.blocks))))))


def count_equal_stages(body: nn.Module, other: nn.Module) -> int:
    """Count the first stages with equal weights in two EfficientNets of one architecture; 0 for other models."""

    def is_equal(name: str) -> bool:
        ours, theirs = body.get_submodule(name).state_dict(), other.get_submodule(name).state_dict()
        return all(torch.equal(value, theirs[key]) for key, value in ours.items())

    return count_first_stages(body, is_equal)


def patch_levels(body: nn.Module) -> list[int]:
    """Return the feature maps from which patches are taken, as timm numbers them.

    Those are the last two maps of a pyramid, and the blocks of a transformer at half and three quarters.
    """
    reductions = feature_reductions(body)
    count = len(reductions)
    return _blocks(reductions, 2, 3) if _is_isotropic(reductions) else list(range(max(0, count - 2), count))


def _is_isotropic(reductions: Sequence[int]) -> bool:
    """Tell whether all maps have one resolution, as those of the blocks of a transformer have."""
    return len(reductions) > 1 and len(set(reductions)) == 1


def _blocks(reductions: Sequence[int], *quarters: int) -> list[int]:
    """Return the last block of each of these quarters of the depth."""
    return sorted({max(0, len(reductions) * quarter // 4 - 1) for quarter in quarters})


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
