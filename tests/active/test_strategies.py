import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.special import logit

from anomalymatch.active.strategies import (
    Auto,
    Distinct,
    Diverse,
    ExpectedDiscovery,
    Mixture,
    PerCluster,
    Random,
    Strategy,
    Top,
    Uncertain,
    expected_finds,
    k_centres,
    similarities,
)
from anomalymatch.backbones.features import Features, Shard
from anomalymatch.build import build_strategy
from anomalymatch.config import compose, config_folder
from anomalymatch.errors import ConfigError
from anomalymatch.ranking import Ranking

RANKING = Ranking(["a", "b", "c", "d", "e"], np.array([0.1, 3.0, -0.2, -5.0, 3.0]))
EMPTY = Ranking([], np.empty(0))
NAMES = sorted(path.stem for path in (config_folder() / "al" / "strategy").glob("*.yaml"))
NO_FIND = {"a": "normal", "b": "unsure"}
COS_10 = float(np.cos(np.deg2rad(10)))


def rng(seed=0):
    return np.random.default_rng(seed)


@pytest.fixture
def embedding(task, make_embedding):
    return make_embedding(task.source)


@pytest.fixture
def with_features(embedding):
    """Make an embedding with the given features, and the ids of its images."""

    def make(rows):
        ids = [f"i{k:02d}" for k in range(len(rows))]
        embedding.__dict__["features"] = Features([Shard(ids, np.asarray(rows, np.float16), [])])  # a cached property
        return embedding, ids

    return make


@pytest.fixture
def in_directions(with_features):
    """Make an embedding whose features are directions in the plane, and a ranking of its images in this order."""

    def make(degrees):
        angles = np.deg2rad(degrees)
        embedding, ids = with_features(np.stack([np.cos(angles), np.sin(angles)], axis=1))
        return embedding, Ranking(ids, -np.arange(float(len(degrees))))

    return make


@pytest.mark.parametrize("name", NAMES)
def test_each_strategy_chooses_every_image_once_if_asked_for_more(name, task, embedding):
    strategy = build_strategy(compose("dataset=demo", f"al.strategy.name={name}"), embedding)
    ranking = Ranking(task.pool[:12], np.linspace(3, -3, 12))
    assert isinstance(strategy, Strategy)
    for last in ({}, NO_FIND):
        assert sorted(strategy(ranking, 50, rng=rng(), last=last)) == sorted(ranking.ids)
        assert strategy(EMPTY, 3, rng=rng(), last=last) == []


def test_top_takes_the_highest_and_breaks_ties_by_id():
    assert Top()(RANKING, 3, rng=rng()) == ["b", "e", "a"]
    reversed_ = Ranking(RANKING.ids[::-1], RANKING.logits[::-1].copy())
    assert Top()(reversed_, 3, rng=rng()) == ["b", "e", "a"]


def test_uncertain_takes_the_scores_nearest_to_the_boundary():
    assert Uncertain()(RANKING, 3, rng=rng()) == ["a", "c", "b"]


def test_random_depends_on_the_generator_and_not_on_the_scores():
    chosen = Random()(RANKING, 3, rng=rng(7))
    assert chosen == Random()(Ranking(RANKING.ids[::-1], np.arange(5.0)), 3, rng=rng(7))
    assert len(set(chosen)) == 3
    counts = dict.fromkeys(RANKING.ids, 0)
    generator = rng()
    for _ in range(1000):
        for id_ in Random()(RANKING, 2, rng=generator):
            counts[id_] += 1
    assert all(abs(n - 400) < 5 * np.sqrt(1000 * 0.4 * 0.6) for n in counts.values())


def test_mixture_takes_the_top_and_uncertain_images():
    ranking = Ranking(list("abcdefgh"), np.array([9.0, 8, 7, 6, 0.5, -0.1, -3, -9]))
    assert Mixture(0.25)(ranking, 4, rng=rng()) == ["a", "b", "c", "f"]
    assert Mixture(0.5)(ranking, 4, rng=rng()) == ["a", "b", "f", "e"]
    assert Mixture(0.0)(ranking, 4, rng=rng()) == ranking.top(4)
    assert Mixture(1.0)(ranking, 4, rng=rng()) == Uncertain()(ranking, 4, rng=rng())


# --- k-centre and near duplicates -------------------------------------------------------------------------------


def slow_k_centres(points, count):
    chosen = [0] if len(points) else []
    while len(chosen) < min(count, len(points)):
        rest = [i for i in range(len(points)) if i not in chosen]
        nearest = [min(float(np.linalg.norm(points[i] - points[c])) for c in chosen) for i in rest]
        chosen.append(rest[int(np.argmax(nearest))])
    return chosen


