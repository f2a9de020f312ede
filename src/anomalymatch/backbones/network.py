"""The network: pretrained normalisation, a timm backbone, and a two-class head on its pooled features."""

import copy
import difflib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import timm
import torch
import torch.nn.functional as F  # noqa: N812 (the field's own abbreviation)
from jaxtyping import Float, Shaped
from timm.models import adapt_input_conv
from torch import Tensor, nn

from anomalymatch.backbones.fuse_batch_norm import fold_batch_norms
from anomalymatch.backbones.side_by_side import SEPARATOR, SideBySide, Statistics, feature_width
from anomalymatch.backbones.stages import stage_statistics, stage_width, stages_of
from anomalymatch.backbones.test_time_views import check_looks, looks
from anomalymatch.backbones.weights import load_weights, pretrained_config
from anomalymatch.errors import ConfigError


@dataclass(frozen=True)
class NetworkSpec:
    """All that is needed to build the same network again; stored beside every checkpoint."""

    name: str
    channels: int
    image_size: int
    bn_momentum: float | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    weights: str
    # Older checkpoints know nothing of what follows.
    stages: bool = False
    orientations: int = 1
    crops: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


class Backbone(nn.Module):
    """A timm model without classifier, fed with raw 8-bit images.

    Normalising inside the module means that a checkpoint carries it, and that no caller can forget it.

    Args:
        body: the timm model.
        mean, std: of the pixels that it was trained on, by channel, 1 being white.
        stage_features: how many its stages have (see `stage_statistics`), which are put out, too; 0 for none of them.
        orientations: over how many of them the features are averaged when predicting (see `models.looks`).
        crops: how many are averaged with the whole image, too.
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
    ) -> None:
        super().__init__()
        self.body, self.stage_features = body, stage_features
        self.orientations, self.crops, self.averages = orientations, crops, True
        self.shortcut: Callable[[Tensor], Tensor] | None = None
        self.features = feature_width(body)
        self._stages = stages_of(body) if stage_features else {}
        self.register_buffer("mean", torch.as_tensor(mean).view(1, -1, 1, 1) * 255.0)
        self.register_buffer("std", torch.as_tensor(std).view(1, -1, 1, 1) * 255.0)

    def forward(self, images: Shaped[Tensor, "b c h w"]) -> Float[Tensor, "b d"]:
        """Pooled features of 8-bit images (values 0 to 255, any dtype), then those of the stages.

        In training mode, and while `averages` is off, images are seen as they are: augmentation turns them there.
        A `shortcut` to the same features serves for that (see `models.frozen_stages`).
        """
        if self.training or not self.averages:
            return self._seen(self.normalise(images)) if self.shortcut is None else self.shortcut(images)
        seen = [self._seen(look) for look in looks(self.normalise(images), self.orientations, self.crops)]
        return torch.stack(seen).mean(dim=0)

    def normalise(self, images: Shaped[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """8-bit images in units of the deviation from what the body was trained on."""
        return (images.to(self.mean.dtype) - self.mean) / self.std

    def _seen(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d"]:
        if not self._stages:
            return self.body(images)
        body = cast(Any, self.body)
        final, maps = body.forward_intermediates(images, **self._stages)
        return torch.cat([body.forward_head(final).float(), stage_statistics(maps)], dim=1)

    def like(self, body: nn.Module, *, stages: bool) -> "Backbone":
        """The same body or a copy of it behind the same normalisation."""
        mean, std = self.mean.flatten() / 255.0, self.std.flatten() / 255.0
        width = self.stage_features if stages else 0
        return Backbone(body, mean, std, stage_features=width, orientations=self.orientations, crops=self.crops)

    def folded(self) -> "Backbone":
        """A copy with its batch norms folded into the convolutions: for predicting only, and faster at it."""
        return self.like(fold_batch_norms(self.body), stages=True).eval()


class Head(nn.Module):
    """Linear two-class head on the features, L2-normalised or as they are.

    Normalised features are what the probe is fitted on, so its solution can be copied in exactly.

    Args:
        features: of the last layer.
        stage_features: further ones, which come normalised.
        normalised: whether those of the last layer are normalised here.
        generator: of the initial weights.
    """

    def __init__(
        self, features: int, *, normalised: bool, stage_features: int = 0, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        self.features, self.stage_features, self.normalised = features, stage_features, normalised
        self.linear = nn.utils.skip_init(nn.Linear, features + stage_features, 2)
        self.reset_parameters(generator)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """A cold start: logits near zero, so that no image passes the pseudo-label cut at step 0.

        timm's own initialisation of a two-class head is about 25 times wider; every image would pass at once
        with a random label.
        """
        bound = self.linear.in_features**-0.5
        with torch.no_grad():
            self.linear.weight.uniform_(-bound, bound, generator=generator)
            self.linear.bias.zero_()

    def set_probe(self, coefficients: Float[Tensor, " d"], intercept: float) -> None:
        """Copy a logistic regression in: softmax over the two logits equals its sigmoid."""
        half = coefficients.to(self.linear.weight) / 2
        with torch.no_grad():
            self.linear.weight.copy_(torch.stack([-half, half]))
            self.linear.bias.copy_(torch.tensor([-intercept / 2, intercept / 2]))

    def forward(self, features: Float[Tensor, "b d"]) -> Float[Tensor, "b 2"]:
        """Logits of (normal, anomaly), in single precision: in bf16 many images of a large archive would tie."""
        device, features = features.device.type, features.to(self.linear.weight)
        if not torch.is_autocast_enabled(device):  # what is exported knows no autocast
            return self._logits(features)
        with torch.autocast(device, enabled=False):
            return self._logits(features)

    def _logits(self, features: Float[Tensor, "b d"]) -> Float[Tensor, "b 2"]:
        if not self.normalised:
            return self.linear(features)
        last, stages = features.split([self.features, self.stage_features], dim=-1)
        return self.linear(torch.cat([F.normalize(last, dim=-1), stages], dim=-1))


class Network(nn.Module):
    """Backbone and head: 8-bit images in, logits of (normal, anomaly) out."""

    def __init__(self, spec: NetworkSpec, backbone: Backbone, head: Head) -> None:
        super().__init__()
        self.spec = spec
        self.backbone = backbone
        self.head = head

    def forward(self, images: Shaped[Tensor, "b c h w"]) -> Float[Tensor, "b 2"]:
        """Logits of (normal, anomaly)."""
        return self.head(self.backbone(images))

    def folded(self) -> "Network":
        """See `Backbone.folded`."""
        return Network(self.spec, self.backbone.folded(), copy.deepcopy(self.head))


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
) -> tuple[NetworkSpec, Backbone]:
    """Build a timm backbone with pretrained weights for any number of channels.

    Args:
        name: any timm model name; `tf_efficientnet_lite0` is the paper's. Several with a plus between them stand side
            by side (see `models.side_by_side`), and have no stages to look into.
        weights: see `models.weights.load_weights`.
        channels: channels of the images; the first convolution is adapted as timm does it (three summed into one,
            or repeated and rescaled).
        image_size: side of the square input, in pixels.
        bn_momentum: momentum of every batch norm; None keeps the model's own.
        stages: whether the features of the stages are put out, too; a model without such goes without.
        orientations: 1, 2, 4 or 8, over which the features are averaged when predicting (see `models.looks`).
        crops: 0, 1 or 5, which are averaged with the whole image, too.

    Raises:
        ConfigError: if timm does not know the name, or a value is out of range.
        DownloadError: if the weights are not at hand.
    """
    if image_size < 16:
        raise ConfigError(f"model.image_size is {image_size}: it must be at least 16 pixels")
    check_looks(orientations, crops)
    donors = [_donor(each, image_size) for each in name.split(SEPARATOR)]
    origins = [load_weights(donor, weights) for donor in donors]
    statistics = [_statistics(pretrained_config(donor), channels) for donor in donors]
    mean, std = statistics[0] if len(donors) == 1 else ((0.0,) * channels, (1.0,) * channels)
    origin = ", ".join(dict.fromkeys(origins))
    spec = NetworkSpec(name, channels, image_size, bn_momentum, mean, std, origin, stages, orientations, crops)
    backbone = empty_backbone(spec)
    bodies: Iterable[nn.Module] = [backbone.body]
    if isinstance(backbone.body, SideBySide):
        backbone.body.set_statistics(statistics)
        bodies = backbone.body.models
    for donor, body in zip(donors, bodies, strict=True):
        _transplant(donor, body, channels)
    return spec, backbone


def empty_backbone(spec: NetworkSpec) -> Backbone:
    """The architecture of `spec` with untrained weights, ready for a checkpoint to be loaded into it."""
    bodies = [
        _create(name, channels=spec.channels, image_size=spec.image_size, classifier=False)
        for name in spec.name.split(SEPARATOR)
    ]
    body = bodies[0] if len(bodies) == 1 else SideBySide(bodies, spec.channels)
    if spec.bn_momentum is not None:
        for module in body.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.momentum = spec.bn_momentum
    width = stage_width(body, spec.channels, spec.image_size) if spec.stages else 0
    return Backbone(
        body, spec.mean, spec.std, stage_features=width, orientations=spec.orientations, crops=spec.crops
    ).to(memory_format=torch.channels_last)


def _donor(name: str, image_size: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)  # without pretrained weights too, the same name gives the same network
        return _create(name, channels=3, image_size=image_size, classifier=True)


def _create(name: str, *, channels: int, image_size: int, classifier: bool) -> nn.Module:
    if not timm.is_model(name):
        raise ConfigError(f"timm has no model {name!r}{_nearest(name, timm.list_models())}")
    options: dict[str, Any] = {"in_chans": channels} | ({} if classifier else {"num_classes": 0})
    try:  # transformers need to know the size, convolutional networks refuse to be told
        return timm.create_model(name, pretrained=False, img_size=image_size, **options)
    except TypeError:
        return timm.create_model(name, pretrained=False, **options)
    except RuntimeError as error:
        architecture, _, tag = name.partition(".")
        known = timm.list_pretrained(f"{architecture}.*")
        if not tag or name in known:
            raise
        raise ConfigError(f"timm has no weights {tag!r} of {architecture}{_nearest(name, known)}") from error


def _nearest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"; did you mean {', '.join(close)}?" if close else ": timm.list_models() gives all names"


def _statistics(config: dict[str, Any], channels: int) -> Statistics:
    mean, std = tuple(config["mean"]), tuple(config["std"])
    if channels == len(mean):
        return mean, std
    return (sum(mean) / len(mean),) * channels, (sum(std) / len(std),) * channels


def _transplant(donor: nn.Module, body: nn.Module, channels: int) -> None:
    weights = donor.state_dict()
    if channels != 3:
        first = pretrained_config(donor)["first_conv"]
        for name in [first] if isinstance(first, str) else first:
            weights[f"{name}.weight"] = adapt_input_conv(channels, weights[f"{name}.weight"])
    missing = body.load_state_dict({k: v for k, v in weights.items() if k in body.state_dict()}, strict=False)
    if missing.missing_keys:
        raise ConfigError(f"the pretrained weights lack {missing.missing_keys[:3]}")
