from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sklearn.decomposition import PCA

from anomalymatch.algorithms.probe.regression import self_train
from anomalymatch.cache import Cache
from anomalymatch.errors import ConfigError, DataError
from anomalymatch.ui import features as module
from anomalymatch.ui.features import BLOCK_ROWS, HalfMatrix, build_feature_store, principal_directions
from anomalymatch.ui.live import LiveRanking

BAD = {0, 7, 120, 399}
WIDTH, STAGES = 24, 16
RARE = np.arange(15, 300, 15)
NORMALS = np.array([k for k in range(21, 260) if k % 15 and k not in BAD])


def low_rank(count, width, rank, noise=0.02):
    """Unit vectors with a mean and nearly of a low rank, like real features."""
    rng = np.random.default_rng(0)
    basis = rng.normal(size=(rank, width)) * np.linspace(2, 0.5, rank)[:, None]
    rows = rng.normal(size=(count, rank)) @ basis + noise * rng.normal(size=(count, width)) + 0.3
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def rows():
    """Features of the last layer, and of stages with a small spread in which the rare images differ."""
    stages = np.random.default_rng(1).normal(size=(400, STAGES))
    stages[RARE, 2] += 6
    return np.concatenate([low_rank(400, WIDTH, 6), 0.3 + 0.02 * stages], axis=1).astype(np.float32)


IDS = [f"im{i:05d}" for i in range(400)]


@pytest.fixture
def build(rows, make_features, tmp_path):
    """Build a store: without stages by default, in shards of 50 images."""

    def build(compression="exact", *, dimensions=10, stages=False, bad=BAD, ids=IDS, some=rows):
        columns = some if stages else some[:, :WIDTH]
        features = make_features(columns, IDS[: len(some)], bad=bad, shard=50, stage_width=STAGES if stages else 0)
        return build_feature_store(features, ids, compression=compression, dimensions=dimensions, folder=tmp_path)

    return build


@pytest.fixture(params=[("exact", False), ("exact", True), ("pca", False), ("pca", True)], ids=str)
def store(request, build):
    return build(request.param[0], stages=request.param[1])


def test_rows_and_projections_by_position(store):
    assert store.positions.tolist() == [i for i in range(400) if i not in BAD]
    assert store.has(np.array([0, 1, 399, 398])).tolist() == [False, True, False, True]
    assert store.rows(np.array([5, 3, 5])).shape == (3, store.dimensions)
    assert store.rows(np.array([], dtype=np.int64)).shape == (0, store.dimensions)
    with pytest.raises(DataError, match="'im00120': reason 120"):
        store.rows(np.array([1, 120]))
    direction = np.random.default_rng(1).normal(size=store.dimensions)
    logits = store.project(direction, -1.5)
    assert np.flatnonzero(np.isnan(logits)).tolist() == sorted(BAD)
    expected = store.rows(store.positions).astype(np.float64) @ direction - 1.5
    np.testing.assert_allclose(logits[store.positions], expected, atol=1e-4)


def test_encode_gives_the_stored_rows(build, rows):
    for compression, dimensions in (("exact", 1), ("pca", 99), ("pca", 6)):
        for stages in (False, True):
            store = build(compression, dimensions=dimensions, stages=stages)
            pooled = rows[[3, 8]] if stages else rows[[3, 8], :WIDTH]
            np.testing.assert_allclose(store.encode(pooled), store.rows(np.array([3, 8])), rtol=2e-3, atol=4e-3)
            with pytest.raises(DataError, match=f"have 5 features, .* {pooled.shape[1]}"):
                store.encode(np.zeros((1, 5), np.float32))


@pytest.mark.parametrize(("compression", "share"), [("exact", 0.98), ("pca", 0.9)])
def test_nearest_images_by_the_last_layer(build, rows, compression, share):
    store, shares = build(compression, stages=True), []
    last = rows[:, :WIDTH]
    for position in (1, 50, 300):
        near = store.nearest(position, 10)
        assert position not in near
        row = store.last_layer.rows(np.array([position]))[0]
        assert (np.diff(store.last_layer.rows(near) @ row) <= 1e-6).all()
        true = [i for i in np.argsort(-(last @ last[position])) if i != position and i not in BAD][:10]
        shares.append(len(set(near) & set(true)) / 10)
    assert np.mean(shares) > share
    assert store.nearest(7, 10).size == 0  # unreadable
    assert len(store.nearest(1, 9999)) == 395


