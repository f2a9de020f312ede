import re

import numpy as np
import pytest
import torch
from timm.optim import Lion

from anomalymatch.algorithms.base import Learner
from anomalymatch.algorithms.fixmatch.module import FixMatch
from anomalymatch.algorithms.msc.module import MeanShiftedContrastive
from anomalymatch.backbones.inference import Inference
from anomalymatch.backbones.network import Backbone
from anomalymatch.backbones.openvino import has_openvino
from anomalymatch.backbones.tta import reoriented
from anomalymatch.errors import ConfigError, LabelError

ALONE = "algorithm.learner.average_with_probe=false"
SIBLINGS = ("flexmatch", "freematch", "softmatch", "meanteacher")
LABELLED = ("probe", "fixmatch", "fixmatch_reference", *SIBLINGS)
ALGORITHMS = (*LABELLED, "knn", "mahalanobis", "pca_residual", "msc")
RATES = {f"{what}{kind}" for what in ("pass_rate", "pseudo_precision") for kind in ("", "_normal", "_anomaly")}
LOGGED = {"step", "loss", "loss_lb", "loss_ulb", *RATES}


def fitted(learner, small, labels, cycles=1):
    for cycle in range(1, cycles + 1):
        learner.fit(labels, pool=small.pool, cycle=cycle)
    return learner


def logits(learner, small):
    return learner.rank([*small.pool, *small.holdout]).logits


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_algorithm_is_a_learner_and_a_restored_one_continues_alike(make, small, labels, algorithm, tmp_path):
    first, second = make(algorithm), make(algorithm)
    assert isinstance(first, Learner)
    assert first.needs_labels == (algorithm in LABELLED) == (not first.is_detector)
    assert len(first.embedding.features.ids) == 60
    ambient = torch.get_rng_state()
    fitted(first, small, labels).save(tmp_path)
    assert torch.equal(torch.get_rng_state(), ambient)
    everything = first.rank(small.source.ids)
    assert everything.ids == list(small.source.ids)
    assert np.std(everything.logits) > 0
    mixed = [small.holdout[2], small.pool[9], small.pool[1]]
    by_id = dict(zip(everything.ids, everything.logits, strict=True))
    assert first.rank(mixed).ids == mixed
    assert first.rank(mixed).logits == pytest.approx([by_id[id_] for id_ in mixed], abs=1e-3)
    assert ((everything.scores > 0) & (everything.scores < 1)).all()
    assert first.rank([]).ids == []
    second.restore(tmp_path)
    close = {"rtol": 1e-5, "atol": 1e-5} if algorithm == "probe" else {"rtol": 0, "atol": 0}  # 32 bits instead of 64
    np.testing.assert_allclose(second.rank(small.source.ids).logits, everything.logits, **close)
    for learner in (first, second):  # the numbers follow from the seed, the cycle and the saved state alone
        learner.fit(labels, pool=small.pool, cycle=2)
    np.testing.assert_array_equal(logits(second, small), logits(first, small))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_an_unfitted_learner_raises(make, small, algorithm, tmp_path):
    with pytest.raises(RuntimeError, match="call fit or restore before rank or save"):
        make(algorithm).rank(small.pool)
    with pytest.raises(RuntimeError, match="call fit or restore before rank or save"):
        make(algorithm).save(tmp_path)


@pytest.mark.parametrize("algorithm", LABELLED)
@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"im000000": "anomaly"}, "none of the 1 labels is 'normal'"),
        ({"im000001": "normal", "im000002": "unsure"}, "none of the 2 labels is 'anomaly'"),
        ({"im000000": "anomaly", "im000001": "fine"}, "unknown label 'fine'"),
    ],
)
def test_labels_without_both_classes_are_refused(make, small, algorithm, said, message):
    with pytest.raises(LabelError, match=message):
        make(algorithm).fit(said, pool=small.pool)


def test_the_probe_refuses_labels_of_unknown_images(make, labels):
    with pytest.raises(LabelError, match="1 labels are of images that are not in the source, the first: 'nowhere'"):
        make("probe").fit({**labels, "nowhere": "normal"})


