import json

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from sklearn.neighbors import NearestNeighbors

from anomalymatch.algorithms.base import BACKBONE, NOVELTY
from anomalymatch.algorithms.msc.module import MeanShiftedContrastive
from anomalymatch.backbones.inference import Inference
from anomalymatch.backbones.openvino import has_openvino
from anomalymatch.backbones.weights import fingerprint
from anomalymatch.config import compose
from anomalymatch.errors import ConfigError, DataError, LabelError, StorageError

FROZEN = ("knn", "mahalanobis", "pca_residual")
ALGORITHMS = (*FROZEN, "msc")


def fitted(learner, small, labels):
    learner.fit(labels, pool=small.pool)
    return learner


def logits(learner, small):
    return learner.rank([*small.pool, *small.holdout]).logits


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_anomalies_rank_first_without_labels(make, small, algorithm):
    # Among so few images the anomalies themselves make up a principal component.
    normals = {id_: "normal" for id_ in small.pool if id_ not in small.anomalies}
    labels = {} if algorithm in ("knn", "msc") else normals
    words = ["algorithm.learner.least_normals=20"]
    words += ["algorithm.learner.detector.neighbours=10"] if algorithm == "knn" else []
    ranking = fitted(make(algorithm, *words), small, labels).rank(small.pool)
    top = ranking.top(len(small.anomalies & set(small.pool)))
    assert len(small.anomalies & set(top)) >= len(top) / 2  # a tenth by chance


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_missing_and_corrupt_files_raise(make, small, labels, algorithm, tmp_path):
    with pytest.raises(StorageError, match=r"novelty\.safetensors is missing or corrupt"):
        make(algorithm).restore(tmp_path)
    fitted(make(algorithm), small, labels).save(tmp_path)
    for name in [NOVELTY, BACKBONE] if algorithm == "msc" else [NOVELTY]:
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(StorageError, match="missing or corrupt"):
            make(algorithm).restore(tmp_path)
        (tmp_path / name).write_bytes(whole)
    (tmp_path / "novelty.json").write_text(json.dumps({}))
    with pytest.raises(StorageError, match="missing or corrupt"):
        make(algorithm).restore(tmp_path)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_enough_labelled_normals_are_used_alone(make, small, labels, algorithm):
    normals = {id_ for id_, label in labels.items() if label == "normal"}
    alone = fitted(make(algorithm, "algorithm.learner.least_normals=6"), small, labels)
    assert set(alone._place) == normals
    mixed = fitted(make(algorithm, "algorithm.learner.least_normals=7"), small, labels)
    assert set(mixed._place) == set(small.pool) - {id_ for id_, label in labels.items() if label == "anomaly"}
    whole = make(algorithm)
    whole.fit({})
    assert set(whole._place) == set(small.source.ids)
    unsure = fitted(make(algorithm), small, {small.pool[3]: "unsure", small.pool[4]: "artefact"})
    assert set(unsure._place) == set(small.pool) - set(small.pool[3:5])