# Whole numbers, so that distances are exact and ties are ties.
@given(
    arrays(np.int64, st.tuples(st.integers(0, 12), st.integers(1, 3)), elements=st.integers(-3, 3)), st.integers(1, 9)
)
def test_k_centres_equal_the_slow_version(points, count):
    points = points.astype(np.float32)
    chosen = k_centres(points, count)
    assert chosen == slow_k_centres(points, count)
    assert len(set(chosen)) == len(chosen) == min(count, len(points))


def test_k_centres_of_a_line_by_hand():
    points = np.array([[0], [1], [10], [4]], dtype=np.float32)
    assert k_centres(points, 3) == [0, 2, 3]
    assert k_centres(np.zeros((3, 2), dtype=np.float32), 2) == [0, 1]


def test_diverse_covers_the_top_and_starts_with_the_best(task, embedding):
    ids = task.pool[:60]
    ranking = Ranking(ids, np.linspace(3, -3, 60))
    chosen = Diverse(embedding, 3)(ranking, 5, rng=rng())
    assert chosen == [ids[i] for i in slow_k_centres(embedding.features.take(ids[:15]), 5)]
    assert chosen == Diverse(embedding, 3)(ranking, 5, rng=rng(1))
    assert sorted(Diverse(embedding, 1)(ranking, 5, rng=rng())) == sorted(ids[:5])


def test_distinct_skips_near_duplicates(in_directions):
    embedding, ranking = in_directions([0, 5, 40, 1, 44, 90])
    strategy = Distinct(embedding, 10, COS_10)
    assert strategy(ranking, 3, rng=rng()) == ["i00", "i02", "i05"]
    assert strategy(ranking, 5, rng=rng()) == ["i00", "i02", "i05", "i01", "i03"]
    assert Distinct(embedding, 1, 0.98)(ranking, 3, rng=rng()) == ["i00", "i02", "i01"]  # three candidates only
    copies, ranking = in_directions([17, 17, 17, 18])
    assert Distinct(copies, 10, 1.0)(ranking, 2, rng=rng()) == ["i00", "i03"]


def test_auto_diversifies_after_a_query_without_a_find(in_directions):
    embedding, ranking = in_directions([0, 1, 40, 60, 20, 180, 5, 90])
    strategy = Auto(embedding, 10, COS_10)
    distinct = ["i00", "i02", "i03", "i04"]
    assert strategy(ranking, 4, rng=rng()) == distinct
    assert strategy(ranking, 4, rng=rng(), last={"a": "anomaly", "b": "normal"}) == distinct
    assert strategy(ranking, 4, rng=rng(), last=NO_FIND) == ["i00", "i02", "i01", "i05"]  # best left, then farthest
    assert strategy(ranking, 1, rng=rng(), last=NO_FIND) == ["i00"]


def test_per_cluster_takes_the_best_of_each_group_in_turn(embedding):
    def by_letter(ids):
        return [[id_ for id_ in reversed(ids) if id_[0] == letter] for letter in "ba"]

    def grouper(given):
        assert given is embedding
        return by_letter

    ranking = Ranking(["a0", "z0", "b0", "a1", "z1", "a2"], -np.arange(6.0))
    strategy = PerCluster(embedding, grouper, 2)
    assert strategy(ranking, 3, rng=rng()) == ["a0", "b0", "a1"]
    assert strategy(ranking, 5, rng=rng()) == ["a0", "b0", "a1", "a2", "z0"]  # z is in no group
    assert strategy(ranking, 9, rng=rng()) == ranking.ids


# --- expected discovery -----------------------------------------------------------------------------------------

SETTINGS = {"candidates": 10, "most_candidates": 500, "followed": 2000, "neighbours": 30, "prior": 2.0}
SETTINGS |= {"answer_weight": 8.0, "log_odds_shift": 2.0}


def expected(embedding, **settings):
    return ExpectedDiscovery(embedding, **SETTINGS | settings)


@pytest.fixture
def archive(with_features):
    """Make an embedding with the given features, and a ranking with the given probabilities."""

    def make(rows, probabilities):
        embedding, ids = with_features(rows)
        return embedding, Ranking(ids, logit(np.asarray(probabilities)) + SETTINGS["log_odds_shift"])

    return make


def slow_expected_finds(probability, weights, free, chosen, rest, prior):
    found = []
    for i in free:
        value = probability[i]
        for answer, weight in ((1.0, probability[i]), (0.0, 1 - probability[i])):
            updated = [
                (prior * probability[j] + weights[i][j] * answer) / (prior + weights[i][j])
                for j in range(len(probability))
                if j != i and j not in chosen
            ]
            value += weight * sum(sorted(updated, reverse=True)[:rest])
        found.append(value)
    return found


