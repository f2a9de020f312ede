"""A frozen pretrained backbone and the features it gives: what every algorithm starts from."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float32

from anomalymatch.backbones.features import FeatureCache, Features, Views, with_unit_last
from anomalymatch.backbones.inference import Inference
from anomalymatch.backbones.network import Backbone, Head, Network, NetworkSpec, build_backbone
from anomalymatch.backbones.openvino import Forward
from anomalymatch.backbones.test_time_views import turned
from anomalymatch.data.source import ImageSource
from anomalymatch.data.stream import resize, to_tensor
from anomalymatch.types import Image, Reject


@dataclass(frozen=True)
class Embedding:
    """How images become features.

    Attributes:
        name: any timm model name, or several with a plus between them (see `models.side_by_side`).
        weights: `auto`, `hub`, `bundled`, `none` or a path (see `models.weights.load_weights`).
        image_size: side to which images are resized, in pixels.
        bn_momentum: momentum of every batch norm while training; None keeps the model's own.
        source: the images.
        cache_dir: folder of the feature cache.
        inference: device, precision and batch size.
        stages: whether a probe sees features of the earlier stages, too (see `Backbone.forward`).
        orientations: over how many of them the features of an image are averaged (see `models.looks`).
        crops: how many are averaged with the whole image, too.
    """

    name: str
    weights: str
    image_size: int
    bn_momentum: float | None
    source: ImageSource
    cache_dir: Path
    inference: Inference
    stages: bool = False
    orientations: int = 1
    crops: int = 0

    @cached_property
    def _built(self) -> tuple[NetworkSpec, Backbone]:
        return build_backbone(
            name=self.name,
            weights=self.weights,
            channels=self.source.channels,
            image_size=self.image_size,
            bn_momentum=self.bn_momentum,
            stages=self.stages,
            orientations=self.orientations,
            crops=self.crops,
        )

    @property
    def spec(self) -> NetworkSpec:
        """Description of the backbone."""
        return self._built[0]

    @cached_property
    def features(self) -> Features:
        """Pooled features of all images of the source, from the cache or computed now: by these they are compared."""
        return self.views.last

    @cached_property
    def views(self) -> Views:
        """All that a probe sees of the images of the source, from the cache or computed now."""
        return self.find_views()

    def find_views(self) -> Views:
        """As `views`, for those who will not keep them: they are mapped into memory, and not kept here."""
        return Views(self._cache.features(self.source, *self._built), self._built[1].features)

    @property
    def features_folder(self) -> Path:
        """Where they are kept."""
        return self._cache.folder / self._cache.key(self.source, *self._built)

    @property
    def _cache(self) -> FeatureCache:
        return FeatureCache(Path(self.cache_dir) / "features", self.inference)

    def encode(self, images: Sequence[Image]) -> Float32[np.ndarray, "n d"]:
        """What a probe sees of images that are not in the source, as `views` has it of those of the source."""
        batch = to_tensor([resize(image, self.image_size) for image in images])
        return with_unit_last(self._forward(batch), self._built[1].features)

    def other_views(self, ids: Sequence[str], orientations: int) -> Float32[np.ndarray, "v d"]:
        """What a probe sees of images of the source when they are mirrored and turned, without how they are.

        An image is computed once, and left out when it can no longer be read.

        Args:
            ids: the images.
            orientations: how many views of each there are with the one in `views` (see `models.orientations.turned`).
        """
        wanted = ids if orientations > 1 else []
        missing = [id_ for id_ in dict.fromkeys(wanted) if (id_, orientations) not in self._turned]
        images = self.source.read(missing) if missing else []
        for id_, image in zip(missing, images, strict=True):
            if not isinstance(image, Reject):
                batch = to_tensor([resize(image, self.image_size)])
                turns = torch.cat([turned(batch, i) for i in range(1, orientations)])
                self._turned[id_, orientations] = with_unit_last(self._forward(turns), self._built[1].features)
        rows = [self._turned[id_, orientations] for id_ in wanted if (id_, orientations) in self._turned]
        width = self._built[1].features + self._built[1].stage_features
        return np.concatenate([np.empty((0, width), np.float32), *rows])

    @cached_property
    def _turned(self) -> dict[tuple[str, int], Float32[np.ndarray, "v d"]]:
        return {}

    @cached_property
    def _forward(self) -> Forward:
        return self.inference.prepared(self._built[1], size=self.image_size, count=1)

    def backbone(self) -> Backbone:
        """A copy of the pretrained backbone, without a look into its stages; it may be trained freely."""
        backbone = self._built[1]
        return backbone.like(copy.deepcopy(backbone.body), stages=False)

    def network(self, *, normalised: bool, generator: torch.Generator | None = None) -> Network:
        """A new network with the pretrained backbone and a cold head; it may be trained freely.

        Args:
            normalised: whether the head sees what a probe sees; if not, the features of the last layer as they are.
            generator: of the head's weights; None for one of its own, so that the caller's is left alone.
        """
        spec = replace(self.spec, stages=self.stages and normalised)
        backbone = self._built[1].like(copy.deepcopy(self._built[1].body), stages=spec.stages)
        head = Head(
            backbone.features,
            normalised=normalised,
            stage_features=backbone.stage_features,
            generator=generator or torch.Generator(),
        )
        return Network(spec, backbone, head)
