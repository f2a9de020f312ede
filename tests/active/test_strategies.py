import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from anomalymatch.active.strategies import (
    Auto,
    Distinct,
    Diverse,
    Mixture,
    PerCluster,
    Strategy,
    k_centres,
    random,
    top,
    uncertain,
)
from anomalymatch.backbones.features import Features, Shard
from anomalymatch.errors import ConfigError
from anomalymatch.ranking import Ranking

RANKING = Ranking(["a", "b", "c", "d", "e"], np.array([0.1, 3.0, -0.2, -5.0, 3.0]))


def rng(seed=0):
    return np.random.default_rng(seed)


def naive_k_centres(points, count):
    chosen = [0] if len(points) else []
    while len(chosen) < min(count, len(points)):
        rest = [i for i in range(len(points)) if i not in chosen]
        nearest = [min(float(np.linalg.norm(points[i] - points[c])) for c in chosen) for i in rest]
        chosen.append(rest[int(np.argmax(nearest))])
    return chosen


def test_top_takes_the_highest_and_breaks_ties_by_id():
    assert top(RANKING, 3, rng=rng()) == ["b", "e", "a"]
    shuffled = Ranking(RANKING.ids[::-1], RANKING.logits[::-1].copy())
    assert top(shuffled, 3, rng=rng()) == ["b", "e", "a"]


def test_uncertain_takes_what_is_nearest_to_the_boundary():
    assert uncertain(RANKING, 3, rng=rng()) == ["a", "c", "b"]


def test_random_follows_from_its_generator_and_not_from_the_scores():
    chosen = random(RANKING, 3, rng=rng(7))
    other = Ranking(RANKING.ids[::-1], np.arange(5.0))
    assert chosen == random(other, 3, rng=rng(7))
    assert len(set(chosen)) == 3
    assert len({tuple(random(RANKING, 3, rng=rng(seed))) for seed in range(20)}) > 5


def test_random_is_fair():
    counts = dict.fromkeys(RANKING.ids, 0)
    generator = rng()
    for _ in range(1000):
        for id_ in random(RANKING, 2, rng=generator):
            counts[id_] += 1
    assert all(abs(n - 400) < 5 * np.sqrt(1000 * 0.4 * 0.6) for n in counts.values())


@pytest.mark.parametrize("strategy", [top, uncertain, random])
def test_fewer_images_than_asked_for_are_all_taken_and_none_twice(strategy):
    assert isinstance(strategy, Strategy)
    assert sorted(strategy(RANKING, 50, rng=rng())) == sorted(RANKING.ids)
    assert strategy(Ranking([], np.empty(0)), 3, rng=rng()) == []


# Whole numbers, so that distances are exact and ties are ties.
@given(
    arrays(np.int64, st.tuples(st.integers(0, 12), st.integers(1, 3)), elements=st.integers(-3, 3)), st.integers(1, 9)
)
def test_k_centres_are_those_of_the_slow_way(points, count):
    points = points.astype(np.float32)
    chosen = k_centres(points, count)
    assert chosen == naive_k_centres(points, count)
    assert len(set(chosen)) == len(chosen) == min(count, len(points))


def test_k_centres_of_a_line_by_hand():
    points = np.array([[0], [1], [10], [4]], dtype=np.float32)
    assert k_centres(points, 3) == [0, 2, 3]
    assert k_centres(np.zeros((3, 2), dtype=np.float32), 2) == [0, 1]


def test_diverse_covers_the_top_and_starts_with_the_best(task, make_embedding):
    embedding = make_embedding(task.source)
    ids = task.pool[:60]
    ranking = Ranking(ids, np.linspace(3, -3, 60))
    chosen = Diverse(embedding, 3)(ranking, 5, rng=rng())
    assert chosen[0] == ids[0]
    assert len(set(chosen)) == 5
    assert set(chosen) <= set(ids[:15])
    features = embedding.features.take(ids[:15])
    assert chosen == [ids[i] for i in naive_k_centres(features, 5)]
    assert chosen == Diverse(embedding, 3)(ranking, 5, rng=rng(1))
    assert Diverse(embedding, 1)(ranking, 5, rng=rng()) != chosen
    assert sorted(Diverse(embedding, 1)(ranking, 5, rng=rng())) == sorted(ids[:5])
    assert sorted(Diverse(embedding, 3)(ranking, 500, rng=rng())) == sorted(ids)


def test_diverse_refuses_to_choose_among_nothing(task, make_embedding):
    with pytest.raises(ConfigError, match=r"al\.strategy\.candidates is 0: it must be at least 1"):
        Diverse(make_embedding(task.source), 0)


def in_directions(embedding, degrees):
    """The embedding of images whose features are directions in the plane, and a ranking of them in this order."""
    angles = np.deg2rad(degrees)
    rows = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    features = Features([Shard([f"i{k}" for k in range(len(degrees))], rows.astype(np.float16), [])])
    embedding.__dict__["features"] = features  # where they would be kept
    return embedding, Ranking(features.ids, -np.arange(float(len(degrees))))


