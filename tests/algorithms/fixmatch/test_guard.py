"""What tells of a training that did harm: every check by hand, and a training that is made to collapse."""

import math

import numpy as np
import pytest

from anomalymatch.algorithms.fixmatch.guard import (
    check_average,
    check_out_of_fold,
    check_ranking,
    check_stop,
    check_training,
    out_of_fold,
)
from anomalymatch.types import Label


def steps(*rows):
    """Rows of `pass_rate` and `pass_rate_anomaly`."""
    return [{"step": float(n), "loss": 0.5, "pass_rate": p, "pass_rate_anomaly": a} for n, (p, a) in enumerate(rows)]


def trained(rows, *, cold=False, cuts=True):
    return check_training(rows, cold=cold, cuts=cuts)


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
        (steps(*[(0.9, 0.02)] * 4, *[(0.9, 0.0)] * 12), False),  # four steps are too few
        ([{"step": 0.0, "loss_contrast": 1.0}], True),  # of another algorithm
    ],
)
def test_a_sound_training_has_no_findings(rows, cold):
    assert trained(rows, cold=cold) == []


def test_a_head_that_knows_nothing_must_not_pass_everything():
    rows = steps((1.0, 0.5), *[(0.5, 0.1)] * 20)
    assert trained(rows, cold=True) == [
        "100% of the pseudo-labels pass at the first step, of a head that knows nothing yet"
    ]
    assert trained(rows) == []
    assert trained(rows, cold=True, cuts=False) == []  # a threshold that adapts begins low
    assert trained(steps((0.9, 0.8), *[(0.9, 0.2)] * 20)) == ["80% of the first batch pass as anomalies"]
    chosen = steps((0.9, 0.7), *[(0.9, 0.2)] * 20)  # half of a batch is chosen; of the rest, four in ten
    assert check_training(chosen, cold=False, candidates=0.5) == []
    assert trained(chosen) == ["70% of the first batch pass as anomalies"]
    assert check_training(steps((0.9, 0.8), (0.9, 0.2)), cold=False, candidates=0.5) != []


def test_collapse_to_one_class():
    to_anomaly = steps(*[(0.9, 0.02)] * 30, *[(1.0, 0.98)] * 10)
    assert trained(to_anomaly) == ["the pseudo-labels have collapsed: 98% of those that pass are anomalies"]
    to_normal = steps(*[(0.9, 0.02)] * 30, *[(1.0, 0.0)] * 10)
    assert trained(to_normal) == ["the pseudo-labels have collapsed: none that passes is an anomaly any more"]
    assert trained(to_normal[:-1] + steps((1.0, 0.01))) == []  # one does


def test_a_loss_that_is_no_number():
    rows = steps(*[(0.9, 0.02)] * 10)
    rows[4]["loss"] = math.nan
    rows[7]["loss"] = math.inf
    assert trained(rows) == ["the loss is not finite from step 4 on"]


def test_an_average_that_lags():
    assert check_average(0.95, 100) == []
    assert "37% of it are the weights from before" in check_average(0.99, 100)[0]  # 0.99^100 = 0.366
    assert check_average(0.99, 200) == []  # carried through two cycles: 0.134
    assert check_average(0.0, 1) == []


# --- the ranking ---------------------------------------------------------------------------------------------

PROBE = np.random.default_rng(0).normal(-2, 1, 1000)


@pytest.mark.parametrize("network", [PROBE, 3 * PROBE - 1, PROBE + np.random.default_rng(1).normal(0, 1, 1000)])
def test_a_ranking_much_like_the_probes_has_no_findings(network):
    assert check_ranking(network, PROBE) == []
    order = np.random.default_rng(2).permutation(1000)
    assert check_ranking(network[order], PROBE[order]) == []


def test_a_ranking_that_has_drifted():
    other = np.random.default_rng(3).permutation(PROBE)
    (finding,) = check_ranking(other, PROBE)
    assert "little in common with the probe's (rank correlation" in finding
    assert "little in common" in check_ranking(-PROBE, PROBE)[0]
    assert check_ranking(PROBE + 6, PROBE) == ["the scores have drifted: 100% are above 1/2, of the probe's 2%"]
    assert check_ranking(PROBE + 6, PROBE + 5) == []  # so are the probe's
    assert check_ranking(np.full(1000, 0.7), PROBE) == ["all scores are the same"]
    assert check_ranking(np.where(PROBE > -1, np.nan, PROBE), PROBE)[0].endswith("of 1,000 scores are not finite")
    assert check_ranking(PROBE, np.zeros(1000)) == []  # a probe that says nothing
    assert check_ranking(PROBE[:1], PROBE[:1]) == []


# --- out of fold ---------------------------------------------------------------------------------------------


def labels_of(anomalies, normals):
    return {f"a{n}": Label.ANOMALY for n in range(anomalies)} | {f"n{n:02d}": Label.NORMAL for n in range(normals)}


def right(held):
    return np.array([float(id_.startswith("a")) for id_ in held])


def test_each_label_is_ranked_by_what_did_not_learn_from_it():
    labels, seen = labels_of(5, 20) | {"u": Label.UNSURE}, []

    def train_and_score(learnt, held):
        assert not set(learnt) & set(held)
        assert set(learnt.values()) == {Label.ANOMALY, Label.NORMAL}
        assert sum(id_.startswith("a") for id_ in held) in (2, 3)
        seen.extend(held)
        return {0: right(held), 7: right(held)}

    assert out_of_fold(labels, 0, train_and_score) == {0: 1, 7: 1}
    assert sorted(seen) == sorted(set(labels) - {"u"})


def test_the_better_one_out_of_fold_is_kept():
    labels, broken = labels_of(4, 20), np.full(12, np.nan)
    worse = out_of_fold(labels, 0, lambda _, held: {0: right(held), 5: -right(held), 9: broken})
    assert worse == pytest.approx({0: 1, 5: 2 / 12, 9: 2 / 12})  # all alike are ranked as one
    assert check_stop(worse) == (0, ["out of fold, its average precision is 0.17, below the probe's 1.00"])
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
    assert check_stop(aps) == (best, [])


def test_with_too_few_labels_the_probe_stays():
    assert out_of_fold(labels_of(3, 90), 0, lambda _, held: {0: right(held), 5: right(held)}) == {}
    best, (finding,) = check_stop({})
    assert best == 0
    assert "too few to compare" in finding