def test_the_distance_is_that_of_scikit_learn_and_no_image_is_its_own_neighbour(make, small):
    learner = fitted(make("knn", "algorithm.learner.detector.neighbours=3"), small, {})
    rows = learner.embedding.features.take(small.pool)
    expected = NearestNeighbors(n_neighbors=3).fit(rows).kneighbors()[0].mean(1)
    novelty = learner._detector
    distances = (np.sinh(learner.rank(small.pool).logits / 2) + 3.0) * novelty.spread + novelty.median
    np.testing.assert_allclose(distances, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_unknown_labels_are_refused(make, small, algorithm):
    with pytest.raises(LabelError, match="unknown label 'fine'"):
        make(algorithm).fit({"im000001": "fine"}, pool=small.pool)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_unusable_images_raise(make, make_source, algorithm):
    ids = make_source(20).ids
    with pytest.raises(DataError, match="none of the 20 images to learn from can be read"):
        make(algorithm, source=make_source(20, unreadable=set(ids), truth=None, fingerprint="bad")).fit({})
    with pytest.raises(DataError, match=r"needs at least \d+ normal images to learn from, and 1 are left"):
        make(algorithm, source=make_source(1, truth=None)).fit({})
    learner = make(algorithm, source=make_source(20, unreadable={ids[3]}, truth=None, fingerprint="one"))
    learner.fit({})
    ranking = learner.rank()
    assert (len(ranking), [reject.id for reject in ranking.rejects]) == (19, [ids[3]])


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_equal_images_raise(make, make_source, monkeypatch, algorithm):
    source = make_source(20, truth=None, fingerprint="equal")
    monkeypatch.setattr(type(source), "load", lambda self, position: np.full((32, 32, 3), 7, dtype=np.uint8))
    with pytest.raises(DataError, match="cannot be fitted on 20 images: their features are all equal"):
        make(algorithm, source=source).fit({})


FROZEN_KNOBS = {
    ("knn", "least_normals"): "6",
    ("knn", "drop"): "0.2",
    ("knn", "detector.neighbours"): "3",
    ("mahalanobis", "least_normals"): "6",
    ("mahalanobis", "drop"): "0.2",
    ("mahalanobis", "detector.shrinkage"): "0.9",
    ("mahalanobis", "detector.trim"): "0.3",
    ("pca_residual", "least_normals"): "6",
    ("pca_residual", "drop"): "0.2",
    ("pca_residual", "detector.variance"): "0.5",
    ("pca_residual", "detector.trim"): "0.3",
}
MSC_KNOBS = {
    "least_normals": "6",
    "drop": "0.3",
    "trim": "0.3",
    "trainable_groups": "1",
    "epochs": "1",
    "batch_size": "8",
    "detector.neighbours": "3",
    "loss.temperature": "1.0",
    "loss.mean_shift": "false",
    "loss.angular_weight": "5.0",
    "loss.weight_decay": "0.5",
    "optimizer.lr": "0.1",
}
ELSEWHERE = {"trainer", "workers"}
"""Knobs that only take time."""


def knobs(algorithm):
    node = OmegaConf.to_container(compose(f"algorithm={algorithm}").algorithm.learner, resolve=False)
    found = set()
    for key, value in node.items():
        inner = value if isinstance(value, dict) else {"": value}
        found |= {f"{key}.{name}".strip(".") for name in inner if not name.startswith("_")} if key[0] != "_" else set()
    return {name for name in found - ELSEWHERE if not name.startswith("augmentation.")}  # see msc/test_views.py


def test_every_knob_is_turned_below():
    assert knobs("msc") == set(MSC_KNOBS)
    for algorithm in FROZEN:
        assert knobs(algorithm) == {knob for name, knob in FROZEN_KNOBS if name == algorithm}


@pytest.mark.parametrize("knob", FROZEN_KNOBS, ids=" ".join)
def test_every_knob_of_the_frozen_ones_changes_the_scores(scores_of, plain_scores, knob):
    algorithm, name = knob
    changed = scores_of(algorithm, f"algorithm.learner.{name}={FROZEN_KNOBS[knob]}")
    assert not np.array_equal(plain_scores(algorithm), changed)


@pytest.mark.slow
@pytest.mark.parametrize("knob", MSC_KNOBS)
def test_every_knob_of_msc_changes_the_scores(scores_of, plain_scores, knob):
    changed = scores_of("msc", f"algorithm.learner.{knob}={MSC_KNOBS[knob]}")
    assert not np.array_equal(plain_scores("msc"), changed)


def test_the_seed_and_the_cycle_change_msc(make, scores_of, plain_scores, small, labels):
    assert not np.array_equal(plain_scores("msc"), scores_of("msc", "seed=1"))
    again = make("msc")
    again.fit(labels, pool=small.pool, cycle=2)
    assert not np.array_equal(plain_scores("msc"), logits(again, small))


def test_msc_trains_only_the_upper_stages_keeps_batch_norms_and_leaves_the_pretrained_backbone_alone(
    make, small, labels
):
    learner = make("msc", "algorithm.learner.trainable_groups=1")
    before = learner.embedding.backbone().state_dict()
    kept = fingerprint(learner.embedding.backbone())
    fitted(learner, small, labels)
    after = learner._backbone.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert not any("running" in name for name in changed)
    assert all(name.startswith(("body.blocks.4", "body.blocks.5", "body.conv_head", "body.bn2")) for name in changed)
    assert fingerprint(learner.embedding.backbone()) == kept


@pytest.mark.skipif(not has_openvino(), reason="needs OpenVINO")
def test_frozen_stages_by_openvino_train_the_same_backbone(make, small, labels, monkeypatch):
    step, shortcuts, rankings = MeanShiftedContrastive.training_step, [], []

    def noted(module, batch, batch_idx):
        shortcuts.append(module.backbone.shortcut)
        return step(module, batch, batch_idx)

    monkeypatch.setattr(MeanShiftedContrastive, "training_step", noted)
    for backend in ("torch", "openvino"):
        inference = Inference("cpu", "fp32", workers=1, backend=backend)
        learner = fitted(make("msc", "algorithm.learner.trainable_groups=1", inference=inference), small, labels)
        assert learner._backbone.shortcut is None
        rankings.append(logits(learner, small))
    half = len(shortcuts) // 2
    assert shortcuts[:half] == [None] * half
    assert half
    assert None not in shortcuts[half:]
    assert np.corrcoef(rankings)[0, 1] > 0.99


def test_without_epochs_msc_is_the_frozen_distance(make, small, labels):
    msc = fitted(make("msc", "algorithm.learner.epochs=0"), small, labels)
    frozen = fitted(make("knn", "algorithm.learner.detector.neighbours=2"), small, labels)
    np.testing.assert_allclose(logits(msc, small), logits(frozen, small), rtol=1e-2, atol=2e-2)


def test_msc_logs_each_step_and_ranks_after_each_epoch(make, plain_scores, small, labels):
    learner, rows, epochs = make("msc"), [], {}
    learner.on_step = rows.append
    learner.on_epoch = lambda epoch: epochs.update({epoch: logits(learner, small)})
    fitted(learner, small, labels)
    steps = len(learner._place) // 16
    assert len(rows) == 2 * steps
    assert set(rows[0]) == {"step", "loss", "loss_contrast", "loss_angular"}
    assert rows[0]["loss"] == rows[0]["loss_contrast"]
    assert list(epochs) == [0, 1, 2]
    assert len({tuple(values) for values in epochs.values()}) == 3
    np.testing.assert_array_equal(epochs[2], logits(learner, small))
    np.testing.assert_array_equal(epochs[2], plain_scores("msc"))  # looking changes nothing


def test_another_training_starts_from_the_weights_of_msc(make, small, labels, make_embedding, tmp_path):
    learner = fitted(make("msc"), small, labels)
    learner.save(tmp_path)
    embedding = make_embedding(small.source, weights=str(tmp_path / BACKBONE))
    assert fingerprint(embedding.backbone()) == fingerprint(learner._backbone)


@pytest.mark.parametrize("channels", [1, 4])
def test_any_number_of_bands_trains(make, make_source, channels):
    learner = make("msc", source=make_source(20, truth=None, channels=channels, fingerprint=f"bands-{channels}"))
    learner.fit({})
    assert np.isfinite(learner.rank().logits).all()


@pytest.mark.parametrize(
    ("algorithm", "override", "message"),
    [
        ("knn", "drop=1.0", "algorithm.learner.drop is 1.0"),
        ("knn", "least_normals=0", "algorithm.learner.least_normals is 0"),
        ("msc", "trim=-0.1", "algorithm.learner.trim is -0.1"),
        ("msc", "epochs=-1", "algorithm.learner.epochs is -1"),
        ("msc", "batch_size=1", "algorithm.learner.batch_size is 1"),
        ("msc", "optimizer.lr=-1.0", "algorithm.learner.optimizer: Invalid learning rate"),
        ("msc", "augmentation.blur=2.0", "augmentation.blur is 2.0"),
        ("msc", "augmentation.crop=[0.0,1.0]", r"augmentation.crop is \[0.0, 1.0\]"),
        ("msc", "augmentation.jitter=[0.1]", r"augmentation.jitter is \[0.1\]: it must be four numbers"),
        ("msc", "augmentation.jitter=[0.0,0.0,0.0,0.9]", "at most 0.5"),
    ],
)
def test_wrong_values_are_refused_when_the_learner_is_made(make, algorithm, override, message):
    with pytest.raises(ConfigError, match=message):
        make(algorithm, f"algorithm.learner.{override}")


def test_several_devices_are_refused(make):
    with pytest.raises(ConfigError, match="algorithm=msc trains on one device"):
        make(
            "msc",
            "trainer.lightning.devices=2",
            "trainer.lightning.strategy=ddp_spawn",
            "trainer.lightning.accelerator=cpu",
        )
