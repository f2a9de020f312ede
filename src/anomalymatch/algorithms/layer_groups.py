"""Layer groups of a network: which of them learn, and how fast."""

from collections.abc import Iterator
from typing import Any, cast

from timm.models import group_parameters
from torch import nn

from anomalymatch.backbones.network import Backbone
from anomalymatch.checks import check_range
from anomalymatch.errors import ConfigError

BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
NORMS = (*BATCH_NORMS, nn.LayerNorm, nn.GroupNorm)


def batch_norms(module: nn.Module) -> Iterator[BatchNorm]:
    """Yield the batch norms of a module."""
    return (m for m in module.modules() if isinstance(m, BATCH_NORMS))


def freeze_lower_groups(
    body: nn.Module, trainable_groups: int | None, key: str = "algorithm.learner.trainable_groups"
) -> None:
    """Freeze all but the last `trainable_groups` layer groups of a timm model; None lets all learn.

    Groups are timm's coarse ones; an EfficientNet has eight: the stem, six stages, and the last stage together with
    the final convolution.

    Raises:
        ConfigError: if `trainable_groups` is negative.
    """
    check_range(key, trainable_groups, low=0, null=True)
    groups = _layer_groups(body)
    learn = groups if trainable_groups is None else groups[max(0, len(groups) - trainable_groups) :]
    names = {name for group in learn for name in group}
    for name, parameter in body.named_parameters():
        parameter.requires_grad_(name in names)


def _layer_groups(body: nn.Module) -> list[list[str]]:
    """List the names of the parameters of each layer group, the lowest first."""
    groups = group_parameters(body, cast(Any, body).group_matcher(coarse=True), return_values=False)
    return [groups[number] for number in sorted(groups)]


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split the parameters that learn into two optimiser groups; normalisation layers have no weight decay."""
    exempt = {id(p) for m in module.modules() if isinstance(m, NORMS) for p in m.parameters()}
    learning = [p for p in module.parameters() if p.requires_grad]
    decay = [p for p in learning if id(p) not in exempt]
    rest = [p for p in learning if id(p) in exempt]
    return [{"params": decay, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]


def layerwise_groups(network: nn.Module, weight_decay: float, layer_decay: float) -> list[dict[str, Any]]:
    """Split the groups of `parameter_groups` by layer group; the factor `lr_scale` slows down the lower ones.

    The head learns at the full rate (ELECTRA, arXiv 2003.10555), each layer group below at `layer_decay` of the rate of
    the one above it. Groups are those of `freeze_lower_groups`, where timm's `param_groups_layer_decay` goes by block.

    Raises:
        ConfigError: if the layer groups are needed but unknown.
    """
    if layer_decay == 1.0:
        return [group | {"lr_scale": 1.0} for group in parameter_groups(network, weight_decay)]
    backbone = getattr(network, "backbone", None)
    if not isinstance(backbone, Backbone):
        raise ConfigError(
            f"layer_decay is {layer_decay}: the layer groups of a {type(network).__name__} are unknown, use 1.0"
        )
    body = backbone.body
    depth = {name: place for place, group in enumerate(reversed(_layer_groups(body)), 1) for name in group}
    places = {id(p): depth[name] for name, p in body.named_parameters()}
    groups = []
    for group in parameter_groups(network, weight_decay):
        for place in sorted({places.get(id(p), 0) for p in group["params"]}):
            some = [p for p in group["params"] if places.get(id(p), 0) == place]
            groups.append(group | {"params": some, "lr_scale": layer_decay**place})
    return groups
