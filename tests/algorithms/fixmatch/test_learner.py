from dataclasses import replace

import numpy as np
import pytest
from scipy.special import expit

from anomalymatch.algorithms.base import WEIGHTS
from anomalymatch.algorithms.fixmatch import learner as fixmatch_learner
from anomalymatch.algorithms.fixmatch.learner import rank_by_network
from anomalymatch.algorithms.probe.learner import fit_probe, rank_by_probe
from anomalymatch.backbones.checkpoint import load_network
from anomalymatch.errors import ConfigError

GUARDLESS = "algorithm.learner.guard=off"
ALONE = "algorithm.learner.average_with_probe=false"


@pytest.mark.parametrize(("rounds", "at_most", "taken"), [(3, 1, 1), (0, 1, 0), (2, "null", 2), (3, 0, 0)])
def test_start_rounds_are_limited_by_the_rounds_of_the_probe(make, rounds, at_most, taken):
    learner = make("fixmatch", f"probe.rounds={rounds}", f"algorithm.learner.start_rounds={at_most}")
    assert learner.start_rounds == taken
    assert learner.refit_probe.rounds == rounds  # of its own, which the limit says nothing of


@pytest.mark.parametrize(("confidence", "rounds"), [(0.9, 3), ("null", 0)])
def test_the_refit_has_a_confidence_of_its_own(make, confidence, rounds):
    learner = make("fixmatch", f"algorithm.learner.refit_confidence={confidence}")
    assert learner.refit_probe.rounds == rounds
    assert learner.refit_probe.confidence == (0.8 if confidence == "null" else confidence)
    assert learner.probe.confidence == 0.8


