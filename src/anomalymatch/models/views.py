"""What a probe sees of the images of an archive: the features of the last layer, and those of all stages."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float32

from anomalymatch.models.features import Features

SAMPLE = 4096
"""Images from which the spread of a feature is measured."""
CONSTANT = 1e-4
"""Spread below which a feature says nothing but how half precision rounds."""


@dataclass(frozen=True)
class Scaling:
    """Which columns belong together, and by what each is multiplied before a probe is fitted.

    Attributes:
        parts: the columns of each view.
        scale: of each of the `d` columns; a row of a view, its mean subtracted, has length one or less on average.
    """

    parts: tuple[slice, ...]
    scale: Float32[np.ndarray, " d"]

    @classmethod
    def plain(cls, dimensions: int) -> "Scaling":
        """One view, as it is."""
        return cls((slice(0, dimensions),), np.ones(dimensions, np.float32))


@dataclass(frozen=True)
class Views:
    """Features of the last layer, and those of the stages behind them.

    Attributes:
        features: all columns.
        width: columns of the last layer.
    """

    features: Features
    width: int

    @cached_property
    def last(self) -> Features:
        """Of the last layer: by these, images are alike or not."""
        return self.features.columns(slice(0, self.width)) if self.stage_width else self.features

    @cached_property
    def stages(self) -> Features:
        """Of the stages."""
        return self.features.columns(slice(self.width, None))

    @property
    def stage_width(self) -> int:
        """Columns of the stages; 0 if there are none."""
        return self.features.dimensions - self.width

    @cached_property
    def scaling(self) -> Scaling:
        """The last layer as it is; a feature of a stage by the inverse square root of its spread over the archive.

        That is half way to equal spreads: a channel that hardly varies neither drowns nor is blown up.
        """
        if not self.stage_width:
            return Scaling.plain(self.width)
        step = max(1, sum(len(shard.ids) for shard in self.stages.shards) // SAMPLE)
        sample = np.concatenate([shard.rows[::step] for shard in self.stages.shards]).astype(np.float32)
        spread = sample.std(axis=0) if len(sample) else np.zeros(self.stage_width, np.float32)
        varies = spread > CONSTANT
        scale = np.zeros(self.stage_width, np.float32)
        scale[varies] = 1.0 / np.sqrt(spread[varies] * spread[varies].sum())
        parts = slice(0, self.width), slice(self.width, self.features.dimensions)
        return Scaling(parts, np.concatenate([np.ones(self.width, np.float32), scale]))
