"""The layer groups of a timm model: which of them learn, and how fast."""

from typing import Any, cast

from timm.models import group_parameters
from torch import nn

from anomalymatch.backbones.network import Network
from anomalymatch.errors import ConfigError

_NORMS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)


def freeze_lower_groups(body: nn.Module, trainable_groups: int | None) -> int:
    """Let only the last `trainable_groups` layer groups of a timm model learn; None lets all learn.

    Groups are timm's coarse ones; an EfficientNet has eight: the stem, six stages, and the last stage together with
    the final convolution.

    Returns:
        The number of parameters that learn.

    Raises:
        ConfigError: if `trainable_groups` is negative.
    """
    check_not_negative("trainable_groups", trainable_groups)
    groups = group_parameters(body, cast(Any, body).group_matcher(coarse=True), return_values=False)
    order = sorted(groups)
    learn = order if trainable_groups is None else order[max(0, len(order) - trainable_groups) :]
    names = {name for group in learn for name in groups[group]}
    for name, parameter in body.named_parameters():
        parameter.requires_grad_(name in names)
    return sum(p.numel() for p in body.parameters() if p.requires_grad)


def check_not_negative(setting: str, value: int | None) -> None:
    """Refuse a setting of a learner that counts something; None stands for all.

    Raises:
        ConfigError: if it is negative.
    """
    if value is not None and value < 0:
        raise ConfigError(f"algorithm.learner.{setting} is {value}: it cannot be negative")


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two optimiser groups: what decays, and the parameters of normalisation layers, which do not."""
    exempt = {id(p) for m in module.modules() if isinstance(m, _NORMS) for p in m.parameters()}
    learning = [p for p in module.parameters() if p.requires_grad]
    decay = [p for p in learning if id(p) not in exempt]
    rest = [p for p in learning if id(p) in exempt]
    return [{"params": decay, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]


def layerwise_groups(network: Network, weight_decay: float, layer_decay: float) -> list[dict[str, Any]]:
    """The groups of `parameter_groups` for each layer group of the backbone by itself; `lr_scale` slows the lower ones.

    The head learns at the full rate (ELECTRA, arXiv 2003.10555), each layer group below at `layer_decay` of the rate of
    the one above it. Groups are those of `freeze_lower_groups`, where timm's `param_groups_layer_decay` goes by block.
    """
    body = network.backbone.body
    layers = group_parameters(body, cast(Any, body).group_matcher(coarse=True), return_values=False)
    depth = {name: place for place, group in enumerate(sorted(layers, reverse=True), 1) for name in layers[group]}
    places = {id(p): depth[name] for name, p in body.named_parameters()}
    groups = []
    for group in parameter_groups(network, weight_decay):
        for place in sorted({places.get(id(p), 0) for p in group["params"]}):
            some = [p for p in group["params"] if places.get(id(p), 0) == place]
            groups.append(group | {"params": some, "lr_scale": layer_decay**place})
    return groups
