from dataclasses import replace

import numpy as np
import pytest

from anomalymatch.algorithms.probe.regression import ProbeSpec, fit_logistic, self_train
from anomalymatch.ui import live as module
from anomalymatch.ui.features import build_feature_store
from anomalymatch.ui.live import ASSUMED_NORMALS, LiveRanking

SPEC = ProbeSpec(
    inverse_regularisation=10.0,
    rounds=3,
    confidence=0.8,
    weight=0.25,
    limit=200,
    orientations=1,
    calibration="none",
    folds=5,
    pool_images=10_000,
)
PLAIN = replace(SPEC, rounds=0)
RARE = np.arange(0, 600, 20)
BAD = 13
NONE = np.array([], dtype=np.int64)


@pytest.fixture
def store(make_features, tmp_path):
    """Store of images with 8 features; each twentieth is rare, and number 13 is unreadable."""
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(600, 8))
    rows[RARE, 0] += 6
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    ids = [f"i{k}" for k in range(600)]
    features = make_features(rows, ids, bad={BAD})
    return build_feature_store(features, ids, compression="exact", dimensions=8, folder=tmp_path)


def no_examples(store):
    return np.zeros((0, store.dimensions), dtype=np.float32)


def test_no_ranking_without_an_anomaly(store):
    live = LiveRanking(store, SPEC, seed=0)
    assert live.fit(NONE, np.array([1, 2]), no_examples(store)) is None
    assert live.fit(np.array([BAD]), np.array([1, 2]), no_examples(store)) is None
    assert live.fit(store.positions, NONE, no_examples(store)) is None  # no image is left to be assumed normal


@pytest.mark.parametrize("spec", [SPEC, PLAIN])
def test_live_ranking_equals_the_probe(store, spec):
    normals = np.array([k for k in range(300, 560) if k % 20])
    anomalies, others = RARE[:4], np.array([101, 120])
    logits = LiveRanking(store, spec, seed=0).fit(anomalies, normals, no_examples(store), others)
    assert logits.shape == (600,)
    assert np.flatnonzero(np.isnan(logits)).tolist() == [BAD]
    known = store.rows(anomalies), store.rows(normals)
    if spec.rounds:
        taken = set(anomalies) | set(normals) | set(others)
        pool = np.array([k for k in store.positions if k not in taken])
        probe = self_train(*known, store.rows(pool), spec).probe
    else:
        probe = fit_logistic(*known, inverse_regularisation=10.0)
    np.testing.assert_allclose(logits[store.positions], probe.logits(store.rows(store.positions)), atol=1e-4)


def test_two_anomalies_alone_find_the_others(store):
    logits = LiveRanking(store, SPEC, seed=0).fit(RARE[:2], NONE, no_examples(store))
    top = np.argsort(-np.nan_to_num(logits, nan=-np.inf))[:30]
    assert len(set(top) & set(RARE)) >= 25


def test_examples_count_as_anomalies(store):
    live = LiveRanking(store, SPEC, seed=0)
    example = np.eye(8, dtype=np.float32)[:1]
    logits = live.fit(NONE, NONE, example)
    top = np.argsort(-np.nan_to_num(logits, nan=-np.inf))[:30]
    assert len(set(top) & set(RARE)) >= 25
    both = live.fit(RARE[:2], NONE, np.eye(8, dtype=np.float32)[3:4])
    assert not np.allclose(np.nan_to_num(both), np.nan_to_num(live.fit(RARE[:2], NONE, no_examples(store))))


def test_reoriented_views_of_the_anomalies_join_the_training(store):
    asked = []

    def reorient(positions):
        asked.append(positions.tolist())
        return np.eye(8, dtype=np.float32)[[3] * len(positions)]

    plain = LiveRanking(store, PLAIN, seed=0).fit(RARE[:2], NONE, no_examples(store))
    taught = LiveRanking(store, PLAIN, seed=0, reorient=reorient).fit(
        np.append(RARE[:2], BAD), NONE, no_examples(store)
    )
    assert asked == [RARE[:2].tolist()]  # not of unreadable images
    gain = (taught - plain)[store.positions]
    towards = store.rows(store.positions)[:, 3]
    assert np.corrcoef(gain, towards)[0, 1] > 0.5


