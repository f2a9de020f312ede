import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import expit
from sklearn.covariance import EmpiricalCovariance
from sklearn.decomposition import PCA
from sklearn.neighbors import NearestNeighbors

from anomalymatch.algorithms.novelty import distances as novelty
from anomalymatch.algorithms.novelty.distances import (
    distance_logits,
    mahalanobis,
    neighbour_distances,
    principal_components,
    principal_residual,
    spread_of,
    trimmed_mean,
    whitening_of,
)


def normal(count, width=6, seed=0):
    return np.random.default_rng(seed).normal(size=(count, width))


def tensor(rows):
    return torch.from_numpy(np.asarray(rows, dtype=np.float32))


def nobody(count):
    return torch.full((count,), -1, dtype=torch.int64)


@given(st.integers(1, 40), st.integers(1, 60), st.integers(1, 5), st.integers(0, 100))
def test_neighbours_are_those_of_scikit_learn(queries, bank, k, seed):
    k = min(k, bank)
    q, b = normal(queries, seed=seed), normal(bank, seed=seed + 1)
    expected, _ = NearestNeighbors(n_neighbors=k).fit(b).kneighbors(q)
    found = neighbour_distances(tensor(q), tensor(b), k, nobody(queries))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("blocks", [(1, 1), (2, 3), (7, 50), (50, 7)])
def test_blocks_change_nothing(monkeypatch, blocks):
    q, b = tensor(normal(30)), tensor(normal(41, seed=1))
    own = torch.arange(30)
    expected = neighbour_distances(q, b, 4, own)
    monkeypatch.setattr(novelty, "QUERY_ROWS", blocks[0])
    monkeypatch.setattr(novelty, "BANK_ROWS", blocks[1])
    torch.testing.assert_close(neighbour_distances(q, b, 4, own), expected, rtol=1e-5, atol=1e-6)


def test_no_image_is_its_own_neighbour():
    rows = normal(25)
    expected, _ = NearestNeighbors(n_neighbors=3).fit(rows).kneighbors()  # of the training rows, without themselves
    found = neighbour_distances(tensor(rows), tensor(rows), 3, torch.arange(25))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-5)
    # A copy under another name does count.
    twice = neighbour_distances(tensor(rows), tensor(np.concatenate([rows, rows])), 1, torch.arange(25))
    assert twice.max() == 0.0


def test_small_distances_are_not_lost_to_rounding():
    rows = torch.nn.functional.normalize(torch.randn(1, 1280, generator=torch.Generator().manual_seed(0)))
    moved = rows.clone()
    moved[0, 0] += 1e-4
    assert neighbour_distances(rows, moved, 1, nobody(1)).item() == pytest.approx(1e-4, rel=1e-2)


def test_half_precision_is_compared_as_it_is():
    q, b = tensor(normal(9)), tensor(normal(20, seed=1))
    half = neighbour_distances(q.half(), b.half(), 2, nobody(9))
    torch.testing.assert_close(half, neighbour_distances(q.half().float(), b.half().float(), 2, nobody(9)))


def test_neighbours_by_hand_and_without_queries():
    bank = tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 1.0]])
    assert neighbour_distances(tensor([[0.0, 0.0]]), bank, 3, nobody(1)).tolist() == [[0.0, 1.0, 5.0]]
    assert neighbour_distances(tensor([[0.0, 0.0]]), bank, 2, torch.tensor([0])).tolist() == [[1.0, 5.0]]
    assert neighbour_distances(bank[:0], bank, 2, nobody(0)).shape == (0, 2)


def test_too_small_a_bank_is_an_error():
    bank = tensor(normal(3))
    with pytest.raises(ValueError, match="4 nearest neighbours need at least 4 rows, got 3"):
        neighbour_distances(bank, bank, 4, nobody(3))
    with pytest.raises(ValueError, match="3 nearest neighbours need at least 4 rows, got 3"):
        neighbour_distances(bank, bank, 3, torch.arange(3))


