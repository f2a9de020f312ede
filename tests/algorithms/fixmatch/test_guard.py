import math
from dataclasses import fields, replace

import numpy as np
import pytest
from hydra.utils import instantiate

from anomalymatch.algorithms.base import GUARD
from anomalymatch.algorithms.fixmatch import guard
from anomalymatch.algorithms.fixmatch import learner as fixmatch_learner
from anomalymatch.algorithms.fixmatch.guard import (
    GuardLimits,
    check_average,
    check_out_of_fold,
    check_scores,
    check_steps,
    check_stop,
    out_of_fold,
)
from anomalymatch.build import build_learner
from anomalymatch.config import compose
from anomalymatch.data.task import initial_labels, make_task
from anomalymatch.errors import TrainingError
from anomalymatch.types import Label

LIMITS = instantiate(compose("algorithm=fixmatch").algorithm.learner.guard_limits)


def steps(*rows):
    """Make logged steps from pairs of `pass_rate` and `pass_rate_anomaly`."""
    return [{"step": float(n), "loss": 0.5, "pass_rate": p, "pass_rate_anomaly": a} for n, (p, a) in enumerate(rows)]


FOUR, COMMON = steps(*[(0.9, 0.02)] * 4, *[(0.9, 0.0)] * 12), steps(*[(0.9, 0.02)] * 30, *[(1.0, 0.98)] * 10)


def trained(rows, *, limits=LIMITS, cold=False, **options):
    return check_steps(rows, limits, cold=cold, **options)


# --- the steps -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "cold"),
    [
        ([], True),
        (steps(*[(0.9, 0.01)] * 100), False),
        (steps((0.0, 0.0), *[(0.4, 0.1)] * 50), True),
        (steps(*[(0.9, 0.0)] * 40), False),  # an anomaly never passed: rare, not collapsed
        (steps(*[(0.0, 0.0)] * 40), True),
        (steps(*[(0.9, 0.02), (0.9, 0.0), (0.9, 0.0)] * 10, *[(0.9, 0.0)] * 15), False),  # few passed, by chance
        (FOUR, False),  # four steps are too few
        ([{"step": 0.0, "loss_contrast": 1.0}], True),  # of another algorithm
    ],
)
def test_a_sound_training_has_no_findings(rows, cold):
    assert trained(rows, cold=cold) == []


def test_too_many_passes_at_the_first_step_are_found():
    rows = steps((1.0, 0.5), *[(0.5, 0.1)] * 20)
    assert trained(rows, cold=True) == [
        "100% of the pseudo-labels pass at the first step, although the head is untrained"
    ]
    assert trained(rows) == []
    assert trained(rows, cold=True, fixed_threshold=False) == []  # a threshold that adapts begins low
    assert trained(steps((0.9, 0.8), *[(0.9, 0.2)] * 20)) == ["80% of the first batch pass as anomalies"]
    chosen = steps((0.9, 0.7), *[(0.9, 0.2)] * 20)  # half of a batch is chosen; of the rest, four in ten
    assert trained(chosen, candidates=0.5) == []
    assert trained(chosen) == ["70% of the first batch pass as anomalies"]
    assert trained(steps((0.9, 0.8), (0.9, 0.2)), candidates=0.5) != []


def test_collapse_to_one_class():
    assert trained(COMMON) == ["the pseudo-labels have collapsed: 98% of those that pass are anomalies"]
    to_normal = steps(*[(0.9, 0.02)] * 30, *[(1.0, 0.0)] * 10)
    assert trained(to_normal) == ["the pseudo-labels have collapsed: none that passes is an anomaly any more"]
    assert trained(to_normal[:-1] + steps((1.0, 0.01))) == []  # one does


def test_a_non_finite_loss_is_found():
    rows = steps(*[(0.9, 0.02)] * 10)
    rows[4]["loss"] = math.nan
    rows[7]["loss"] = math.inf
    assert trained(rows) == ["the loss is not finite from step 4 on"]


def test_a_lagging_average_is_found():
    assert check_average(0.95, 100, LIMITS) == []
    assert "37% of it are the weights from before" in check_average(0.99, 100, LIMITS)[0]  # 0.99^100 = 0.366
    assert check_average(0.99, 200, LIMITS) == []  # carried through two cycles: 0.134
    assert check_average(0.0, 1, LIMITS) == []


# --- the ranking ---------------------------------------------------------------------------------------------

PROBE = np.random.default_rng(0).normal(-2, 1, 1000)


@pytest.mark.parametrize("network", [PROBE, 3 * PROBE - 1, PROBE + np.random.default_rng(1).normal(0, 1, 1000)])
def test_a_ranking_like_the_probes_has_no_findings(network):
    assert check_scores(network, PROBE, LIMITS) == []
    order = np.random.default_rng(2).permutation(1000)
    assert check_scores(network[order], PROBE[order], LIMITS) == []


