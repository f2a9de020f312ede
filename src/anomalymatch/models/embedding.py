"""A frozen pretrained backbone and the features it gives: what every algorithm starts from."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float32, UInt8
from torch import Tensor

from anomalymatch.data.source import ImageSource
from anomalymatch.data.stream import resize, to_tensor
from anomalymatch.models.features import FeatureCache, Features
from anomalymatch.models.inference import Inference
from anomalymatch.models.network import Backbone, Head, Network, NetworkSpec, build_backbone
from anomalymatch.types import Image


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
        return self.find_features()

    def find_features(self) -> Features:
        """As `features`, for those who will not keep them: they are mapped into memory, and not kept here."""
        return self._cache.features(self.source, *self._built)

    @property
    def features_folder(self) -> Path:
        """Where they are kept."""
        return self._cache.folder / self._cache.key(self.source, *self._built)

    @property
    def _cache(self) -> FeatureCache:
        return FeatureCache(Path(self.cache_dir) / "features", self.inference)

    def encode(self, images: Sequence[Image]) -> Float32[np.ndarray, "n d"]:
        """Features of images that are not in the source, L2-normalised as those of the source are."""
        batch = to_tensor([resize(image, self.image_size) for image in images])
        rows = self._forward(batch)
        return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)

    @cached_property
    def _forward(self) -> Callable[[UInt8[Tensor, "b c h w"]], Float32[np.ndarray, "b d"]]:
        return self.inference.prepared(self._built[1])

    def backbone(self) -> Backbone:
        """A copy of the pretrained backbone; it may be trained freely."""
        return copy.deepcopy(self._built[1])

    def network(self, *, normalised: bool, generator: torch.Generator | None = None) -> Network:
        """A new network with the pretrained backbone and a cold head; it may be trained freely."""
        backbone = self.backbone()
        return Network(self.spec, backbone, Head(backbone.features, normalised=normalised, generator=generator))
