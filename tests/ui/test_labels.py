import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import cohen_kappa_score

from anomalymatch.data.label_log import LabelLog
from anomalymatch.types import Label
from anomalymatch.ui.labels import LabelIndex

A, N, U, X = Label


@pytest.fixture
def log():
    log = LabelLog(Path(":memory:"))
    yield log
    log.close()


def add(index, annotator, **labels):
    index._log.append(labels, annotator=annotator, cycle=0)
    return index.refresh()


def undo(index, annotator, act="undo"):
    labels = getattr(index._log, act)(annotator=annotator)
    index.refresh()
    return labels


def test_the_last_label_counts(log):
    index = LabelIndex(log)
    assert add(index, "ada", a=A, b=N) == {"a", "b"}
    add(index, "bob", a=N)
    assert index.labels() == {"b": N, "a": N}
    assert index.current("a").annotator == "bob"
    assert index.annotators() == {"ada": 2, "bob": 1}
    add(index, "ada", b=None)
    assert (index.current("b"), index.labels(), index.annotators()) == (None, {"a": N}, {"ada": 1, "bob": 1})


def test_undo_any_number_of_times(log):
    index = LabelIndex(log)
    add(index, "ada", a=A)
    add(index, "ada", a=N, b=N)
    add(index, "ada", b=U)
    assert undo(index, "ada") == {"b": U}
    assert index.labels() == {"a": N, "b": N}
    assert undo(index, "ada") == {"a": N, "b": N}
    assert index.labels() == {"a": A}
    assert undo(index, "ada") == {"a": A}
    assert undo(index, "ada") == {}
    assert [event.undoes for event in index.history("a")] == [None, None, 2, 1]


def test_redo_in_the_index_as_in_the_log_and_the_last_labels(log):
    index = LabelIndex(log)
    add(index, "ada", a=A)
    add(index, "bob", a=U, d=U)
    add(index, "ada", a=N, b=N)
    add(index, "ada", c=X)
    add(index, "ada", c=None)
    assert index.recent("ada", 2) == {"b": N, "a": N}
    for act in ("undo", "undo", "undo", "redo", "redo"):
        undo(index, "ada", act)
        assert index.labels() == log.current() == LabelIndex(log).labels()
    assert list(index.recent("ada", 8).items()) == [("c", X), ("b", N), ("a", N)]
    assert index.recent("bob", 1) == {"d": U}
    assert index.recent("eve", 8) == {}


def test_refresh_reads_labels_of_another_process(log):
    index, other = LabelIndex(log), LabelIndex(log)
    add(other, "bob", a=A)
    assert index.labels() == {}
    assert index.refresh() == {"a"}
    assert index.labels() == {"a": A}
    assert LabelIndex(log).labels() == {"a": A}


def test_conflicts_come_newest_first_and_pairs_by_common_images(log):
    index = LabelIndex(log)
    add(index, "ada", a=A, b=A, c=A)
    add(index, "bob", c=N, b=A)
    add(index, "bob", a=N)
    assert index.conflicts() == ["a", "c"]
    assert [index.has_conflict(id_) for id_ in ("c", "b", "unknown")] == [True, False, False]
    add(index, "ada", c=N)
    assert index.conflicts() == ["a"]
    add(index, "eve", c=N)
    found = [(pair.first, pair.second, pair.images, pair.share) for pair in index.agreements()]
    assert found == [("ada", "bob", 3, pytest.approx(2 / 3)), ("ada", "eve", 1, 1.0), ("bob", "eve", 1, 1.0)]


def test_the_next_label_settles_a_conflict(log):
    index = LabelIndex(log)
    add(index, "ada", a=A, b=A)
    add(index, "bob", a=N, b=N)
    add(index, "eve", a=N)
    assert index.conflicts() == ["b"]
    add(index, "ada", a=A)  # who does not accept it opens the conflict again
    assert index.conflicts() == ["a", "b"]
    log.undo(annotator="ada")
    log.undo(annotator="eve")
    index.refresh()
    assert index.conflicts() == ["b", "a"], "undone labels settle nothing"
    assert index.agreements()[0].share == 0


def test_discovery_is_in_the_order_of_first_labels(log):
    index = LabelIndex(log)
    add(index, "ada", a=N)
    add(index, "ada", b=A)
    add(index, "ada", c=N, d=A)
    add(index, "ada", a=A)  # a changed label is not a further label
    assert index.discovery() == [1, 2, 2, 3]


PAIRS = st.lists(st.tuples(st.sampled_from(list(Label)), st.sampled_from(list(Label))), min_size=1, max_size=12)


@given(PAIRS)
@settings(max_examples=40, deadline=None)
def test_kappa_equals_that_of_scikit_learn(pairs):
    log = LabelLog(Path(":memory:"))
    index = LabelIndex(log)
    add(index, "ada", **{str(i): a for i, (a, _) in enumerate(pairs)})
    add(index, "bob", **{str(i): b for i, (_, b) in enumerate(pairs)})
    (agreement,) = index.agreements()
    one, other = zip(*pairs, strict=True)
    assert agreement.images == len(pairs)
    assert agreement.share == pytest.approx(sum(a == b for a, b in pairs) / len(pairs))
    if len({*one, *other}) > 1:
        expected = cohen_kappa_score([str(a) for a in one], [str(b) for b in other])
        assert agreement.kappa == pytest.approx(expected, nan_ok=True)
    else:
        assert math.isnan(agreement.kappa)  # chance explains all agreement
    log.close()