def test_a_drifted_ranking_is_found():
    other = np.random.default_rng(3).permutation(PROBE)
    (finding,) = check_scores(other, PROBE, LIMITS)
    assert "little in common with the probe's (rank correlation" in finding
    assert "little in common" in check_scores(-PROBE, PROBE, LIMITS)[0]
    assert check_scores(PROBE + 6, PROBE, LIMITS) == ["the scores have drifted: 100% are above 1/2, of the probe's 2%"]
    assert check_scores(PROBE + 6, PROBE + 5, LIMITS) == []  # so are the probe's
    assert check_scores(np.full(1000, 0.7), PROBE, LIMITS) == ["all scores are the same"]
    assert check_scores(np.where(PROBE > -1, np.nan, PROBE), PROBE, LIMITS)[0].endswith(
        "of 1,000 scores are not finite"
    )
    assert check_scores(PROBE, np.zeros(1000), LIMITS) == []  # a probe that says nothing
    assert check_scores(PROBE[:1], PROBE[:1], LIMITS) == []


# --- out of fold ---------------------------------------------------------------------------------------------


def labels_of(anomalies, normals):
    return {f"a{n}": Label.ANOMALY for n in range(anomalies)} | {f"n{n:02d}": Label.NORMAL for n in range(normals)}


def right(held):
    return np.array([float(id_.startswith("a")) for id_ in held])


def test_each_label_is_scored_by_a_training_without_it():
    labels, seen = labels_of(5, 20) | {"u": Label.UNSURE}, []

    def train_and_score(learnt, held):
        assert not set(learnt) & set(held)
        assert set(learnt.values()) == {Label.ANOMALY, Label.NORMAL}
        assert sum(id_.startswith("a") for id_ in held) in (2, 3)
        seen.extend(held)
        return {0: right(held), 7: right(held)}

    assert out_of_fold(labels, 0, train_and_score, LIMITS) == {0: 1, 7: 1}
    assert sorted(seen) == sorted(set(labels) - {"u"})


def test_the_better_one_out_of_fold_is_kept():
    labels, broken = labels_of(4, 20), np.full(12, np.nan)
    worse = out_of_fold(labels, 0, lambda _, held: {0: right(held), 5: -right(held), 9: broken}, LIMITS)
    assert worse == pytest.approx({0: 1, 5: 2 / 12, 9: 2 / 12})  # all alike are ranked as one
    assert check_stop(worse, LIMITS) == (0, ["out of fold, its average precision is 0.17, below the probe's 1.00"])
    assert check_out_of_fold(0.5, 0.5) == check_out_of_fold(0.6, 0.5) == check_out_of_fold(math.nan, 0.5) == []
    assert check_out_of_fold(0.5, 0.6) == ["out of fold, its average precision is 0.50, below the probe's 0.60"]


@pytest.mark.parametrize(
    ("aps", "best"),
    [
        ({0: 0.5, 25: 0.6, 50: 0.7, 100: 0.4}, 50),
        ({0: 0.5, 25: 0.5, 50: 0.5}, 50),  # nothing speaks for the probe
        ({0: 0.5, 25: 0.6, 50: 0.6, 100: 0.2}, 50),
    ],
)
def test_a_training_stops_where_it_ranks_best(aps, best):
    assert check_stop(aps, LIMITS) == (best, [])


def test_with_too_few_labels_the_probe_stays():
    assert out_of_fold(labels_of(3, 90), 0, lambda _, held: {0: right(held), 5: right(held)}, LIMITS) == {}
    best, (finding,) = check_stop({}, LIMITS)
    assert best == 0
    assert "too few to compare" in finding


# --- limits --------------------------------------------------------------------------------------------------


def folds_of(limits):
    seen = []
    out_of_fold(labels_of(6, 6), 0, lambda _, held: seen.append(len(held)) or {0: right(held)}, limits)
    return seen


LIMIT_CHANGES = {
    "cold_pass_rate": (0.9, lambda limits: trained(steps((0.7, 0.1)), cold=True, limits=limits)),
    "anomaly_pass_rate": (0.9, lambda limits: trained(steps((0.9, 0.8), (0.9, 0.2)), limits=limits)),
    "collapse_rate": (0.99, lambda limits: trained(COMMON, limits=limits)),
    "collapse_steps": (4, lambda limits: trained(FOUR, limits=limits)),
    "correlation": (-0.5, lambda limits: check_scores(np.random.default_rng(3).permutation(PROBE), PROBE, limits)),
    "spread": (9.0, lambda limits: check_scores(PROBE, PROBE, limits)),
    "high_share": (1.0, lambda limits: check_scores(PROBE + 6, PROBE, limits)),
    "high_ratio": (90.0, lambda limits: check_scores(PROBE + 6, PROBE, limits)),
    "initial_weights": (0.4, lambda limits: check_average(0.99, 100, limits)),
    "folds": (3, folds_of),
    "labels_per_fold": (4, folds_of),
}
"""Another value of each limit, and a check whose result it changes; the tests of learners turn the others."""


