import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anomalymatch.data.source import ImageSource
from anomalymatch.data.task import initial_labels, make_task
from anomalymatch.errors import ConfigError, DataError, LabelError
from anomalymatch.ranking import Ranking
from anomalymatch.types import Label, Reject


class Source(ImageSource):
    """Source of ids and classes without images."""

    def __init__(self, counts, *, order=None, holdout=frozenset(), known=True):
        truth = {f"{name}/{i:05d}": name for name, count in counts.items() for i in range(count)}
        ids = list(truth) if order is None else [list(truth)[i] for i in order]
        super().__init__(
            name="set", ids=ids, bands=["grey"], fingerprint="x", truth=truth if known else None, holdout=holdout
        )

    def load(self, position):
        raise NotImplementedError


COUNTS = {"a": 100, "b": 300, "c": 57}


@pytest.mark.parametrize("holdout", [0.0, 0.2, 0.5])
def test_pool_and_holdout_partition_the_source(holdout):
    source = Source(COUNTS)
    task = make_task(source, anomaly="a", holdout=holdout)
    assert task.pool == [id_ for id_ in source.ids if id_ in set(task.pool)]  # in the order of the source
    assert sorted([*task.pool, *task.holdout]) == sorted(source.ids)
    assert task.anomalies == {id_ for id_ in source.ids if id_.startswith("a/")}
    for name, count in COUNTS.items():  # the same share of each class
        assert sum(id_.startswith(f"{name}/") for id_ in task.holdout) == round(holdout * count)


@given(st.randoms(use_true_random=False), st.integers(0, 1000))
@settings(max_examples=10, deadline=None)
def test_the_split_depends_on_neither_order_nor_seed(random, seed):
    order = list(range(sum(COUNTS.values())))
    random.shuffle(order)
    first = make_task(Source(COUNTS), anomaly="a", seed=0)
    second = make_task(Source(COUNTS, order=order), anomaly="b", seed=seed)
    assert set(first.holdout) == set(second.holdout)


def test_new_images_leave_most_of_the_split_as_it_was():
    small = set(make_task(Source({"a": 100, "b": 1000}), anomaly="a").holdout)
    large = set(make_task(Source({"a": 110, "b": 1100}), anomaly="a").holdout)
    assert len(small & large) > 0.8 * len(small)


def test_an_official_holdout_is_kept():
    official = frozenset({"a/00003", "b/00007", "b/00008"})
    task = make_task(Source(COUNTS, holdout=official), anomaly="a", holdout=0.5)
    assert set(task.holdout) == official
    assert len(task.pool) == sum(COUNTS.values()) - 3


@given(
    rare=st.integers(20, 400), common=st.integers(200, 2000), prevalence=st.floats(0.005, 0.9), seed=st.integers(0, 99)
)
@settings(max_examples=60, deadline=None)
def test_prevalence_is_exact_within_rounding(rare, common, prevalence, seed):
    source = Source({"rare": rare, "common": common})
    plain = make_task(source, anomaly="rare")
    task = make_task(source, anomaly="rare", prevalence=prevalence, seed=seed)
    for side, whole in ((task.pool, plain.pool), (task.holdout, plain.holdout)):
        truth = task.truth(side)
        anomalies, normals = int(truth.sum()), int((~truth).sum())
        # Rounding: one anomaly more or less, or one normal if those were subsampled.
        assert abs(anomalies - prevalence * len(side)) <= 1
        assert set(side) <= set(whole)
        assert len(set(side)) == len(side)
        before = plain.truth(whole)
        # Only the class that was too frequent is subsampled.
        assert anomalies == before.sum() or normals == (~before).sum()


@pytest.mark.parametrize(
    ("prevalence", "pool"), [(0.01, (3, 320)), (0.25, (80, 240)), (0.5, (80, 80)), (0.2, (80, 320))]
)
def test_prevalence_by_hand(prevalence, pool):
    task = make_task(Source({"rare": 100, "common": 400}), anomaly="rare", prevalence=prevalence)
    truth = task.truth(task.pool)
    assert (truth.sum(), (~truth).sum()) == pool


def test_the_seed_draws_the_subsample():
    tasks = [make_task(Source(COUNTS), anomaly="a", prevalence=0.05, seed=seed) for seed in (0, 0, 1)]
    assert tasks[0].pool == tasks[1].pool
    assert tasks[0].pool != tasks[2].pool


def test_several_classes_may_be_rare():
    task = make_task(Source(COUNTS), anomaly=["a", "c"])
    assert len(task.anomalies) == 157
    assert task.truth(task.pool).mean() == pytest.approx(157 / 457, abs=0.005)
    assert task.label("a/00000") == task.label("c/00001") == Label.ANOMALY
    assert task.label("b/00000") == Label.NORMAL
    np.testing.assert_array_equal(task.truth(["c/00001", "b/00001", "c/00002"]), [True, False, True])
    assert task.truth([]).shape == (0,)


def test_without_truth_everything_is_pool():
    source = Source(COUNTS, known=False)
    task = make_task(source)
    assert list(task.pool) == list(source.ids)
    assert list(task.holdout) == []
    for call in (task.truth, lambda pool: task.label(pool[0])):
        with pytest.raises(DataError, match=r"set: .*dataset\.anomaly=CLASS"):
            call(task.pool)


