"""Both learners by what the loop expects of them, and no hyper-parameter without an effect."""

import numpy as np
import pytest
import timm
import torch
from omegaconf import OmegaConf

from anomalymatch.active.learner import Learner
from anomalymatch.build import build_learner
from anomalymatch.config import compose
from anomalymatch.data.augment import Augmentation
from anomalymatch.data.task import initial_labels, make_task
from anomalymatch.errors import ConfigError, LabelError
from anomalymatch.models.features import Features
from anomalymatch.models.orientations import turned

TINY = (
    "algorithm.learner.batch.labelled=4",
    "algorithm.learner.batch.unlabelled_ratio=2",
    "trainer.iterations=3",
    # So that a few steps change something.
    "algorithm.learner.optimizer.lr=0.05",
)
# So that a network without pretrained weights, too, makes pseudo-labels.
LOW = ("algorithm.learner.loss.threshold=0.5",)
LOWERED = {"fixmatch": LOW, "fixmatch_reference": LOW, "flexmatch": LOW}
SIBLINGS = ("flexmatch", "freematch", "softmatch", "meanteacher")
ALGORITHMS = ("probe", "fixmatch", "fixmatch_reference", *SIBLINGS)


@pytest.fixture
def small(make_source):
    return make_task(make_source(60, size=32), anomaly="rare")


@pytest.fixture
def labels(small):
    return initial_labels(small, anomalies=2, normals=6, seed=0)


@pytest.fixture
def make(small, make_embedding):
    def make_learner(algorithm="fixmatch", *overrides, **model):
        tiny = () if algorithm == "probe" else (*TINY, *LOWERED.get(algorithm, ()))
        config = compose(f"algorithm={algorithm}", *tiny, *overrides)
        return build_learner(config, small, make_embedding(small.source, **model))

    return make_learner


def fitted(learner, small, labels, cycles=1):
    for cycle in range(1, cycles + 1):
        learner.fit(labels, pool=small.pool, cycle=cycle)
    return learner


@pytest.fixture(scope="module")
def plain_logits():
    """Scores before any knob is turned, computed once for each set of overrides."""
    known = {}

    def logits_of(make, small, labels, *overrides, cycles=1):
        key = (overrides, cycles)
        if key not in known:
            known[key] = logits(fitted(make("fixmatch", *overrides), small, labels, cycles), small)
        return known[key]

    return logits_of


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
    learner = make("fixmatch", "algorithm.learner.optimizer.lr=0.0")
    before = {k: v.clone() for k, v in learner.embedding.network(normalised=True).backbone.state_dict().items()}
    fitted(learner, small, labels)
    probe = fitted(make("probe"), small, labels)
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

UNFROZEN = "algorithm.learner.loss.freeze_batch_norm=false"
STUDENT = "algorithm.learner.loss.teacher=student"
ALIKE = "algorithm.learner.batch.candidate_share=0.0"
PRIOR = "algorithm.learner.loss.alignment.prior=0.5"
KNOBS = {
    "start": ["start=cold"],
    "carry_over": ["carry_over=true"],
    "guard": ["guard=fallback"],  # with so few anomalies nothing can be compared, and the probe stays
    "trainable_groups": ["trainable_groups=null"],
    "loss.threshold": ["loss.threshold=0.999"],
    "loss.alignment.prior": ["loss.alignment.prior=0.01"],
    "loss.alignment.momentum": ["loss.alignment.momentum=0.0", PRIOR],
    "loss.consistency": ["loss.consistency=squared_error"],
    "loss.rampup": ["loss.rampup=0.9"],
    "loss.layer_decay": ["loss.layer_decay=0.1"],
    "loss.unlabelled_weight": ["loss.unlabelled_weight=3.0"],
    "loss.ema_decay": ["loss.ema_decay=0.5"],
    "loss.teacher": ["loss.teacher=student"],
    "loss.schedule": ["loss.schedule=constant"],
    "loss.weight_decay": ["loss.weight_decay=0.5"],
    "loss.freeze_batch_norm": ["loss.freeze_batch_norm=false"],
    "loss.single_forward": ["loss.single_forward=true", UNFROZEN, STUDENT],
    "batch.labelled": ["batch.labelled=6"],
    "batch.unlabelled_ratio": ["batch.unlabelled_ratio=1"],
    "batch.candidates": ["batch.candidates=3"],
    "batch.candidate_share": ["batch.candidate_share=1.0", "algorithm.learner.batch.candidates=3"],
    "batch.iterations": ["batch.iterations=4"],
    "optimizer.lr": ["optimizer.lr=0.1"],
    "optimizer.momentum": ["optimizer.momentum=0.5"],
    "optimizer.nesterov": ["optimizer.nesterov=false"],
}
"""What is changed, then what both sides share: without batch statistics one forward pass or two are the same."""
SPEED_ONLY = {"batch.workers"}


