"""Ranking by a description, alone and with a cold start."""

import json

import numpy as np
import pytest
from tiny_clip import write_tiny_clip

pytest.importorskip("open_clip", reason='pip install "anomalymatch[text]"')

from anomalymatch import make_text_ranker, run
from anomalymatch.active.cold_start import AlternatingOrder, ColdStart, RandomOrder
from anomalymatch.active.text_ranker import (
    DESCRIBED,
    DESCRIPTION,
    LONGEST,
    TextRanker,
    check_descriptions,
    read_description,
    save_description,
    save_ranking,
)
from anomalymatch.algorithms.base import Learner
from anomalymatch.build import build_loop
from anomalymatch.config import compose
from anomalymatch.data.task import make_task
from anomalymatch.errors import ConfigError, StorageError
from anomalymatch.ranking import Ranking


@pytest.fixture(scope="session")
def words(tmp_path_factory):
    return [f"text.model={write_tiny_clip(tmp_path_factory.mktemp('clip'))}"]


@pytest.fixture
def ranker(task, words, tmp_path):
    def make(descriptions, of=task, *changes):
        return make_text_ranker(of, descriptions, *words, f"data.cache_dir={tmp_path / 'cache'}", *changes)

    return make


def cosines(ranker, text):
    """The slow twin: one image and one description at a time."""
    features, model = ranker.embedding.features(), ranker.embedding.model
    t = model.encode_text(text)
    return {id_: float(np.dot(features.take([id_])[0], t)) for id_ in features.ids}


def test_images_are_ranked_by_their_cosine(ranker, task):
    found = ranker("a ring galaxy")
    assert isinstance(found, Learner)
    expected = cosines(found, "a ring galaxy")
    order = sorted(task.pool, key=lambda id_: (-expected[id_], id_))
    assert found.fit({}).rank().top(100) == order
    assert found.rank(task.pool[:7]).top(7) == [id_ for id_ in order if id_ in task.pool[:7]]
    assert ranker("a merger").rank().top(100) != order


def test_equal_images_are_in_order_of_their_ids_and_unreadable_ones_are_rejects(ranker, make_source):
    source = make_source(6, unreadable=["im000002"])
    source.load = lambda i, load=source.load: load(i if i == 2 else 1)
    ranking = ranker("a ring galaxy", make_task(source)).rank()
    assert ranking.top(6) == [f"im00000{i}" for i in (0, 1, 3, 4, 5)]
    assert [reject.id for reject in ranking.rejects] == ["im000002"]
    assert len(set(ranking.logits)) == 5


def test_of_several_descriptions_an_image_has_to_fit_one(ranker, task):
    texts = ("a ring galaxy", "a merger of two galaxies", "noise")
    found = ranker(texts)
    columns = []
    for text in texts:
        values = cosines(found, text)
        pool = np.array([values[id_] for id_ in task.pool])
        columns.append({id_: (values[id_] - pool.mean()) / pool.std() for id_ in values})
    best = {id_: max(column[id_] for column in columns) for id_ in task.pool}
    got, want = found.rank(task.pool), sorted(best, key=best.get, reverse=True)
    assert np.mean([a == b for a, b in zip(got.top(100), want, strict=True)]) > 0.9  # near ties may swap
    assert ranker(texts[::-1]).rank(task.pool).top(5) == got.top(5)


@pytest.mark.parametrize("wrong", ["", " ", [], ["a", ""], ["a", 3], True, {"a": 1}, "x" * (LONGEST + 1), ["a"] * 21])
def test_what_is_no_description_is_refused(wrong):
    with pytest.raises(ConfigError, match=r"al\.describe"):
        check_descriptions(wrong)


def test_descriptions_are_cleaned():
    assert check_descriptions("  a\tring\n galaxy ") == ("a ring galaxy",)
    assert check_descriptions(["b", "a", "b"]) == ("b", "a")


def test_the_command_line_takes_a_description_as_it_is_typed():
    text = "two galaxies, merging: (tidal) tails & 'arms' {x=1}"
    assert compose(f"al.describe={text}").al.describe == text
    assert compose("al.describe=[a ring galaxy, a merger]").al.describe == ["a ring galaxy", "a merger"]
    assert compose("al.describe=").al.describe is None


