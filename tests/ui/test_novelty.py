import logging

import numpy as np
import pytest
from sklearn.neighbors import NearestNeighbors

from anomalymatch.algorithms.novelty.detectors import Neighbours, PrincipalResidual
from anomalymatch.backbones.features import Features, Shard
from anomalymatch.types import Reject
from anomalymatch.ui import novelty as module
from anomalymatch.ui.features import build_bank
from anomalymatch.ui.novelty import novelty_of

COUNT, BAD = 200, 17


@pytest.fixture
def rows():
    rows = np.random.default_rng(0).normal(size=(COUNT - 1, 6)) + 4.0
    rows[50] = [-9, 9, -9, 9, -9, 9]  # the odd one, of image 51
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows.astype(np.float16)


def bank_of(rows, folder):
    ids = [f"im{i:03d}" for i in range(len(rows) + 1)]
    shard = Shard(ids[:BAD] + ids[BAD + 1 :], rows, [Reject(ids[BAD], "torn")])
    return build_bank(Features([shard]), ids, compression="exact", dimensions=6, folder=folder)


def test_it_orders_as_the_mean_distance_to_the_nearest_others(rows, tmp_path):
    found = novelty_of(bank_of(rows, tmp_path), Neighbours(5), COUNT, folder=tmp_path)
    assert found.shape == (COUNT,)
    assert np.isnan(found[BAD])
    assert np.nanargmax(found) == 51
    distances, _ = NearestNeighbors(n_neighbors=6).fit(rows.astype(np.float64)).kneighbors()
    expected = np.insert(distances[:, :5].mean(axis=1), BAD, np.nan)
    np.testing.assert_array_equal(np.argsort(found), np.argsort(expected))


@pytest.mark.parametrize("sample", [40, 199])
def test_blocks_change_nothing_and_a_sample_finds_the_odd_one_too(rows, tmp_path, monkeypatch, sample):
    monkeypatch.setattr(module, "SAMPLE", sample)
    bank = bank_of(rows, tmp_path)
    whole = novelty_of(bank, Neighbours(3), COUNT, folder=tmp_path / "a")
    monkeypatch.setattr(module, "BLOCK", 7)
    np.testing.assert_allclose(novelty_of(bank, Neighbours(3), COUNT, folder=tmp_path / "b"), whole, rtol=1e-5)
    assert np.nanargmax(whole) == 51


def test_it_is_computed_once_for_each_archive_and_detector(rows, tmp_path, monkeypatch):
    bank = bank_of(rows, tmp_path)
    first = novelty_of(bank, Neighbours(3), COUNT, folder=tmp_path)
    calls = []
    monkeypatch.setattr(module, "_scores", lambda *_: calls.append(1) or np.zeros(COUNT - 1, np.float32))
    np.testing.assert_array_equal(novelty_of(bank, Neighbours(3), COUNT, folder=tmp_path), first)
    assert not calls
    novelty_of(bank, Neighbours(4), COUNT, folder=tmp_path)
    novelty_of(bank, PrincipalResidual(variance=0.5, trim=0.0), COUNT, folder=tmp_path)
    novelty_of(bank_of(rows[::-1].copy(), tmp_path), Neighbours(3), COUNT, folder=tmp_path)
    assert len(calls) == 3


def test_a_damaged_file_is_computed_again(rows, tmp_path, caplog):
    bank = bank_of(rows, tmp_path)
    first = novelty_of(bank, Neighbours(3), COUNT, folder=tmp_path)
    (path,) = tmp_path.glob("novelty-*.safetensors")
    path.write_bytes(path.read_bytes()[:100])
    np.testing.assert_array_equal(novelty_of(bank, Neighbours(3), COUNT, folder=tmp_path), first)
    assert "is corrupt" in caplog.text


@pytest.mark.parametrize("count", [5, 50], ids=["few", "equal"])
def test_too_few_or_equal_images_have_none(count, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    ids = [f"im{i}" for i in range(count)]
    features = Features([Shard(ids, np.ones((count, 6), np.float16), [])])
    bank = build_bank(features, ids, compression="exact", dimensions=6, folder=tmp_path)
    assert novelty_of(bank, Neighbours(10), count, folder=tmp_path) is None
    assert "No order by novelty" in caplog.text