def leaves(node, prefix=""):
    for key, value in node.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        elif not key.startswith("_") and str(value) not in ("${augment}", "${trainer.lightning}", "${probe}"):
            yield f"{prefix}{key}"


def test_every_knob_of_fixmatch_is_turned_below():
    node = OmegaConf.to_container(compose("algorithm=fixmatch").algorithm.learner)
    assert set(leaves(node)) == set(KNOBS) | SPEED_ONLY


@pytest.mark.slow
@pytest.mark.parametrize("knob", KNOBS)
def test_every_knob_of_fixmatch_changes_the_scores(make, small, labels, plain_logits, knob):
    change, *shared = KNOBS[knob]
    cycles = 2 if knob == "carry_over" else 1
    plain = plain_logits(make, small, labels, *shared, cycles=cycles)
    changed = logits(fitted(make("fixmatch", *shared, f"algorithm.learner.{change}"), small, labels, cycles), small)
    assert np.abs(plain - changed).max() > 1e-6


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


@pytest.mark.parametrize("orientations", [1, 2, 8])
def test_other_views_are_those_of_the_turned_images_and_computed_once(make_source, make_embedding, orientations):
    source = make_source(12, unreadable={"im000003"})
    embedding = make_embedding(source, stages=True)
    ids = ["im000001", "im000003", "im000002"]
    rows = embedding.other_views(ids, orientations)
    readable = [source.read([id_])[0] for id_ in ("im000001", "im000002")]
    batches = [torch.from_numpy(image).permute(2, 0, 1)[None] for image in readable]
    views = [turned(b, i)[0].permute(1, 2, 0).numpy() for b in batches for i in range(1, orientations)]
    assert rows.shape == (2 * (orientations - 1), embedding.views.features.dimensions)
    if views:
        np.testing.assert_allclose(rows, embedding.encode(views), atol=1e-5)
    source.read = None  # what is known is not read again
    np.testing.assert_array_equal(embedding.other_views(["im000001", "im000002"], orientations), rows)


def test_the_mirror_image_of_an_anomaly_teaches_the_probe(make, small, labels):
    one, two, eight = (
        logits(fitted(make("probe", f"probe.orientations={n}"), small, labels), small) for n in (1, 2, 8)
    )
    assert np.abs(one - two).max() > 1e-3
    assert np.abs(eight - two).max() > 1e-3


OWN = {
    "flexmatch": {"threshold": "0.75"},
    "freematch": {"threshold": None, "weighting.momentum": "0.5", "weighting.fairness": "5.0"},
    "softmatch": {"threshold": None, "weighting.momentum": "0.1", "weighting.n_sigma": "9.0"},
    "meanteacher": {"threshold": "0.95", "consistency": "cross_entropy", "unlabelled_weight": "1.0", "rampup": "1.0"},
}
"""What each sibling sets, and what else it may be; None where it can be nothing else."""


SHARED = {
    # So long that most images were sure once: the thresholds are low before.
    ("flexmatch", "threshold"): ["trainer.iterations=12", ALIKE],
    # A Gaussian so narrow, or so far along, that it shows.
    ("softmatch", "weighting.momentum"): ["algorithm.learner.loss.weighting.n_sigma=30.0"],
    ("softmatch", "weighting.n_sigma"): ["algorithm.learner.loss.weighting.momentum=0.1"],
}
"""What both sides need, for the change to have an effect on so few steps of so small a network."""


@pytest.mark.parametrize("algorithm", OWN)
def test_every_knob_that_a_sibling_adds_is_turned_below(algorithm):
    own, plain = (dict(_values(compose(f"algorithm={name}").algorithm.learner)) for name in (algorithm, "fixmatch"))
    differ = {key.removeprefix("loss.") for key, value in own.items() if key not in plain or plain[key] != value}
    assert differ | {"threshold"} == set(OWN[algorithm])


def _values(node):
    """As it stands in the file: what refers to something else is the same everywhere."""
    plain = OmegaConf.to_container(node, resolve=False)
    for key in leaves(plain):
        value = plain
        for part in key.split("."):
            value = value[part]
        yield key, value


