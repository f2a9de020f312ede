import numpy as np
import pytest

from anomalymatch.algorithms.probe.regression import ProbeSpec, fit_logistic, self_train
from anomalymatch.backbones.features import Features, Shard
from anomalymatch.types import Reject
from anomalymatch.ui import live as module
from anomalymatch.ui.features import build_bank
from anomalymatch.ui.live import SUPPOSED_NORMALS, LiveRanking

SPEC = ProbeSpec(inverse_regularisation=10.0, rounds=3, confidence=0.8, weight=0.25, limit=200)
PLAIN = ProbeSpec(inverse_regularisation=10.0, rounds=0, confidence=0.8, weight=0.25, limit=200)
RARE = np.arange(0, 600, 20)
BAD = 13
NONE = np.array([], dtype=np.int64)


def make_bank(folder):
    """Images in 8 dimensions; each twentieth is rare, and number 13 cannot be read."""
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(600, 8))
    rows[RARE, 0] += 6
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    ids = [f"i{k}" for k in range(600)]
    kept = [k for k in range(600) if k != BAD]
    shard = Shard([ids[k] for k in kept], rows[kept].astype(np.float16), [Reject(ids[BAD], "truncated")])
    return build_bank(Features([shard]), ids, compression="exact", dimensions=8, folder=folder)


@pytest.fixture
def bank(tmp_path):
    return make_bank(tmp_path)


def no_examples(bank):
    return np.zeros((0, bank.dimensions), dtype=np.float32)


def test_nothing_ranks_without_an_anomaly(bank):
    live = LiveRanking(bank, SPEC, seed=0)
    assert live.fit(NONE, np.array([1, 2]), no_examples(bank)) is None
    assert live.fit(np.array([BAD]), np.array([1, 2]), no_examples(bank)) is None
    assert live.fit(bank.positions, NONE, no_examples(bank)) is None  # nothing is left that could be normal


@pytest.mark.parametrize("spec", [SPEC, PLAIN])
def test_the_ranking_is_that_of_the_probe(bank, spec):
    normals = np.array([k for k in range(300, 560) if k % 20])
    anomalies, others = RARE[:4], np.array([101, 120])
    logits = LiveRanking(bank, spec, seed=0).fit(anomalies, normals, no_examples(bank), others)
    assert logits.shape == (600,)
    assert np.flatnonzero(np.isnan(logits)).tolist() == [BAD]
    known = bank.rows(anomalies), bank.rows(normals)
    if spec.rounds:
        taken = set(anomalies) | set(normals) | set(others)
        pool = np.array([k for k in bank.positions if k not in taken])
        probe = self_train(*known, bank.rows(pool), spec)
    else:
        probe = fit_logistic(*known, inverse_regularisation=10.0)
    np.testing.assert_allclose(logits[bank.positions], probe.logits(bank.rows(bank.positions)), atol=1e-4)


def test_two_anomalies_alone_find_the_others(bank):
    logits = LiveRanking(bank, SPEC, seed=0).fit(RARE[:2], NONE, no_examples(bank))
    top = np.argsort(-np.nan_to_num(logits, nan=-np.inf))[:30]
    assert len(set(top) & set(RARE)) >= 25


def test_examples_from_elsewhere_are_anomalies(bank):
    live = LiveRanking(bank, SPEC, seed=0)
    example = np.eye(8, dtype=np.float32)[:1]
    logits = live.fit(NONE, NONE, example)
    top = np.argsort(-np.nan_to_num(logits, nan=-np.inf))[:30]
    assert len(set(top) & set(RARE)) >= 25
    both = live.fit(RARE[:2], NONE, np.eye(8, dtype=np.float32)[3:4])
    assert not np.allclose(np.nan_to_num(both), np.nan_to_num(live.fit(RARE[:2], NONE, no_examples(bank))))


def test_other_views_of_the_labelled_anomalies_teach_too(bank):
    asked = []

    def turned(positions):
        asked.append(positions.tolist())
        return np.eye(8, dtype=np.float32)[[3] * len(positions)]

    plain = LiveRanking(bank, PLAIN, seed=0).fit(RARE[:2], NONE, no_examples(bank))
    taught = LiveRanking(bank, PLAIN, seed=0, turned=turned).fit(np.append(RARE[:2], BAD), NONE, no_examples(bank))
    assert asked == [RARE[:2].tolist()]  # not of what cannot be read
    gain = (taught - plain)[bank.positions]
    towards = bank.rows(bank.positions)[:, 3]
    assert np.corrcoef(gain, towards)[0, 1] > 0.5


