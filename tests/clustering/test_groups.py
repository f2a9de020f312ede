import itertools

import numpy as np
import pytest
from scipy.cluster.hierarchy import fcluster, linkage
from sklearn.metrics import adjusted_rand_score, f1_score

from anomalymatch.clustering.groups import (
    UNGROUPED,
    choose_count,
    clustering_metrics,
    count_distinct,
    cut_tree,
    hdbscan,
    make_cut,
    number_by_size,
    ward_tree,
)
from anomalymatch.errors import ConfigError


def blobs(counts=(30, 20, 10), spread=0.3, width=4, seed=0):
    rng = np.random.default_rng(seed)
    centres = 5.0 * np.eye(len(counts), width)
    truth = np.repeat(np.arange(len(counts)), counts)
    return centres[truth] + rng.normal(0, spread, (len(truth), width)), truth


@pytest.mark.parametrize("method", ["ward", "kmeans", "spectral"])
@pytest.mark.parametrize("exact_images", [100, 1000])  # 100: by a graph of neighbours
def test_blobs_are_found_largest_first(method, exact_images):
    rows, truth = blobs((60, 50, 40))
    assert (make_cut(rows, method, seed=0, exact_images=exact_images)(3) == truth).all()


def test_cut_agrees_with_scipy_and_handles_ties():
    rows = np.random.default_rng(1).normal(size=(40, 3))
    tree = linkage(rows, "ward")
    for count in (1, 2, 7, 39, 40):
        labels = cut_tree(tree, count)
        assert len(np.unique(labels)) == count
        assert adjusted_rand_score(labels, fcluster(tree, count, "maxclust")) == 1.0
    same = linkage(np.zeros((6, 2)), "ward")
    assert [len(np.unique(cut_tree(same, count))) for count in range(1, 7)] == [1, 2, 3, 4, 5, 6]


def test_order_of_images_does_not_matter():
    rows, _ = blobs(spread=2.0)
    order = np.random.default_rng(2).permutation(len(rows))
    labels, shuffled = cut_tree(ward_tree(rows), 5), cut_tree(ward_tree(rows[order]), 5)
    assert adjusted_rand_score(labels[order], shuffled) == 1.0


def test_hdbscan_leaves_out_single_images():
    rows, truth = blobs()
    rows = np.concatenate([rows, [[50.0, 50.0, 50.0, 50.0]]])
    labels = hdbscan(rows, 5)
    assert labels[-1] == UNGROUPED
    assert adjusted_rand_score(labels[:-1], truth) > 0.9
    for smallest in (1, 99):
        with pytest.raises(ConfigError, match="smallest_group"):
            hdbscan(rows, smallest)


def test_groups_are_numbered_by_size_then_by_first_image():
    assert number_by_size(np.array([7, 3, 3, 9, 7, -1, 5])).tolist() == [0, 1, 1, 2, 0, -1, 3]


def test_count_of_distinct_embeddings():
    assert count_distinct(np.zeros((5, 3))) == 1
    assert count_distinct(np.array([[0.0, 1.0], [0.0, 1.0 + 1e-12], [2.0, 0.0]])) == 2


@pytest.mark.parametrize("criterion", ["silhouette", "gap"])
def test_number_of_groups_is_found_with_certainty(criterion):
    rows, _ = blobs((25, 25, 25, 25))
    choice = choose_count(rows, "ward", criterion=criterion, most=8, seed=0)
    assert choice.count == 4
    assert choice.agreement >= 0.8
    assert ": sure, " in choice.sentence
    assert choice == choose_count(rows, "ward", criterion=criterion, most=8, seed=0)


def test_overlapping_groups_are_reported():
    rows = np.random.default_rng(0).normal(size=(80, 6))
    choice = choose_count(rows, "ward", criterion="silhouette", most=8, seed=0)
    assert choice.sentence.endswith("overlap")
    assert choose_count(rows, "ward", criterion="gap", most=8, seed=0).count <= 3


@pytest.mark.parametrize("method", ["ward", "kmeans", "spectral"])
@pytest.mark.parametrize("criterion", ["silhouette", "gap"])
def test_three_distinct_images_are_enough(method, criterion, monkeypatch):
    monkeypatch.setattr("anomalymatch.clustering.groups.REPEATS", 2)
    rows = np.repeat([[0.0, 0.0], [1.0, 0.0], [9.0, 1.0]], [1, 1, 3], axis=0)
    assert 1 <= choose_count(rows, method, criterion=criterion, most=5, seed=0).count <= 4


def test_measures_by_hand():
    measured = clustering_metrics(["a", "a", "a", "b"], np.array([0, 0, 1, 1]))
    # a is matched to group 0 (2 of 3 and 2 of 2), b to group 1 (1 of 1 and 1 of 2).
    assert measured["f1"] == pytest.approx((2 * 2 / 5 + 2 * 1 / 3) / 2)
    assert measured["purity"] == pytest.approx(3 / 4)
    assert measured["ari"] == pytest.approx(0.0)
    assert set(clustering_metrics(["a", "a", "b"], np.array([1, 1, 0])).values()) == {1.0}
    assert clustering_metrics(["a", "b"], np.array([0, 0]))["f1"] == pytest.approx((2 / 3) / 2)  # b has no group


def test_f1_is_that_of_the_best_of_all_matchings():
    rng = np.random.default_rng(0)
    truth, groups = rng.integers(3, size=40), rng.integers(3, size=40)
    scores = {}
    for order in itertools.permutations(range(3)):
        renamed = np.array(order)[groups]
        scores[(renamed == truth).sum()] = f1_score(truth, renamed, average="macro")
    measured = clustering_metrics([str(k) for k in truth], groups.astype(np.int64))
    assert measured["f1"] == pytest.approx(scores[max(scores)])


def test_groups_of_other_images_have_no_measure():
    for truth, groups in ((["a"], [0, 1]), ([], [])):
        with pytest.raises(ValueError, match="expected one group"):
            clustering_metrics(truth, np.array(groups, dtype=np.int64))
