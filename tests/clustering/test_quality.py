import itertools

import numpy as np
import pytest
from sklearn.metrics import f1_score

from anomalymatch.clustering.quality import clustering_metrics, group_purity


def test_a_perfect_grouping_has_ones():
    assert set(clustering_metrics(["a", "a", "b"], np.array([1, 1, 0])).values()) == {1.0}


def test_by_hand():
    measured = clustering_metrics(["a", "a", "a", "b"], np.array([0, 0, 1, 1]))
    # a is matched to group 0 (2 of 3 and 2 of 2), b to group 1 (1 of 1 and 1 of 2).
    assert measured["f1"] == pytest.approx((2 * 2 / 5 + 2 * 1 / 3) / 2)
    assert measured["purity"] == pytest.approx(3 / 4)
    assert measured["ari"] == pytest.approx(0.0)


def test_f1_is_that_of_the_best_of_all_matchings():
    rng = np.random.default_rng(0)
    truth, groups = rng.integers(3, size=40), rng.integers(3, size=40)
    scores = {}
    for order in itertools.permutations(range(3)):
        renamed = np.array(order)[groups]
        scores[(renamed == truth).sum()] = f1_score(truth, renamed, average="macro")
    measured = clustering_metrics([str(k) for k in truth], groups.astype(np.int64))
    assert measured["f1"] == pytest.approx(scores[max(scores)])


def test_a_class_without_a_group_counts_nothing():
    assert clustering_metrics(["a", "b"], np.array([0, 0]))["f1"] == pytest.approx((2 / 3) / 2)


def test_what_has_no_measure_is_refused():
    for truth, groups in ((["a"], [0, 1]), ([], [])):
        with pytest.raises(ValueError, match="expected one group"):
            clustering_metrics(truth, np.array(groups, dtype=np.int64))


def test_purity_of_a_group():
    assert group_purity(["a", "b", "b", "b"]) == ("b", 0.75)
