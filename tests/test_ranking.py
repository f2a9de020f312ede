import csv
import io
import os

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anomalymatch import ranking as module
from anomalymatch.errors import StorageError
from anomalymatch.ranking import Ranking, write_rejects
from anomalymatch.text import csv_cell
from anomalymatch.types import Reject

LOGITS = st.lists(st.floats(-50, 50, width=32), max_size=30)


def ranking(logits, rejects=()):
    return Ranking([f"im{i}" for i in range(len(logits))], np.array(logits, dtype=np.float64), list(rejects))


def test_by_hand():
    result = ranking([0.0, 2.0, -1.0, 2.0])
    assert len(result) == 4
    assert result.score_of(["im1", "other"]) == {"im1": pytest.approx(0.88079708)}
    assert result.order.tolist() == [1, 3, 0, 2]
    assert result.top(99) == ["im1", "im3", "im0", "im2"]
    assert result.top(0) == []
    np.testing.assert_allclose(result.scores, [0.5, 0.88079708, 0.26894142, 0.88079708])


@given(LOGITS, st.randoms(use_true_random=False))
def test_the_order_is_unique_whatever_order_the_images_came_in(logits, random):
    first = ranking(logits)
    places = list(range(len(logits)))
    random.shuffle(places)
    second = Ranking([first.ids[i] for i in places], first.logits[places])
    slow = sorted(first.ids, key=lambda id_: (-logits[int(id_[2:])], id_))
    assert first.top(len(first)) == second.top(len(second)) == slow


SPECIAL = [0.0, -0.0, 1.5, np.nan, np.inf, -np.inf]


@given(st.lists(st.sampled_from(SPECIAL), max_size=12), st.permutations("abcdefghijkl"))
def test_equal_undefined_and_infinite_scores_are_ordered_by_id(logits, ids):
    result = Ranking(ids[: len(logits)], np.array(logits, dtype=np.float64))
    slow = np.lexsort((np.array(result.ids, dtype=object), -result.logits))
    assert result.order.tolist() == slow.tolist()
    assert result.top(3, without=set("abc")) == [result.ids[i] for i in slow if result.ids[i] not in "abc"][:3]


def test_saturated_probabilities_keep_their_order():
    result = ranking([40.0, 60.0, 50.0])
    assert np.unique(result.scores).size == 1
    assert result.top(3) == ["im1", "im2", "im0"]


def test_restrict_keeps_order_and_rejects():
    result = ranking([1.0, 2.0, 3.0], [Reject("x", "empty"), Reject("y", "torn")])
    part = result.restrict(["im2", "im0", "y", "never seen"])
    assert part.ids == ["im0", "im2"]
    assert part.logits.tolist() == [1.0, 3.0]
    assert part.rejects == [Reject("y", "torn")]
    assert len(result.restrict([])) == 0
    others = result.without({"im2": 1, "x": 2, "never seen": 3})
    assert (others.ids, others.logits.tolist(), others.rejects) == (["im0", "im1"], [1.0, 2.0], [Reject("y", "torn")])


@given(st.lists(st.sampled_from(SPECIAL), max_size=12), st.permutations("abcdefghijkl"), st.data())
def test_parts_have_the_images_and_the_order_of_the_whole(logits, ids, data):
    """Whichever form the wanted ids have: the first or last images as they are in the ranking, a set, any other."""
    rejects = [Reject(id_, "torn") for id_ in "xy"]
    whole = Ranking(list(ids[: len(logits)]), np.array(logits, dtype=np.float64), rejects)
    start, stop = (data.draw(st.integers(0, len(logits))) for _ in range(2))
    some = data.draw(st.sampled_from([whole.ids[:stop], whole.ids[start:], whole.ids[start:stop]]))
    for keep in (some, ["y", *some], [*some, "z"], some[::-1], [*some, *some], frozenset({"y", *some}), iter(some)):
        wanted = {*some, "y"} if isinstance(keep, list | frozenset) and "y" in keep else set(some)
        part = whole.restrict(keep)
        others = whole.without(wanted)
        for each, positions in (
            (part, [i for i, id_ in enumerate(whole.ids) if id_ in wanted]),
            (others, [i for i, id_ in enumerate(whole.ids) if id_ not in wanted]),
        ):
            assert each.ids == [whole.ids[i] for i in positions]
            np.testing.assert_array_equal(each.logits, whole.logits[positions])
            assert each.order.tolist() == Ranking(each.ids, each.logits).order.tolist()
        assert [reject.id for reject in part.rejects] == [id_ for id_ in "xy" if id_ in wanted]
        assert [reject.id for reject in others.rejects] == [id_ for id_ in "xy" if id_ not in wanted]


def test_write_and_read(tmp_path):
    result = Ranking(["b", "a", "ä,\n", "z"], np.array([0.5, 0.5, 700.0, -np.inf]))
    result.write(tmp_path / "cycle" / "scores.parquet")
    table = pq.read_table(tmp_path / "cycle" / "scores.parquet")
    assert table.column_names == ["id", "score", "rank", "logit"]
    assert table["rank"].to_pylist() == [3, 2, 1, 4]
    assert table["score"].to_pylist() == result.scores.tolist()
    back = Ranking.read(tmp_path / "cycle" / "scores.parquet")
    assert back.ids == result.ids
    np.testing.assert_array_equal(back.logits, result.logits)
    assert [p.name for p in (tmp_path / "cycle").iterdir()] == ["scores.parquet"]


