import numpy as np
import pytest
import torch
from sklearn.covariance import LedoitWolf
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import NearestNeighbors

from anomalymatch.algorithms.novelty.detectors import (
    Mahalanobis,
    Neighbours,
    PrincipalResidual,
    fit_detector,
    nearest_distances,
)
from anomalymatch.errors import ConfigError, DataError

CPU = torch.device("cpu")
DETECTORS = [Neighbours(2), Mahalanobis(None, 0.1), PrincipalResidual(0.5, 0.1)]
NAMES = ("neighbours", "mahalanobis", "residual")


def units(count, width=8, seed=0, towards=0, spread=0.3):
    rows = np.random.default_rng(seed).normal(size=(count, width)) * spread
    rows[:, towards] += 1.0
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows.astype(np.float16).astype(np.float32)


def nobody(rows):
    return np.full(len(rows), -1)


def distances_of(novelty, logits):
    return (np.sinh(logits / 2) + 3.0) * novelty.spread + novelty.median


@pytest.mark.parametrize("detector", DETECTORS, ids=NAMES)
def test_anomalies_score_higher_than_normal_images(detector):
    novelty = fit_detector(detector, units(100), drop=0.0, device=CPU)
    new, odd = units(50, seed=1), units(50, seed=2, towards=3)
    logits = novelty.logits(np.concatenate([new, odd]), np.full(100, -1), CPU)
    assert roc_auc_score(np.repeat([0, 1], 50), logits) > 0.95
    assert np.isfinite(logits).all()
    own = novelty.logits(units(100), np.arange(100), CPU)
    assert np.median(own) == pytest.approx(2 * np.arcsinh(-3.0), rel=1e-3)


def scattered(count, seed):
    rows = np.random.default_rng(seed).normal(size=(count, 8)) * 0.5
    rows[:, 0] -= 0.3
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("detector", DETECTORS, ids=NAMES)
def test_dropping_the_highest_reduces_the_effect_of_hidden_anomalies(detector):
    rows = np.concatenate([units(180), scattered(20, seed=2)])
    both = np.concatenate([units(500, seed=1), scattered(500, seed=4)])
    aucs = {}
    for drop in (0.0, 0.2):
        novelty = fit_detector(detector, rows, drop=drop, device=CPU)
        assert (novelty.place >= 0).sum() == len(rows) * (1 - drop)
        aucs[drop] = roc_auc_score(np.repeat([0, 1], 500), novelty.logits(both, nobody(both), CPU))
    assert (novelty.place[180:] < 0).sum() > 10  # at random it would be 4
    assert aucs[0.2] > aucs[0.0] + (-0.001 if isinstance(detector, Mahalanobis) else 0.003)


def test_neighbours_leave_out_the_image_itself_and_only_that():
    rows = units(30)
    novelty = fit_detector(Neighbours(2), rows, drop=0.1, device=CPU)
    kept = novelty.place >= 0
    reference = NearestNeighbors(n_neighbors=2).fit(rows[kept])
    expected = np.empty(30)
    expected[kept] = reference.kneighbors()[0].mean(1)
    expected[~kept] = reference.kneighbors(rows[~kept])[0].mean(1)
    distances = distances_of(novelty, novelty.logits(rows, np.arange(30), CPU))
    np.testing.assert_allclose(distances, expected, rtol=1e-4)
    unknown = distances_of(novelty, novelty.logits(rows, nobody(rows), CPU))
    assert (unknown[kept] < expected[kept]).all()


def test_the_covariance_is_shrunk_as_ledoit_and_wolf_say():
    rows, queries = units(20, 40), units(5, 40, seed=1)  # fewer images than dimensions
    novelty = fit_detector(Mahalanobis(None, 0.0), rows, drop=0.0, device=CPU)
    distances = distances_of(novelty, novelty.logits(queries, nobody(queries), CPU))
    reference = LedoitWolf().fit(rows.astype(np.float64))
    np.testing.assert_allclose(distances**2, reference.mahalanobis(queries.astype(np.float64)), rtol=1e-6)


@pytest.mark.parametrize("detector", DETECTORS, ids=NAMES)
def test_too_few_or_unusable_features_raise(detector):
    name = type(detector).__name__
    for count in range(detector.least):
        with pytest.raises(DataError, match=rf"{name} needs at least {detector.least} normal images.*and {count} are"):
            fit_detector(detector, units(count), drop=0.0, device=CPU)
    fit_detector(detector, units(detector.least), drop=0.0, device=CPU)
    with pytest.raises(DataError, match=rf"{name} cannot be fitted on 6 images: their features are all equal"):
        fit_detector(detector, np.repeat(units(1), 6, axis=0), drop=0.0, device=CPU)
    broken = units(6)
    broken[3, 2] = np.nan
    with pytest.raises(DataError, match="some features are not finite"):
        fit_detector(detector, broken, drop=0.0, device=CPU)


def test_an_index_finds_the_neighbours_of_a_large_bank():
    pytest.importorskip("faiss")
    bank = torch.from_numpy(units(3000)).half()
    queries = torch.cat([bank[:200], torch.from_numpy(units(200, seed=1)).half()])
    own = torch.cat([torch.arange(200), torch.full((200,), -1)])
    exact = nearest_distances(queries, bank, 3, own, device=CPU)
    found = nearest_distances(queries, bank, 3, own, device=CPU, exact_rows=10)
    assert (found >= exact - 1e-2).all()
    assert (found - exact).abs().mean() < 0.01
    assert (exact[:200, 0] > 0).all()
    assert (found[:200, 0] > 0).all()


def test_a_large_bank_without_faiss_raises(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    bank = torch.from_numpy(units(20))
    with pytest.raises(
        ConfigError, match=r"20 images to compare with need an index: pip install 'anomalymatch\[faiss\]'"
    ):
        nearest_distances(bank, bank, 2, torch.arange(20), device=CPU, exact_rows=10)
