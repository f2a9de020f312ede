"""Neural network: pixel normalisation, a timm backbone, and a two-class head on its pooled features."""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F  # noqa: N812 (the field's own abbreviation)
from jaxtyping import Float, Shaped
from timm.models.efficientnet import EfficientNet
from torch import Tensor, nn

from anomalymatch.backbones.architectures import MIN_SIZE, Architecture, find_origin, fitting_size, split_names
from anomalymatch.backbones.ensemble import FeatureEnsemble, PixelStatistics
from anomalymatch.backbones.fuse_batch_norm import fuse_batch_norms
from anomalymatch.backbones.stages import (
    count_equal_stages,
    lower_maps,
    stage_options,
    stage_statistics,
    stage_width,
    upper_features,
)
from anomalymatch.backbones.tokens import feature_width, pool, pooled_features
from anomalymatch.backbones.tta import CROPS, MAX_TILES, ORIENTATIONS, Tiling, cut_tiles, shrunk, tta_inputs
from anomalymatch.backbones.weights import pretrained_config, pretrained_model
from anomalymatch.checks import check_choice, check_range
from anomalymatch.errors import ConfigError

Statistic = float | int | Sequence[float | int] | None
"""Mean or standard deviation, for all channels or for each; None for that of the weights."""


@dataclass(frozen=True)
class NetworkSpec:
    """Parameters from which the same network can be built again; stored beside every checkpoint.

    Attributes are the arguments of `build_backbone`, and:
        architectures: that of each model, one of an ensemble: with them, neither the hub nor a folder is needed.
        image_size: that which the models take.
        tiles: number along each side, already chosen where the configuration says `auto`.
        mean, std: statistics of the pixels that the backbone was trained on, by channel; white is 1.
        weights: origin of the pretrained weights, in words.
    """

    name: str
    architectures: tuple[Architecture, ...]
    channels: int
    image_size: int
    bn_momentum: float | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    weights: str
    stages: bool
    orientations: int
    crops: int
    tiles: int = 1  # checkpoints from before tiles have none

    @property
    def tiling(self) -> Tiling:
        """Tiles that the network sees of an image."""
        return Tiling(self.tiles, self.image_size)

    @property
    def input_size(self) -> int:
        """Side of the images that features and scores are computed from: `image_size`, or that which tiles cover."""
        return self.tiling.side

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self) | {"architectures": [each._asdict() for each in self.architectures]}


