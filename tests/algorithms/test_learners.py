"""Both learners by what the loop expects of them, and no hyper-parameter without an effect."""

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
ALGORITHMS = ("probe", "fixmatch", "fixmatch_reference", *SIBLINGS)


def fitted(learner, small, labels, cycles=1):
    for cycle in range(1, cycles + 1):
        learner.fit(labels, pool=small.pool, cycle=cycle)
    return learner


def logits(learner, small):
    return learner.rank([*small.pool, *small.holdout]).logits


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_algorithm_is_a_learner_whose_numbers_follow_from_the_seed(make, small, labels, algorithm):
    first = fitted(make(algorithm), small, labels)
    assert isinstance(first, Learner)
    second = make(algorithm)
    assert len(second.embedding.features.ids) == 60
    ambient = torch.get_rng_state()
    fitted(second, small, labels)
    assert torch.equal(torch.get_rng_state(), ambient)
    np.testing.assert_array_equal(logits(first, small), logits(second, small))
    assert first.rank().ids == list(small.source.ids)
    mixed = [small.holdout[2], small.pool[9], small.pool[1]]
    everything = dict(zip(first.rank().ids, first.rank().logits, strict=True))
    assert first.rank(mixed).ids == mixed
    assert first.rank(mixed).logits == pytest.approx([everything[id_] for id_ in mixed], abs=1e-5)
    assert np.std(logits(first, small)) > 0


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_saved_weights_score_and_train_on_alike(make, small, labels, algorithm, tmp_path):
    first = fitted(make(algorithm), small, labels)
    first.save(tmp_path)
    second = make(algorithm)
    second.restore(tmp_path)
    close = {"rtol": 1e-5, "atol": 1e-5} if algorithm == "probe" else {"rtol": 0, "atol": 0}  # 32 bits instead of 64
    np.testing.assert_allclose(logits(second, small), logits(first, small), **close)
    for learner in (first, second):
        learner.fit(labels, pool=small.pool, cycle=2)
    np.testing.assert_array_equal(logits(second, small), logits(first, small))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_learner_that_was_not_fitted_says_so(make, small, algorithm, tmp_path):
    with pytest.raises(RuntimeError, match="call fit or restore before rank or save"):
        make(algorithm).rank(small.pool)
    with pytest.raises(RuntimeError, match="call fit or restore before rank or save"):
        make(algorithm).save(tmp_path)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"im000000": "anomaly"}, "none of the 1 labels is 'normal'"),
        ({"im000001": "normal", "im000002": "unsure"}, "none of the 2 labels is 'anomaly'"),
        ({"im000000": "anomaly", "im000001": "fine"}, "unknown label 'fine'"),
    ],
)
def test_labels_that_cannot_teach_are_refused(make, small, algorithm, said, message):
    with pytest.raises(LabelError, match=message):
        make(algorithm).fit(said, pool=small.pool)


def test_the_probe_refuses_labels_of_unknown_images(make, labels):
    with pytest.raises(LabelError, match="1 labels are of images that are not in the source, the first: 'nowhere'"):
        make("probe").fit({**labels, "nowhere": "normal"})


def test_unsure_and_artefact_teach_nothing(make, small, labels):
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


def test_fixmatch_tells_its_losses_at_each_step(make, small, labels):
    learner, rows = make("fixmatch"), []
    learner.on_step = rows.append
    fitted(learner, small, labels)
    assert [row["step"] for row in rows] == [0, 1, 2]
    both = {f"{what}{kind}" for what in ("pass_rate", "pseudo_precision") for kind in ("", "_normal", "_anomaly")}
    assert set(rows[0]) == {"step", "loss", "loss_lb", "loss_ulb", *both}
    assert all(row["loss"] == pytest.approx(row["loss_lb"] + row["loss_ulb"], rel=1e-5) for row in rows)


@pytest.mark.parametrize(
    ("algorithm", "more"),
    [
        ("flexmatch", {"threshold_normal", "threshold_anomaly"}),
        ("freematch", {"threshold_normal", "threshold_anomaly", "loss_penalty"}),
        ("softmatch", {"confidence_mean", "confidence_deviation"}),
        ("meanteacher", set()),
    ],
)
def test_siblings_tell_their_thresholds_at_each_step_too(make, small, labels, algorithm, more):
    rows = {name: [] for name in ("fixmatch", algorithm)}
    for name, heard in rows.items():
        learner = make(name)
        learner.on_step = heard.append
        fitted(learner, small, labels)
    assert set(rows[algorithm][0]) - set(rows["fixmatch"][0]) == more
    for name in more - {"loss_penalty"}:
        first, *_, last = (row[name] for row in rows[algorithm])
        assert first != last, name
        assert 0 <= last <= 1


def test_the_thresholds_of_a_later_cycle_begin_anew(make, small, labels):
    """The pool is another then; that the student goes on from where it was changes nothing of it."""
    learner, rows = make("flexmatch", "algorithm.learner.carry_over=true"), []
    learner.on_step = rows.append
    fitted(learner, small, labels, cycles=2)
    first, second = (row for row in rows if row["step"] == 0)
    assert first["threshold_normal"] == second["threshold_normal"] == 0.0
    assert rows[2]["threshold_normal"] > 0.0