def test_assumed_normals_fill_up_the_labelled_ones(store, monkeypatch):
    seen = []

    def recorded(anomalies, normals, *others, **options):
        seen.append((anomalies, normals))
        return self_train(anomalies, normals, *others, **options)

    monkeypatch.setattr(module, "self_train", recorded)
    live = LiveRanking(store, PLAIN, seed=0)
    normals = store.positions[1:250]
    for count in (0, 1, 150, ASSUMED_NORMALS, 249):
        live.fit(RARE[:1], normals[:count], no_examples(store), np.arange(400, 500))
        rows = seen[-1][1]
        assert len(rows) == max(ASSUMED_NORMALS, count)
        np.testing.assert_array_equal(rows[:count], store.rows(normals[:count]))
        assert len(np.unique(rows, axis=0)) == len(rows)
        labelled = np.concatenate([RARE[:1], np.arange(400, 500)])
        assert not (rows[:, None] == store.rows(labelled)[None]).all(axis=2).any()
    live.fit(RARE[:1], np.array([BAD, 1]), no_examples(store))
    assert len(seen[-1][1]) == ASSUMED_NORMALS


def test_other_labels_are_excluded_from_the_pool(store):
    live = LiveRanking(store, SPEC, seed=0)
    normals = np.array([k for k in range(300, 560) if k % 20])
    free = live.fit(RARE[:4], normals, no_examples(store))
    without = live.fit(RARE[:4], normals, no_examples(store), RARE[4:15])
    assert not np.allclose(np.nan_to_num(free), np.nan_to_num(without))


def test_ranking_depends_on_the_seed_alone(store):
    first, second = (LiveRanking(store, SPEC, seed=0).fit(RARE[:2], NONE, no_examples(store)) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    other = LiveRanking(store, SPEC, seed=1).fit(RARE[:2], NONE, no_examples(store))
    assert not np.array_equal(np.nan_to_num(first), np.nan_to_num(other))


def test_pool_is_a_part_of_a_large_archive(store):
    live = LiveRanking(store, replace(SPEC, pool_images=50), seed=0)
    assert 50 <= len(live._pool) < 100
    whole = LiveRanking(store, SPEC, seed=0)
    whole._pool = store.positions
    fits = [one.fit(RARE[:2], NONE, no_examples(store)) for one in (live, whole)]
    assert not np.allclose(*map(np.nan_to_num, fits))


def test_first_batch_is_diverse(store, monkeypatch):
    batch = LiveRanking(store, SPEC, seed=0).first_batch(20)
    assert len(set(batch)) == 20
    assert store.has(batch).all()
    assert not np.array_equal(batch, LiveRanking(store, SPEC, seed=1).first_batch(20))

    def nearest_two(positions):
        rows = store.rows(positions)
        distance = np.linalg.norm(rows[:, None] - rows[None], axis=2)
        return distance[~np.eye(len(rows), dtype=bool)].min()

    rng = np.random.default_rng(0)
    drawn = [nearest_two(rng.choice(store.positions, 20, replace=False)) for _ in range(50)]
    assert nearest_two(batch) > max(drawn)
    monkeypatch.setattr(module, "FIRST_SAMPLE", 25)
    assert len(LiveRanking(store, SPEC, seed=0).first_batch(40)) == 25


def test_diverse_returns_readable_candidates(store):
    live = LiveRanking(store, SPEC, seed=0)
    candidates = np.array([40, BAD, 3, 5, 3 + 20])
    chosen = live.diverse(candidates, 10)
    assert chosen[0] == 40
    assert sorted(chosen) == [3, 5, 23, 40]
    assert len(live.diverse(candidates, 2)) == 2
    assert live.diverse(np.array([BAD]), 5).size == 0