def test_unsure_and_artefact_are_not_used(make, small, labels):
    more = {**labels, small.pool[20]: "unsure", small.pool[21]: "artefact"}
    np.testing.assert_array_equal(
        logits(fitted(make("probe"), small, labels), small), logits(fitted(make("probe"), small, more), small)
    )


def test_fixmatch_starts_from_the_probe_and_leaves_the_pretrained_backbone_alone(make, small, labels):
    learner = make("fixmatch", "algorithm.learner.optimizer.lr=0.0", "algorithm.learner.refit=false", ALONE)
    before = {k: v.clone() for k, v in learner.embedding.network(normalised=True).backbone.state_dict().items()}
    fitted(learner, small, labels)
    probe = fitted(make("probe", "probe.rounds=1", "probe.fit_gap=null"), small, labels)
    # The probe sees features in half precision.
    np.testing.assert_allclose(logits(learner, small), logits(probe, small), atol=0.02)
    fitted(make("fixmatch"), small, labels)
    after = learner.embedding.network(normalised=True).backbone.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items())


@pytest.mark.parametrize(
    ("algorithm", "more"),
    [
        ("fixmatch", set()),
        ("flexmatch", {"threshold_normal", "threshold_anomaly"}),
        ("freematch", {"threshold_normal", "threshold_anomaly", "loss_penalty"}),
        ("softmatch", {"confidence_mean", "confidence_deviation"}),
        ("meanteacher", set()),
    ],
)
def test_losses_and_adaptive_values_are_logged_at_each_step(make, small, labels, algorithm, more):
    learner, rows = make(algorithm), []
    learner.on_step = rows.append
    fitted(learner, small, labels)
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert set(rows[0]) == LOGGED | more
    for name in more - {"loss_penalty"}:
        first, *_, last = (row[name] for row in rows)
        assert first != last, name
        assert 0 <= last <= 1


def test_each_cycle_starts_with_new_thresholds(make, small, labels):
    """The pool changes between cycles, so the thresholds restart even if the student continues."""
    learner, rows = make("flexmatch", "algorithm.learner.carry_over=true"), []
    learner.on_step = rows.append
    fitted(learner, small, labels, cycles=2)
    first, second = (row for row in rows if row["step"] == 0)
    assert first["threshold_normal"] == second["threshold_normal"] == 0.0
    assert rows[2]["threshold_normal"] > 0.0


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_nothing_is_learnt_from_the_held_out_split_and_it_is_not_ranked(make, small, labels, algorithm, monkeypatch):
    plain = make(algorithm, stages=True).fit(labels).rank()
    assert plain.ids == small.pool
    load, held_out = type(small.source).load, {small.source.position(id_) for id_ in small.holdout}

    def poisoned(source, position):
        return np.full((32, 32, 3), 255, np.uint8) if position in held_out else load(source, position)

    monkeypatch.setattr(type(small.source), "load", poisoned)
    monkeypatch.setattr(small.source, "fingerprint", "poisoned")
    np.testing.assert_array_equal(make(algorithm, stages=True).fit(labels).rank().logits, plain.logits)


def test_fixmatch_never_reads_the_held_out_split(make, small, labels):
    learner, read = make("fixmatch"), []
    learner.embedding.features.take(small.pool)
    real = small.source.read
    small.source.read = lambda ids: read.extend(ids) or real(ids)
    fitted(learner, small, labels)
    assert read
    assert not set(read) & set(small.holdout)


