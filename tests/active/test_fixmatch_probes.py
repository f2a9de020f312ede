"""The probe that a fine-tuning starts from, and the one that ranks at last."""

import numpy as np
import pytest

from anomalymatch.active import fixmatch_learner
from anomalymatch.active.learner import likeliest, probe_of
from anomalymatch.errors import ConfigError


@pytest.mark.parametrize(("rounds", "at_most", "taken"), [(3, 1, 1), (0, 1, 0), (2, "null", 2), (3, 0, 0)])
def test_the_first_trains_itself_no_longer_than_both_say(make, rounds, at_most, taken):
    learner = make("fixmatch", f"probe.rounds={rounds}", f"algorithm.learner.start_rounds={at_most}")
    assert (learner.probe.rounds, learner.watch.spec.rounds) == (taken, taken)
    assert learner.last_probe.rounds == rounds  # of its own, which the limit says nothing of


@pytest.mark.parametrize(("confidence", "rounds"), [(0.9, 3), ("null", 0)])
def test_the_last_is_sure_by_a_cut_of_its_own(make, confidence, rounds):
    learner = make("fixmatch", f"algorithm.learner.refit_confidence={confidence}")
    assert learner.last_probe.rounds == rounds
    assert learner.last_probe.confidence == (0.8 if confidence == "null" else confidence)
    assert learner.probe.confidence == 0.8


def test_a_cut_that_is_no_probability_is_refused_by_its_name(make):
    with pytest.raises(ConfigError, match=r"algorithm\.learner\.refit_confidence is 1\.5"):
        make("fixmatch", "algorithm.learner.refit_confidence=1.5")


@pytest.mark.parametrize("share", [0.75, 0.0])
def test_the_candidates_of_the_first_may_teach_the_last(make, small, labels, monkeypatch, share):
    heard = []

    def refit(network, embedding, known, spec, likely):
        heard.append((known, spec, likely))
        return real(network, embedding, known, spec, likely)

    real = fixmatch_learner.refit_head
    monkeypatch.setattr(fixmatch_learner, "refit_head", refit)
    learner = make("fixmatch", "algorithm.learner.guard=off", f"algorithm.learner.batch.candidate_share={share}")
    learner.fit(labels, pool=small.pool)
    ((known, spec, likely),) = heard
    assert known == labels
    assert spec == learner.last_probe
    rest = [id_ for id_ in small.pool if id_ not in labels]
    probe = probe_of(learner.embedding, labels, rest, learner.probe)
    assert len(likely) == learner.batch.candidates_of(len(rest)) == -(-len(rest) // 5)
    rows = learner.embedding.views.features.take(rest)
    best = np.argsort(-probe.logits(rows), kind="stable")[: len(likely)]
    assert likely.ids == [rest[i] for i in best]
    np.testing.assert_allclose(likely.logits, probe.logits(rows)[best], atol=1e-4)


def test_without_a_probe_nothing_is_likely(make, small):
    assert len(likeliest(make("fixmatch").embedding, None, small.pool, len)) == 0
