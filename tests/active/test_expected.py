import numpy as np
import pytest
from scipy.special import logit

from anomalymatch.active import strategies as expected
from anomalymatch.active.strategies import BALANCED, PRIOR, ExpectedDiscovery, Strategy, likeness, values
from anomalymatch.backbones.features import Features, Shard
from anomalymatch.errors import ConfigError
from anomalymatch.ranking import Ranking


@pytest.fixture
def archive(task, make_embedding):
    """Makes an embedding with these features, and a ranking with these probabilities."""

    def make(rows, chances):
        ids = [f"i{k:02d}" for k in range(len(rows))]
        embedding = make_embedding(task.source)
        embedding.__dict__["features"] = Features([Shard(ids, np.asarray(rows, np.float16), [])])  # where they are kept
        return embedding, Ranking(ids, logit(np.asarray(chances)) + BALANCED)

    return make


def slow_values(chance, weights, free, chosen, rest):
    found = []
    for i in free:
        value = chance[i]
        for answer, weight in ((1.0, chance[i]), (0.0, 1 - chance[i])):
            then = [
                (PRIOR * chance[j] + weights[i][j] * answer) / (PRIOR + weights[i][j])
                for j in range(len(chance))
                if j != i and j not in chosen
            ]
            value += weight * sum(sorted(then, reverse=True)[:rest])
        found.append(value)
    return found


@pytest.mark.parametrize("rest", [0, 1, 3, 50])
def test_values_are_those_of_the_slow_way(rest):
    rng = np.random.default_rng(rest)
    chance, weights = rng.random(12), rng.random((6, 12)) * (rng.random((6, 12)) < 0.5)
    chosen, free = [1, 4], np.array([0, 2, 3, 5])
    assert values(chance, weights, free, chosen, rest) == pytest.approx(
        slow_values(chance, weights, free, chosen, rest)
    )


def test_the_value_of_an_image_by_hand():
    # PRIOR is 2: the other's 0.2 becomes (2 * 0.2 + 2) / 4 after a yes, and 0.4 / 4 after a no.
    value = values(np.array([0.5, 0.2]), np.array([[0.0, 2.0]]), np.array([0]), [], 1)
    assert value == pytest.approx([0.5 + 0.5 * 0.6 + 0.5 * 0.1])


def test_only_the_nearest_neighbours_are_alike(monkeypatch):
    monkeypatch.setattr(expected, "NEIGHBOURS", 2)
    points = np.array([[1, 0], [0.9, 0.1], [0.8, 0.3], [0, 1], [-1, 0], [-1.7, -1.4]], np.float32)
    found = likeness(points, 2)
    assert found.shape == (2, 6)
    assert (np.diag(found) == 0).all()
    assert (np.count_nonzero(found, axis=1) <= 2).all()
    centred = points - points.mean(axis=0)
    cosine = centred[0] @ centred[1] / np.linalg.norm(centred[0]) / np.linalg.norm(centred[1])
    assert found[0, 1] == pytest.approx(cosine**2, rel=1e-5)


def test_one_label_left_is_spent_on_the_likeliest(archive):
    rng = np.random.default_rng(0)
    embedding, ranking = archive(rng.normal(size=(40, 8)), rng.random(40) * 0.98 + 0.01)
    strategy = ExpectedDiscovery(embedding, 4, 1)
    assert isinstance(strategy, Strategy)
    assert strategy(ranking, 1, rng=rng) == ranking.top(1)


def test_with_labels_left_what_tells_of_many_comes_before_what_is_alone(archive):
    kind = np.tile([1.0, 0.0], (12, 1)) + np.random.default_rng(0).normal(size=(12, 2)) * 0.01
    embedding, ranking = archive([[-1.0, 0.1], *kind], [0.55, *[0.5] * 12])
    assert ranking.top(1) == ["i00"]
    assert ExpectedDiscovery(embedding, 20, 12)(ranking, 1, rng=np.random.default_rng(0)) != ["i00"]
    assert ExpectedDiscovery(embedding, 20, 1)(ranking, 1, rng=np.random.default_rng(0)) == ["i00"]


def test_a_batch_is_as_large_as_asked_for_without_repetitions(archive):
    rng = np.random.default_rng(1)
    embedding, ranking = archive(rng.normal(size=(30, 4)), rng.random(30) * 0.98 + 0.01)
    strategy = ExpectedDiscovery(embedding, 2, 5)  # more asked for than the horizon has
    chosen = strategy(ranking, 10, rng=rng)
    assert len(set(chosen)) == 10
    assert set(chosen) <= set(ranking.top(20))
    assert sorted(strategy(ranking, 50, rng=rng)) == sorted(ranking.ids)
    assert strategy(Ranking([], np.empty(0)), 3, rng=rng) == []


def test_no_more_compete_than_the_work_allows(archive, monkeypatch):
    monkeypatch.setattr(expected, "COMPETING", 6)
    rng = np.random.default_rng(2)
    embedding, ranking = archive(rng.normal(size=(30, 4)), rng.random(30) * 0.98 + 0.01)
    assert set(ExpectedDiscovery(embedding, 10, 100)(ranking, 3, rng=rng)) <= set(ranking.top(6))
    assert len(set(ExpectedDiscovery(embedding, 10, 100)(ranking, 9, rng=rng))) == 9


def test_a_horizon_of_nothing_is_refused(archive):
    embedding, _ = archive([[1.0, 0.0]], [0.5])
    with pytest.raises(ConfigError, match=r"al\.strategy\.horizon is 0: it must be at least 1"):
        ExpectedDiscovery(embedding, 10, 0)
