"""After a backbone has learnt, its head anew: the probe of the labels alone, on the features as they are now."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float32

from anomalymatch.data.labels import ids_labelled
from anomalymatch.data.stream import stream
from anomalymatch.models.embedding import Embedding
from anomalymatch.models.features import with_unit_last
from anomalymatch.models.network import Network
from anomalymatch.models.orientations import turned
from anomalymatch.models.probe import ProbeSpec, fit_probe, trusted
from anomalymatch.types import Label

Rows = Float32[np.ndarray, "n d"]


def refit_head(network: Network, embedding: Embedding, labels: Mapping[str, str], spec: ProbeSpec) -> None:
    """Set the head of `network` to a probe, in place.

    Where anomalies are rare, many pseudo-labels are wrong. The features gain by them all the same, for they move to
    the archive at hand; but a head that has learnt them by heart ranks by them.

    Args:
        network: with a head on normalised features.
        embedding: where it came from, with the images.
        labels: those whose images cannot be read are left out.
        spec: how the probe is fitted; it does not train itself here.
    """
    sides = (ids_labelled(labels, label) for label in (Label.ANOMALY, Label.NORMAL))
    anomalies, normals = (_features(network, embedding, ids, orientations=range(1)) for ids in sides)
    if not len(anomalies) or not len(normals):
        return
    other = range(1, spec.orientations)
    turns = _features(network, embedding, ids_labelled(labels, Label.ANOMALY), orientations=other)
    views, c = np.concatenate([anomalies, turns]), spec.inverse_regularisation
    gain = trusted(anomalies, normals, embedding.views.scaling, inverse_regularisation=c)
    probe = fit_probe(views, normals, inverse_regularisation=c, gain=gain, share=len(anomalies) / len(views))
    network.head.set_probe(torch.from_numpy(probe.coefficients), probe.intercept)


def _features(network: Network, embedding: Embedding, ids: Sequence[str], *, orientations: Iterable[int]) -> Rows:
    """Of the readable images, in these orientations."""
    backbone, inference, size = network.backbone, embedding.inference, embedding.image_size
    forward = inference.prepared(backbone)
    rows = [np.empty((0, backbone.features + backbone.stage_features), np.float32)]
    for batch in stream(embedding.source, ids, size=size, batch_size=inference.batch_size(size), workers=1):
        rows += [forward(turned(batch.images, i)) for i in orientations if batch.ids]
    return with_unit_last(np.concatenate(rows), backbone.features)