WRONG = {
    "probe": """probe.inverse_regularisation=0.0 probe.inverse_regularisation=nan probe.rounds=-1 probe.limit=-1
        probe.folds=1 probe.pool_images=0 probe.orientations=3 probe.confidence=0.4 probe.confidence=1.0
        probe.calibration=isotonic probe.weight=0.0 probe.fit_gap=-1.0""",
    "fixmatch": """start=warm start_rounds=-1 trainable_groups=-2 refit_confidence=0.4 refit_confidence=1.0 guard=maybe
        guard_limits.folds=1 loss.threshold=0.0 loss.threshold=1.1 loss.threshold=nan loss.consistency=kl
        loss.rampup=1.5 loss.layer_decay=0.0 loss.layer_decay=1.5 loss.schedule=cosine loss.teacher=mean
        loss.ema_decay=1.0 loss.ema_decay=-0.1 loss.unlabelled_weight=-1.0 loss.weight_decay=nan
        loss.alignment.prior=0.0 loss.alignment.prior=1.0 loss.alignment.momentum=nan loss.alignment.momentum=1.0
        batch.labelled=0 batch.unlabelled_ratio=0 batch.iterations=-3 batch.candidates=-1 batch.candidate_share=1.5
        batch.candidate_share=nan batch.workers=-1""",
    "flexmatch": "loss.threshold=null loss.threshold=1.5",
    "freematch": "loss.threshold=0.9 loss.weighting.momentum=1.0 loss.weighting.fairness=-0.1",
    "softmatch": "loss.threshold=0.9 loss.weighting.momentum=-0.1 loss.weighting.n_sigma=nan",
    "knn": "drop=1.0 least_normals=0 detector.neighbours=0",
    "mahalanobis": "detector.shrinkage=1.5 detector.trim=1.0",
    "pca_residual": "detector.variance=1.0 detector.trim=-0.1",
    "msc": """trim=-0.1 epochs=-1 batch_size=1 workers=-1 loss.temperature=0.0 loss.temperature=nan
        loss.angular_weight=-1.0 loss.weight_decay=-1.0 two_views.blur=2.0""",
}


@pytest.mark.parametrize(
    ("algorithm", "word"), [(name, word) for name, words in WRONG.items() for word in words.split()]
)
def test_wrong_values_are_refused_when_the_learner_is_made(make, algorithm, word):
    key, value = word.split("=")
    name = key if key.startswith("probe.") else f"algorithm.learner.{key}"
    shown = key if key.startswith("two_views.") else name  # which two nodes share
    with pytest.raises(ConfigError, match=f"{re.escape(shown)} is '?{re.escape(value).replace(',', ', ')}"):
        make(algorithm, f"{name}={value}")


@pytest.mark.parametrize("algorithm", ["fixmatch", "msc"])
@pytest.mark.parametrize(("name", "kind"), [("adamw", torch.optim.AdamW), ("lion", Lion)])
def test_another_optimiser_replaces_the_whole_node(make, small, labels, monkeypatch, algorithm, name, kind):
    made, step = [], kind.step

    def noted(optimizer, *args, **options):
        made.append(optimizer.param_groups[0])
        return step(optimizer, *args, **options)

    monkeypatch.setattr(kind, "step", noted)
    ranking = make(algorithm, f"optimizer={name}", "algorithm.learner.optimizer.lr=1e-3").fit(labels).rank()
    assert np.isfinite(ranking.logits).all()
    assert made
    assert all("momentum" not in group and group["betas"][0] == 0.9 for group in made)


def test_an_optimiser_with_the_keys_of_another_is_refused_with_what_to_do(make):
    with pytest.raises(ConfigError, match=r"algorithm\.learner\.optimizer: .*'momentum'.*optimizer=adamw"):
        make("fixmatch", "algorithm.learner.optimizer._target_=torch.optim.AdamW")


@pytest.mark.parametrize("algorithm", ["fixmatch", "msc"])
@pytest.mark.parametrize(
    ("word", "message"),
    [("optimizer.lr=-1.0", "Invalid learning rate"), ("+optimizer.warmup=3", "unexpected keyword argument 'warmup'")],
)
def test_wrong_settings_of_the_optimiser_are_refused(make, algorithm, word, message):
    with pytest.raises(ConfigError, match=f"algorithm.learner.optimizer: .*{message}"):
        make(algorithm, f"{'+' * (word[0] == '+')}algorithm.learner.{word.removeprefix('+')}")