def test_distinct_takes_the_best_of_images_that_are_nearly_the_same(task, make_embedding):
    embedding, ranking = in_directions(make_embedding(task.source), [0, 5, 40, 1, 44, 90])
    strategy = Distinct(embedding, 10, float(np.cos(np.deg2rad(10))))
    assert isinstance(strategy, Strategy)
    assert strategy(ranking, 3, rng=rng()) == ["i0", "i2", "i5"]
    assert strategy(ranking, 5, rng=rng()) == ["i0", "i2", "i5", "i1", "i3"]
    assert Distinct(embedding, 1, 0.98)(ranking, 3, rng=rng()) == ["i0", "i2", "i1"]  # looks at three alone
    assert strategy(Ranking([], np.empty(0)), 3, rng=rng()) == []


def test_images_that_differ_are_distinct_as_they_are(task, make_embedding):
    ranking = Ranking(task.pool[:60], np.linspace(3, -3, 60))
    strategy = Distinct(make_embedding(task.source), 3, 1.0)
    assert strategy(ranking, 8, rng=rng()) == top(ranking, 8, rng=rng())
    assert sorted(strategy(ranking, 500, rng=rng())) == sorted(ranking.ids)


def test_of_an_image_and_its_copy_one_is_distinct(task, make_embedding):
    embedding, ranking = in_directions(make_embedding(task.source), [17, 17, 17, 18])
    assert Distinct(embedding, 10, 1.0)(ranking, 2, rng=rng()) == ["i0", "i3"]


def test_auto_looks_elsewhere_after_a_query_that_found_nothing(task, make_embedding):
    embedding, ranking = in_directions(make_embedding(task.source), [0, 1, 40, 60, 20, 180, 5, 90])
    strategy = Auto(embedding, 10, float(np.cos(np.deg2rad(10))))
    assert isinstance(strategy, Strategy)
    distinct = ["i0", "i2", "i3", "i4"]
    assert strategy(ranking, 4, rng=rng()) == distinct
    assert strategy(ranking, 4, rng=rng(), last={"a": "anomaly", "b": "normal"}) == distinct
    nothing = {"a": "normal", "b": "unsure"}
    assert strategy(ranking, 4, rng=rng(), last=nothing) == ["i0", "i2", "i1", "i5"]  # the best left, and the farthest
    assert strategy(ranking, 1, rng=rng(), last=nothing) == ["i0"]
    assert sorted(strategy(ranking, 50, rng=rng(), last=nothing)) == sorted(ranking.ids)
    assert strategy(Ranking([], np.empty(0)), 3, rng=rng(), last=nothing) == []


@pytest.mark.parametrize("similarity", [0.0, 1.01, -0.5])
def test_distinct_refuses_a_similarity_that_none_has(similarity, task, make_embedding):
    with pytest.raises(ConfigError, match=rf"al\.strategy\.similarity is {similarity}"):
        Distinct(make_embedding(task.source), 3, similarity)


def test_a_mixture_is_the_top_and_what_is_uncertain():
    ranking = Ranking(list("abcdefgh"), np.array([9.0, 8, 7, 6, 0.5, -0.1, -3, -9]))
    assert isinstance(Mixture(0.25), Strategy)
    assert Mixture(0.25)(ranking, 4, rng=rng()) == ["a", "b", "c", "f"]
    assert Mixture(0.5)(ranking, 4, rng=rng()) == ["a", "b", "f", "e"]
    assert Mixture(0.0)(ranking, 4, rng=rng()) == top(ranking, 4, rng=rng())
    assert Mixture(1.0)(ranking, 4, rng=rng()) == uncertain(ranking, 4, rng=rng())
    assert sorted(Mixture(0.5)(ranking, 50, rng=rng())) == ranking.ids


@pytest.mark.parametrize("explore", [-0.1, 1.1])
def test_a_mixture_refuses_what_is_no_part(explore):
    with pytest.raises(ConfigError, match=rf"al\.strategy\.explore is {explore}"):
        Mixture(explore)


KINDS = Ranking([f"{kind}{i}" for i in range(20) for kind in "ab"[: 1 + i % 2]], -np.arange(30.0))


def by_kind(ids):
    return [[id_ for id_ in reversed(ids) if id_[0] == kind] for kind in "ba"]


def test_per_cluster_asks_for_the_best_of_each_kind_in_turn():
    ids = KINDS.top(30)
    kinds = [[id_ for id_ in ids if id_[0] == kind] for kind in "ab"]
    expected = [id_ for pair in zip(*kinds, strict=False) for id_ in pair][:6]
    strategy = PerCluster(by_kind, 5)
    assert isinstance(strategy, Strategy)
    assert strategy(KINDS, 6, rng=rng()) == expected


def test_per_cluster_leaves_no_image_out_and_asks_for_none_twice():
    ranking = Ranking(["a0", "z0", "b0", "a1", "z1", "a2"], -np.arange(6.0))
    strategy = PerCluster(by_kind, 2)
    assert strategy(ranking, 3, rng=rng()) == ["a0", "b0", "a1"]
    assert strategy(ranking, 5, rng=rng()) == ["a0", "b0", "a1", "a2", "z0"]  # z is in no group
    assert strategy(ranking, 9, rng=rng()) == ranking.ids
    assert strategy(Ranking([], np.empty(0)), 3, rng=rng()) == []
    with pytest.raises(ConfigError, match=r"al\.strategy\.candidates is 0"):
        PerCluster(by_kind, 0)
