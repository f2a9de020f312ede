"""Learner of the probe, a logistic regression on frozen features."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from anomalymatch.algorithms.base import WEIGHTS, StepListener, Truth, ignore_step, require_fitted
from anomalymatch.algorithms.probe.regression import Probe, ProbeSpec, SelfTraining, self_train
from anomalymatch.backbones.checkpoint import describe_input, load_network, save_network
from anomalymatch.backbones.embedding import Embedding
from anomalymatch.backbones.features import Features
from anomalymatch.backbones.network import Network
from anomalymatch.data.labels import training_ids
from anomalymatch.data.stream import none_readable
from anomalymatch.errors import LabelError
from anomalymatch.ranking import Ranking


class ProbeLearner:
    """Logistic regression on frozen features: milliseconds a round once the features are cached.

    It does not use `seed` and `truth`, which all learners take.
    """

    needs_labels, is_detector, trains = True, False, False

    def __init__(self, embedding: Embedding, *, probe: ProbeSpec, seed: int = 0, truth: Truth | None = None) -> None:
        self.embedding, self.spec = embedding, probe
        self.on_step: StepListener = ignore_step
        self._probe: Probe | None = None

    def fit(self, labels: Mapping[str, str], *, pool: Sequence[str] | None = None, cycle: int = 1) -> "ProbeLearner":
        """See `Learner.fit`."""
        self._probe = fit_probe(self.embedding, labels, pool, self.spec).probe
        return self

    def rank(self, ids: Sequence[str] | None = None) -> Ranking:
        """See `Learner.rank`."""
        wanted = self.embedding.default_ids if ids is None else ids
        ranking = rank_by_probe(self.embedding.probe_features, require_fitted(self._probe), wanted)
        return replace(ranking, source=self.embedding.source)

    def save(self, folder: Path) -> None:
        """Save a network with the probe as its head, which scores any image."""
        network = probe_network(self.embedding, require_fitted(self._probe))
        save_network(network, folder / WEIGHTS, algorithm="probe", input=describe_input(self.embedding.source))

    def restore(self, folder: Path) -> None:
        """See `Learner.restore`."""
        self._probe = probe_of(load_network(folder / WEIGHTS))


def fit_probe(
    embedding: Embedding, labels: Mapping[str, str], pool: Sequence[str] | None, spec: ProbeSpec
) -> SelfTraining:
    """Fit a probe on cached features, with self-training on the pool; images that cannot be read are left out.

    Raises:
        LabelError: if a label is of an unknown image, or no readable image is labelled anomaly, or none normal.
        NoReadableImageError: if no labelled image can be read.
    """
    features = embedding.probe_features
    readable, rejects = features.split(labels)
    if rejects and not readable:
        raise none_readable(embedding.source, rejects if features.ids else features.rejects)
    unknown = [id_ for id_ in readable if id_ not in features]
    if unknown:
        raise LabelError(
            f"{len(unknown)} labels are of images that are not in the source, the first: {unknown[0]!r} (ids are texts)"
        )
    anomalies, normals = training_ids({id_: labels[id_] for id_ in readable})
    unlabelled: list[str] = []
    if spec.rounds:
        wanted = embedding.default_ids if pool is None else pool
        unlabelled = [id_ for id_ in wanted if id_ in features and id_ not in labels]
    step = max(1, len(unlabelled) // spec.pool_images)
    rows = features.take(anomalies), features.take(normals), features.take(unlabelled[::step])
    turned = embedding.reoriented_features(anomalies, spec.orientations)
    return self_train(*rows, spec, embedding.scaling, turned=turned)


def probe_network(embedding: Embedding, probe: Probe, generator: torch.Generator | None = None) -> Network:
    """Build the pretrained network with a probe as its head."""
    network = embedding.network(normalised=True, generator=generator)
    network.head.set_probe(torch.from_numpy(probe.coefficients), probe.intercept)
    return network


def probe_of(network: Network) -> Probe:
    """Return the probe that is the head of a network."""
    weight, bias = (each.detach().double().numpy() for each in (network.head.linear.weight, network.head.linear.bias))
    return Probe(weight[1] - weight[0], float(bias[1] - bias[0]))


def rank_by_probe(features: Features, probe: Probe, ids: Sequence[str]) -> Ranking:
    """Rank images by a probe on cached features."""
    readable, rejects, rows = features.rows(ids)
    logits = features.project(probe.coefficients, rows) + probe.intercept
    return Ranking(readable, logits, rejects)