def test_every_limit_is_turned():
    elsewhere = {"ranked_images", "checkpoints"}
    assert set(LIMIT_CHANGES) | elsewhere == {field.name for field in fields(GuardLimits)}


@pytest.mark.parametrize("name", LIMIT_CHANGES)
def test_every_limit_changes_a_finding(name):
    value, check = LIMIT_CHANGES[name]
    assert check(LIMITS) != check(replace(LIMITS, **{name: value}))


# --- in a learner --------------------------------------------------------------------------------------------

TINY = (
    "algorithm.learner.batch.labelled=4",
    "algorithm.learner.batch.unlabelled_ratio=2",
    "trainer.iterations=4",
    "algorithm.learner.loss.ema_decay=0.5",
)
COLLAPSE = "algorithm.learner.optimizer.lr=1e4"


@pytest.fixture
def small(make_source):
    return make_task(make_source(120, size=32), anomaly="rare")


@pytest.fixture
def labels(small):
    return initial_labels(small, anomalies=4, normals=8, seed=0)


@pytest.fixture
def train(small, labels, make_embedding):
    def trained(*overrides, algorithm="fixmatch"):
        config = compose(f"algorithm={algorithm}", *(TINY if algorithm != "probe" else ()), *overrides)
        learner = build_learner(config, small, make_embedding(small.source))
        learner.fit(labels, pool=small.pool, cycle=1)
        return learner

    return trained


def test_warning_changes_no_number(train, small):
    rankings = [train(f"algorithm.learner.guard={guard}").rank(small.pool) for guard in ("off", "warn")]
    np.testing.assert_array_equal(rankings[0].logits, rankings[1].logits)


def test_warn_reports_a_collapse(train, small, caplog, tmp_path):
    learner = train("algorithm.learner.optimizer.lr=30", "algorithm.learner.guard=warn")
    assert np.isfinite(learner.rank(small.pool).logits).all()
    assert learner.guard.notes
    assert all(f"Training, cycle 1: {note}" in caplog.text for note in learner.guard.notes)
    learner.save(tmp_path)
    assert (tmp_path / GUARD).read_text().splitlines() == learner.guard.notes
    assert not np.allclose(learner.rank(small.pool).logits, train(algorithm="probe").rank(small.pool).logits, atol=1e-3)


DIVERGE = "algorithm.learner.optimizer.lr=1e38"


@pytest.mark.parametrize("guard", ["off", "warn"])
def test_a_diverged_training_raises(train, small, guard):
    learner = train(DIVERGE, "trainer.iterations=1", f"algorithm.learner.guard={guard}")
    with pytest.raises(TrainingError, match=r"not finite: .*algorithm\.learner\.optimizer\.lr"):
        learner.rank(small.pool)


@pytest.mark.parametrize("count", [20, 96])
def test_divergence_at_the_last_step_falls_back_for_any_number_of_images(train, small, count):
    learner = train(DIVERGE, "trainer.iterations=1")
    ranking, probe = learner.rank(small.pool[:count]), train(algorithm="probe").rank(small.pool[:count])
    np.testing.assert_allclose(ranking.logits, probe.logits, rtol=1e-3, atol=1e-3)
    assert any("scores are not finite: the ranking of the probe is kept" in note for note in learner.guard.notes)


@pytest.mark.parametrize("algorithm", ["flexmatch", "freematch", "softmatch", "meanteacher"])
def test_a_cold_start_with_an_adaptive_threshold_has_no_finding(train, algorithm):
    cold = ("algorithm.learner.start=cold", "algorithm.learner.refit=false", "algorithm.learner.trainable_groups=null")
    cold += ("algorithm.learner.average_with_probe=false",)
    notes = train(*cold, "algorithm.learner.guard=fallback", algorithm=algorithm).guard.notes
    assert not any("untrained" in note for note in notes)