@pytest.mark.parametrize(
    ("source", "options", "error", "message"),
    [
        (Source(COUNTS), {"anomaly": "z"}, ConfigError, "'z'.*dataset.anomaly.* a, b, c"),
        (Source(COUNTS), {"anomaly": ["a", "z"]}, ConfigError, "'z'"),
        (Source(COUNTS), {"anomaly": ["a", "b", "c"]}, ConfigError, "every class of set"),
        (Source({f"c{i:02d}": 2 for i in range(30)}), {"anomaly": "x"}, ConfigError, r"… \(30 in all\)"),
        (Source(COUNTS, known=False), {"anomaly": "a"}, DataError, "set has no classes.* dataset.anomaly=a"),
        (Source(COUNTS), {"anomaly": "a", "holdout": -0.1}, ConfigError, "dataset.holdout is -0.1"),
        (Source(COUNTS), {"anomaly": "a", "holdout": 0.9}, ConfigError, "dataset.holdout is 0.9"),
        (Source(COUNTS), {"anomaly": "a", "prevalence": 0.0}, ConfigError, "dataset.prevalence is 0.0"),
        (Source(COUNTS), {"anomaly": "a", "prevalence": 1.0}, ConfigError, "dataset.prevalence is 1.0"),
        (Source(COUNTS), {"prevalence": 0.1}, ConfigError, "dataset.prevalence needs dataset.anomaly"),
    ],
)
def test_wrong_options(source, options, error, message):
    with pytest.raises(error, match=message):
        make_task(source, **options)


def test_repr_counts_instead_of_listing(make_source):
    task = make_task(make_source(100), anomaly="rare")
    assert repr(task) == "<Task array: 80 images in the pool, 20 held out, 10 true anomalies>"
    assert task._repr_html_().count("<img") == 8


def test_initial_labels():
    task = make_task(Source(COUNTS), anomaly="a")
    labels = initial_labels(task, anomalies=5, normals=20, seed=0)
    assert list(labels.values()) == [Label.ANOMALY] * 5 + [Label.NORMAL] * 20
    assert set(labels) <= set(task.pool)
    assert all(task.label(id_) == label for id_, label in labels.items())
    assert labels == initial_labels(task, anomalies=5, normals=20, seed=0)
    assert labels.keys() != initial_labels(task, anomalies=5, normals=20, seed=1).keys()


def test_initial_labels_are_drawn_evenly():
    task = make_task(Source({"a": 10, "b": 40}), anomaly="a", holdout=0.0)
    drawn = [id_ for seed in range(400) for id_ in initial_labels(task, anomalies=2, normals=1, seed=seed)]
    counts = np.array([drawn.count(id_) for id_ in task.pool[:10]])
    assert ((counts - 80) ** 2 / 80).sum() < 28  # chi-square with 9 degrees of freedom, 0.1 %


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"anomalies": 0, "normals": 5}, "0 images labelled anomaly"),
        ({"anomalies": 5, "normals": 0}, "0 images labelled normal"),
        ({"anomalies": 81, "normals": 5}, "81 images labelled anomaly.* 366 .* 80"),
        ({"anomalies": 5, "normals": 999}, "999 .* 366 .* 286"),
    ],
)
def test_too_few_images_for_the_initial_labels(options, message):
    task = make_task(Source(COUNTS), anomaly="a")
    with pytest.raises(LabelError, match=message):
        initial_labels(task, seed=0, **options)


def test_all_but_the_normal_class_are_anomalies(make_source):
    classes = {f"im{i:06d}": ("Good", "crack", "scratch")[i % 3] for i in range(30)}
    source = make_source(truth=classes)
    task = make_task(source, normal="good")
    assert task.anomalies == {id_ for id_, name in classes.items() if name != "Good"}
    assert make_task(source, anomaly=["CRACK", "scratch"]).anomalies == task.anomalies
    with pytest.raises(ConfigError, match=r"dataset\.anomaly and dataset\.normal"):
        make_task(source, anomaly="crack", normal="Good")
    with pytest.raises(ConfigError, match=r"no class 'bad' for dataset\.normal: choose from Good, crack, scratch"):
        make_task(source, normal="bad")


def test_unlabelled_images_of_a_ranking(make_source):
    """The ranking has the images of the pool without a label; a second call with the same labels returns it again."""
    task = make_task(make_source(50), anomaly="rare", holdout=0.2)
    ids = [*task.pool[1:], "gone from the archive", *task.holdout]
    ranking = Ranking(ids, np.arange(len(ids), dtype=np.float64), [Reject(task.pool[0], "torn"), Reject("x", "torn")])
    labels = {task.pool[3]: Label.NORMAL, task.holdout[0]: Label.ANOMALY}
    rest = task.unlabelled(ranking, labels)
    slow = ranking.restrict([id_ for id_ in task.pool if id_ not in labels])
    assert (rest.ids, rest.logits.tolist(), rest.rejects) == (slow.ids, slow.logits.tolist(), slow.rejects)
    assert task.unlabelled(ranking, dict(labels)) is rest
    assert task.unlabelled(ranking, labels | {task.pool[4]: Label.UNSURE}).ids == [
        id_ for id_ in rest.ids if id_ != task.pool[4]
    ]
    assert task.unlabelled(Ranking(ids, -ranking.logits), labels).logits.tolist() == [-x for x in rest.logits]
    assert task.rare == sum(id_ in task.anomalies for id_ in task.pool)