@pytest.mark.parametrize("rest", [0, 1, 3, 50])
def test_expected_finds_equal_the_slow_version(rest):
    draw = rng(rest)
    probability, weights = draw.random(12), draw.random((6, 12)) * (draw.random((6, 12)) < 0.5)
    given = probability, weights, np.array([0, 2, 3, 5]), [1, 4], rest, 1.5
    assert expected_finds(*given) == pytest.approx(slow_expected_finds(*given))


def test_expected_finds_by_hand():
    # With a prior of 2, the other's 0.2 becomes (2 * 0.2 + 2) / 4 after a yes, and 0.4 / 4 after a no.
    value = expected_finds(np.array([0.5, 0.2]), np.array([[0.0, 2.0]]), np.array([0]), [], 1, 2.0)
    assert value == pytest.approx([0.5 + 0.5 * 0.6 + 0.5 * 0.1])


def test_only_nearest_neighbours_are_similar():
    points = np.array([[1, 0], [0.9, 0.1], [0.8, 0.3], [0, 1], [-1, 0], [-1.7, -1.4]], np.float32)
    found = similarities(points, 2, 2)
    assert found.shape == (2, 6)
    assert (np.diag(found) == 0).all()
    assert (np.count_nonzero(found, axis=1) <= 2).all()
    centred = points - points.mean(axis=0)
    cosine = centred[0] @ centred[1] / np.linalg.norm(centred[0]) / np.linalg.norm(centred[1])
    assert found[0, 1] == pytest.approx(cosine**2, rel=1e-5)


@pytest.mark.parametrize("count", [1, 6])
def test_the_last_query_is_greedy(archive, count):
    embedding, ranking = archive(rng().normal(size=(40, 8)), rng(1).random(40) * 0.98 + 0.01)
    last = expected(embedding, candidates=4, answer_weight=0.0)(ranking, count, rng=rng(), remaining=0)
    assert last == ranking.top(count)


def test_many_remaining_labels_prefer_an_image_with_many_neighbours(archive):
    kind = np.tile([1.0, 0.0], (12, 1)) + rng().normal(size=(12, 2)) * 0.01
    embedding, ranking = archive([[-1.0, 0.1], *kind], [0.55, *[0.5] * 12])
    assert expected(embedding, candidates=20)(ranking, 1, rng=rng(), remaining=11) != ranking.top(1)
    assert expected(embedding, candidates=20)(ranking, 1, rng=rng(), remaining=0) == ranking.top(1) == ["i00"]


def test_a_batch_comes_from_the_candidates_alone(archive):
    embedding, ranking = archive(rng(1).normal(size=(30, 4)), rng(2).random(30) * 0.98 + 0.01)
    chosen = expected(embedding, candidates=2)(ranking, 10, rng=rng(), remaining=5)
    assert len(set(chosen)) == 10
    assert set(chosen) <= set(ranking.top(20))
    few = expected(embedding, most_candidates=6)
    assert set(few(ranking, 3, rng=rng())) <= set(ranking.top(6))
    assert len(set(few(ranking, 9, rng=rng()))) == 9


@pytest.mark.parametrize(
    "changed",
    [{"candidates": 1}, {"most_candidates": 8}, {"followed": 1}, {"neighbours": 2}, {"prior": 60.0},
     {"answer_weight": 0.0}, {"log_odds_shift": -3.0}],
    ids=lambda changed: next(iter(changed)),
)  # fmt: skip
def test_each_setting_changes_the_choice(archive, changed):
    embedding, ranking = archive(rng(3).normal(size=(400, 4)), rng(4).random(400) * 0.9 + 0.05)
    one, other = (expected(embedding, **words)(ranking, 8, rng=rng(), remaining=92) for words in (changed, {}))
    assert one != other


@pytest.mark.parametrize(
    ("key", "value", "make"),
    [
        ("explore", 1.1, lambda embedding: Mixture(1.1)),
        ("candidates", 0, lambda embedding: Diverse(embedding, 0)),
        ("candidates", 0, lambda embedding: Distinct(embedding, 0, 0.9)),
        ("candidates", 0, lambda embedding: PerCluster(embedding, lambda _: None, 0)),
        ("similarity", 0.0, lambda embedding: Distinct(embedding, 3, 0.0)),
        ("similarity", 1.01, lambda embedding: Distinct(embedding, 3, 1.01)),
        ("prior", 0.0, lambda embedding: expected(embedding, prior=0.0)),
    ],
)
def test_a_setting_out_of_range_is_refused(embedding, key, value, make):
    with pytest.raises(ConfigError, match=rf"al\.strategy\.{key} is {value}"):
        make(embedding)
