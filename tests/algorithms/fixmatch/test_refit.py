from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from probes import SELF_TRAINING

from anomalymatch.algorithms.fixmatch.learner import refit_head, refit_spec
from anomalymatch.algorithms.probe.regression import ProbeSpec, column_gain, fit_logistic, self_train
from anomalymatch.backbones.network import anomaly_logit
from anomalymatch.backbones.tta import reoriented
from anomalymatch.data.task import initial_labels, make_task
from anomalymatch.ranking import Ranking

SPEC = replace(SELF_TRAINING, orientations=2)


@pytest.fixture
def task(make_source):
    return make_task(make_source(60, size=32, unreadable={"im000004"}), anomaly="rare")


@pytest.fixture
def embedding(task, make_embedding):
    return make_embedding(task.source, bn_momentum=None, stages=True)


@pytest.fixture
def labels(task):
    return initial_labels(task, anomalies=3, normals=12, seed=0)


def images(task, ids):
    return torch.stack([torch.from_numpy(task.source.read([id_])[0]).permute(2, 0, 1) for id_ in ids])


def features(network, batch):
    """Compute the features of a batch as the head gets them."""
    with torch.inference_mode():
        rows = network.eval().backbone(batch).numpy()
    width = network.backbone.features
    return np.concatenate(
        [rows[:, :width] / np.linalg.norm(rows[:, :width], axis=1, keepdims=True), rows[:, width:]], 1
    )


def test_the_head_is_a_probe_on_the_current_features(task, embedding, labels):
    network = embedding.network(normalised=True)
    with torch.no_grad():
        for parameter in network.backbone.parameters():
            parameter.mul_(1.1)  # as if it had learnt something
    anomalies, normals = ([id_ for id_ in sorted(labels) if labels[id_] == kind] for kind in ("anomaly", "normal"))
    rare = images(task, anomalies)
    rows, mirrored, others = (features(network, batch) for batch in (rare, reoriented(rare, 1), images(task, normals)))
    alone = ProbeSpec(**{**SPEC.__dict__, "rounds": 0})
    probe = self_train(rows, others, rows[:0], alone, embedding.probe_features.scaling, turned=mirrored).probe
    refit_head(network, embedding, labels, SPEC)
    with torch.inference_mode():
        logits = network(images(task, task.pool[:9]))
    expected = probe.logits(features(network, images(task, task.pool[:9])))
    np.testing.assert_allclose((logits[:, 1] - logits[:, 0]).numpy(), expected, atol=1e-3)


def test_candidates_confident_by_both_probes_are_pseudo_labelled(task, embedding, labels):
    network = embedding.network(normalised=True)
    anomalies, normals = ([id_ for id_ in sorted(labels) if labels[id_] == kind] for kind in ("anomaly", "normal"))
    pool = [id_ for id_ in task.pool if id_ not in labels][:20]
    readable = [id_ for id_ in pool if id_ != "im000004"]
    before = np.linspace(12.0, -12.0, len(pool))
    rare = images(task, anomalies)
    rows, mirrored, others, theirs = (
        features(network, batch) for batch in (rare, reoriented(rare, 1), images(task, normals), images(task, readable))
    )
    gain = column_gain(rows, others, embedding.probe_features.scaling, SPEC)
    fit = partial(
        fit_logistic, np.concatenate([rows, mirrored]), others, inverse_regularisation=10.0, gain=gain, share=0.5
    )
    probe = fit()
    kept = np.array([before[pool.index(id_)] for id_ in readable])
    for _ in range(3):
        supposed = theirs[(probe.logits(theirs) + kept) / 2 >= np.log(9.0)]  # a probability of 0.9
        assert 0 < len(supposed) < len(readable)
        probe = fit(pseudo_labelled=supposed, weight=0.25)
    refit_head(network, embedding, labels, refit_spec(SPEC, 0.9), Ranking(pool, before))
    with torch.inference_mode():
        logits = network(images(task, task.pool[:4]))
    expected = probe.logits(features(network, images(task, task.pool[:4])))
    np.testing.assert_allclose((logits[:, 1] - logits[:, 0]).numpy(), expected, atol=1e-3)


def test_without_confidence_only_labels_are_used(task, embedding, labels):
    alone, asked = embedding.network(normalised=True), embedding.network(normalised=True)
    pool = [id_ for id_ in task.pool if id_ not in labels]
    refit_head(alone, embedding, labels, SPEC)
    refit_head(asked, embedding, labels, refit_spec(SPEC, None), Ranking(pool, np.full(len(pool), 99.0)))
    assert torch.equal(alone.head.linear.weight, asked.head.linear.weight)


def test_the_refit_is_calibrated_if_the_probe_is(task, embedding, labels):
    plain, calibrated = embedding.network(normalised=True), embedding.network(normalised=True)
    refit_head(plain, embedding, labels, SPEC)
    refit_head(calibrated, embedding, labels, replace(SPEC, calibration="platt"))
    with torch.inference_mode():
        before, after = (anomaly_logit(each(images(task, task.pool[5:25]))) for each in (plain, calibrated))
    slope, offset = np.polyfit(before.numpy(), after.numpy(), 1)
    np.testing.assert_allclose(after.numpy(), slope * before.numpy() + offset, atol=1e-3)
    assert slope > 0
    assert abs(slope - 1) + abs(offset) > 0.1


def test_unreadable_images_are_left_out(embedding, labels):
    heads = []
    for more in ({}, {"im000004": "normal"}, {"im000009": "unsure", "im000011": "artefact"}):
        network = embedding.network(normalised=True)
        refit_head(network, embedding, {**labels, **more}, SPEC)
        heads.append(network.head.linear.weight.clone())
    assert torch.equal(heads[0], heads[1])
    assert torch.equal(heads[0], heads[2])


def test_without_readable_images_of_both_classes_the_head_stays(embedding, labels):
    network = embedding.network(normalised=True)
    before = network.head.linear.weight.clone()
    readable = {id_: label for id_, label in labels.items() if label == "normal"}
    refit_head(network, embedding, {**readable, "im000004": "anomaly"}, SPEC)
    assert torch.equal(network.head.linear.weight, before)


def test_non_finite_features_leave_the_head_as_it_is(embedding, labels):
    network = embedding.network(normalised=True)
    before = network.head.linear.weight.clone()
    with torch.no_grad():
        next(network.backbone.body.parameters()).fill_(float("nan"))
    refit_head(network, embedding, labels, SPEC)
    assert torch.equal(network.head.linear.weight, before)