class Backbone(nn.Module):
    """A timm model without classifier that takes raw 8-bit images.

    It normalises pixels itself: a checkpoint carries mean and deviation, and no caller can forget them.

    With tiles, it takes the image that they cover, and the output has three parts for each feature: that of the whole
    image, shrunk to the size of a tile, and the largest and the mean over the tiles.

    Args:
        body: the timm model.
        mean, std: statistics of the pixels that it was trained on, by channel; white is 1.
        stage_features: number of features of the stages in the output (see `stage_statistics`); 0 for none.
        orientations: number of orientations over which features are averaged in prediction (see `tta`).
        crops: number of crops that are averaged with the whole image.
        tiling: tiles that are seen in prediction; None for none.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        body: nn.Module,
        mean: Sequence[float] | Tensor,
        std: Sequence[float] | Tensor,
        *,
        stage_features: int = 0,
        orientations: int = 1,
        crops: int = 0,
        tiling: Tiling | None = None,
    ) -> None:
        super().__init__()
        self.body, self.stage_features = body, stage_features
        self.orientations, self.crops, self.averages = orientations, crops, True
        self.tiling = tiling if tiling is not None and tiling.count > 1 else None
        self.shortcut: Callable[[Tensor], Tensor] | None = None
        self.features = feature_width(body) * self.parts
        self._stage_options = stage_options(body) if stage_features else {}
        self.register_buffer("mean", torch.as_tensor(mean).view(1, -1, 1, 1) * 255.0)
        self.register_buffer("std", torch.as_tensor(std).view(1, -1, 1, 1) * 255.0)

    def forward(self, images: Shaped[Tensor, "b c h w"]) -> Float[Tensor, "b d"]:
        """Compute pooled features of 8-bit images (0 to 255, any dtype), followed by those of the stages.

        In training mode, or with `averages` set to False, nothing is averaged: there augmentation turns the images, and
        each is one tile or a whole image in the size of a tile, whose three parts are equal. A `shortcut` that computes
        the same features takes over then (see `frozen_stages`).
        """
        if self.training or not self.averages:
            rows = self._features(self.normalise(images)) if self.shortcut is None else self.shortcut(images)
            return self.join_parts([rows] * self.parts)
        return self.join_parts(self._averaged_parts(images, self._features))

    def forward_both(
        self, other: "Backbone", images: Shaped[Tensor, "b c h w"], shared: int
    ) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b d"]]:
        """Compute the features of this and another EfficientNet whose stem and first `shared` stages are the same.

        What they share is computed once: in a fine-tuned one and its origin, the larger part of the work.
        """

        def both(pixels: Float[Tensor, "b c h w"]) -> Float[Tensor, "b e"]:
            bodies = cast(EfficientNet, self.body), cast(EfficientNet, other.body)
            below = lower_maps(bodies[0], pixels, shared)
            rows = []
            for body in bodies:
                last, above = upper_features(body, below[-1], shared)
                rows += [last.float(), stage_statistics([*below, *above])] if self.stage_features else [last.float()]
            return torch.cat(rows, dim=1)

        parts = [part.chunk(2, dim=1) for part in self._averaged_parts(images, both)]
        return self.join_parts([own for own, _ in parts]), self.join_parts([theirs for _, theirs in parts])

    def _averaged_parts(
        self, images: Shaped[Tensor, "b c h w"], features: Callable[[Tensor], Tensor]
    ) -> list[Float[Tensor, "b e"]]:
        """Average features over orientations and crops; with tiles, those of whole, largest and mean."""
        pixels = self.normalise(images)
        if self.tiling is None:
            return [self._averaged(pixels, self.crops, features)]
        whole = self._averaged(shrunk(pixels, self.tiling.size), self.crops, features)
        tiles = self._averaged(cut_tiles(pixels, self.tiling), 0, features)
        tiles = tiles.unflatten(0, (len(self.tiling.boxes), whole.shape[0]))
        return [whole, tiles.amax(dim=0), tiles.mean(dim=0)]

    @property
    def parts(self) -> int:
        """Number of parts of the output: 1, or whole, largest and mean with tiles."""
        return 1 if self.tiling is None else 3

    def join_parts(self, rows: Sequence[Float[Tensor, "b e"]]) -> Float[Tensor, "b d"]:
        """Join the features of each part: first all of the last layer, then all of the stages."""
        if len(rows) == 1:
            return rows[0]
        width = self.features // self.parts
        return torch.cat([*(row[:, :width] for row in rows), *(row[:, width:] for row in rows)], dim=1)

    def _averaged(
        self, images: Float[Tensor, "b c s s"], crops: int, features: Callable[[Tensor], Tensor]
    ) -> Float[Tensor, "b e"]:
        return torch.stack([features(x) for x in tta_inputs(images, self.orientations, crops)]).mean(dim=0)

    @property
    def pixels_per_pixel(self) -> float:
        """Number of pixels that pass through the body for each pixel of an image in prediction."""
        if self.tiling is None:
            return float(self.orientations * (1 + self.crops))
        inputs = self.orientations * (1 + self.crops + len(self.tiling.boxes))
        return inputs * (self.tiling.size / self.tiling.side) ** 2

    @property
    def width(self) -> int:
        """Number of all features, those of the stages included."""
        return self.features + self.stage_features

    def normalise(self, images: Shaped[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Subtract the mean from 8-bit images and divide by the standard deviation."""
        return (images.to(self.mean.dtype) - self.mean) / self.std

    def _features(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d"]:
        if not self._stage_options:
            return pooled_features(self.body, images)
        final, maps = cast(Any, self.body).forward_intermediates(images, **self._stage_options)
        return torch.cat([pool(self.body, final).float(), stage_statistics(maps)], dim=1)

    def with_body(self, body: nn.Module, *, stages: bool) -> "Backbone":
        """Return a backbone with another body of the same architecture and the same settings."""
        mean, std = self.mean.flatten() / 255.0, self.std.flatten() / 255.0
        width = self.stage_features if stages else 0
        return Backbone(
            body,
            mean,
            std,
            stage_features=width,
            orientations=self.orientations,
            crops=self.crops,
            tiling=self.tiling,
        )

    def fused(self) -> "Backbone":
        """Return a copy with batch norms fused into the convolutions, in evaluation mode; for prediction only."""
        return self.with_body(fuse_batch_norms(self.body), stages=True).eval()


class Head(nn.Module):
    """Linear two-class head on the features, L2-normalised or unchanged.

    The probe is fitted on normalised features, so its solution can be copied in exactly. `normalised` is of the last
    layer: stage features come normalised.
    """

    def __init__(
        self, features: int, *, normalised: bool, stage_features: int = 0, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        self.features, self.stage_features, self.normalised = features, stage_features, normalised
        self.linear = nn.utils.skip_init(nn.Linear, features + stage_features, 2)
        self.reset_parameters(generator)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw small weights: logits near zero, so that no image passes the pseudo-label threshold at step 0.

        timm's own initialisation of a two-class head is about 25 times wider: most images would pass at once with a
        random label.
        """
        bound = self.linear.in_features**-0.5
        with torch.no_grad():
            self.linear.weight.uniform_(-bound, bound, generator=generator)
            self.linear.bias.zero_()

    def set_probe(self, coefficients: Float[Tensor, " d"], intercept: float) -> None:
        """Copy a logistic regression: the softmax over the two logits then equals its sigmoid."""
        half = coefficients.to(self.linear.weight) / 2
        with torch.no_grad():
            self.linear.weight.copy_(torch.stack([-half, half]))
            self.linear.bias.copy_(torch.tensor([-intercept / 2, intercept / 2]))

    def forward(self, features: Float[Tensor, "b d"]) -> Float[Tensor, "b 2"]:
        """Compute logits of (normal, anomaly) in single precision: in bf16 many images of a large archive would tie."""
        device, features = features.device.type, features.to(self.linear.weight)
        if not torch.is_autocast_enabled(device):  # an exported module knows no autocast
            return self._logits(features)
        with torch.autocast(device, enabled=False):
            return self._logits(features)

    def _logits(self, features: Float[Tensor, "b d"]) -> Float[Tensor, "b 2"]:
        if not self.normalised:
            return self.linear(features)
        last, stages = features.split([self.features, self.stage_features], dim=-1)
        return self.linear(torch.cat([F.normalize(last, dim=-1), stages], dim=-1))


class Network(nn.Module):
    """Backbone and head: 8-bit images in, logits of (normal, anomaly) out.

    Args:
        spec: the architecture.
        backbone: the backbone.
        head: the head on its features.
        second: another network of the same architecture, whose logits are averaged with its own; None for none.
    """

    def __init__(self, spec: NetworkSpec, backbone: Backbone, head: Head, second: "Network | None" = None) -> None:
        super().__init__()
        self.spec = spec
        self.backbone = backbone
        self.head = head
        self.second = second
        self._shared_stages = 0

    def forward(self, images: Shaped[Tensor, "b c h w"]) -> Float[Tensor, "b 2"]:
        """Compute logits of (normal, anomaly)."""
        return self.features_and_logits(images)[1]

    def features_and_logits(
        self, images: Shaped[Tensor, "b c h w"]
    ) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b 2"]]:
        """Compute the features of the backbone and the logits of (normal, anomaly)."""
        if self.second is None:
            own = self.backbone(images)
            return own, self.head(own)
        if self._shared_stages:
            own, theirs = self.backbone.forward_both(self.second.backbone, images, self._shared_stages)
        else:
            own, theirs = self.backbone(images), self.second.backbone(images)
        return own, (self.head(own) + self.second.head(theirs)) / 2

    @property
    def pixels_per_pixel(self) -> float:
        """Number of pixels that pass through all bodies for each pixel of an image, stages in common counted twice."""
        return self.backbone.pixels_per_pixel + (0.0 if self.second is None else self.second.pixels_per_pixel)

    def alone(self) -> "Network":
        """Return the network without the second one; they share their weights."""
        return Network(self.spec, self.backbone, self.head)

    def fused(self) -> "Network":
        """Return a copy for prediction, which computes stages that both networks have once; see `Backbone.fused`."""
        second = None if self.second is None else self.second.fused()
        fused = Network(self.spec, self.backbone.fused(), copy.deepcopy(self.head), second).eval()
        if second is not None:
            fused._shared_stages = count_equal_stages(fused.backbone.body, second.backbone.body)
        return fused


def anomaly_logit(logits: Float[Tensor, "b 2"]) -> Float[Tensor, " b"]:
    """Return the log-odds of the anomaly class, which still differ where probabilities saturate at 1."""
    return logits[:, 1] - logits[:, 0]


def build_backbone(
    *,
    name: str,
    weights: str,
    channels: int,
    image_size: int,
    bn_momentum: float | None = None,
    stages: bool = False,
    orientations: int = 1,
    crops: int = 0,
    tiles: int = 1,
    mean: Statistic = None,
    std: Statistic = None,
) -> tuple[NetworkSpec, Backbone]:
    """Build a timm backbone with pretrained weights for any number of channels.

    Args:
        name: see `find_origin`; the paper's is `tf_efficientnet_lite0`. Names joined by a plus make an ensemble (see
            `FeatureEnsemble`), which has no stage features.
        weights: see `pretrained_model`.
        channels: channels of the images; timm adapts the first convolution (three summed into one, or repeated and
            rescaled).
        image_size: side of the square input, in pixels; a transformer takes the nearest multiple of its patches.
        bn_momentum: momentum of every batch norm; None keeps the model's own.
        stages: also output the features of the stages, if the model has any.
        orientations: 1, 2, 4 or 8, over which features are averaged in prediction (see `tta`).
        crops: 0, 1 or 5, which are averaged with the whole image.
        tiles: number of overlapping tiles along each side, which are seen beside the whole image in prediction; 1 for
            none.
        mean: of the pixels that the weights were trained on, for all channels or for each; white is 1. None takes that
            which belongs to the weights.
        std: standard deviation of these pixels, in the same way.

    Raises:
        ConfigError: if there is no such model, or a value is out of range.
        DownloadError: if the model cannot be fetched.
    """
    check_range("model.image_size", image_size, low=MIN_SIZE)
    check_choice("model.orientations", orientations, ORIENTATIONS)
    check_choice("model.crops", crops, CROPS)
    check_choice("model.tiles", tiles, range(1, MAX_TILES + 1))
    names = split_names(name)
    origins = [find_origin(each) for each in names]
    donors, found = zip(*(pretrained_model(origin, weights) for origin in origins), strict=True)
    given = _checked_statistics(mean=mean, std=std)
    statistics = [_statistics(pretrained_config(donor) | given, channels) for donor in donors]
    size = fitting_size(
        name, [(origin.architecture, donor) for origin, donor in zip(origins, donors, strict=True)], image_size
    )
    bodies = []
    for origin, donor in zip(origins, donors, strict=True):
        config, tensors = pretrained_config(donor), donor.state_dict()
        bands = config["input_size"][0]
        if bands not in (1, 3, channels):
            raise ConfigError(
                f"the weights are for images of {bands} bands, these have {channels}: take weights that were "
                f"adapted to this archive"
            )
        body = origin.architecture.build(channels=channels, size=size, config=config, tensors=tensors)
        if missing := body.state_dict().keys() - tensors.keys():
            raise ConfigError(f"the pretrained weights of {origin.architecture.name} lack {sorted(missing)[:3]}")
        bodies.append(body)
    means, deviations = statistics[0] if len(bodies) == 1 else ((0.0,) * channels, (1.0,) * channels)
    spec = NetworkSpec(
        name=name,
        architectures=tuple(origin.architecture for origin in origins),
        channels=channels,
        image_size=size,
        bn_momentum=bn_momentum,
        mean=means,
        std=deviations,
        weights=", ".join(dict.fromkeys(found)),
        stages=stages,
        orientations=orientations,
        crops=crops,
        tiles=tiles,
    )
    backbone = _assembled(spec, bodies)
    if isinstance(backbone.body, FeatureEnsemble):
        backbone.body.set_statistics(statistics)
    return spec, backbone


def image_classifier(network: nn.Module | str) -> nn.Module:
    """Return a network that takes 8-bit images and gives logits of (normal, anomaly).

    The name of a timm model is built with pretrained weights and a new head. A classifier of timm is wrapped, so that
    its images are normalised as its weights were trained. Any other module is returned as it is.
    """
    if isinstance(network, str):
        spec, backbone = build_backbone(name=network, weights="auto", channels=3, image_size=224)
        return Network(spec, backbone, Head(backbone.features, normalised=False))
    config = getattr(network, "pretrained_cfg", None)
    if not isinstance(config, dict) or "mean" not in config or not hasattr(network, "num_features"):
        return network
    first = next(module for module in network.modules() if isinstance(module, nn.Conv2d))
    return Backbone(network, *_statistics(config, first.in_channels))


def empty_backbone(spec: NetworkSpec) -> Backbone:
    """Build the architecture of `spec` with untrained weights, for a checkpoint to be loaded.

    Raises:
        ConfigError: if timm cannot build it.
    """
    bodies = [each.build(channels=spec.channels, size=spec.image_size) for each in spec.architectures]
    return _assembled(spec, bodies)


def _assembled(spec: NetworkSpec, bodies: Sequence[nn.Module]) -> Backbone:
    body = bodies[0] if len(bodies) == 1 else FeatureEnsemble(bodies, spec.channels)
    if spec.bn_momentum is not None:
        for module in body.modules():
            if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)):
                module.momentum = spec.bn_momentum
    try:
        width = stage_width(body, spec.channels, spec.image_size) if spec.stages else 0
    except RuntimeError as error:  # a stage without pixels
        raise ConfigError(f"model.image_size is {spec.image_size}, too small for {spec.name}: {error}") from error
    backbone = Backbone(
        body,
        spec.mean,
        spec.std,
        stage_features=width * (3 if spec.tiles > 1 else 1),
        orientations=spec.orientations,
        crops=spec.crops,
        tiling=spec.tiling,
    )
    return backbone.to(memory_format=torch.channels_last)


def _checked_statistics(**given: Statistic) -> dict[str, tuple[float, ...]]:
    """Return those of mean and standard deviation that are given, as tuples.

    Raises:
        ConfigError: if a value is out of range.
    """
    found = {
        key: value if isinstance(value, Sequence) else [value] for key, value in given.items() if value is not None
    }
    for key, values in found.items():
        check_range(f"model.{key}, number of values", len(values), low=1)
        for value in values:
            check_range(f"model.{key}", value, above=0 if key == "std" else None, below=math.inf)
    return {key: tuple(map(float, values)) for key, values in found.items()}


def _statistics(config: dict[str, Any], channels: int) -> PixelStatistics:
    mean, std = (
        tuple(config[key]) if len(config[key]) == channels else (sum(config[key]) / len(config[key]),) * channels
        for key in ("mean", "std")
    )
    return mean, std
