import numpy as np
import pytest
from sklearn.neighbors import NearestNeighbors

from anomalymatch.backbones.features import Features, Shard
from anomalymatch.backbones.neighbours import ExactSearch, IndexSearch, open_search
from anomalymatch.errors import ConfigError


def make_features(count, columns=12, shard=100, seed=0):
    """Unit vectors around twenty centres, in shards, of which the last but one is empty."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(20, columns))[rng.integers(0, 20, count)] + 0.5 * rng.normal(size=(count, columns))
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)
    ids = [f"i{k}" for k in range(count)]
    shards = [Shard(ids[k : k + shard], rows[k : k + shard], []) for k in range(0, count, shard)]
    shards.insert(-1, Shard([], rows[:0], []))
    return Features(shards)


def allowed_of(features, share=0.7):
    return np.random.default_rng(1).random(len(features.ids)) < share


def slowly(features, queries, count, allowed):
    """The same by scikit-learn, with single queries."""
    rows = np.flatnonzero(allowed)
    every = features.take_rows(rows)
    search = NearestNeighbors(n_neighbors=min(count, len(rows)), algorithm="brute").fit(every)
    return sorted({int(rows[i]) for query in queries for i in search.kneighbors(query[None])[1][0]})


@pytest.mark.parametrize("queries", [[0], [3, 140, 299]])
@pytest.mark.parametrize("count", [1, 10, 1000])
def test_the_exact_search_finds_the_neighbours_of_scikit_learn(queries, count, monkeypatch):
    monkeypatch.setattr("anomalymatch.backbones.features.BLOCK_NUMBERS", 64 * 12)  # several blocks a shard
    features = make_features(300)
    wanted, allowed = features.take_rows(np.array(queries)), allowed_of(features)
    found = ExactSearch(features)(wanted, count, allowed)
    assert found.tolist() == slowly(features, wanted, count, allowed)
    assert ExactSearch(features)(wanted, count, np.zeros(300, bool)).tolist() == []


def test_an_image_is_its_own_neighbour_only_if_it_is_allowed():
    features = make_features(300)
    allowed = np.ones(300, bool)
    assert ExactSearch(features)(features.take_rows(np.array([7])), 1, allowed).tolist() == [7]
    allowed[7] = False
    assert ExactSearch(features)(features.take_rows(np.array([7])), 1, allowed).tolist() != [7]


def test_the_index_finds_most_of_the_exact_neighbours_and_only_allowed_ones(tmp_path):
    pytest.importorskip("faiss")
    features = make_features(5000)
    queries, allowed = features.take_rows(np.arange(0, 5000, 500)), allowed_of(features)
    exact = open_search(features, tmp_path)(queries, 20, allowed)
    search = open_search(features, tmp_path, exact_rows=4999)
    assert isinstance(search, IndexSearch)
    found = search(queries, 20, allowed)
    assert allowed[found].all()
    assert len(set(found.tolist()) & set(exact.tolist())) > 0.9 * len(exact)
    assert search(queries, 20, np.zeros(5000, bool)).tolist() == []
    few = np.zeros(5000, bool)
    few[found[:3]] = True
    assert set(search(queries, 20, few).tolist()) == set(found[:3].tolist())


def test_the_index_is_built_once_and_again_when_it_is_damaged(tmp_path, monkeypatch, caplog):
    pytest.importorskip("faiss")
    from anomalymatch.backbones import neighbours

    built = []
    build = neighbours.build_index
    monkeypatch.setattr(neighbours, "build_index", lambda *args: built.append(None) or build(*args))
    features = make_features(500)
    queries, allowed = features.take_rows(np.array([3, 4])), np.ones(500, bool)

    def found():
        return open_search(features, tmp_path, exact_rows=10)(queries, 20, allowed).tolist()

    first = found()
    assert found() == first
    assert len(built) == 1
    (path,) = tmp_path.rglob("index.faiss")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert found() == first
    assert len(built) == 2
    assert str(path.parent) in caplog.text
    open_search(make_features(400), tmp_path, exact_rows=10)
    assert len(built) == 3, "features of other images need an index of their own"


def test_only_a_large_archive_needs_faiss(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    features = make_features(300)
    assert isinstance(open_search(features, tmp_path), ExactSearch)
    with pytest.raises(ConfigError, match=r"300 images.*need an index: pip install 'anomalymatch\[faiss\]'.*al\.cand"):
        open_search(features, tmp_path, exact_rows=299)
