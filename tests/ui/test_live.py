import logging
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from sklearn.neighbors import NearestNeighbors

from anomalymatch.algorithms.novelty.detectors import Neighbours, PrincipalResidual
from anomalymatch.algorithms.probe.regression import self_train
from anomalymatch.ui import live as module
from anomalymatch.ui.live import ASSUMED_NORMALS, LiveRanking, compute_novelty

RARE = np.arange(0, 600, 20)
BAD = 13
NONE = np.array([], dtype=np.int64)
NO_EXAMPLES = np.zeros((0, 8), dtype=np.float32)


@pytest.fixture
def store(make_store):
    """Store of images with 8 features; each twentieth is rare, and number 13 is unreadable."""
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(600, 8))
    rows[RARE, 0] += 6
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return make_store(rows, bad={BAD})


@pytest.fixture
def make(store, spec):
    """Function that makes a live ranking on `store`."""

    def make(*, rounds=3, pool_images=10_000, seed=0, **options):
        return LiveRanking(store, replace(spec, rounds=rounds, pool_images=pool_images), seed=seed, **options)

    return make


def test_no_ranking_without_an_anomaly(store, make):
    live = make()
    assert live.fit(NONE, np.array([1, 2]), NO_EXAMPLES) is None
    assert live.fit(np.array([BAD]), np.array([1, 2]), NO_EXAMPLES) is None
    assert live.fit(store.positions, NONE, NO_EXAMPLES) is None  # no image is left to be assumed normal


def test_two_anomalies_alone_find_the_others(make):
    logits = make().fit(RARE[:2], NONE, NO_EXAMPLES)
    top = np.argsort(-np.nan_to_num(logits, nan=-np.inf))[:30]
    assert len(set(top) & set(RARE)) >= 25


def test_examples_count_as_anomalies(make):
    live = make()
    example = np.eye(8, dtype=np.float32)[:1]
    logits = live.fit(NONE, NONE, example)
    top = np.argsort(-np.nan_to_num(logits, nan=-np.inf))[:30]
    assert len(set(top) & set(RARE)) >= 25
    both = live.fit(RARE[:2], NONE, np.eye(8, dtype=np.float32)[3:4])
    assert not np.allclose(np.nan_to_num(both), np.nan_to_num(live.fit(RARE[:2], NONE, NO_EXAMPLES)))


def test_reoriented_views_of_the_anomalies_join_the_training(store, make):
    asked = []

    def reorient(positions):
        asked.append(positions.tolist())
        return np.eye(8, dtype=np.float32)[[3] * len(positions)]

    plain = make(rounds=0).fit(RARE[:2], NONE, NO_EXAMPLES)
    taught = make(rounds=0, reorient=reorient).fit(np.append(RARE[:2], BAD), NONE, NO_EXAMPLES)
    assert asked == [RARE[:2].tolist()]  # not of unreadable images
    gain = (taught - plain)[store.positions]
    towards = store.rows(store.positions)[:, 3]
    assert np.corrcoef(gain, towards)[0, 1] > 0.5


def test_assumed_normals_fill_up_the_labelled_ones(store, make, monkeypatch):
    seen = []

    def recorded(anomalies, normals, *others, **options):
        seen.append((anomalies, normals))
        return self_train(anomalies, normals, *others, **options)

    monkeypatch.setattr(module, "self_train", recorded)
    live = make(rounds=0)
    normals = store.positions[1:250]
    for count in (0, 1, 150, ASSUMED_NORMALS, 249):
        live.fit(RARE[:1], normals[:count], NO_EXAMPLES, np.arange(400, 500))
        rows = seen[-1][1]
        assert len(rows) == max(ASSUMED_NORMALS, count)
        np.testing.assert_array_equal(rows[:count], store.rows(normals[:count]))
        assert len(np.unique(rows, axis=0)) == len(rows)
        labelled = np.concatenate([RARE[:1], np.arange(400, 500)])
        assert not (rows[:, None] == store.rows(labelled)[None]).all(axis=2).any()
    live.fit(RARE[:1], np.array([BAD, 1]), NO_EXAMPLES)
    assert len(seen[-1][1]) == ASSUMED_NORMALS


def test_other_labels_are_excluded_from_the_pool(make):
    live = make()
    normals = np.array([k for k in range(300, 560) if k % 20])
    free = live.fit(RARE[:4], normals, NO_EXAMPLES)
    without = live.fit(RARE[:4], normals, NO_EXAMPLES, RARE[4:15])
    assert not np.allclose(np.nan_to_num(free), np.nan_to_num(without))


def test_a_kind_is_ranked_against_the_other_anomalies(store, make):
    live = make(rounds=0)
    both = live.fit(RARE[:4], NONE, NO_EXAMPLES)
    fitted = live.fitted
    kinds = RARE[store.rows(RARE)[:, 1] > 0], RARE[store.rows(RARE)[:, 1] < 0]
    logits = live.fit_kind(kinds[0][:5], kinds[1][:5], NONE)
    assert logits[kinds[0][5:]].mean() > logits[kinds[1][5:]].mean()
    assert logits[kinds[0][5:]].min() > np.nanmedian(logits)
    assert live.fit_kind(np.array([BAD]), NONE, NONE) is None
    assert live.fitted is fitted  # heat maps still explain the ranking of all anomalies
    np.testing.assert_array_equal(both, live.fit(RARE[:4], NONE, NO_EXAMPLES))