@given(st.integers(0, 100))
def test_mahalanobis_is_that_of_scikit_learn(seed):
    rows, queries = normal(60, 4, seed) @ normal(4, 4, seed + 1), normal(7, 4, seed + 2)
    reference = EmpiricalCovariance().fit(rows)
    distances = mahalanobis(queries, rows.mean(0), whitening_of(reference.covariance_))
    np.testing.assert_allclose(distances**2, reference.mahalanobis(queries), rtol=1e-6)


def test_mahalanobis_by_hand():
    whitening = whitening_of(np.diag([4.0, 0.25]))
    assert mahalanobis(np.array([[3.0, 2.0]]), np.array([1.0, 1.0]), whitening) == pytest.approx([math.sqrt(1 + 4)])


@pytest.mark.parametrize("rows", [np.zeros((5, 3)), normal(3, 5), np.ones((4, 2)) * 0.1])
def test_a_singular_covariance_is_an_error(rows):
    with pytest.raises(ValueError, match="the covariance is singular"):
        whitening_of(np.cov(rows.T))


@given(st.sampled_from([0.3, 0.5, 0.9, 0.99]), st.sampled_from([5, 40]), st.integers(0, 100))
def test_components_and_residuals_are_those_of_scikit_learn(variance, count, seed):
    rows, queries = normal(count, 6, seed) * [5, 4, 3, 2, 1, 0.5], normal(7, 6, seed + 1)
    reference = PCA(n_components=variance, svd_solver="full").fit(rows)
    components = principal_components(rows, rows.mean(0), variance)
    assert components.shape == reference.components_.shape
    expected = np.linalg.norm(queries - reference.inverse_transform(reference.transform(queries)), axis=1)
    np.testing.assert_allclose(principal_residual(queries, rows.mean(0), components), expected, rtol=1e-6, atol=1e-9)


def test_residual_by_hand():
    residual = principal_residual(np.array([[4.0, 5.0, 6.0]]), np.array([1.0, 1.0, 6.0]), np.array([[1.0, 0.0, 0.0]]))
    assert residual == pytest.approx([4.0])
    with pytest.raises(ValueError, match="the features are all equal"):
        principal_components(np.ones((4, 3)), np.ones(3), 0.9)


def test_the_trimmed_mean_leaves_the_far_ones_out():
    rows = np.concatenate([normal(90), normal(10, seed=1) + 50.0])
    assert np.linalg.norm(trimmed_mean(rows, 0.0)) == pytest.approx(np.linalg.norm(rows.mean(0)))
    np.testing.assert_allclose(trimmed_mean(rows, 0.1), rows[:90].mean(0))
    shuffled = np.random.default_rng(0).permutation(rows)
    np.testing.assert_allclose(trimmed_mean(shuffled, 0.1), trimmed_mean(rows, 0.1))
    np.testing.assert_allclose(trimmed_mean(rows[:1], 0.9), rows[0])
    with pytest.raises(ValueError, match="expected 0 <= trim < 1"):
        trimmed_mean(rows, 1.0)


def test_the_spread_is_robust_and_has_something_to_fall_back_on():
    distances = np.random.default_rng(0).normal(10.0, 2.0, 20_001)
    assert spread_of(distances) == pytest.approx((10.0, 2.0), rel=0.05)
    assert spread_of(np.r_[distances, np.full(500, 1e6)])[1] == pytest.approx(2.0, rel=0.1)
    assert spread_of(np.array([1.0, 1.0, 1.0, 5.0])) == pytest.approx((1.0, math.sqrt(3.0)))
    assert spread_of(np.array([3.0, 3.0])) == (3.0, 3.0)
    with pytest.raises(ValueError, match="all of their distances are equal to zero"):
        spread_of(np.zeros(4))


def test_distance_logits_keeps_the_order_and_is_half_at_three_deviations():
    distances = np.array([10.0, 16.0, 8.0, 1e6])
    logits = distance_logits(distances, 10.0, 2.0)
    assert logits[:3] == pytest.approx([2 * math.asinh(-3), 0.0, 2 * math.asinh(-4)])
    assert 0 < expit(logits).min() < expit(logits).max() < 1
    assert np.argsort(logits).tolist() == np.argsort(distances).tolist()