@pytest.mark.parametrize("guard", ["fallback", "retrain"])
@pytest.mark.parametrize("algorithm", ["fixmatch", "fixmatch_reference"])
def test_a_collapse_falls_back_to_the_probe(train, small, labels, tmp_path, algorithm, guard):
    learner = train(f"algorithm.learner.guard={guard}", COLLAPSE, algorithm=algorithm)
    probe = train(algorithm="probe").rank(small.pool)
    ranking = learner.rank(small.pool)
    assert any("the ranking of the probe is kept" in note for note in learner.guard.notes)
    assert ranking.top(3) == probe.top(3)
    np.testing.assert_allclose(ranking.logits, probe.logits, rtol=1e-3, atol=1e-3)
    learner.save(tmp_path)
    other = train("algorithm.learner.guard=off", algorithm=algorithm)
    other.restore(tmp_path)
    np.testing.assert_array_equal(other.rank(small.pool).logits, ranking.logits)
    other.fit(labels, pool=small.pool, cycle=2)  # and the next cycle begins anew
    assert np.isfinite(other.rank(small.pool).logits).all()


@pytest.fixture
def with_aps(train, monkeypatch):
    """Train a learner as if these were the average precisions; return it and the real ones."""

    def trained(aps, *words):
        compared = []

        def judge(real, limits):
            compared.append(real)
            return check_stop(aps, limits)

        monkeypatch.setattr(guard, "check_stop", judge)
        return train("algorithm.learner.guard=retrain", *words), compared

    return trained


def test_retrain_stops_at_the_best_checkpoint(train, small, with_aps):
    never = "algorithm.learner.guard_limits.collapse_rate=1.0"  # so few pseudo-labels may all be of one class
    learner, (compared,) = with_aps({0: 0.1, 1: 0.2, 2: 0.1, 3: 0.3, 4: 0.2}, never)
    assert list(compared) == [0, 1, 2, 3, 4]  # the quarters of four steps
    assert all(0 < ap <= 1 for ap in compared.values())
    stopped, plain = learner.rank(small.pool), train("algorithm.learner.guard=off").rank(small.pool)
    assert learner.guard.notes == []
    assert not np.array_equal(stopped.logits, plain.logits)
    other, (compared,) = with_aps({0: 0.1, 4: 0.2}, "algorithm.learner.guard_limits.checkpoints=2")
    assert list(compared) == [0, 2, 4]
    whole = other.rank(small.pool)
    np.testing.assert_array_equal(whole.logits, plain.logits)


def test_retrain_keeps_a_better_probe(train, small, with_aps):
    learner, _ = with_aps({0: 0.3, 2: 0.2, 4: 0.1})
    assert learner.guard.notes == [
        "out of fold, its average precision is 0.20, below the probe's 0.30: the ranking of the probe is kept"
    ]
    probe = train(algorithm="probe").rank(small.pool)
    np.testing.assert_allclose(learner.rank(small.pool).logits, probe.logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("refitted", "falls_back"), [(0.0, True), (1.0, False)])
def test_a_worse_refitted_head_falls_back_to_the_probe(train, small, monkeypatch, refitted, falls_back):
    real = fixmatch_learner.refit_head

    def refit(*args):
        assert 0 < real(*args) <= 1
        return refitted

    monkeypatch.setattr(fixmatch_learner, "refit_head", refit)
    learner = train()  # as it is by default
    assert any("out of fold" in note for note in learner.guard.notes) is falls_back
    other = train("algorithm.learner.guard=off") if not falls_back else train(algorithm="probe")
    np.testing.assert_allclose(learner.rank(small.pool).logits, other.rank(small.pool).logits, rtol=1e-3, atol=1e-3)


def test_a_lagging_average_is_reported_and_kept(train, small, monkeypatch):
    monkeypatch.setattr(guard, "check_out_of_fold", lambda *args: [])
    slow = "algorithm.learner.loss.ema_decay=0.95"
    learner = train("algorithm.learner.guard=fallback", slow)
    assert len(learner.guard.notes) == 1
    assert "81%" in learner.guard.notes[0]  # 0.95^4
    plain = train("algorithm.learner.guard=off", slow).rank(small.pool)
    np.testing.assert_array_equal(learner.rank(small.pool).logits, plain.logits)


def test_drift_is_found_at_the_first_ranking(train, small, monkeypatch):
    monkeypatch.setattr(guard, "check_out_of_fold", lambda *args: [])
    monkeypatch.setattr(guard, "check_scores", lambda network, probe, limits: ["it drifts"])
    learner = train("algorithm.learner.guard=fallback")
    assert learner.guard.notes == []
    ranking = learner.rank(small.pool)
    assert learner.guard.notes == ["it drifts: the ranking of the probe is kept"]
    np.testing.assert_allclose(ranking.logits, train(algorithm="probe").rank(small.pool).logits, rtol=1e-3, atol=1e-3)
    learner.rank(small.pool)
    assert len(learner.guard.notes) == 1  # told once
    few = train("algorithm.learner.guard=fallback", "algorithm.learner.guard_limits.ranked_images=1000")
    few.rank(small.pool)
    assert few.guard.notes == []
