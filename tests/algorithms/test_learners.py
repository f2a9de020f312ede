import numpy as np
import pytest
import timm
import torch

from anomalymatch.algorithms.base import Learner
from anomalymatch.algorithms.fixmatch.module import FixMatch
from anomalymatch.backbones.features import Features
from anomalymatch.backbones.inference import Inference
from anomalymatch.backbones.openvino import has_openvino
from anomalymatch.backbones.tta import reoriented
from anomalymatch.errors import ConfigError, LabelError

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
    everything = first.rank()
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
    np.testing.assert_allclose(second.rank().logits, everything.logits, **close)
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
    learner = make("fixmatch", "algorithm.learner.optimizer.lr=0.0", "algorithm.learner.refit=false")
    before = {k: v.clone() for k, v in learner.embedding.network(normalised=True).backbone.state_dict().items()}
    fitted(learner, small, labels)
    probe = fitted(make("probe", "probe.rounds=1"), small, labels)
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
    if algorithm == "fixmatch":
        assert all(row["loss"] == pytest.approx(row["loss_lb"] + row["loss_ulb"], rel=1e-5) for row in rows)
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


def test_fixmatch_never_reads_the_held_out_split(make, small, labels):
    learner, read = make("fixmatch"), []
    learner.embedding.features.take(small.pool)
    real = small.source.read
    small.source.read = lambda ids: read.extend(ids) or real(ids)
    fitted(learner, small, labels)
    assert read
    assert not set(read) & set(small.holdout)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("algorithm.learner.start=warm", "algorithm.learner.start is 'warm'"),
        ("algorithm.learner.optimizer.lr=-1.0", "algorithm.learner.optimizer: Invalid learning rate"),
        (
            "+algorithm.learner.optimizer.warmup=3",
            "algorithm.learner.optimizer: .*unexpected keyword argument 'warmup'",
        ),
    ],
)
def test_wrong_values_are_refused_when_the_learner_is_made(make, override, message):
    with pytest.raises(ConfigError, match=message):
        make("fixmatch", override)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["devices=2"], "DDPStrategy with 2 devices .*=ddp_spawn"),
        (["devices=2", "strategy=ddp"], r"set trainer\.lightning\.strategy=ddp_spawn"),
        (["devices=1", "strategy=ddp"], r"set trainer\.lightning\.strategy=ddp_spawn"),
        (["devices=2", "strategy=ddp_fork"], r"set trainer\.lightning\.strategy=ddp_spawn"),
        (["devices=2", "strategy=ddp_notebook"], r"set trainer\.lightning\.strategy=ddp_spawn"),
        (["devices=3", "strategy=ddp_spawn"], "batch.labelled is 4: .* 3$"),
        (["devices=2", "strategy=ddp_spawn", "+num_nodes=2"], "num_nodes is 2"),
        (["devices=2", "strategy=ddp_spawn", "+sync_batchnorm=true"], "sync_batchnorm"),
    ],
    ids=" ".join,
)
def test_unusable_process_settings_are_refused_when_the_learner_is_made(make, words, message):
    lightning = [f"+trainer.lightning.{w[1:]}" if w[0] == "+" else f"trainer.lightning.{w}" for w in words]
    with pytest.raises(ConfigError, match=message):
        make("fixmatch", "trainer.lightning.accelerator=cpu", *lightning)


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
def test_frozen_stages_by_openvino_train_the_same_network(make, small, labels, monkeypatch):
    words = [f"algorithm.learner.{word}" for word in ("guard=off", "refit=false", "trainable_groups=1")]
    rankings, shortcuts = [], []
    step = FixMatch.training_step
    for backend in ("torch", "openvino"):
        learner = make("fixmatch", *words, inference=Inference("cpu", "fp32", workers=1, backend=backend))

        def noted(module, batch, batch_idx):
            shortcuts.append([net.backbone.shortcut for net in (module.network, module.ema.network)])
            return step(module, batch, batch_idx)

        monkeypatch.setattr(FixMatch, "training_step", noted)
        rankings.append(logits(fitted(learner, small, labels), small))
        assert learner._average.backbone.shortcut is None
    assert all(map(all, shortcuts[3:]))
    assert not any(map(any, shortcuts[:3]))
    assert np.corrcoef(rankings)[0, 1] > 0.999


@pytest.mark.parametrize("orientations", [1, 2, 8])
def test_other_views_are_those_of_the_turned_images_and_computed_once(make_source, make_embedding, orientations):
    source = make_source(12, unreadable={"im000003"})
    embedding = make_embedding(source, stages=True)
    ids = ["im000001", "im000003", "im000002"]
    rows = embedding.reoriented_features(ids, orientations)
    readable = [source.read([id_])[0] for id_ in ("im000001", "im000002")]
    batches = [torch.from_numpy(image).permute(2, 0, 1)[None] for image in readable]
    views = [reoriented(b, i)[0].permute(1, 2, 0).numpy() for b in batches for i in range(1, orientations)]
    assert rows.shape == (2 * (orientations - 1), embedding.probe_features.dimensions)
    if views:
        np.testing.assert_allclose(rows, embedding.encode(views), atol=1e-5)
    source.read = None  # what is known is not read again
    np.testing.assert_array_equal(embedding.reoriented_features(["im000001", "im000002"], orientations), rows)


def test_orientations_change_the_probe(make, small, labels):
    one, two, eight = (
        logits(fitted(make("probe", f"probe.orientations={n}"), small, labels), small) for n in (1, 2, 8)
    )
    assert np.abs(one - two).max() > 1e-3
    assert np.abs(eight - two).max() > 1e-3


@pytest.mark.slow
def test_model_weights_come_from_the_given_file(make, small, labels, tmp_path):
    source = make("probe")
    network = source.embedding.network(normalised=True)
    body = {k: v * 1.1 for k, v in network.backbone.body.state_dict().items() if v.is_floating_point()}
    donor = dict(timm.create_model("test_efficientnet").state_dict())
    torch.save({**donor, **body}, tmp_path / "weights.pth")
    plain = logits(fitted(source, small, labels), small)
    other = logits(fitted(make("probe", weights=str(tmp_path / "weights.pth")), small, labels), small)
    assert np.abs(plain - other).max() > 1e-6


def test_features_are_computed_once(make, small, labels):
    first = make("probe")
    assert isinstance(first.embedding.features, Features)
    reads = small.source.reads
    fitted(make("probe", "probe.orientations=1"), small, labels)  # mirror images would be made of images
    assert small.source.reads == reads
