import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import cohen_kappa_score

from anomalymatch.data.label_log import LabelLog
from anomalymatch.types import Label
from anomalymatch.ui.labels import LabelBook

A, N, U, X = Label


@pytest.fixture
def log():
    log = LabelLog(Path(":memory:"))
    yield log
    log.close()


def say(book, annotator, **labels):
    return book.say(labels, annotator=annotator, cycle=0, scores={})


def test_the_last_word_counts(log):
    book = LabelBook(log)
    assert say(book, "ada", a=A, b=N) == {"a", "b"}
    say(book, "bob", a=N)
    assert book.labels() == {"b": N, "a": N}
    assert book.last("a").annotator == "bob"
    assert book.counts() == {A: 0, N: 2, U: 0, X: 0}
    assert book.annotators() == {"ada": 2, "bob": 1}


def test_a_label_taken_away(log):
    book = LabelBook(log)
    say(book, "ada", a=A)
    say(book, "ada", a=None)
    assert book.last("a") is None
    assert book.labels() == {}
    assert book.annotators() == {}


def test_undo_of_any_depth(log):
    book = LabelBook(log)
    say(book, "ada", a=A)
    say(book, "ada", a=N, b=N)
    say(book, "ada", b=U)
    assert book.undo("ada") == ["b"]
    assert book.labels() == {"a": N, "b": N}
    assert book.undo("ada") == ["a", "b"]
    assert book.labels() == {"a": A}
    assert book.undo("ada") == ["a"]
    assert book.undo("ada") == []
    assert [event.undoes for event in book.history("a")] == [None, None, 2, 1]


def test_it_follows_another_process(log):
    book, other = LabelBook(log), LabelBook(log)
    say(other, "bob", a=A)
    assert book.labels() == {}
    assert book.refresh() == {"a"}
    assert book.labels() == {"a": A}
    assert LabelBook(log).labels() == {"a": A}


def test_conflicts_newest_first(log):
    book = LabelBook(log)
    say(book, "ada", a=A, b=A, c=A)
    say(book, "bob", c=N, b=A)
    say(book, "bob", a=N)
    assert book.conflicts() == ["a", "c"]
    assert book.conflict("c")
    assert not book.conflict("b")
    assert not book.conflict("unknown")
    say(book, "ada", c=N)
    assert book.conflicts() == ["a"]


def test_the_discovery_curve_keeps_the_order_of_first_labels(log):
    book = LabelBook(log)
    say(book, "ada", a=N)
    say(book, "ada", b=A)
    say(book, "ada", c=N, d=A)
    say(book, "ada", a=A)  # a second thought is no further label
    assert book.discovery() == [1, 2, 2, 3]


PAIRS = st.lists(st.tuples(st.sampled_from(list(Label)), st.sampled_from(list(Label))), min_size=1, max_size=12)


@given(PAIRS)
@settings(max_examples=40, deadline=None)
def test_kappa_is_that_of_scikit_learn(pairs):
    log = LabelLog(Path(":memory:"))
    book = LabelBook(log)
    book.say({str(i): a for i, (a, _) in enumerate(pairs)}, annotator="ada", cycle=0, scores={})
    book.say({str(i): b for i, (_, b) in enumerate(pairs)}, annotator="bob", cycle=0, scores={})
    (agreement,) = book.agreements()
    one, other = zip(*pairs, strict=True)
    assert agreement.images == len(pairs)
    assert agreement.share == pytest.approx(sum(a == b for a, b in pairs) / len(pairs))
    if len({*one, *other}) > 1:
        expected = cohen_kappa_score([str(a) for a in one], [str(b) for b in other])
        assert agreement.kappa == pytest.approx(expected, nan_ok=True)
    else:
        assert math.isnan(agreement.kappa)  # chance alone explains all
    log.close()


def test_agreement_of_a_pair_needs_common_images(log):
    book = LabelBook(log)
    say(book, "ada", a=A, b=N, c=N)
    say(book, "bob", a=A)
    say(book, "eve", b=N, c=A)
    assert [(x.first, x.second, x.images, x.share) for x in book.agreements()] == [
        ("ada", "eve", 2, 0.5),
        ("ada", "bob", 1, 1.0),
    ]
