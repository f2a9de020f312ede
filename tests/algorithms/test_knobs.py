"""Every hyper-parameter has an effect: a change of it changes the scores."""

import numpy as np
import pytest
from omegaconf import OmegaConf

from anomalymatch.config import compose

SIBLINGS = ("flexmatch", "freematch", "softmatch", "meanteacher")
UNFROZEN = "algorithm.learner.loss.freeze_batch_norm=false"
STUDENT = "algorithm.learner.loss.teacher=student"
ALIKE = "algorithm.learner.batch.candidate_share=0.0"
PRIOR = "algorithm.learner.loss.alignment.prior=0.5"
KNOBS = {
    "start": ["start=cold", "algorithm.learner.refit=false", "algorithm.learner.average_with_probe=false"],
    "carry_over": ["carry_over=true"],
    "start_rounds": ["start_rounds=0"],
    "refit": ["refit=false"],
    "refit_confidence": ["refit_confidence=0.5"],
    "average_with_probe": ["average_with_probe=false"],
    "guard": ["guard=retrain"],  # with so few anomalies nothing can be compared, and the probe stays
    "trainable_groups": ["trainable_groups=null"],
    "loss.threshold": ["loss.threshold=0.999"],
    "loss.alignment.prior": ["loss.alignment.prior=0.01"],
    "loss.alignment.momentum": ["loss.alignment.momentum=0.0", PRIOR],
    "loss.consistency": ["loss.consistency=squared_error"],
    "loss.rampup": ["loss.rampup=0.9"],
    "loss.layer_decay": ["loss.layer_decay=0.1"],
    "loss.unlabelled_weight": ["loss.unlabelled_weight=3.0"],
    "loss.ema_decay": ["loss.ema_decay=0.5"],
    "loss.teacher": ["loss.teacher=student", "augment=objects"],
    "loss.schedule": ["loss.schedule=constant"],
    "loss.weight_decay": ["loss.weight_decay=0.5"],
    "loss.freeze_batch_norm": ["loss.freeze_batch_norm=false"],
    "loss.single_forward": ["loss.single_forward=true", UNFROZEN, STUDENT],
    "batch.labelled": ["batch.labelled=6"],
    "batch.unlabelled_ratio": ["batch.unlabelled_ratio=1"],
    "batch.candidates": ["batch.candidates=3"],
    "batch.pool_per_candidate": ["batch.pool_per_candidate=2"],
    "batch.candidate_share": ["batch.candidate_share=1.0", "algorithm.learner.batch.candidates=3"],
    "batch.iterations": ["batch.iterations=4"],
    "optimizer.lr": ["optimizer.lr=0.1"],
    "optimizer.momentum": ["optimizer.momentum=0.5"],
    "optimizer.nesterov": ["optimizer.nesterov=false"],
}
"""The change first, then overrides of both sides: with frozen batch norms single_forward has no effect."""
SPEED_ONLY = {"batch.workers"}


@pytest.fixture
def scores_of(scores_of):
    """Scores without a guard, which would often replace both sides by the same probe after so few steps."""

    def scores(algorithm, *overrides, **options):
        unguarded = [] if algorithm in ("probe", *NOVELTY) else ["algorithm.learner.guard=off"]
        return scores_of(algorithm, *unguarded, *overrides, **options)

    return scores


def leaves(node, prefix=""):
    for key, value in node.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        elif not key.startswith("_") and str(value) not in ("${augment}", "${trainer.lightning}", "${probe}"):
            yield f"{prefix}{key}"


def test_every_knob_of_fixmatch_is_turned_below():
    node = OmegaConf.to_container(compose("algorithm=fixmatch").algorithm.learner)
    del node["guard_limits"]  # turned in fixmatch/test_guard.py
    assert set(leaves(node)) == set(KNOBS) | SPEED_ONLY


OWN = {
    "flexmatch": {"threshold": "0.75"},
    "freematch": {"threshold": None, "weighting.momentum": "0.5", "weighting.fairness": "5.0"},
    "softmatch": {"threshold": None, "weighting.momentum": "0.1", "weighting.n_sigma": "9.0"},
    "meanteacher": {"threshold": "0.95", "consistency": "cross_entropy", "unlabelled_weight": "1.0", "rampup": "1.0"},
}
"""The keys that each variant sets, with another value; None if no other is allowed."""


SHARED = {
    # So long that most images were sure once: the thresholds are low before.
    ("flexmatch", "threshold"): ["trainer.iterations=40", ALIKE],
    # A Gaussian so narrow, or so far along, that it shows.
    ("softmatch", "weighting.momentum"): ["algorithm.learner.loss.weighting.n_sigma=30.0"],
    ("softmatch", "weighting.n_sigma"): ["algorithm.learner.loss.weighting.momentum=0.1"],
}
"""Overrides of both sides with which a change has an effect on few steps of a small network."""


