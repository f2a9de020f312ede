"""What watches over a training: a sound one, one that is made to collapse, and one that diverges."""

import numpy as np
import pytest

from anomalymatch.algorithms.base import GUARD
from anomalymatch.algorithms.fixmatch.guard import check_stop
from anomalymatch.build import build_learner, make_learner
from anomalymatch.config import compose
from anomalymatch.data.task import initial_labels, make_task
from anomalymatch.errors import ConfigError, TrainingError

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


def test_a_training_that_collapses_is_told_of(train, small, caplog, tmp_path):
    learner = train("algorithm.learner.optimizer.lr=30", "algorithm.learner.guard=warn")
    assert np.isfinite(learner.rank(small.pool).logits).all()
    assert learner.watch.notes
    assert all(f"Training, cycle 1: {note}" in caplog.text for note in learner.watch.notes)
    learner.save(tmp_path)
    assert (tmp_path / GUARD).read_text().splitlines() == learner.watch.notes
    assert not np.allclose(learner.rank(small.pool).logits, train(algorithm="probe").rank(small.pool).logits, atol=1e-3)


DIVERGE = "algorithm.learner.optimizer.lr=1e38"


@pytest.mark.parametrize("guard", ["off", "warn"])
def test_what_has_diverged_is_one_clear_sentence(train, small, guard):
    learner = train(DIVERGE, "trainer.iterations=1", f"algorithm.learner.guard={guard}")
    with pytest.raises(TrainingError, match=r"scores are not finite: the training has diverged\. Choose a lower algo"):
        learner.rank(small.pool)


@pytest.mark.parametrize("count", [20, 96])
def test_what_has_diverged_at_its_last_step_falls_back_however_few_are_ranked(train, small, count):
    learner = train(DIVERGE, "trainer.iterations=1")
    ranking, probe = learner.rank(small.pool[:count]), train(algorithm="probe").rank(small.pool[:count])
    np.testing.assert_allclose(ranking.logits, probe.logits, rtol=1e-3, atol=1e-3)
    assert any("scores are not finite: the ranking of the probe is kept" in note for note in learner.watch.notes)


@pytest.mark.parametrize("algorithm", ["flexmatch", "freematch", "softmatch", "meanteacher"])
def test_a_cold_start_whose_threshold_adapts_is_no_harm(train, algorithm):
    cold = ("algorithm.learner.start=cold", "algorithm.learner.refit=false", "algorithm.learner.trainable_groups=null")
    notes = train(*cold, "algorithm.learner.guard=fallback", algorithm=algorithm).watch.notes
    assert not any("knows nothing yet" in note for note in notes)


@pytest.mark.parametrize("guard", ["fallback", "retrain"])
@pytest.mark.parametrize("algorithm", ["fixmatch", "fixmatch_reference"])
def test_a_training_that_collapses_falls_back_to_the_probe(train, small, labels, tmp_path, algorithm, guard):
    learner = train(f"algorithm.learner.guard={guard}", COLLAPSE, algorithm=algorithm)
    probe = train(algorithm="probe").rank(small.pool)
    ranking = learner.rank(small.pool)
    assert any("the ranking of the probe is kept" in note for note in learner.watch.notes)
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
    """A learner that trained with these average precisions out of fold, and what was compared in truth."""
    from anomalymatch.algorithms.fixmatch import guard as watch

    def trained(aps):
        compared = []

        def judge(real):
            compared.append(real)
            return check_stop(aps)

        monkeypatch.setattr(watch, "check_stop", judge)
        return train("algorithm.learner.guard=retrain"), compared

    return trained


def test_a_training_stops_where_the_halves_of_the_labels_rank_best(train, small, with_aps):
    learner, (compared,) = with_aps({0: 0.1, 1: 0.2, 2: 0.1, 3: 0.3, 4: 0.2})
    assert list(compared) == [0, 1, 2, 3, 4]  # the quarters of four steps
    assert all(0 < ap <= 1 for ap in compared.values())
    stopped, plain = learner.rank(small.pool), train("algorithm.learner.guard=off").rank(small.pool)
    assert learner.watch.notes == []
    assert not np.array_equal(stopped.logits, plain.logits)
    whole = with_aps({0: 0.1, 4: 0.2})[0].rank(small.pool)
    np.testing.assert_array_equal(whole.logits, plain.logits)


def test_where_the_halves_speak_for_the_probe_nothing_is_trained(train, small, with_aps, monkeypatch):
    learner, _ = with_aps({0: 0.3, 2: 0.2, 4: 0.1})
    assert learner.watch.notes == [
        "out of fold, its average precision is 0.20, below the probe's 0.30: the ranking of the probe is kept"
    ]
    probe = train(algorithm="probe").rank(small.pool)
    np.testing.assert_allclose(learner.rank(small.pool).logits, probe.logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("refitted", "falls_back"), [(0.0, True), (1.0, False)])
def test_features_that_were_spoilt_are_not_kept(train, small, monkeypatch, refitted, falls_back):
    from anomalymatch.algorithms.fixmatch import learner as fixmatch_learner

    real = fixmatch_learner.refit_head

    def refit(*args):
        assert 0 < real(*args) <= 1
        return refitted

    monkeypatch.setattr(fixmatch_learner, "refit_head", refit)
    learner = train()  # as it is by default
    assert any("out of fold" in note for note in learner.watch.notes) is falls_back
    other = train("algorithm.learner.guard=off") if not falls_back else train(algorithm="probe")
    np.testing.assert_allclose(learner.rank(small.pool).logits, other.rank(small.pool).logits, rtol=1e-3, atol=1e-3)


def test_an_average_that_lags_is_told_but_not_undone(train, small, monkeypatch):
    from anomalymatch.algorithms.fixmatch import guard as watch

    monkeypatch.setattr(watch, "check_out_of_fold", lambda *args: [])
    slow = "algorithm.learner.loss.ema_decay=0.95"
    learner = train("algorithm.learner.guard=fallback", slow)
    assert len(learner.watch.notes) == 1
    assert "81%" in learner.watch.notes[0]  # 0.95^4
    plain = train("algorithm.learner.guard=off", slow).rank(small.pool)
    np.testing.assert_array_equal(learner.rank(small.pool).logits, plain.logits)


def test_drift_shows_when_the_ranking_is_made(train, small, monkeypatch):
    from anomalymatch.algorithms.fixmatch import guard as watch

    monkeypatch.setattr(watch, "check_out_of_fold", lambda *args: [])
    monkeypatch.setattr(watch, "check_ranking", lambda network, probe: ["it drifts"])
    learner = train("algorithm.learner.guard=fallback")
    assert learner.watch.notes == []
    ranking = learner.rank(small.pool)
    assert learner.watch.notes == ["it drifts: the ranking of the probe is kept"]
    np.testing.assert_allclose(ranking.logits, train(algorithm="probe").rank(small.pool).logits, rtol=1e-3, atol=1e-3)
    learner.rank(small.pool)
    assert len(learner.watch.notes) == 1  # told once


def test_a_mode_that_there_is_not(small):
    with pytest.raises(ConfigError, match=r"guard is 'maybe': choose one of warn, fallback, retrain, off"):
        make_learner("fixmatch", small, "algorithm.learner.guard=maybe", "model.name=test_efficientnet")