@pytest.mark.parametrize("share", [0.75, 0.0])
def test_the_candidates_are_passed_to_the_refit(make, small, labels, monkeypatch, share):
    heard = []

    def refit(network, embedding, known, spec, likely):
        heard.append((known, spec, likely))
        return real(network, embedding, known, spec, likely)

    real = fixmatch_learner.refit_head
    monkeypatch.setattr(fixmatch_learner, "refit_head", refit)
    learner = make("fixmatch", GUARDLESS, f"algorithm.learner.batch.candidate_share={share}")
    learner.fit(labels, pool=small.pool)
    ((known, spec, likely),) = heard
    assert known == labels
    assert spec == learner.refit_probe
    rest = [id_ for id_ in small.pool if id_ not in labels]
    probe = fit_probe(learner.embedding, labels, rest, learner.probe).rounds[1]
    assert len(likely) == learner.batch.candidates_of(len(rest)) == -(-len(rest) // 5)
    rows = learner.embedding.probe_features.take(rest)
    best = np.argsort(-probe.logits(rows), kind="stable")[: len(likely)]
    assert likely.ids == [rest[i] for i in best]
    np.testing.assert_allclose(likely.logits, probe.logits(rows)[best], atol=1e-4)


def test_the_fallback_is_the_configured_probe_with_its_calibration(make, small, labels):
    learner = make("fixmatch", "probe.calibration=platt")
    assert (learner.refit_probe.rounds, learner.refit_probe.calibration) == (3, "platt")
    assert (learner.probe.rounds, learner.probe.calibration) == (3, "platt")
    learner.fit(labels, pool=small.pool)
    rest = [id_ for id_ in small.pool if id_ not in labels]
    fit = fit_probe(learner.embedding, labels, rest, learner.probe)
    assert fit.probe.intercept != fit.rounds[-1].intercept
    probe = learner.guard.fallback_network().head.linear.bias.diff().item()
    assert probe == pytest.approx(fit.probe.intercept, rel=1e-5)


def test_anomalies_pass_although_candidates_hold_more_of_them_than_the_pool(make, small, labels):
    """Alignment to the teacher's own rate over the pool changes hardly anything."""
    rest = [id_ for id_ in small.pool if id_ not in labels]
    still = (GUARDLESS, "algorithm.learner.optimizer.lr=1e-9", "algorithm.learner.loss.threshold=0.6")
    plain = make("fixmatch", *still)
    plain.fit(labels, pool=small.pool)
    probe = fit_probe(plain.embedding, labels, rest, plain.probe).rounds[1]
    chances = expit(probe.logits(plain.embedding.probe_features.take(rest)))
    passes = {}
    for name, prior in (("none", "null"), ("its own", chances.mean()), ("a tenth of it", chances.mean() / 10)):
        learner, rows = make("fixmatch", *still, f"algorithm.learner.loss.alignment.prior={prior}"), []
        learner.on_step = rows.append
        learner.fit(labels, pool=small.pool)
        passes[name] = np.mean([row["pass_rate_anomaly"] for row in rows])
    assert passes["none"] > 0.05
    assert passes["its own"] > 0.6 * passes["none"]
    assert passes["a tenth of it"] < 0.5 * passes["none"]


def test_alignment_with_candidates_alone_is_refused(make, small, labels):
    aligned = make(
        "fixmatch", "algorithm.learner.loss.alignment.prior=0.1", "algorithm.learner.batch.candidate_share=1.0"
    )
    with pytest.raises(ConfigError, match=r"candidate_share is 1\.0"):
        aligned.fit(labels, pool=small.pool)


def test_the_age_of_the_average_counts_its_updates_over_all_cycles(make, small, labels, tmp_path):
    words = (
        "algorithm.learner.carry_over=true",
        "algorithm.learner.guard=warn",
        "algorithm.learner.loss.ema_decay=0.9",
    )
    learner = make("fixmatch", *words)
    shares = []
    for cycle in (60, 61):  # the number of a cycle says nothing of how long there has been an average
        learner.fit(labels, pool=small.pool, cycle=cycle)
        shares += [note.split(": ")[1] for note in learner.guard.notes if "lags behind" in note]
    learner.save(tmp_path)
    other = make("fixmatch", *words)
    other.restore(tmp_path)
    other.fit(labels, pool=small.pool, cycle=62)
    shares += [note.split(": ")[1] for note in other.guard.notes if "lags behind" in note]
    steps = learner.batch.iterations
    told = [f"{0.9 ** (steps * k):.0%} of it are the weights from before the first step" for k in (1, 2, 3)]
    assert shares == [text for k, text in enumerate(told, 1) if 0.9 ** (steps * k) > 0.2]
    assert len(shares) >= 2


def assert_same(ranking, other, atol=0.0):
    assert list(ranking.ids) == list(other.ids)
    np.testing.assert_allclose(ranking.logits, other.logits, rtol=0, atol=atol)


def standardised(logits):
    return (logits - logits.mean()) / logits.std()


def averaged_by_hand(make, small, labels):
    """Return a learner that ranks by the mean, the mean by hand, and the rankings of its parts."""
    alone, averaged = make("fixmatch", GUARDLESS, ALONE), make("fixmatch", GUARDLESS)
    own = alone.fit(labels, pool=small.pool).rank()
    ranking = averaged.fit(labels, pool=small.pool).rank()
    rest = [id_ for id_ in small.pool if id_ not in labels]
    probe = fit_probe(averaged.embedding, labels, rest, averaged.probe).probe
    theirs = rank_by_probe(averaged.embedding.probe_features, probe, own.ids)
    return averaged, ranking, own, theirs, [own.ids.index(id_) for id_ in rest]


def test_the_mean_with_the_probe_is_that_of_log_odds_at_the_same_scale(make, small, labels):
    _, ranking, own, theirs, rest = averaged_by_hand(make, small, labels)
    assert list(ranking.ids) == list(own.ids) == list(theirs.ids)
    at, by = own.logits[rest], theirs.logits[rest]  # fewer than the sample, so that it has all of them
    scaled = at.mean() + (theirs.logits - by.mean()) * at.std() / by.std()
    np.testing.assert_allclose(ranking.logits, (own.logits + scaled) / 2, atol=1e-3 * at.std())
    both = standardised(own.logits[rest]) + standardised(by)
    assert np.corrcoef(ranking.logits[rest], both)[0, 1] > 0.99999
    assert np.abs(ranking.logits - own.logits).max() > 0.01 * at.std()


def test_the_mean_with_the_probe_is_saved_with_both_networks(make, small, labels, tmp_path):
    averaged, ranking, own, _, _ = averaged_by_hand(make, small, labels)
    averaged.save(tmp_path)
    restored = make("fixmatch", GUARDLESS)
    restored.restore(tmp_path)
    assert_same(restored.rank(), ranking)
    network = load_network(tmp_path / WEIGHTS)
    whole = rank_by_network(network, averaged.embedding, ranking.ids)
    np.testing.assert_allclose(whole.logits, ranking.logits, atol=0.01 * ranking.logits.std())
    alone = rank_by_network(network.alone(), averaged.embedding, ranking.ids)
    np.testing.assert_allclose(alone.logits, own.logits, atol=1e-5)


def test_the_mean_with_the_probe_ends_where_the_guard_keeps_the_probe(make, small, labels, monkeypatch):
    learner = make("fixmatch")
    monkeypatch.setattr(learner.guard, "check_training", lambda *_, **__: True)
    probe = make("probe").fit(labels, pool=small.pool).rank()
    assert_same(learner.fit(labels, pool=small.pool).rank(), probe, atol=0.02)  # the features of the cache are rounded


def test_the_guard_sees_the_ranking_of_the_trained_network_alone(make, small, labels, monkeypatch):
    warned = "algorithm.learner.guard=warn"
    learner, seen = make("fixmatch", warned), []
    learner.fit(labels, pool=small.pool)
    alone = make("fixmatch", warned, ALONE).fit(labels, pool=small.pool)
    monkeypatch.setattr(learner.guard, "check_ranking", lambda ranking: bool(seen.append(ranking)))
    monkeypatch.setattr(alone.guard, "check_ranking", lambda ranking: False)
    learner.rank()
    assert_same(*seen, alone.rank())


def test_a_training_that_goes_on_begins_with_the_trained_network_alone(make, small, labels, tmp_path):
    words = (GUARDLESS, "algorithm.learner.carry_over=true")
    alone, averaged = make("fixmatch", *words, ALONE), make("fixmatch", *words)
    for cycle in (1, 2):
        alone.fit(labels, pool=small.pool, cycle=cycle)
        averaged.fit(labels, pool=small.pool, cycle=cycle)
        averaged.save(tmp_path)
        averaged = make("fixmatch", *words)
        averaged.restore(tmp_path)
        network = load_network(tmp_path / WEIGHTS).alone()
        own = rank_by_network(network, averaged.embedding, small.pool)
        np.testing.assert_allclose(own.logits, alone.rank(small.pool).logits, atol=1e-4)


def test_a_mean_of_log_odds_that_are_all_the_same_is_the_trained_network(make, small, labels, monkeypatch):
    real = fixmatch_learner.rank_by_probe

    def constant(*args):
        ranking = real(*args)
        return replace(ranking, logits=np.zeros(len(ranking)))

    averaged = make("fixmatch", GUARDLESS, "algorithm.learner.batch.candidate_share=0.0")
    alone = make("fixmatch", GUARDLESS, ALONE, "algorithm.learner.batch.candidate_share=0.0")
    monkeypatch.setattr(fixmatch_learner, "rank_by_probe", constant)
    assert_same(averaged.fit(labels, pool=small.pool).rank(), alone.fit(labels, pool=small.pool).rank())


def test_a_cold_start_has_neither_a_refit_nor_a_mean_with_the_probe(make):
    with pytest.raises(ConfigError, match=r"start=cold needs .*refit=false and .*average_with_probe=false"):
        make("fixmatch", "algorithm.learner.start=cold")
    with pytest.raises(ConfigError, match=r"start=cold needs algorithm.learner.average_with_probe=false: "):
        make("fixmatch", "algorithm.learner.start=cold", "algorithm.learner.refit=false")
    make("fixmatch", "algorithm.learner.start=cold", "algorithm.learner.refit=false", ALONE)
