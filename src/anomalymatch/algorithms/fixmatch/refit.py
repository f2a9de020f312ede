"""After a backbone has learnt, its head anew: a probe on the features as they are now."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float32

from anomalymatch.algorithms.probe.regression import (
    ProbeSpec,
    check_confidence,
    column_gain,
    out_of_fold_ap,
    self_train,
)
from anomalymatch.backbones.embedding import Embedding
from anomalymatch.backbones.features import normalise_last
from anomalymatch.backbones.network import Network
from anomalymatch.backbones.tta import reoriented
from anomalymatch.data.labels import ids_labelled
from anomalymatch.data.stream import stream
from anomalymatch.ranking import Ranking
from anomalymatch.types import Label

Rows = Float32[np.ndarray, "n d"]


def refit_spec(spec: ProbeSpec, confidence: float | None) -> ProbeSpec:
    """How the new probe is fitted: as the first one, but sure of what teaches it by another cut.

    Args:
        spec: how the first one is.
        confidence: probability from which an unlabelled image is supposed to be an anomaly; None for the labels alone.

    Raises:
        ConfigError: if it is no such probability.
    """
    if confidence is None:
        return replace(spec, rounds=0)
    check_confidence("algorithm.learner.refit_confidence", confidence)
    return replace(spec, confidence=confidence)


def refit_head(
    network: Network,
    embedding: Embedding,
    labels: Mapping[str, str],
    spec: ProbeSpec,
    likely: Ranking | None = None,
) -> float:
    """Set the head of `network` to a probe, in place.

    It stays where no image of a class can be read, and where a training went so wrong that features are not finite.

    Where anomalies are rare, many pseudo-labels are wrong. The features gain by them all the same, for they move to
    the archive at hand; but a head that has learnt them by heart ranks by them.

    Args:
        network: with a head on normalised features.
        embedding: where it came from, with the images.
        labels: those whose images cannot be read are left out.
        spec: how the probe is fitted.
        likely: unlabelled images that may teach it, too, with the log-odds of a probe on the features from before the
            training: by the mean of these and its own, the probe has to be sure of them. None for the labels alone.

    Returns:
        The average precision of the labelled images, each ranked by a probe that has not seen it. Their features have:
        a low one tells of features that were spoilt, a high one alone does not tell of good ones. NaN if there is none.
    """
    backbone, c, scaling = network.backbone, spec.inverse_regularisation, embedding.probe_features.scaling
    size, inference = embedding.image_size, embedding.inference
    unlabelled = likely.ids if likely is not None and spec.rounds else []
    forward = inference.prepare(backbone, size=size, count=len(labels) + len(unlabelled))
    at_once = inference.batch_size(size)

    def features(ids: Sequence[str], orientations: Iterable[int] = (0,)) -> tuple[list[str], Rows]:
        """Which images are readable, and theirs in these orientations."""
        readable: list[str] = []
        rows = [np.empty((0, backbone.features + backbone.stage_features), np.float32)]
        for batch in stream(embedding.source, ids, size=size, batch_size=at_once, workers=inference.workers):
            readable += batch.ids
            rows += [forward(reoriented(batch.images, i)) for i in orientations if batch.ids]
        return readable, normalise_last(np.concatenate(rows), backbone.features)

    rare, anomalies = features(ids_labelled(labels, Label.ANOMALY))
    _, normals = features(ids_labelled(labels, Label.NORMAL))
    if not len(anomalies) or not len(normals) or not np.isfinite([anomalies.sum(), normals.sum()]).all():
        return math.nan
    _, mirrored = features(rare, range(1, spec.orientations))
    ids, pool = features(unlabelled)
    before = None if likely is None else likely.restrict(ids).logits
    probe = self_train(anomalies, normals, pool, spec, scaling, turned=mirrored, second=before)
    network.head.set_probe(torch.from_numpy(probe.coefficients), probe.intercept)
    gain = column_gain(anomalies, normals, scaling, inverse_regularisation=c)
    return out_of_fold_ap(anomalies, normals, inverse_regularisation=c, gain=gain)
