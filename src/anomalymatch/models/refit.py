"""After a backbone has learnt, its head anew: the probe of the labels alone, on the features as they are now."""

import math
from collections.abc import Iterable, Mapping

import numpy as np
import torch
from jaxtyping import Float32

from anomalymatch.data.labels import ids_labelled
from anomalymatch.data.stream import stream
from anomalymatch.models.embedding import Embedding
from anomalymatch.models.features import with_unit_last
from anomalymatch.models.network import Network
from anomalymatch.models.orientations import turned
from anomalymatch.models.probe import ProbeSpec, fit_probe, out_of_fold_ap, trusted
from anomalymatch.types import Label

Rows = Float32[np.ndarray, "n d"]


def refit_head(network: Network, embedding: Embedding, labels: Mapping[str, str], spec: ProbeSpec) -> float:
    """Set the head of `network` to a probe, in place.

    It stays where no image of a class can be read, and where a training went so wrong that features are not finite.

    Where anomalies are rare, many pseudo-labels are wrong. The features gain by them all the same, for they move to
    the archive at hand; but a head that has learnt them by heart ranks by them.

    Args:
        network: with a head on normalised features.
        embedding: where it came from, with the images.
        labels: those whose images cannot be read are left out.
        spec: how the probe is fitted; it does not train itself here.

    Returns:
        The average precision of the labelled images, each ranked by a probe that has not seen it. Their features have:
        a low one tells of features that were spoilt, a high one alone does not tell of good ones. NaN if there is none.
    """
    backbone, c = network.backbone, spec.inverse_regularisation
    size = embedding.image_size
    forward = embedding.inference.prepared(backbone, size=size, count=len(labels))
    at_once = embedding.inference.batch_size(size)

    def features(kind: Label, orientations: Iterable[int]) -> Rows:
        """Of the readable images, in these orientations."""
        rows = [np.empty((0, backbone.features + backbone.stage_features), np.float32)]
        for batch in stream(embedding.source, ids_labelled(labels, kind), size=size, batch_size=at_once, workers=1):
            rows += [forward(turned(batch.images, i)) for i in orientations if batch.ids]
        return with_unit_last(np.concatenate(rows), backbone.features)

    anomalies, normals = (features(kind, range(1)) for kind in (Label.ANOMALY, Label.NORMAL))
    if not len(anomalies) or not len(normals) or not np.isfinite([anomalies.sum(), normals.sum()]).all():
        return math.nan
    views = np.concatenate([anomalies, features(Label.ANOMALY, range(1, spec.orientations))])
    gain = trusted(anomalies, normals, embedding.views.scaling, inverse_regularisation=c)
    probe = fit_probe(views, normals, inverse_regularisation=c, gain=gain, share=len(anomalies) / len(views))
    network.head.set_probe(torch.from_numpy(probe.coefficients), probe.intercept)
    return out_of_fold_ap(anomalies, normals, inverse_regularisation=c, gain=gain)