@pytest.mark.slow
@pytest.mark.parametrize(
    ("algorithm", "key"), [(name, key) for name, knobs in OWN.items() for key, value in knobs.items() if value]
)
def test_every_knob_that_a_sibling_adds_changes_the_scores(make, small, labels, algorithm, key):
    shared = SHARED.get((algorithm, key), [])
    plain = logits(fitted(make(algorithm, *shared), small, labels), small)
    word = f"algorithm.learner.loss.{key}={OWN[algorithm][key]}"
    changed = logits(fitted(make(algorithm, *shared, word), small, labels), small)
    assert np.abs(plain - changed).max() > 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", SIBLINGS)
def test_any_of_them_can_be_aligned_to_a_prior(make, small, labels, algorithm):
    plain = logits(fitted(make(algorithm), small, labels), small)
    word = "algorithm.learner.loss.alignment.prior=0.01"
    assert np.abs(plain - logits(fitted(make(algorithm, word), small, labels), small)).max() > 1e-6
    none = logits(fitted(make(algorithm, "algorithm.learner.loss.alignment=null"), small, labels), small)
    np.testing.assert_array_equal(plain, none)


@pytest.mark.slow
@pytest.mark.parametrize(
    "override",
    ["seed=1", "trainer.lightning.precision=bf16-mixed", "augment.operations=0", "probe.inverse_regularisation=0.1"],
)
def test_what_comes_from_other_groups_changes_the_scores_too(make, small, labels, plain_logits, override):
    plain = plain_logits(make, small, labels)
    assert np.abs(plain - logits(fitted(make("fixmatch", override), small, labels), small)).max() > 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("change", [{"name": "test_resnet"}, {"image_size": 40}, {"bn_momentum": 0.9}], ids=str)
def test_every_knob_of_the_model_changes_the_scores(make, small, labels, plain_logits, change):
    plain = plain_logits(make, small, labels, UNFROZEN)
    changed = logits(fitted(make("fixmatch", UNFROZEN, **change), small, labels), small)
    assert np.abs(plain - changed).max() > 1e-6


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


@pytest.mark.slow
def test_workers_change_nothing_but_the_time(make, small, labels, plain_logits):
    plain = plain_logits(make, small, labels)
    np.testing.assert_array_equal(plain, logits(fitted(make("fixmatch", "trainer.workers=2"), small, labels), small))


AUGMENT = {
    "flip": 0.0,
    "vertical_flip": 0.5,
    "translate": 0.3,
    "operations": 1,
    "factor": [0.5, 0.6],
    "posterize_bits": [1, 2],
    "rotate": 90.0,
    "shear": 1.0,
    "strong_translate": 0.05,
    "cutout": 0.0,
}
WEAK = {"flip", "vertical_flip", "translate"}


def test_every_knob_of_the_augmentation_is_turned_below():
    assert {key for key in compose().augment if not key.startswith("_")} == set(AUGMENT)


@pytest.mark.parametrize("knob", AUGMENT)
def test_every_knob_of_the_augmentation_changes_its_view(knob):
    image = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    node = {k: v for k, v in OmegaConf.to_container(compose().augment).items() if not k.startswith("_")}
    plain, changed = Augmentation(**node), Augmentation(**node | {knob: AUGMENT[knob]})
    for view in ("weak", "strong"):
        one, other = getattr(plain, view)(3), getattr(changed, view)(3)
        differ = any(not np.array_equal(one(image, seed), other(image, seed)) for seed in range(60))
        assert differ == (view == "strong" or knob in WEAK)


@pytest.mark.parametrize(
    "change", ["inverse_regularisation=1.0", "rounds=0", "confidence=0.999", "weight=1.0", "limit=1"]
)
def test_every_knob_of_the_probe_changes_the_scores(make, small, labels, change):
    shared = ["probe.inverse_regularisation=100.0"]  # these labels are few: only a close fit is sure of anything
    plain = logits(fitted(make("probe", *shared), small, labels), small)
    other = fitted(make("probe", *shared, f"probe.{change}"), small, labels)
    assert np.abs(plain - logits(other, small)).max() > 1e-3


def test_features_are_computed_once(make, small, labels):
    first = make("probe")
    assert isinstance(first.embedding.features, Features)
    reads = small.source.reads
    fitted(make("probe", "probe.orientations=1"), small, labels)  # mirror images would be made of images
    assert small.source.reads == reads