def test_ties_of_nearest_images_are_in_order_of_position(build):
    store = build(some=np.repeat(np.eye(3, 24, dtype=np.float32), 4, axis=0), bad={1}, ids=IDS[:12])
    assert store.nearest(2, 4).tolist() == [0, 3, 4, 5]
    assert store.nearest(9, 99).tolist() == [8, 10, 11, 0, 2, 3, 4, 5, 6, 7]
    assert store.nearest(9, 0).tolist() == []


def test_auto_compresses_large_features(build, monkeypatch):
    assert build("auto").dimensions == 24
    monkeypatch.setattr(module, "EXACT_BYTES", 2 * 396 * 24 - 1)
    assert build("auto").dimensions == 10


@pytest.mark.parametrize(("sample", "dimensions", "tolerance"), [(20_000, 99, 3e-3), (100, 12, 2e-2)])
def test_principal_components_keep_the_inner_products(build, rows, monkeypatch, sample, dimensions, tolerance):
    monkeypatch.setattr(module, "SAMPLE", sample)
    store = build("pca", dimensions=dimensions)
    assert store.dimensions == min(dimensions, 24)
    stored, kept = store.rows(store.positions), rows[store.positions, :24]
    np.testing.assert_allclose(stored @ stored.T, kept @ kept.T, atol=tolerance)


def test_wrong_options_and_features_of_other_images(build):
    with pytest.raises(ConfigError, match=r"ui.compression.*'zip'"):
        build("zip")
    with pytest.raises(ConfigError, match=r"ui.dimensions is 0"):
        build("pca", dimensions=0)
    for other in ([*IDS[:60], "x", *IDS[61:]], [*IDS[:60], IDS[61], IDS[60], *IDS[62:]]):
        with pytest.raises(DataError, match="'im00050'"):
            build(ids=other)
    with pytest.raises(DataError, match="400 images, but 401 images"):
        build(ids=[*IDS, "x"])


def test_archive_without_a_readable_image(build, rows):
    store = build("pca", some=rows[:20], bad=set(range(20)), ids=IDS[:20])
    assert store.positions.size == 0
    assert np.isnan(store.project(np.ones(24), 0.0)).all()
    assert store.rows(np.array([], dtype=np.int64)).shape == (0, 24)


def test_compressed_features_come_from_the_cache(build, rows, monkeypatch, tmp_path, caplog):
    first = build("pca", dimensions=9)
    entries = len(list((tmp_path / "compressed").glob("*/rows.npy")))

    def fail(*_):
        raise AssertionError("computed")

    with monkeypatch.context() as patch:
        patch.setattr(Cache, "write", fail)
        second = build("pca", dimensions=9)
        np.testing.assert_array_equal(first.rows(first.positions), second.rows(first.positions))
        np.testing.assert_array_equal(first.encode(rows[:, :24]), second.encode(rows[:, :24]))
        for changed in ({"dimensions": 8}, {"bad": {1, 2, 3, 4}}):
            with pytest.raises(AssertionError, match="computed"):
                build("pca", **{"dimensions": 9} | changed)
    (file,) = (tmp_path / "compressed").glob("*/components.npy")
    data = file.read_bytes()
    file.unlink()
    file.write_bytes(data[:-1])
    again = build("pca", dimensions=9)
    assert "is corrupt" in caplog.text
    np.testing.assert_array_equal(again.rows(first.positions), first.rows(first.positions))
    assert entries == 1


def test_principal_components_equal_those_of_scikit_learn():
    sample = low_rank(300, 16, 5)
    found = principal_directions(sample, 5)
    # Beside their negatives the rows have a mean of zero, so that scikit-learn subtracts nothing.
    reference = PCA(5).fit(np.concatenate([sample, -sample])).components_
    np.testing.assert_allclose(np.abs(np.sum(found.T * reference, axis=1)), 1.0, atol=1e-4)
    np.testing.assert_allclose(found.T @ found, np.eye(5), atol=1e-5)
    assert (np.diff(np.square(sample @ found).sum(axis=0)) <= 0).all()
    assert principal_directions(sample, 99).shape == (16, 16)
    assert principal_directions(sample[:3], 7).shape == (16, 7)