@pytest.mark.parametrize(
    ("algorithm", "words", "message"),
    [
        ("fixmatch", "devices=2", "DDPStrategy with 2 devices .*=ddp_spawn"),
        ("fixmatch", "devices=2 strategy=ddp", r"set trainer\.lightning\.strategy=ddp_spawn"),
        ("fixmatch", "devices=1 strategy=ddp", r"set trainer\.lightning\.strategy=ddp_spawn"),
        ("fixmatch", "devices=2 strategy=ddp_fork", r"set trainer\.lightning\.strategy=ddp_spawn"),
        ("fixmatch", "devices=2 strategy=ddp_notebook", r"set trainer\.lightning\.strategy=ddp_spawn"),
        ("fixmatch", "devices=3 strategy=ddp_spawn", "batch.labelled is 4: .* 3$"),
        ("fixmatch", "devices=2 strategy=ddp_spawn num_nodes=2", "num_nodes is 2"),
        ("fixmatch", "devices=2 strategy=ddp_spawn sync_batchnorm=true", "sync_batchnorm"),
        ("msc", "devices=2 strategy=ddp_spawn", "algorithm=msc trains on one device"),
    ],
)
def test_unusable_process_settings_are_refused_when_the_learner_is_made(make, algorithm, words, message):
    lightning = [f"++trainer.lightning.{word}" for word in words.split()]
    with pytest.raises(ConfigError, match=message):
        make(algorithm, "trainer.lightning.accelerator=cpu", *lightning)


def test_errors_of_lightning_are_config_errors(make, small, labels):
    with pytest.raises(ConfigError, match=r"trainer\.lightning: .*warp"):
        fitted(make("fixmatch", "trainer.lightning.accelerator=warp"), small, labels)


def test_after_a_training_the_average_ranks_over_all_orientations_again(make, small, labels):
    one, several = (make("fixmatch", orientations=count, stages=True) for count in (1, 8))
    assert one.embedding.features_folder != several.embedding.features_folder
    learner = fitted(several, small, labels)
    network = learner._average
    assert network.backbone.orientations == network.spec.orientations == 8
    image = small.source.read(small.pool[:1])[0]
    views = [torch.from_numpy(np.ascontiguousarray(v)).permute(2, 0, 1)[None] for v in (image, np.rot90(image))]
    with torch.inference_mode():
        torch.testing.assert_close(network(views[0]), network(views[1]), atol=1e-4, rtol=1e-4)


@pytest.mark.skipif(not has_openvino(), reason="needs OpenVINO")
@pytest.mark.parametrize(
    ("algorithm", "module", "words"),
    [
        ("fixmatch", FixMatch, ("guard=off", "refit=false", "average_with_probe=false")),
        ("msc", MeanShiftedContrastive, ()),
    ],
)
def test_frozen_stages_by_openvino_train_the_same_network(make, small, labels, monkeypatch, algorithm, module, words):
    words = [f"algorithm.learner.{word}" for word in (*words, "trainable_groups=1")]
    rankings, shortcuts = [], []
    step = module.training_step

    def noted(training, batch, batch_idx):
        shortcuts.append([part.shortcut for part in training.modules() if isinstance(part, Backbone)])
        return step(training, batch, batch_idx)

    monkeypatch.setattr(module, "training_step", noted)
    for backend in ("torch", "openvino"):
        learner = make(algorithm, *words, inference=Inference("cpu", "fp32", workers=1, backend=backend))
        rankings.append(logits(fitted(learner, small, labels), small))
    half = len(shortcuts) // 2
    assert all(map(all, shortcuts[half:]))
    assert not any(map(any, shortcuts[:half]))
    assert np.corrcoef(rankings)[0, 1] > 0.99


@pytest.mark.parametrize("orientations", [1, 2, 8])
def test_other_views_are_those_of_the_turned_images_and_computed_once(make_source, make_embedding, orientations):
    source = make_source(12, unreadable={"im000003"})
    embedding = make_embedding(source, stages=True)
    ids = ["im000001", "im000002"]
    rows = embedding.reoriented_features(ids, orientations)
    batches = [torch.from_numpy(image).permute(2, 0, 1)[None] for image in source.read(ids)]
    views = [reoriented(b, i)[0].permute(1, 2, 0).numpy() for b in batches for i in range(1, orientations)]
    assert rows.shape == (2 * (orientations - 1), embedding.probe_features.dimensions)
    if views:
        np.testing.assert_allclose(rows, embedding.encode(views), atol=1e-5)
    source.unreadable.add("im000004")  # after its features were computed
    lost = embedding.reoriented_features(["im000004"], orientations)
    np.testing.assert_array_equal(lost, embedding.probe_features.take(["im000004"] * (orientations - 1)))
    source.read = None  # what is known is not read again
    np.testing.assert_array_equal(embedding.reoriented_features(ids, orientations), rows)
