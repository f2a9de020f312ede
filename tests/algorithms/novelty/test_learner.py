import json

import numpy as np
import pytest
import torch

from anomalymatch.algorithms.base import BACKBONE, NOVELTY
from anomalymatch.backbones.weights import fingerprint
from anomalymatch.errors import DataError, StorageError

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
    assert set(whole._place) == set(small.pool)
    unsure = fitted(make(algorithm), small, {small.pool[3]: "unsure", small.pool[4]: "artefact"})
    assert set(unsure._place) == set(small.pool) - set(small.pool[3:5])


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_unusable_images_raise(make, make_source, algorithm):
    ids = make_source(20).ids
    with pytest.raises(DataError, match="none of 20 images can be read: 20 "):
        make(algorithm, source=make_source(20, unreadable=set(ids), truth=None, fingerprint="bad")).fit({})
    with pytest.raises(DataError, match=r"needs at least \d+ normal images to learn from, and 1 are left"):
        make(algorithm, source=make_source(1, truth=None)).fit({})
    learner = make(algorithm, source=make_source(20, unreadable={ids[3]}, truth=None, fingerprint="one"))
    learner.fit({})
    ranking = learner.rank()
    assert (len(ranking), [reject.id for reject in ranking.rejects]) == (19, [ids[3]])


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