def test_fixmatch_never_looks_at_the_held_out_split(make, small, labels):
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
        ("algorithm.learner.start=warm", "algorithm.learner.start is 'warm': choose one of probe, cold"),
        ("algorithm.learner.optimizer.lr=-1.0", "algorithm.learner.optimizer: Invalid learning rate"),
        (
            "+algorithm.learner.optimizer.warmup=3",
            "algorithm.learner.optimizer: .*unexpected keyword argument 'warmup'",
        ),
        ("algorithm.learner.loss.schedule=linear", "algorithm.learner.loss.schedule is 'linear'"),
        ("algorithm.learner.loss.alignment.prior=1.5", "algorithm.learner.loss.alignment.prior is 1.5: it must lie in"),
        ("algorithm.learner.loss.alignment.momentum=1.0", "algorithm.learner.loss.alignment.momentum is 1.0"),
        ("algorithm.learner.loss.consistency=kl", "algorithm.learner.loss.consistency is 'kl'"),
        ("algorithm.learner.loss.rampup=-0.1", "algorithm.learner.loss.rampup is -0.1"),
    ],
)
def test_wrong_values_are_refused_when_the_learner_is_made(make, override, message):
    with pytest.raises(ConfigError, match=message):
        make("fixmatch", override)


@pytest.mark.parametrize(
    ("algorithm", "override", "message"),
    [
        ("flexmatch", "threshold=null", "algorithm.learner.loss.threshold is null: FlexMatch lowers one"),
        ("freematch", "threshold=0.9", "algorithm.learner.loss.threshold is 0.9: FreeMatch follows the confidences"),
        ("freematch", "weighting.momentum=1.0", "algorithm.learner.loss.weighting.momentum is 1.0"),
        ("freematch", "weighting.fairness=-1.0", "algorithm.learner.loss.weighting.fairness is -1.0"),
        ("softmatch", "weighting.momentum=-0.5", "algorithm.learner.loss.weighting.momentum is -0.5"),
        ("softmatch", "weighting.n_sigma=-2.0", "algorithm.learner.loss.weighting.n_sigma is -2.0"),
        ("meanteacher", "threshold=1.5", "algorithm.learner.loss.threshold is 1.5"),
    ],
)
def test_wrong_values_of_the_siblings_are_refused_too(make, algorithm, override, message):
    with pytest.raises(ConfigError, match=message) as error:
        make(algorithm, f"algorithm.learner.loss.{override}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["devices=2"], "DDPStrategy with 2 devices would start this program anew, or fork it: set .*=ddp_spawn"),
        (["devices=2", "strategy=ddp"], r"set trainer\.lightning\.strategy=ddp_spawn"),
        (["devices=1", "strategy=ddp"], r"set trainer\.lightning\.strategy=ddp_spawn"),
        (["devices=2", "strategy=ddp_fork"], r"set trainer\.lightning\.strategy=ddp_spawn"),
        (["devices=2", "strategy=ddp_notebook"], r"set trainer\.lightning\.strategy=ddp_spawn"),
        (["devices=3", "strategy=ddp_spawn"], "batch.labelled is 4: 3 processes train, so it must be a multiple of 3"),
        (["devices=2", "strategy=ddp_spawn", "+num_nodes=2"], "num_nodes is 2: training is on one host"),
        (["devices=2", "strategy=ddp_spawn", "+sync_batchnorm=true"], "sync_batchnorm would take the activations out"),
    ],
    ids=" ".join,
)
def test_several_processes_that_cannot_train_are_refused_when_the_learner_is_made(make, words, message):
    lightning = [f"+trainer.lightning.{w[1:]}" if w[0] == "+" else f"trainer.lightning.{w}" for w in words]
    with pytest.raises(ConfigError, match=message):
        make("fixmatch", "trainer.lightning.accelerator=cpu", *lightning)


def test_what_lightning_refuses_is_one_error_and_no_traceback(make, small, labels):
    with pytest.raises(ConfigError, match=r"trainer\.lightning: .*warp"):
        fitted(make("fixmatch", "trainer.lightning.accelerator=warp"), small, labels)


# --- no dead knobs ---------------------------------------------------------------------------------------------


def test_after_a_training_the_average_ranks_over_all_orientations_again(make, small, labels):
    one, several = (make("fixmatch", orientations=count, stages=True) for count in (1, 8))
    assert one.embedding.features_folder != several.embedding.features_folder
    learner = fitted(several, small, labels)
    network = learner._fitted()
    assert network.backbone.orientations == network.spec.orientations == 8
    image = small.source.read(small.pool[:1])[0]
    views = [torch.from_numpy(np.ascontiguousarray(v)).permute(2, 0, 1)[None] for v in (image, np.rot90(image))]
    with torch.inference_mode():
        torch.testing.assert_close(network(views[0]), network(views[1]), atol=1e-4, rtol=1e-4)


@pytest.mark.skipif(not has_openvino(), reason="needs OpenVINO")
@pytest.mark.parametrize("algorithm", ["fixmatch", "meanteacher"])
def test_frozen_stages_that_are_computed_apart_teach_the_same(make, small, labels, algorithm, monkeypatch):
    words = "trainer.iterations=3", "algorithm.learner.guard=off", "algorithm.learner.trainable_groups=1"
    rankings, shortcuts = [], []
    step = FixMatch.training_step
    for backend in ("torch", "openvino"):
        learner = make(algorithm, *words, inference=Inference("cpu", "fp32", workers=1, backend=backend))

        def noted(module, batch, batch_idx):
            shortcuts.append([net.backbone.shortcut for net in (module.network, module.ema.network)])
            return step(module, batch, batch_idx)

        monkeypatch.setattr(FixMatch, "training_step", noted)
        rankings.append(logits(fitted(learner, small, labels), small))
        assert learner._fitted().backbone.shortcut is None
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


def test_the_mirror_image_of_an_anomaly_teaches_the_probe(make, small, labels):
    one, two, eight = (
        logits(fitted(make("probe", f"probe.orientations={n}"), small, labels), small) for n in (1, 2, 8)
    )
    assert np.abs(one - two).max() > 1e-3
    assert np.abs(eight - two).max() > 1e-3


@pytest.mark.slow
def test_weights_of_the_model_come_from_where_it_says(make, small, labels, tmp_path):
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