def test_a_description_beyond_the_context_is_told(ranker):
    assert ranker("a ring galaxy").notes() == []
    (note,) = ranker(["a ring galaxy", "galaxy " * 40]).notes()
    assert "galaxy galaxy" in note


# --- with a cold start ------------------------------------------------------------------------------------------


def test_two_orders_alternate(task, make_embedding, ranker):
    first, second = ranker("a ring galaxy"), RandomOrder(make_embedding(task.source, pool=task.pool), seed=0)
    both = AlternatingOrder(first, second).fit({}).rank(task.pool).top(100)
    one, two = first.rank(task.pool).top(100), second.rank(task.pool).top(100)
    seen = []
    for pair in zip(one, two, strict=True):
        seen += [id_ for id_ in dict.fromkeys(pair) if id_ not in seen]
    assert both == seen


def test_an_image_that_only_one_order_can_read_is_a_reject(make_source, make_embedding, ranker):
    good, bad = make_source(10), make_source(10, unreadable=["im000004"])
    first, second = ranker("a", make_task(bad)), RandomOrder(make_embedding(good), seed=0)
    for pair in ((first, second), (second, first)):
        ranking = AlternatingOrder(*pair).rank(good.ids)
        assert sorted(ranking.ids) == [id_ for id_ in good.ids if id_ != "im000004"]
        assert [reject.id for reject in ranking.rejects] == ["im000004"]


@pytest.mark.parametrize(("cold", "kind"), [("none", TextRanker), ("mixed", AlternatingOrder)])
def test_a_run_starts_from_the_description(probe_job, words, tmp_path, cold, kind, events, without_pictures):
    job = [*probe_job, *words, "oracle=top_k", "al.describe=a ring galaxy", f"al.cold_start={cold}", "al.budget=6"]
    run(*job, "al.cycles=2", folder=tmp_path / "run")
    loop = build_loop(compose(*job))
    assert isinstance(loop.learner, ColdStart)
    assert type(loop.learner.cold) is kind
    saved = Ranking.read(tmp_path / "run" / DESCRIBED)
    assert json.loads((tmp_path / "run" / DESCRIPTION).read_text()) == {"descriptions": ["a ring galaxy"]}
    again = loop.described.rank([*loop.task.pool, *loop.task.holdout])
    assert saved.ids == again.ids
    np.testing.assert_array_equal(saved.logits, again.logits)
    start = [event.id for event in events(tmp_path / "run") if event.annotator == "start"]
    text = [id_ for id_ in saved.top(len(saved)) if id_ in set(loop.task.pool)]
    assert start[0] == text[0]
    assert (start == text[:6]) == (cold == "none")
    if cold != "none":
        other = loop.learner.cold.learners[1]
        other.fit({}, pool=loop.task.pool)
        assert start == [*dict.fromkeys(sum(zip(text, other.rank(loop.task.pool).top(6), strict=False), ()))][:6]


def test_a_run_that_is_resumed_keeps_the_description_of_the_page(probe_job, words, tmp_path, without_pictures):
    job = [*probe_job, *words, "oracle=top_k", "al.describe=a ring galaxy"]
    folder = tmp_path / "run"
    run(*job, "al.cycles=1", folder=folder)
    save_description(folder, ["a merger"])
    assert not (folder / DESCRIBED).exists()
    run(*job, "al.cycles=2", folder=folder)
    assert read_description(folder) == (("a merger",), None)


def test_the_description_of_a_run_folder_is_checked(tmp_path):
    assert read_description(tmp_path) is None
    save_description(tmp_path, ["ü; 'ring'"])
    save_ranking(tmp_path, Ranking(["a", "b"], np.array([1.0, 2.0])))
    found = read_description(tmp_path)
    assert (found.descriptions, found.ranking.top(2)) == (("ü; 'ring'",), ["b", "a"])
    (tmp_path / DESCRIBED).write_bytes(b"PAR1")
    assert read_description(tmp_path).ranking is None
    save_description(tmp_path, [])
    assert read_description(tmp_path) == ((), None)
    for wrong in ("{", "[]", '{"descriptions": [1]}', '{"descriptions": 5}', json.dumps({"descriptions": ["x" * 501]})):
        (tmp_path / DESCRIPTION).write_text(wrong)
        with pytest.raises(StorageError, match="delete that file"):
            read_description(tmp_path)
