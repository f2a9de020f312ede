import json
import logging
import os

import numpy as np
import pytest
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA

from anomalymatch.backbones.features import Features, Shard
from anomalymatch.errors import ConfigError, DataError, StorageError
from anomalymatch.types import Reject
from anomalymatch.ui import compression
from anomalymatch.ui import features as module
from anomalymatch.ui.compression import BLOCK_ROWS, HalfRows, Rows, principal_components
from anomalymatch.ui.features import FeatureBank, build_bank
from anomalymatch.ui.product_quantiser import CENTROIDS, ProductQuantiser, QuantisedRows

RNG = np.random.default_rng(0)


def unit(rows):
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def low_rank(count, width, rank, noise=0.02, seed=0):
    """Normalised rows with a mean, that are nearly of a low rank, as features are."""
    rng = np.random.default_rng(seed)
    basis = rng.normal(size=(rank, width)) * np.linspace(2, 0.5, rank)[:, None]
    return unit(rng.normal(size=(count, rank)) @ basis + noise * rng.normal(size=(count, width)) + 0.3)


def make(rows, bad=(), shard=50):
    """Features in shards of `shard` images and all ids; positions in `bad` cannot be read."""
    ids = [f"im{i:05d}" for i in range(len(rows))]
    shards = []
    for start in range(0, len(ids), shard):
        part = range(start, min(start + shard, len(ids)))
        kept = [i for i in part if i not in bad]
        rejects = [Reject(ids[i], f"reason {i}") for i in part if i in bad]
        shards.append(Shard([ids[i] for i in kept], rows[kept].astype(np.float16), rejects))
    return Features(shards), ids


@pytest.fixture(scope="module")
def rows():
    return low_rank(400, 24, 6)


BAD = {0, 7, 120, 399}


@pytest.fixture(params=["exact", "pca", "pq"])
def built(request, rows, tmp_path):
    features, ids = make(rows, BAD)
    return request.param, build_bank(features, ids, compression=request.param, dimensions=10, folder=tmp_path)


def test_every_bank_keeps_the_protocol_and_the_positions(built, rows):
    kind, bank = built
    assert isinstance(bank, FeatureBank)
    assert bank.positions.tolist() == [i for i in range(400) if i not in BAD]
    assert bank.positions.dtype == np.int64
    assert bank.dimensions == (24 if kind == "exact" else 10)
    assert bank.has(np.array([0, 1, 399, 398])).tolist() == [False, True, False, True]
    assert bank.rows(np.array([5, 3, 5])).dtype == np.float32
    with pytest.raises(DataError, match="no features of image 'im00120': reason 120"):
        bank.rows(np.array([1, 120]))


def test_rows_of_no_images(built):
    _, bank = built
    nothing = np.array([], dtype=np.int64)
    assert bank.rows(nothing).shape == (0, bank.dimensions)
    assert bank.has(nothing).shape == (0,)


def test_projections_are_the_inner_products_of_the_rows(built):
    _, bank = built
    direction = np.random.default_rng(1).normal(size=bank.dimensions)
    logits = bank.project(direction, -1.5)
    assert logits.dtype == np.float32
    assert np.flatnonzero(np.isnan(logits)).tolist() == sorted(BAD)
    expected = bank.rows(bank.positions).astype(np.float64) @ direction - 1.5
    np.testing.assert_allclose(logits[bank.positions], expected, atol=1e-4)


def test_rows_and_encode_agree_with_the_features(built, rows):
    kind, bank = built
    readable = rows[bank.positions]
    stored = bank.rows(bank.positions)
    encoded = bank.encode(readable)
    tolerance = {"exact": 5e-4, "pca": 1e-3, "pq": 0.1}[kind]
    np.testing.assert_allclose(stored, encoded, atol=tolerance)
    gram = {"exact": 1e-3, "pca": 0.02, "pq": 0.12}[kind]
    np.testing.assert_allclose(stored @ stored.T, readable @ readable.T, atol=gram)
    with pytest.raises(DataError, match="have 23 features, but those of the archive have 24"):
        bank.encode(rows[:, :23])


def test_neighbours_are_those_of_a_full_search(built, rows):
    kind, bank = built
    shares = []
    for position in bank.positions[::20]:
        row = bank.encode(rows[[position]])[0]
        near = bank.nearest(row, 10)
        products = bank.rows(bank.positions) @ row
        np.testing.assert_allclose(bank.rows(near) @ row, np.sort(products)[::-1][:10], atol=1e-5)
        true = bank.positions[np.argsort(-(rows[bank.positions] @ rows[position]))[:10]]
        shares.append(len(set(near) & set(true)) / 10)
    assert np.mean(shares) > {"exact": 0.98, "pca": 0.9, "pq": 0.7}[kind]


