"""A frozen pretrained backbone and the features it gives: what every algorithm starts from."""

import copy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from anomalymatch.data.source import ImageSource
from anomalymatch.models.features import FeatureCache, Features
from anomalymatch.models.inference import Inference
from anomalymatch.models.network import Backbone, Head, Network, NetworkSpec, build_backbone


@dataclass(frozen=True)
class Embedding:
    """How images become features.

    Attributes:
        name: any timm model name.
        weights: `auto`, `hub`, `bundled`, `none` or a path (see `models.weights.load_weights`).
        image_size: side to which images are resized, in pixels.
        bn_momentum: momentum of every batch norm while training; None keeps the model's own.
        source: the images.
        cache_dir: folder of the feature cache.
        inference: device, precision and batch size.
    """

    name: str
    weights: str
    image_size: int
    bn_momentum: float | None
    source: ImageSource
    cache_dir: Path
    inference: Inference

    @cached_property
    def _built(self) -> tuple[NetworkSpec, Backbone]:
        return build_backbone(
            name=self.name,
            weights=self.weights,
            channels=self.source.channels,
            image_size=self.image_size,
            bn_momentum=self.bn_momentum,
        )

    @property
    def spec(self) -> NetworkSpec:
        """Description of the backbone."""
        return self._built[0]

    @cached_property
    def features(self) -> Features:
        """Pooled features of all images of the source, from the cache or computed now."""
        return FeatureCache(Path(self.cache_dir) / "features", self.inference).features(self.source, *self._built)

    def network(self, *, normalised: bool, generator: torch.Generator | None = None) -> Network:
        """A new network with the pretrained backbone and a cold head; it may be trained freely."""
        spec, backbone = self._built[0], copy.deepcopy(self._built[1])
        return Network(spec, backbone, Head(backbone.features, normalised=normalised, generator=generator))
