"""Refit of the head after a training: a probe on the fine-tuned features."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float32

from anomalymatch.algorithms.probe.regression import ProbeSpec, self_train
from anomalymatch.backbones.embedding import Embedding
from anomalymatch.backbones.features import normalise_last
from anomalymatch.backbones.network import Network
from anomalymatch.backbones.tta import reoriented
from anomalymatch.checks import check_range
from anomalymatch.data.labels import ids_labelled
from anomalymatch.data.stream import stream
from anomalymatch.ranking import Ranking
from anomalymatch.types import Label


def refit_spec(spec: ProbeSpec, confidence: float | None) -> ProbeSpec:
    """Return the hyper-parameters of the new probe: those of the first with another confidence.

    Args:
        spec: hyper-parameters of the first probe.
        confidence: probability from which an unlabelled image is pseudo-labelled; None uses the labels alone.

    Raises:
        ConfigError: if it is out of range.
    """
    check_range("algorithm.learner.refit_confidence", confidence, low=0.5, below=1, null=True)
    return replace(spec, rounds=0) if confidence is None else replace(spec, confidence=confidence)


def refit_head(
    network: Network,
    embedding: Embedding,
    labels: Mapping[str, str],
    spec: ProbeSpec,
    candidates: Ranking | None = None,
) -> float:
    """Replace the head of `network` by a probe on its features, in place.

    The head stays if no image of a class can be read, or if a diverged training left features that are not finite.

    Where anomalies are rare, many pseudo-labels are wrong. The features improve nevertheless, as they adapt to the
    archive, but a head that was trained on the pseudo-labels has learnt their mistakes.

    Args:
        network: network with a head on normalised features.
        embedding: the images and the backbone that the network was made from.
        labels: label by image id; images that cannot be read are left out.
        spec: hyper-parameters of the probe.
        candidates: unlabelled images for self-training, with the log-odds of a probe on the pretrained features: the
            mean of these and the new probe's must be confident. None uses the labels alone.

    Returns:
        The average precision of the labelled images by cross-validation of the probe, NaN if it is unknown. The
        features have seen the labels: a low value shows that they were damaged, a high value alone proves nothing.
    """
    backbone, scaling = network.backbone, embedding.probe_features.scaling
    size, inference = embedding.image_size, embedding.inference
    unlabelled = candidates.ids if candidates is not None and spec.rounds else []
    forward = inference.prepare(backbone, size=size, count=len(labels) + len(unlabelled))
    batch_size = inference.batch_size(size)

    def features(
        ids: Sequence[str], orientations: Iterable[int] = (0,)
    ) -> tuple[list[str], Float32[np.ndarray, "n d"]]:
        """Compute the features of all readable images in some orientations."""
        readable: list[str] = []
        rows = [np.empty((0, backbone.features + backbone.stage_features), np.float32)]
        for batch in stream(embedding.source, ids, size=size, batch_size=batch_size, workers=inference.workers):
            readable += batch.ids
            rows += [forward(reoriented(batch.images, i)) for i in orientations if batch.ids]
        return readable, normalise_last(np.concatenate(rows), backbone.features)

    rare, anomalies = features(ids_labelled(labels, Label.ANOMALY))
    _, normals = features(ids_labelled(labels, Label.NORMAL))
    if not len(anomalies) or not len(normals) or not np.isfinite([anomalies.sum(), normals.sum()]).all():
        return math.nan
    _, mirrored = features(rare, range(1, spec.orientations))
    ids, pool = features(unlabelled)
    before = None if candidates is None else candidates.restrict(ids).logits
    fit = self_train(anomalies, normals, pool, spec, scaling, turned=mirrored, second=before)
    network.head.set_probe(torch.from_numpy(fit.probe.coefficients), fit.probe.intercept)
    return fit.average_precision
