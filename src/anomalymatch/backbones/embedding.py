"""Frozen pretrained backbone of a task, and the features that it computes."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float32

from anomalymatch.backbones.features import FeatureCache, Features, Scaling, normalise_last
from anomalymatch.backbones.inference import Inference
from anomalymatch.backbones.network import Backbone, Head, Network, NetworkSpec, Statistic, build_backbone
from anomalymatch.backbones.openvino import Forward
from anomalymatch.backbones.tta import MAX_TILES, Tiling, reoriented
from anomalymatch.checks import check_choice
from anomalymatch.data.source import ImageSource
from anomalymatch.data.stream import none_readable, read_images, resize, to_tensor
from anomalymatch.progress import ShowProgress, progress
from anomalymatch.types import Image

REDUCTION = 2
"""Factor by which `model.tiles=auto` may shrink images along each side: details of twice as many pixels stay."""
SAMPLED = 16
"""Images whose sizes decide about `model.tiles=auto`."""


@dataclass(frozen=True)
class Embedding:
    """Backbone and source; features are computed on first use and cached on disk.

    Attributes:
        name, weights, image_size, bn_momentum, stages, orientations, crops, mean, std: see `build_backbone`. The images
            have the size `spec.input_size`.
        tiles: see `build_backbone`; `auto` takes as many as `fitting_tiles` of the images.
        source: the images.
        cache_dir: folder of the feature cache.
        inference: device, precision and batch size.
        pool: ids that learners learn from and rank unless they are given others; None for all of the source. A
            held-out split must not be among them.
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
    tiles: int | str = 1
    mean: Statistic = None
    std: Statistic = None
    pool: Sequence[str] | None = None

    @cached_property
    def _built(self) -> tuple[NetworkSpec, Backbone]:
        check_choice("model.tiles", self.tiles, ("auto", *range(1, MAX_TILES + 1)))
        tiles = fitting_tiles(self.source, self.image_size) if self.tiles == "auto" else int(self.tiles)
        return build_backbone(
            name=self.name,
            weights=self.weights,
            channels=self.source.channels,
            image_size=self.image_size,
            bn_momentum=self.bn_momentum,
            stages=self.stages,
            orientations=self.orientations,
            crops=self.crops,
            tiles=tiles,
            mean=self.mean,
            std=self.std,
        )

    @property
    def spec(self) -> NetworkSpec:
        """Description of the backbone."""
        return self._built[0]

    @cached_property
    def features(self) -> Features:
        """Features of the last layer for all images of the source: these measure the similarity of images."""
        return self.probe_features.last

    @property
    def default_ids(self) -> Sequence[str]:
        """The pool; all images of the source where there is none."""
        return self.source.ids if self.pool is None else self.pool

    @cached_property
    def scaling(self) -> Scaling:
        """Scaling of the probe features, measured on the pool alone."""
        return self.probe_features.scaling_on(self.probe_features.split(self.default_ids)[0])

    @cached_property
    def probe_features(self) -> Features:
        """Features on which a probe is fitted: the last layer, and the stages if `stages` is set."""
        return self.load_features()

    def load_features(
        self, show: ShowProgress = progress, on_part: Callable[[Features], None] | None = None
    ) -> Features:
        """Return `probe_features` without a reference to the memory-mapped files; see `FeatureCache.features`."""
        return self._cache.features(self.source, *self._built, show=show, on_part=on_part)

    @property
    def features_folder(self) -> Path:
        """Folder of the cached features."""
        return self._cache.folder / self._cache.key(self.source, *self._built)

    @property
    def _cache(self) -> FeatureCache:
        return FeatureCache(Path(self.cache_dir) / "features", self.inference)

    def encode(self, images: Sequence[Image]) -> Float32[np.ndarray, "n d"]:
        """Compute the probe features of images that are not in the source."""
        batch = to_tensor([resize(image, self.spec.input_size, self.source.rendering.fit) for image in images])
        return normalise_last(self._forward(batch), self._built[1].features)

    def reoriented_features(self, ids: Sequence[str], orientations: int) -> Float32[np.ndarray, "v d"]:
        """Compute the probe features of mirrored and turned images of the source, once for each image.

        There are `orientations` - 1 rows for each image, one image after the other: the first orientation, the image as
        it is (see `tta.reoriented`), is left out. An image that can no longer be read is taken as it is.
        """
        wanted = ids if orientations > 1 else []
        missing = [id_ for id_ in dict.fromkeys(wanted) if (id_, orientations) not in self._reoriented]
        if missing:
            found = read_images(self.source, missing, self.spec.input_size)
            for id_, image in zip(found.ids, found.images, strict=True):
                batch = to_tensor([resize(image, self.spec.input_size, self.source.rendering.fit)])
                turned = torch.cat([reoriented(batch, i) for i in range(1, orientations)])
                self._reoriented[id_, orientations] = normalise_last(self._forward(turned), self._built[1].features)
            for reject in found.rejects:
                own = self.probe_features.take([reject.id])
                self._reoriented[reject.id, orientations] = own.repeat(orientations - 1, axis=0)
        rows = [self._reoriented[id_, orientations] for id_ in wanted]
        return np.concatenate([np.empty((0, self._built[1].width), np.float32), *rows])

    @cached_property
    def _reoriented(self) -> dict[tuple[str, int], Float32[np.ndarray, "v d"]]:
        return {}

    @cached_property
    def _forward(self) -> Forward:
        return self._cache.forward(self.source, *self._built)

    def backbone(self) -> Backbone:
        """Return a copy of the pretrained backbone without stage features, which may be trained."""
        backbone = self._built[1]
        return backbone.with_body(copy.deepcopy(backbone.body), stages=False)

    def network(self, *, normalised: bool, generator: torch.Generator | None = None) -> Network:
        """Return a new network with a copy of the pretrained backbone and a new head, which may be trained.

        A `normalised` head gets the probe features, any other the features of the last layer as they are.
        """
        spec = replace(self.spec, stages=self.stages and normalised)
        backbone = self._built[1].with_body(copy.deepcopy(self._built[1].body), stages=spec.stages)
        head = Head(
            backbone.features,
            normalised=normalised,
            stage_features=backbone.stage_features,
            generator=generator or torch.Generator(),
        )
        return Network(spec, backbone, head)


def fitting_tiles(source: ImageSource, size: int) -> int:
    """Return the smallest number of tiles of `size` squared pixels that shrink a typical image by `REDUCTION` at most.

    That is 1 for images that are not larger than `REDUCTION` tiles. The typical image has the median of the longer
    sides of `SAMPLED` images, evenly spaced in the archive. With `fit=crop` the shorter sides count.

    Raises:
        NoReadableImageError: if none of them can be read.
    """
    found = read_images(source, source.ids[:: -(-len(source.ids) // SAMPLED)])
    if not found.images:
        raise none_readable(source, found.rejects)
    side = min if source.rendering.fit == "crop" else max
    typical = float(np.median([side(image.shape[:2]) for image in found.images]))
    fitting = (count for count in range(1, MAX_TILES) if REDUCTION * Tiling(count, size).side >= typical)
    return next(fitting, MAX_TILES)
