import logging
from functools import partial

import numpy as np
import pytest
from sklearn.neighbors import NearestNeighbors

from anomalymatch.algorithms.novelty.detectors import Neighbours, PrincipalResidual
from anomalymatch.ui import novelty as module
from anomalymatch.ui.novelty import compute_novelty

COUNT, BAD, ODD = 200, 17, 51


@pytest.fixture
def rows():
    rows = np.random.default_rng(0).normal(size=(COUNT, 6)) + 4.0
    rows[ODD] = [-9, 9, -9, 9, -9, 9]
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows.astype(np.float16)


@pytest.fixture
def store_of(make_store):
    return partial(make_store, bad={BAD})


def test_novelty_is_the_mean_distance_to_the_nearest_images(rows, store_of, tmp_path):
    found = compute_novelty(store_of(rows), Neighbours(5), folder=tmp_path)
    assert found.shape == (COUNT,)
    assert np.isnan(found[BAD])
    assert np.nanargmax(found) == ODD
    kept = np.delete(rows, BAD, axis=0).astype(np.float64)
    distances, _ = NearestNeighbors(n_neighbors=6).fit(kept).kneighbors()
    expected = np.insert(distances[:, :5].mean(axis=1), BAD, np.nan)
    np.testing.assert_array_equal(np.argsort(found), np.argsort(expected))


@pytest.mark.parametrize("sample", [40, 199])
def test_novelty_of_a_sample_and_in_blocks(rows, store_of, tmp_path, monkeypatch, sample):
    monkeypatch.setattr(module, "SAMPLE", sample)
    store = store_of(rows)
    whole = compute_novelty(store, Neighbours(3), folder=tmp_path / "a")
    monkeypatch.setattr(module, "BLOCK", 7)
    np.testing.assert_allclose(compute_novelty(store, Neighbours(3), folder=tmp_path / "b"), whole, rtol=1e-5)
    assert np.nanargmax(whole) == ODD


def test_novelty_is_cached_by_archive_and_detector(rows, store_of, tmp_path, monkeypatch, caplog):
    store = store_of(rows)
    first = compute_novelty(store, Neighbours(3), folder=tmp_path)
    (path,) = tmp_path.glob("novelty/*/scores.npy")
    path.write_bytes(path.read_bytes()[:100])
    np.testing.assert_array_equal(compute_novelty(store, Neighbours(3), folder=tmp_path), first)
    assert "is corrupt" in caplog.text
    calls = []
    monkeypatch.setattr(module, "_score", lambda *_: calls.append(1) or np.zeros(COUNT - 1, np.float32))
    np.testing.assert_array_equal(compute_novelty(store, Neighbours(3), folder=tmp_path), first)
    assert not calls
    compute_novelty(store, Neighbours(4), folder=tmp_path)
    compute_novelty(store, PrincipalResidual(variance=0.5, trim=0.0), folder=tmp_path)
    compute_novelty(store_of(rows[::-1].copy()), Neighbours(3), folder=tmp_path)
    assert len(calls) == 3


@pytest.mark.parametrize("count", [5, 50], ids=["few", "equal"])
def test_few_or_equal_images_have_no_novelty(count, store_of, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    assert compute_novelty(store_of(np.ones((count, 6), np.float16)), Neighbours(10), folder=tmp_path) is None
    assert "not ordered by novelty" in caplog.text