@pytest.mark.parametrize("algorithm", OWN)
def test_every_knob_that_a_sibling_adds_is_turned_below(algorithm):
    own, plain = (dict(_values(compose(f"algorithm={name}").algorithm.learner)) for name in (algorithm, "fixmatch"))
    differ = {key.removeprefix("loss.") for key, value in own.items() if key not in plain or plain[key] != value}
    assert differ | {"threshold"} == set(OWN[algorithm])


def _values(node):
    """Yield keys and values as in the file, with references unresolved."""
    plain = OmegaConf.to_container(node, resolve=False)
    for key in leaves(plain):
        value = plain
        for part in key.split("."):
            value = value[part]
        yield key, value


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", SIBLINGS)
def test_every_variant_can_do_without_alignment(scores_of, plain_scores, algorithm):
    none = scores_of(algorithm, "algorithm.learner.loss.alignment=null")
    np.testing.assert_array_equal(plain_scores(algorithm), none)


@pytest.mark.slow
@pytest.mark.parametrize("change", [{"name": "test_resnet"}, {"image_size": 40}, {"bn_momentum": 0.9}], ids=str)
def test_every_knob_of_the_model_changes_the_scores(scores_of, plain_scores, change):
    plain = plain_scores("fixmatch", UNFROZEN)
    changed = scores_of("fixmatch", UNFROZEN, **change)
    assert np.abs(plain - changed).max() > 1e-6


NOVELTY = {
    "knn": "least_normals=6 drop=0.2 detector.neighbours=3",
    "mahalanobis": "least_normals=6 drop=0.2 detector.shrinkage=0.9 detector.trim=0.3",
    "pca_residual": "least_normals=6 drop=0.2 detector.variance=0.5 detector.trim=0.3",
    "msc": """least_normals=6 drop=0.3 trim=0.3 trainable_groups=1 epochs=1 batch_size=8 detector.neighbours=3
        loss.temperature=1.0 loss.mean_shift=false loss.angular_weight=5.0 loss.weight_decay=0.5 optimizer.lr=0.1""",
}


@pytest.mark.parametrize("algorithm", NOVELTY)
def test_every_knob_of_novelty_detection_is_turned_below(algorithm):
    node = OmegaConf.to_container(compose(f"algorithm={algorithm}").algorithm.learner)
    node.pop("two_views", None)  # turned in augmentation/test_pairs.py
    assert set(leaves(node)) - {"workers"} == {word.split("=")[0] for word in NOVELTY[algorithm].split()}


PROBE = """inverse_regularisation=1.0 rounds=0 confidence=0.999 weight=1.0 limit=1 orientations=8 calibration=platt
    pool_images=5 fit_gap=1e6"""
# These labels are few: only a close fit is sure of anything.
CLOSE = ["probe.inverse_regularisation=100.0", "probe.fit_gap=0.0"]
OTHERS = "seed=1 trainer.lightning.precision=bf16-mixed augment.gain=0.6 probe.inverse_regularisation=0.1"


def changes():
    """Yield an algorithm, a change of it, and overrides of both sides."""
    for change, *shared in KNOBS.values():
        yield "fixmatch", f"algorithm.learner.{change}", shared
    for algorithm, knobs in OWN.items():
        for key, value in knobs.items():
            if value:
                yield algorithm, f"algorithm.learner.loss.{key}={value}", SHARED.get((algorithm, key), [])
        yield algorithm, "algorithm.learner.loss.alignment.prior=0.01", []
    yield from (("fixmatch", word, []) for word in OTHERS.split())
    yield from (("probe", f"probe.{word}", CLOSE) for word in PROBE.split())
    for algorithm, words in NOVELTY.items():
        yield from ((algorithm, f"algorithm.learner.{word}", []) for word in words.split())


QUICK = ("probe", "knn", "mahalanobis", "pca_residual")


@pytest.mark.parametrize(
    ("algorithm", "change", "shared"),
    [pytest.param(*case, marks=[] if case[0] in QUICK else [pytest.mark.slow]) for case in changes()],
)
def test_every_knob_changes_the_scores(scores_of, plain_scores, algorithm, change, shared):
    cycles = 2 if "carry_over" in change else 1
    plain = plain_scores(algorithm, *shared, cycles=cycles)
    changed = scores_of(algorithm, *shared, change, cycles=cycles)
    assert np.abs(plain - changed).max() > (1e-3 if algorithm == "probe" else 1e-6)
