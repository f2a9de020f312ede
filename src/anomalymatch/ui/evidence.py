"""Large view with a heat map of the evidence for the score of the image."""

from collections.abc import Callable
from functools import lru_cache, partial

import numpy as np
from jaxtyping import Float32

from anomalymatch.active.run_folder import RunReader
from anomalymatch.algorithms.base import WEIGHTS
from anomalymatch.algorithms.probe.regression import Probe
from anomalymatch.backbones.checkpoint import load_network
from anomalymatch.backbones.evidence import evidence_map
from anomalymatch.errors import LabelError, StorageError
from anomalymatch.evaluation.heat_maps import overlay, scale_evidence
from anomalymatch.types import Image
from anomalymatch.ui.pictures import AS_TRAINED, Pictures, png

LocateEvidence = Callable[[Probe, Image], Float32[np.ndarray, "s s"]]
"""Computes the evidence for a probe on the features of the archive in an image, see `Evidence.local`."""


class HeatMaps:
    """Heat maps of the evidence for the live ranking, or for a training.

    Args:
        pictures: pictures of the images.
        fitted: returns the probe of the live ranking, on the features of the backbone; None before the first.
        reader: the run folder, with the trained networks.
        locate: computes the evidence for a probe.
    """

    def __init__(
        self, pictures: Pictures, fitted: Callable[[], Probe | None], reader: RunReader, locate: LocateEvidence
    ) -> None:
        self.pictures, self.fitted, self.locate = pictures, fitted, locate
        self._network = lru_cache(maxsize=1)(lambda cycle: load_network(reader.cycle(cycle) / WEIGHTS))

    def picture(
        self, id_: str, *, stretch: str = AS_TRAINED, channel: str | None = None, cycle: int | None = None
    ) -> bytes:
        """Return the PNG of `Pictures.full` with a heat map.

        Args:
            id_: the image.
            stretch: see `Pictures.full`.
            channel: see `Pictures.full`.
            cycle: number of the training; None for the live ranking.

        Raises:
            LabelError: if there is no ranking by a probe or network yet.
            ConfigError: if the backbone gives no feature maps.
        """
        fit = self.pictures.source.rendering.fit
        locate: Callable[[Image], Float32[np.ndarray, "s s"]]
        if cycle is not None:
            try:
                locate = partial(evidence_map, self._network(cycle), fit=fit)
            except StorageError as error:
                raise LabelError(f"there is no heat map of training {cycle}: it has no network that scores") from error
        elif (probe := self.fitted()) is None:
            raise LabelError("there is no heat map yet: label an anomaly first")
        else:
            locate = partial(self.locate, probe)
        heat = scale_evidence(locate(self.pictures.image(id_)))
        return png(overlay(self.pictures.image(id_, stretch=stretch, channel=channel), heat, fit))
