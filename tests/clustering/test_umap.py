import math

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.manifold import trustworthiness
from sklearn.neighbors import KNeighborsClassifier

from anomalymatch.clustering import umap as module
from anomalymatch.clustering.umap import fuzzy_graph, nearest, umap


def normal(n, d=5, seed=0):
    return np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32)


def nearest_twin(row, others, count):
    apart = sorted((math.dist(row, other), k) for k, other in enumerate(others))
    return apart[:count]


@pytest.mark.parametrize(("itself", "count"), [(True, 3), (False, 7)])
def test_nearest_equals_the_slow_twin(itself, count, monkeypatch):
    monkeypatch.setattr(module, "_BLOCK", 4)
    rows = normal(30)
    others = rows if not itself else normal(50, seed=1)
    found, distances = nearest(rows, others, count, itself=itself)
    for k, row in enumerate(rows.tolist()):
        known = [o if itself or j != k else [math.inf] * 5 for j, o in enumerate(others.tolist())]
        twin = nearest_twin(row, known, count)
        assert found[k].tolist() == [j for _, j in twin]
        assert distances[k] == pytest.approx([d for d, _ in twin], rel=1e-5)


def graph_twin(near, distances):
    """Algorithms 2 and 3 of the paper, vector by vector."""
    count, k = near.shape
    directed = np.zeros((count, count))
    for i in range(count):
        beyond = [max(0.0, d - distances[i][0]) for d in distances[i].tolist()]
        low, high = 1e-6, 1e6
        for _ in range(200):
            middle = (low * high) ** 0.5
            too_wide = sum(math.exp(-b / middle) for b in beyond) > math.log2(k + 1)
            low, high = (low, middle) if too_wide else (middle, high)
        for j, b in zip(near[i].tolist(), beyond, strict=True):
            directed[i, j] = math.exp(-b / low)
    return directed + directed.T - directed * directed.T


def test_graph_equals_the_slow_twin():
    near, distances = nearest(rows := normal(40), rows, 6, itself=False)
    np.testing.assert_allclose(fuzzy_graph(near, distances).toarray(), graph_twin(near, distances), atol=1e-4)


def test_weights_of_equal_distances_are_one():
    corners = np.eye(3, dtype=np.float32)  # all are equally far apart, so no scale fits
    near, distances = nearest(corners, corners, 2, itself=False)
    assert fuzzy_graph(near, distances).toarray().tolist() == [[0, 1, 1], [1, 0, 1], [1, 1, 0]]


def test_the_map_of_digits_keeps_neighbours():
    # On all digits: 0.970 and 0.987; umap-learn 0.5.12: 0.973 and 0.990; two principal components: 0.61 and 0.83.
    rows, digits = load_digits(return_X_y=True)
    places = umap(rows[::2].astype(np.float32), seed=0)
    guessed = KNeighborsClassifier(10).fit(places[::2], digits[::4]).score(places[1::2], digits[2::4])
    assert guessed > 0.9
    assert trustworthiness(rows[::2], places) > 0.96


def test_vectors_beyond_the_landmarks_lie_in_their_cluster(monkeypatch):
    monkeypatch.setattr(module, "LANDMARKS", 60)
    cluster = np.arange(300) % 3
    places = umap(normal(300) + 20 * np.eye(5, dtype=np.float32)[cluster], seed=0)
    assert KNeighborsClassifier(1).fit(places[::2], cluster[::2]).score(places[1::2], cluster[1::2]) == 1


def test_the_same_seed_gives_the_same_map():
    rows = normal(50)
    assert np.array_equal(umap(rows, seed=1), umap(rows, seed=1))
    assert not np.array_equal(umap(rows, seed=1), umap(rows, seed=2))


@pytest.mark.parametrize("rows", [normal(2), normal(3, d=1), np.ones((20, 4), np.float32), np.repeat(normal(2), 9, 0)])
def test_few_and_equal_vectors_have_finite_places(rows):
    assert np.isfinite(umap(rows, seed=0)).all()