def test_of_equal_neighbours_the_first_position_comes_first(tmp_path):
    features, ids = make(np.repeat(np.eye(3, dtype=np.float32), 4, axis=0), bad={1}, shard=5)
    bank = build_bank(features, ids, compression="exact", dimensions=1, folder=tmp_path)
    assert bank.nearest(np.array([1, 0.5, 0], np.float32), 5).tolist() == [0, 2, 3, 4, 5]
    assert bank.nearest(np.array([0, 0.5, 1], np.float32), 99).tolist() == [8, 9, 10, 11, 4, 5, 6, 7, 0, 2, 3]
    assert bank.nearest(np.array([1, 0, 0], np.float32), 0).tolist() == []


def test_auto_is_exact_while_the_features_are_small(rows, tmp_path, monkeypatch):
    features, ids = make(rows)
    exact = build_bank(features, ids, compression="auto", dimensions=10, folder=tmp_path)
    assert exact.dimensions == 24
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(module, "EXACT_BYTES", 2 * 400 * 24 - 1)
    assert build_bank(features, ids, compression="auto", dimensions=10, folder=tmp_path).dimensions == 10


def test_dimensions_beyond_the_features_keep_all(rows, tmp_path):
    features, ids = make(rows)
    bank = build_bank(features, ids, compression="pca", dimensions=99, folder=tmp_path)
    assert bank.dimensions == 24
    stored = bank.rows(bank.positions)
    np.testing.assert_allclose(stored @ stored.T, rows @ rows.T, atol=3e-3)


def test_wrong_options_and_features_of_other_images(rows, tmp_path):
    features, ids = make(rows)
    with pytest.raises(ConfigError, match="'zip': choose one of auto, exact, pca, pq"):
        build_bank(features, ids, compression="zip", dimensions=8, folder=tmp_path)
    with pytest.raises(ConfigError, match="it must be at least 1"):
        build_bank(features, ids, compression="pca", dimensions=0, folder=tmp_path)
    for other in ([*ids[:60], "x", *ids[61:]], [*ids[:60], ids[61], ids[60], *ids[62:]]):
        with pytest.raises(DataError, match="those from 'im00050' on do not match the source"):
            build_bank(features, other, compression="exact", dimensions=8, folder=tmp_path)
    with pytest.raises(DataError, match="features of 400 images, but 401 images"):
        build_bank(features, [*ids, "x"], compression="exact", dimensions=8, folder=tmp_path)


def test_an_archive_of_which_nothing_can_be_read(rows, tmp_path):
    features, ids = make(rows[:20], bad=set(range(20)))
    bank = build_bank(features, ids, compression="pca", dimensions=8, folder=tmp_path)
    assert bank.positions.size == 0
    assert np.isnan(bank.project(np.ones(24), 0.0)).all()
    assert bank.nearest(np.ones(24, np.float32), 5).size == 0
    assert bank.rows(np.array([], dtype=np.int64)).shape == (0, 24)


@pytest.mark.parametrize("kind", ["pca", "pq"])
def test_a_second_time_it_comes_from_the_disk(rows, tmp_path, monkeypatch, kind):
    features, ids = make(rows, BAD)
    options = {"compression": kind, "dimensions": 9, "folder": tmp_path}
    first = build_bank(features, ids, **options)

    def never(*_):
        raise AssertionError("computed")

    with monkeypatch.context() as patch:
        patch.setattr(compression, "_compute", never)
        second = build_bank(features, ids, **options)
        np.testing.assert_array_equal(first.rows(first.positions), second.rows(first.positions))
        np.testing.assert_array_equal(first.encode(rows), second.encode(rows))
        for changed in ({"dimensions": 8}, {"compression": "pq" if kind == "pca" else "pca"}):
            with pytest.raises(AssertionError, match="computed"):
                build_bank(features, ids, **(options | changed))
        with pytest.raises(AssertionError, match="computed"):
            build_bank(*make(rows, {1, 2, 3, 4}), **options)
    names = {path.name for folder in tmp_path.glob(f"{kind}-*") for path in folder.iterdir()}
    assert {"components.npy", "rows.npy", "description.json"} <= names
    assert not [path for path in tmp_path.iterdir() if path.suffix == ".part"]


def files(folder):
    (entry,) = folder.glob("p[cq]*-*")
    return sorted(entry.iterdir())