def test_supposed_normals_fill_up_the_labelled_ones(bank, monkeypatch):
    seen = []

    def recorded(anomalies, normals, *others, **options):
        seen.append((anomalies, normals))
        return self_train(anomalies, normals, *others, **options)

    monkeypatch.setattr(module, "self_train", recorded)
    live = LiveRanking(bank, PLAIN, seed=0)
    normals = bank.positions[1:250]
    for count in (0, 1, 150, SUPPOSED_NORMALS, 249):
        live.fit(RARE[:1], normals[:count], no_examples(bank), np.arange(400, 500))
        rows = seen[-1][1]
        assert len(rows) == max(SUPPOSED_NORMALS, count)
        np.testing.assert_array_equal(rows[:count], bank.rows(normals[:count]))
        assert len(np.unique(rows, axis=0)) == len(rows)
        labelled = np.concatenate([RARE[:1], np.arange(400, 500)])
        assert not (rows[:, None] == bank.rows(labelled)[None]).all(axis=2).any()
    live.fit(RARE[:1], np.array([BAD, 1]), no_examples(bank))
    assert len(seen[-1][1]) == SUPPOSED_NORMALS


def test_what_is_labelled_otherwise_is_not_learned_from(bank):
    live = LiveRanking(bank, SPEC, seed=0)
    normals = np.array([k for k in range(300, 560) if k % 20])
    free = live.fit(RARE[:4], normals, no_examples(bank))
    without = live.fit(RARE[:4], normals, no_examples(bank), RARE[4:15])
    assert not np.allclose(np.nan_to_num(free), np.nan_to_num(without))


def test_a_seed_gives_one_ranking_and_another_another(bank):
    first, second = (LiveRanking(bank, SPEC, seed=0).fit(RARE[:2], NONE, no_examples(bank)) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    other = LiveRanking(bank, SPEC, seed=1).fit(RARE[:2], NONE, no_examples(bank))
    assert not np.array_equal(np.nan_to_num(first), np.nan_to_num(other))


def test_the_pool_is_a_part_of_a_large_archive(bank, monkeypatch):
    monkeypatch.setattr(module, "POOL_IMAGES", 50)
    live = LiveRanking(bank, SPEC, seed=0)
    assert 50 <= len(live._pool) < 100
    whole = LiveRanking(bank, SPEC, seed=0)
    whole._pool = bank.positions
    fits = [one.fit(RARE[:2], NONE, no_examples(bank)) for one in (live, whole)]
    assert not np.allclose(*map(np.nan_to_num, fits))


def test_the_first_batch_is_diverse(bank, monkeypatch):
    batch = LiveRanking(bank, SPEC, seed=0).first_batch(20)
    assert len(set(batch)) == 20
    assert bank.has(batch).all()
    assert not np.array_equal(batch, LiveRanking(bank, SPEC, seed=1).first_batch(20))

    def nearest_two(positions):
        rows = bank.rows(positions)
        distance = np.linalg.norm(rows[:, None] - rows[None], axis=2)
        return distance[~np.eye(len(rows), dtype=bool)].min()

    rng = np.random.default_rng(0)
    drawn = [nearest_two(rng.choice(bank.positions, 20, replace=False)) for _ in range(50)]
    assert nearest_two(batch) > max(drawn)
    monkeypatch.setattr(module, "FIRST_SAMPLE", 25)
    assert len(LiveRanking(bank, SPEC, seed=0).first_batch(40)) == 25


def test_diverse_orders_the_readable_candidates(bank):
    live = LiveRanking(bank, SPEC, seed=0)
    candidates = np.array([40, BAD, 3, 5, 3 + 20])
    chosen = live.diverse(candidates, 10)
    assert chosen[0] == 40
    assert sorted(chosen) == [3, 5, 23, 40]
    assert len(live.diverse(candidates, 2)) == 2
    assert live.diverse(np.array([BAD]), 5).size == 0