def test_ranking_depends_on_the_seed_alone(make):
    first, second = (make().fit(RARE[:2], NONE, NO_EXAMPLES) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    other = make(seed=1).fit(RARE[:2], NONE, NO_EXAMPLES)
    assert not np.array_equal(np.nan_to_num(first), np.nan_to_num(other))


def test_pool_is_a_part_of_a_large_archive(store, make):
    live = make(pool_images=50)
    assert 50 <= len(live._pool) < 100
    whole = make()
    whole._pool = store.positions
    fits = [one.fit(RARE[:2], NONE, NO_EXAMPLES) for one in (live, whole)]
    assert not np.allclose(*map(np.nan_to_num, fits))


def test_first_batch_is_diverse(store, make, monkeypatch):
    batch = make().first_batch(20)
    assert len(set(batch)) == 20
    assert store.has(batch).all()
    assert not np.array_equal(batch, make(seed=1).first_batch(20))

    def nearest_two(positions):
        rows = store.rows(positions)
        distance = np.linalg.norm(rows[:, None] - rows[None], axis=2)
        return distance[~np.eye(len(rows), dtype=bool)].min()

    rng = np.random.default_rng(0)
    drawn = [nearest_two(rng.choice(store.positions, 20, replace=False)) for _ in range(50)]
    assert nearest_two(batch) > max(drawn)
    monkeypatch.setattr(module, "FIRST_SAMPLE", 25)
    assert len(make().first_batch(40)) == 25


def test_diverse_returns_readable_candidates(make):
    live = make()
    candidates = np.array([40, BAD, 3, 5, 3 + 20])
    chosen = live.diverse(candidates, 10)
    assert chosen[0] == 40
    assert sorted(chosen) == [3, 5, 23, 40]
    assert len(live.diverse(candidates, 2)) == 2
    assert live.diverse(np.array([BAD]), 5).size == 0


COUNT, UNREADABLE, ODD = 200, 17, 51


@pytest.fixture
def novelty_rows():
    rows = np.random.default_rng(0).normal(size=(COUNT, 6)) + 4.0
    rows[ODD] = [-9, 9, -9, 9, -9, 9]
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows.astype(np.float16)


@pytest.fixture
def store_of(make_store):
    return partial(make_store, bad={UNREADABLE})


def test_novelty_is_the_mean_distance_to_the_nearest_images(novelty_rows, store_of, tmp_path):
    found = compute_novelty(store_of(novelty_rows), Neighbours(5), folder=tmp_path)
    assert found.shape == (COUNT,)
    assert np.isnan(found[UNREADABLE])
    assert np.nanargmax(found) == ODD
    kept = np.delete(novelty_rows, UNREADABLE, axis=0).astype(np.float64)
    distances, _ = NearestNeighbors(n_neighbors=6).fit(kept).kneighbors()
    expected = np.insert(distances[:, :5].mean(axis=1), UNREADABLE, np.nan)
    np.testing.assert_array_equal(np.argsort(found), np.argsort(expected))


@pytest.mark.parametrize("sample", [40, 199])
def test_novelty_of_a_sample_and_in_blocks(novelty_rows, store_of, tmp_path, monkeypatch, sample):
    monkeypatch.setattr(module, "NOVELTY_SAMPLE", sample)
    store = store_of(novelty_rows)
    whole = compute_novelty(store, Neighbours(3), folder=tmp_path / "a")
    monkeypatch.setattr(module, "NOVELTY_BLOCK", 7)
    np.testing.assert_allclose(compute_novelty(store, Neighbours(3), folder=tmp_path / "b"), whole, rtol=1e-5)
    assert np.nanargmax(whole) == ODD


def test_novelty_is_cached_by_archive_and_detector(novelty_rows, store_of, tmp_path, monkeypatch, caplog):
    store = store_of(novelty_rows)
    first = compute_novelty(store, Neighbours(3), folder=tmp_path)
    (path,) = tmp_path.glob("novelty/*/scores.npy")
    path.write_bytes(path.read_bytes()[:100])
    np.testing.assert_array_equal(compute_novelty(store, Neighbours(3), folder=tmp_path), first)
    assert "is corrupt" in caplog.text
    calls = []
    monkeypatch.setattr(module, "_novelty_scores", lambda *_: calls.append(1) or np.zeros(COUNT - 1, np.float32))
    np.testing.assert_array_equal(compute_novelty(store, Neighbours(3), folder=tmp_path), first)
    assert not calls
    compute_novelty(store, Neighbours(4), folder=tmp_path)
    compute_novelty(store, PrincipalResidual(variance=0.5, trim=0.0), folder=tmp_path)
    compute_novelty(store_of(novelty_rows[::-1].copy()), Neighbours(3), folder=tmp_path)
    assert len(calls) == 3


@pytest.mark.parametrize("count", [5, 50], ids=["few", "equal"])
def test_few_or_equal_images_have_no_novelty(count, store_of, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    assert compute_novelty(store_of(np.ones((count, 6), np.float16)), Neighbours(10), folder=tmp_path) is None
    assert "not ordered by novelty" in caplog.text
