"""What the probe of the live ranking sees: two banks side by side, exact or compressed."""

import numpy as np
import pytest

from anomalymatch.algorithms.probe.regression import ProbeSpec, self_train
from anomalymatch.backbones.features import Features, Shard
from anomalymatch.errors import DataError
from anomalymatch.types import Reject
from anomalymatch.ui.features import build_bank, build_seen
from anomalymatch.ui.live import LiveRanking

SPEC = ProbeSpec(inverse_regularisation=10.0, rounds=2, confidence=0.8, weight=0.25, limit=50)
IDS = [f"i{k}" for k in range(300)]
KEPT = np.array([k for k in range(300) if k != 7])
RARE = np.arange(0, 300, 15)
NO_EXAMPLES = np.zeros((0, 36), np.float32)


@pytest.fixture
def views():
    """20 columns of the last layer, 16 of stages of little spread; anomalies show in a stage; image 7 is unreadable."""
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(300, 36))
    rows[:, :20] /= np.linalg.norm(rows[:, :20], axis=1, keepdims=True)
    rows[RARE, 22] += 6
    rows[:, 20:] = 0.3 + 0.02 * rows[:, 20:]
    shard = Shard([IDS[k] for k in KEPT], rows[KEPT].astype(np.float16), [Reject(IDS[7], "truncated")])
    return Features([shard], stage_width=16)


def seen_of(views, folder, compression="exact", dimensions=99):
    kept = {"compression": compression, "dimensions": dimensions, "folder": folder}
    bank = build_bank(views.last, IDS, **kept)
    return bank, build_seen(bank, views, IDS, **kept)


def test_both_banks_stand_side_by_side(views, tmp_path):
    bank, (both, scaling) = seen_of(views, tmp_path)
    some = np.array([0, 6, 8, 299])
    np.testing.assert_array_equal(both.rows(some), views.take([IDS[k] for k in some]))
    np.testing.assert_array_equal(both.positions, KEPT)
    assert both.dimensions == 36
    assert both.has(np.array([6, 7])).tolist() == [True, False]
    with pytest.raises(DataError, match="truncated"):
        both.rows(np.array([7]))
    assert scaling.blocks == (slice(0, 20), slice(20, 36))
    np.testing.assert_array_equal(scaling.scale, views.scaling.scale)
    direction = np.linspace(-1, 1, 36)
    values = both.project(direction, 0.5)
    assert np.flatnonzero(np.isnan(values)).tolist() == [7]
    np.testing.assert_allclose(values[KEPT], both.rows(KEPT) @ direction + 0.5, atol=1e-5)
    row = both.rows(np.array([3]))[0]
    np.testing.assert_array_equal(both.nearest(row, 5), bank.nearest(row[:20], 5))


def test_other_images_come_into_its_space(views, tmp_path):
    for compression, dimensions in (("exact", 1), ("pca", 99), ("pca", 6)):
        _, (both, _) = seen_of(views, tmp_path, compression, dimensions)
        encoded = both.encode(views.take([IDS[3], IDS[8]]))
        np.testing.assert_allclose(encoded, both.rows(np.array([3, 8])), atol=2e-3)


def test_the_live_ranking_is_that_of_the_learners_probe(views, tmp_path):
    bank, seen = seen_of(views, tmp_path)
    normals = np.array([k for k in range(20, 260) if k % 15])
    logits = LiveRanking(bank, SPEC, seed=0, seen=seen).fit(RARE[:5], normals, NO_EXAMPLES)
    rows, taken = views.take, set(RARE[:5]) | set(normals)
    pool = rows([IDS[k] for k in KEPT if k not in taken])
    probe = self_train(rows([IDS[k] for k in RARE[:5]]), rows([IDS[k] for k in normals]), pool, SPEC, views.scaling)
    np.testing.assert_allclose(logits[KEPT], probe.logits(rows([IDS[k] for k in KEPT])), atol=2e-3)


def test_all_principal_components_rank_as_the_features_do(views, tmp_path):
    normals = np.array([k for k in range(20, 260) if k % 15])
    exact, rotated = (
        LiveRanking(bank, SPEC, seed=0, seen=seen).fit(RARE[:5], normals, NO_EXAMPLES)[KEPT]
        for bank, seen in (seen_of(views, tmp_path, compression) for compression in ("exact", "pca"))
    )
    assert np.corrcoef(exact, rotated)[0, 1] > 0.999
    plain = LiveRanking(seen_of(views, tmp_path)[0], SPEC, seed=0).fit(RARE[:5], normals, NO_EXAMPLES[:, :20])[KEPT]
    rare = np.isin(KEPT, RARE)
    assert exact[rare].mean() - exact[~rare].mean() > 2 * (plain[rare].mean() - plain[~rare].mean())


def test_without_stages_there_is_but_the_bank(views, tmp_path):
    alone = views.last
    bank, (both, scaling) = seen_of(alone, tmp_path)
    assert both is bank
    assert scaling.blocks == (slice(0, 20),)


def test_another_scale_is_another_compression(views, tmp_path):
    kept = {"compression": "pca", "dimensions": 4, "folder": tmp_path}
    some = np.array([0, 1])
    first, again, other = (
        build_bank(views.stages, IDS, **kept, scale=scale).rows(some)
        for scale in (None, np.ones(16, np.float32), 2 * np.ones(16, np.float32))
    )
    np.testing.assert_array_equal(first, again)
    np.testing.assert_allclose(other, 2 * first, rtol=1e-2)