@pytest.mark.parametrize("kind", ["pca", "pq"])
def test_a_damaged_entry_is_computed_again(rows, tmp_path, caplog, kind):
    features, ids = make(rows)
    options = {"compression": kind, "dimensions": 6, "folder": tmp_path}
    good = build_bank(features, ids, **options)
    expected = good.rows(good.positions)
    for i in range(len(files(tmp_path))):
        for damage in (lambda d: d[: len(d) // 2], lambda d: b"", lambda d: d[:-3] + bytes([d[-3] ^ 1]) + d[-2:]):
            path = files(tmp_path)[i]
            data = path.read_bytes()
            path.unlink()  # the old file is mapped into the memory of this process
            path.write_bytes(damage(data))
            caplog.clear()
            with caplog.at_level(logging.WARNING, logger=compression.__name__):
                again = build_bank(features, ids, **options)
            assert "computing them again" in caplog.text, path
            np.testing.assert_array_equal(again.rows(again.positions), expected)
    path = files(tmp_path)[0]
    os.remove(path)
    np.testing.assert_array_equal(build_bank(features, ids, **options).rows(good.positions), expected)
    assert set(json.loads((path.parent / "description.json").read_text())) >= {"rows.npy", "components.npy"}


def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path):
    resource = pytest.importorskip("resource")
    features, ids = make(low_rank(3000, 24, 6))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(StorageError, match="cannot write"):
            build_bank(features, ids, compression="pca", dimensions=20, folder=tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["bank.lock"]


def test_components_are_those_of_a_principal_component_analysis():
    sample = low_rank(300, 16, 5)
    found = principal_components(sample, 5)
    # Beside their negatives the rows have no mean, and the analysis takes none away.
    reference = PCA(5).fit(np.concatenate([sample, -sample])).components_
    np.testing.assert_allclose(np.abs(np.sum(found.T * reference, axis=1)), 1.0, atol=1e-4)
    np.testing.assert_allclose(found.T @ found, np.eye(5), atol=1e-5)
    energy = np.square(sample @ found).sum(axis=0)
    assert (np.diff(energy) <= 0).all()
    assert principal_components(sample, 99).shape == (16, 16)
    assert principal_components(sample[:3], 7).shape == (16, 7)


def test_the_components_come_from_a_sample_and_rows_are_half_precision(tmp_path, monkeypatch):
    monkeypatch.setattr(compression, "SAMPLE", 100)
    rows = low_rank(2000, 16, 4, noise=0.001)
    features, ids = make(rows, shard=700)
    bank = build_bank(features, ids, compression="pca", dimensions=8, folder=tmp_path)
    stored = bank.rows(bank.positions)
    np.testing.assert_allclose(stored @ stored[:50].T, rows @ rows[:50].T, atol=4e-3)
    assert np.load(next(tmp_path.glob("pca-*")) / "rows.npy").dtype == np.float16


@pytest.mark.parametrize("width", [1, 2, 3, 7, 8])
def test_codes_stand_for_the_nearest_centroid(width):
    rng = np.random.default_rng(width)
    sample = (rng.normal(size=(900, width)) * np.linspace(2, 0.1, width)).astype(np.float32)
    quantiser = ProductQuantiser.fit(sample, seed=0)
    assert sorted(quantiser.groups.ravel()) == list(range(width + width % 2))
    codes = quantiser.encode(sample)
    decoded = quantiser.decode(codes)
    assert decoded.shape == sample.shape
    padded = np.pad(sample, ((0, 0), (0, width % 2)))
    for j, group in enumerate(quantiser.groups):
        distance = np.square(padded[:, None, group] - quantiser.centroids[j][None]).sum(axis=2)
        chosen = distance[np.arange(900), codes[:, j]]
        np.testing.assert_allclose(chosen, distance.min(axis=1), atol=1e-5)
    direction = rng.normal(size=width).astype(np.float32)
    stored = QuantisedRows(codes, quantiser)
    assert isinstance(stored, Rows)
    np.testing.assert_allclose(stored.inner(direction), decoded @ direction, atol=1e-4)
    np.testing.assert_array_equal(stored.take(np.array([3, 1])), decoded[[3, 1]])


def test_codebooks_are_about_as_good_as_those_of_scikit_learn():
    sample = np.random.default_rng(0).normal(size=(3000, 2)).astype(np.float32)
    quantiser = ProductQuantiser.fit(sample, seed=0)
    error = np.square(quantiser.decode(quantiser.encode(sample)) - sample).sum()
    assert error < 1.15 * KMeans(CENTROIDS, n_init=1, random_state=0).fit(sample).inertia_
    other = ProductQuantiser.fit(sample, seed=1)
    assert not np.array_equal(other.centroids, quantiser.centroids)
    np.testing.assert_array_equal(ProductQuantiser.fit(sample, seed=0).centroids, quantiser.centroids)


def test_few_different_vectors_are_kept_exactly():
    sample = np.repeat(np.random.default_rng(0).normal(size=(40, 6)), 3, axis=0).astype(np.float32)
    quantiser = ProductQuantiser.fit(sample, seed=0)
    np.testing.assert_array_equal(quantiser.decode(quantiser.encode(sample)), sample)


def test_rows_across_blocks():
    values = np.random.default_rng(0).normal(size=(2 * BLOCK_ROWS + 30, 3)).astype(np.float16)
    stored = HalfRows([values[:10], values[10:10], values[10:]])
    assert len(stored) == len(values)
    assert max(len(block) for block in stored.blocks) == BLOCK_ROWS
    index = np.array([len(values) - 1, 0, 9, 10, BLOCK_ROWS + 10, 0])
    np.testing.assert_array_equal(stored.take(index), values[index].astype(np.float32))
    direction = np.array([1, -2, 0.5], np.float32)
    np.testing.assert_allclose(stored.inner(direction), values.astype(np.float32) @ direction, atol=1e-5)