def test_half_matrix_across_blocks():
    values = np.random.default_rng(0).normal(size=(2 * BLOCK_ROWS + 30, 3)).astype(np.float16)
    stored = HalfMatrix([values[:10], values[10:10], values[10:]])
    assert len(stored) == len(values)
    assert [len(block) for block in stored.singles()] == [10, BLOCK_ROWS, BLOCK_ROWS, 20]
    index = np.array([len(values) - 1, 0, 9, 10, BLOCK_ROWS + 10, 0])
    np.testing.assert_array_equal(stored.take(index), values[index].astype(np.float32))
    direction = np.array([1, -2, 0.5], np.float32)
    np.testing.assert_allclose(stored.multiply(direction), values.astype(np.float32) @ direction, atol=1e-5)


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="only Linux tells the memory of a mapped file")
def test_a_product_leaves_no_mapped_features_in_memory(tmp_path):
    values = np.random.default_rng(0).normal(size=(2 * BLOCK_ROWS + 30, 64)).astype(np.float16)
    for name, part in {"a": values[:BLOCK_ROWS], "b": values[BLOCK_ROWS:]}.items():
        np.save(tmp_path / name, part)
    mapped = [np.load(tmp_path / f"{name}.npy", mmap_mode="r") for name in "ab"]
    stored = HalfMatrix(mapped)

    def in_memory() -> list[int]:
        lines = Path("/proc/self/smaps").read_text().splitlines()
        at = [i for i, line in enumerate(lines) if str(tmp_path) in line]
        return [int(next(line for line in lines[i:] if line.startswith("Rss:")).split()[1]) for i in at]

    assert mapped[0].any()
    assert sum(in_memory()) > 200  # KiB
    direction = np.linspace(-1, 1, 64, dtype=np.float32)
    for _ in range(2):
        np.testing.assert_allclose(stored.multiply(direction), values.astype(np.float32) @ direction, atol=1e-4)
        assert in_memory() == [0, 0]


def test_stages_are_further_columns(build, rows, make_features):
    store, features = build(stages=True), make_features(rows, IDS, bad=BAD, stage_width=STAGES)
    some = np.array([1, 6, 8, 398])
    np.testing.assert_array_equal(store.rows(some), features.take([IDS[k] for k in some]))
    np.testing.assert_array_equal(store.last_layer.rows(some), store.rows(some)[:, :WIDTH])
    assert store.scaling.blocks == (slice(0, 24), slice(24, 40))
    np.testing.assert_array_equal(store.scaling.scale, features.scaling.scale)
    alone = build()
    assert alone.last_layer is alone
    assert alone.scaling.blocks == (slice(0, 24),)


@pytest.mark.parametrize("rounds", [2, 0])
def test_live_ranking_equals_the_probe_on_all_columns(build, rows, make_features, spec, rounds):
    spec = replace(spec, rounds=rounds, limit=50)
    store, features = build(stages=True), make_features(rows, IDS, bad=BAD, stage_width=STAGES)
    none, others = np.zeros((0, 40), np.float32), np.array([301, 350])
    logits = LiveRanking(store, spec, seed=0).fit(RARE[:5], NORMALS, none, others)
    assert np.flatnonzero(np.isnan(logits)).tolist() == sorted(BAD)
    taken = {*RARE[:5], *NORMALS, *others}

    def take(positions):
        return features.take([IDS[k] for k in positions])

    pool = take([k for k in store.positions if k not in taken])
    probe = self_train(take(RARE[:5]), take(NORMALS), pool, spec, features.scaling).probe
    np.testing.assert_allclose(logits[store.positions], probe.logits(take(store.positions)), atol=2e-3)
    rotated = LiveRanking(build("pca", stages=True, dimensions=99), spec, seed=0).fit(RARE[:5], NORMALS, none)
    assert np.corrcoef(logits[store.positions], rotated[store.positions])[0, 1] > 0.999
    last = LiveRanking(build(), spec, seed=0).fit(RARE[:5], NORMALS, none[:, :24])[store.positions]
    rare = np.isin(store.positions, RARE)
    both = logits[store.positions]
    assert both[rare].mean() - both[~rare].mean() > 2 * (last[rare].mean() - last[~rare].mean())