def test_csv_is_rounded_and_best_first(tmp_path):
    Ranking(["b", "a,", "c"], np.array([0.123456789, 3.0, -np.inf])).write_csv(tmp_path / "scores.csv")
    lines = (tmp_path / "scores.csv").read_text().splitlines()
    assert lines == ["rank,id,score,logit", '1,"a,",0.952574,3.0000', "2,b,0.530825,0.1235", "3,c,0.000000,-inf"]


def test_csv_has_the_text_of_the_module_csv(tmp_path, monkeypatch):
    """Also of ids with quotes or formulas, of negative zeros and of numbers that Arrow would round otherwise."""
    monkeypatch.setattr(module, "CSV_ROWS", 7)
    odd = ["a,b", 'say "x"', "two\nlines", "=1+1", "'=1", "-5", "@x", "", "ä b", "-"]
    special = [0.0, -0.0, -1e-9, -3e-5, -5e-5, 1e-5, np.nan, np.inf, -np.inf, 1e12, 123456789.00005, -2.00005, 0.03125]
    logits = np.concatenate([special, np.random.default_rng(0).normal(0, 20, 200)])
    result = Ranking([*odd, *(f"field/{i}.fits" for i in range(len(logits) - len(odd)))], logits)
    result.write_csv(tmp_path / "scores.csv")
    slow = io.StringIO()
    rows = csv.writer(slow, lineterminator="\n")
    rows.writerow(["rank", "id", "score", "logit"])
    for rank, i in enumerate(result.order, 1):
        rows.writerow([rank, csv_cell(result.ids[i]), f"{result.scores[i]:.6f}", f"{result.logits[i]:.4f}"])
    assert (tmp_path / "scores.csv").read_bytes().decode() == slow.getvalue()


def test_repr_is_short_and_a_notebook_shows_pictures(make_source):
    """Of a million images, three ids; ids are text, not HTML."""
    million = ranking(np.linspace(0, 1, 1_000_000), [Reject("x", "torn")])
    assert repr(million).startswith("<Ranking of 1,000,000 images, 1 unreadable; the top: 'im999999' 0.731, ")
    assert len(repr(million)) < 150
    source = make_source(4, unreadable=["im000001"])
    shown = Ranking(source.ids, np.arange(4.0), source=source)._repr_html_()
    assert (shown.count("<img"), shown.count("the file is truncated")) == (3, 1)
    assert shown.index("im000003") < shown.index("im000002")
    assert "&lt;b&gt;" in Ranking(["<b>"], np.zeros(1))._repr_html_()


def test_pandas_has_the_ranking_best_first():
    frame = Ranking(["b", "a", "c"], np.array([0.0, 3.0, -np.inf])).to_pandas()
    assert frame.to_dict("list") == {
        "rank": [1, 2, 3],
        "id": ["a", "b", "c"],
        "score": pytest.approx([0.952574, 0.5, 0.0]),
        "logit": [3.0, 0.0, -np.inf],
    }


def test_a_plot_shows_the_top_and_the_histogram_of_all_scores(make_source, tmp_path):
    source = make_source(14, unreadable=["im000012"])
    figure = Ranking(source.ids, np.linspace(-3, 3, 14), source=source).plot(7)
    *pictures, histogram = figure.axes
    assert [axes.get_xlabel() for axes in pictures[:2]] == ["im000013", "im000012"]
    assert [bool(axes.images) for axes in pictures] == [True, False, *[True] * 5]
    assert sum(bar.get_height() for bar in histogram.patches) == 14
    figure.savefig(tmp_path / "ranking.png")
    assert len(Ranking(["$a", "b"], np.zeros(2)).plot().axes) == 1


def test_an_empty_ranking(tmp_path):
    ranking([]).write(tmp_path / "scores.parquet")
    back = Ranking.read(tmp_path / "scores.parquet")
    assert len(back) == 0
    assert back.top(5) == []


@pytest.mark.parametrize(
    "damage", [os.remove, lambda path: path.write_bytes(b"PAR1 no"), lambda path: write_rejects([], path)]
)
def test_missing_or_corrupt_scores(tmp_path, damage):
    path = tmp_path / "scores.parquet"
    ranking([1.0, 2.0]).write(path)
    damage(path)
    with pytest.raises(StorageError, match=r"scores\.parquet"):
        Ranking.read(path)


def test_rejects(tmp_path):
    write_rejects([Reject("a", "0 bytes"), Reject("b", 'no image, "torn"')], tmp_path / "rejects.parquet")
    assert pq.read_table(tmp_path / "rejects.parquet").to_pylist() == [
        {"id": "a", "reason": "0 bytes"},
        {"id": "b", "reason": 'no image, "torn"'},
    ]
    write_rejects([], tmp_path / "rejects.parquet")
    table = pq.read_table(tmp_path / "rejects.parquet")
    assert table.num_rows == 0
    assert [str(kind) for kind in table.schema.types] == ["string", "string"]
