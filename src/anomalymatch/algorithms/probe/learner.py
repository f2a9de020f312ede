"""Learner of the probe, a logistic regression on frozen features."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from anomalymatch.algorithms.base import WEIGHTS, Truth
from anomalymatch.algorithms.lightning import StepListener, ignore_step
from anomalymatch.algorithms.probe.regression import Probe, ProbeSpec, SelfTraining, self_train
from anomalymatch.backbones.checkpoint import describe_input, load_network, save_network
from anomalymatch.backbones.embedding import Embedding
from anomalymatch.backbones.network import Network
from anomalymatch.data.labels import training_ids
from anomalymatch.errors import LabelError
from anomalymatch.ranking import Ranking


class ProbeLearner:
    """Logistic regression on frozen features: milliseconds a round once the features are cached.

    Args:
        embedding: the backbone and the images.
        probe: hyper-parameters of the probe.
        seed, truth: not used; all learners take them.
    """

    needs_labels, is_detector, trains = True, False, False

    def __init__(self, embedding: Embedding, *, probe: ProbeSpec, seed: int = 0, truth: Truth | None = None) -> None:
        self.embedding, self.spec = embedding, probe
        self.on_step: StepListener = ignore_step
        self._probe: Probe | None = None

    def fit(self, labels: Mapping[str, str], *, pool: Sequence[str] | None = None, cycle: int = 1) -> None:
        """See `Learner.fit`."""
        self._probe = fit_probe(self.embedding, labels, pool, self.spec).probe

    def rank(self, ids: Sequence[str] | None = None) -> Ranking:
        """See `Learner.rank`."""
        features, probe = self.embedding.probe_features, self._fitted()
        logits = features.project(probe.coefficients) + probe.intercept
        if ids is None:
            return Ranking(features.ids, logits, features.rejects)
        reasons = {reject.id: reject for reject in features.rejects}
        kept = [id_ for id_ in ids if id_ not in reasons]
        return Ranking(kept, logits[features.positions(kept)], [reasons[id_] for id_ in ids if id_ in reasons])

    def save(self, folder: Path) -> None:
        """Save a network with the probe as its head, which scores any image."""
        network = probe_network(self.embedding, self._fitted())
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


def fit_probe(
    embedding: Embedding, labels: Mapping[str, str], pool: Sequence[str] | None, spec: ProbeSpec
) -> SelfTraining:
    """Fit a probe on cached features, with self-training on the pool; images that cannot be read are left out.

    Raises:
        LabelError: if a label is of an unknown image, or no readable image is labelled anomaly, or none normal.
    """
    features = embedding.probe_features
    unreadable = {reject.id for reject in features.rejects}
    unknown = [id_ for id_ in labels if id_ not in features and id_ not in unreadable]
    if unknown:
        raise LabelError(f"{len(unknown)} labels are of images that are not in the source, the first: {unknown[0]!r}")
    anomalies, normals = training_ids({id_: label for id_, label in labels.items() if id_ not in unreadable})
    unlabelled: list[str] = []
    if spec.rounds:
        unlabelled = [id_ for id_ in (features.ids if pool is None else pool) if id_ in features and id_ not in labels]
    step = max(1, len(unlabelled) // spec.pool_images)
    rows = features.take(anomalies), features.take(normals), features.take(unlabelled[::step])
    turned = embedding.reoriented_features(anomalies, spec.orientations)
    return self_train(*rows, spec, features.scaling, turned=turned)


def probe_network(embedding: Embedding, probe: Probe, generator: torch.Generator | None = None) -> Network:
    """Build the pretrained network with a probe as its head."""
    network = embedding.network(normalised=True, generator=generator)
    network.head.set_probe(torch.from_numpy(probe.coefficients), probe.intercept)
    return network


def top_by_probe(
    embedding: Embedding, probe: Probe | None, pool: Sequence[str], count_of: Callable[[int], int]
) -> Ranking:
    """Rank the pool by a probe and keep the first images.

    Args:
        embedding: the images.
        probe: the probe; without one the ranking is empty.
        pool: ids; images that cannot be read are left out.
        count_of: function from the number of readable images to the number to keep.
    """
    if probe is None:
        return Ranking([], np.empty(0))
    features = embedding.probe_features
    readable = [id_ for id_ in pool if id_ in features]
    logits = features.project(probe.coefficients)[features.positions(readable)] + probe.intercept
    first = Ranking(readable, logits).order[: count_of(len(readable))]
    return Ranking([readable[i] for i in first], logits[first])
