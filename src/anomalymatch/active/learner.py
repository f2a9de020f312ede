"""Learners: fit on a few labels, rank the rest. The loop, a notebook and the labelling page all speak to these."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import torch

from anomalymatch.active.steps import StepListener, ignore_step
from anomalymatch.data.labels import training_ids
from anomalymatch.errors import LabelError
from anomalymatch.functional.fixmatch import anomaly_logit
from anomalymatch.models.checkpoint import describe_input, load_network, save_network
from anomalymatch.models.embedding import Embedding
from anomalymatch.models.network import Network
from anomalymatch.models.probe import Probe, ProbeSpec, self_train
from anomalymatch.progress import Advance, ignore_progress
from anomalymatch.ranking import Ranking
from anomalymatch.types import Reject

Truth = Callable[[Sequence[str]], np.ndarray]
"""Whether each image is an anomaly, in a benchmark."""
WEIGHTS, NOVELTY, BACKBONE = "weights.safetensors", "novelty.safetensors", "backbone.safetensors"
"""What a cycle may hold: a network that scores, what was learnt of normal images, and a backbone by itself."""
POOL_IMAGES = 10_000
"""Unlabelled images that the probe looks at, about."""


@runtime_checkable
class Learner(Protocol):
    """What every algorithm offers."""

    needs_labels: bool
    """Whether it cannot be fitted without at least one anomaly and one normal."""
    on_step: StepListener
    """Called with the losses of every training step."""

    def fit(self, labels: Mapping[str, str], *, pool: Sequence[str] | None = None, cycle: int = 1) -> None:
        """Train.

        Args:
            labels: label by image id; unsure and artefact teach nothing.
            pool: unlabelled images to learn from, where the algorithm does; None means all of the source.
            cycle: number of this training; it only selects the random numbers.

        Raises:
            LabelError: if `needs_labels` and no image is labelled anomaly, or none normal.
        """
        ...

    def rank(self, ids: Sequence[str] | None = None) -> Ranking:
        """Score `ids` in this order, or all images of the source.

        Raises:
            DataError: if one of them is not in the source.
        """
        ...

    def save(self, folder: Path) -> None:
        """Write the weights, so that `restore` brings back this very state."""
        ...

    def restore(self, folder: Path) -> None:
        """Read what `save` wrote."""
        ...


class ProbeLearner:
    """Logistic regression on frozen features: milliseconds a round once the features are cached.

    Args:
        embedding: the backbone and the images.
        probe: how it is fitted.
        seed, truth: all learners are built alike; this one has no randomness and needs no truth.
    """

    needs_labels = True

    def __init__(self, embedding: Embedding, *, probe: ProbeSpec, seed: int = 0, truth: Truth | None = None) -> None:
        self.embedding, self.spec = embedding, probe
        self.on_step: StepListener = ignore_step
        self._probe: Probe | None = None

    def fit(self, labels: Mapping[str, str], *, pool: Sequence[str] | None = None, cycle: int = 1) -> None:
        """See `Learner.fit`."""
        self._probe = probe_of(self.embedding, labels, pool, self.spec)

    def rank(self, ids: Sequence[str] | None = None) -> Ranking:
        """See `Learner.rank`."""
        features, probe = self.embedding.views.features, self._fitted()
        logits = features.project(probe.coefficients) + probe.intercept
        if ids is None:
            return Ranking(features.ids, logits, features.rejects)
        reasons = {reject.id: reject for reject in features.rejects}
        kept = [id_ for id_ in ids if id_ not in reasons]
        return Ranking(kept, logits[features.positions(kept)], [reasons[id_] for id_ in ids if id_ in reasons])

    def save(self, folder: Path) -> None:
        """See `Learner.save`: the probe becomes the head of a network that scores any image."""
        network = self.embedding.network(normalised=True)
        probe = self._fitted()
        network.head.set_probe(torch.from_numpy(probe.coefficients), probe.intercept)
        save_network(network, folder / WEIGHTS, algorithm="probe", input=describe_input(self.embedding.source))

    def restore(self, folder: Path) -> None:
        """See `Learner.restore`."""
        linear = load_network(folder / WEIGHTS).head.linear
        weight, bias = linear.weight.detach().double().numpy(), linear.bias.detach().double().numpy()
        self._probe = Probe(weight[1] - weight[0], float(bias[1] - bias[0]))

    def _fitted(self) -> Probe:
        if self._probe is None:
            raise RuntimeError("call fit or restore before rank or save")
        return self._probe


def probe_of(embedding: Embedding, labels: Mapping[str, str], pool: Sequence[str] | None, spec: ProbeSpec) -> Probe:
    """The probe fitted on those of `labels` whose images can be read, and on what it is sure of in the pool."""
    views = embedding.views
    features = views.features
    unreadable = {reject.id for reject in features.rejects}
    unknown = [id_ for id_ in labels if id_ not in features and id_ not in unreadable]
    if unknown:
        raise LabelError(f"{len(unknown)} labels are of images that are not in the source, the first: {unknown[0]!r}")
    anomalies, normals = training_ids({id_: label for id_, label in labels.items() if id_ not in unreadable})
    unlabelled: list[str] = []
    if spec.rounds:
        unlabelled = [id_ for id_ in (features.ids if pool is None else pool) if id_ in features and id_ not in labels]
    step = max(1, len(unlabelled) // POOL_IMAGES)  # enough to learn from, and a round stays in the milliseconds
    rows = features.take(anomalies), features.take(normals), features.take(unlabelled[::step])
    turned = embedding.other_views(anomalies, spec.orientations)
    return self_train(*rows, spec, views.scaling, turned=turned)


def ranked_by(
    network: Network, embedding: Embedding, ids: Sequence[str], advance: Advance = ignore_progress
) -> Ranking:
    """Images in the order of a network's logits.

    Args:
        network: see `Network`; its features need not be those of `embedding` any more.
        embedding: the images, and how they are computed.
        ids: which of them.
        advance: called with the number of images that are done.
    """
    inference, size = embedding.inference, embedding.image_size
    kept: list[str] = []
    logits = [np.empty(0)]
    rejects: list[Reject] = []
    forward = inference.prepared(network, size=size, count=len(ids))
    for batch in inference.run(forward, embedding.source, ids, size=size):
        kept += batch.ids
        rejects += batch.rejects
        logits.append(anomaly_logit(torch.from_numpy(batch.outputs)).double().numpy())
        advance(len(batch.ids) + len(batch.rejects))
    return Ranking(kept, np.concatenate(logits), rejects)


def likeliest(
    embedding: Embedding, probe: Probe | None, pool: Sequence[str], count_of: Callable[[int], int]
) -> Ranking:
    """The images of the pool that a probe ranks highest, best first.

    Args:
        embedding: the images.
        probe: see `probe_of`; without one, no image.
        pool: those that cannot be read are left out.
        count_of: how many are wanted of so many.
    """
    if probe is None:
        return Ranking([], np.empty(0))
    features = embedding.views.features
    readable = [id_ for id_ in pool if id_ in features]
    logits = features.project(probe.coefficients)[features.positions(readable)] + probe.intercept
    first = Ranking(readable, logits).order[: count_of(len(readable))]
    return Ranking([readable[i] for i in first], logits[first])
