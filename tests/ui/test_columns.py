import logging
import math
from dataclasses import replace
from datetime import UTC, date, datetime

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anomalymatch.errors import ConfigError, DataError
from anomalymatch.ranking import Ranking
from anomalymatch.ui.columns import Columns, Kind, add_scores, read_scores
from anomalymatch.ui.views import ColumnOrder, ColumnRange, Query, Show

IDS = [f"im{i:06d}" for i in range(6)]
COLUMNS = {
    "magnitude": (Kind.NUMBER, [17.25, None, -3.5, math.nan, 17.25, math.inf]),
    "count": (Kind.NUMBER, [3, 1, None, 2, 10, -1]),
    "edge on": (Kind.BOOLEAN, [True, False, None, True, False, False]),
    "taken": (Kind.DATE, [date(2021, 5, day) for day in (3, 1, 2, 9, 8, 7)]),
    "utc": (Kind.DATE, [datetime(2021, 5, 1, hour, tzinfo=UTC) for hour in (3, 1, 2, 9, 8, 7)]),
    "written": (Kind.NUMBER, [" 5", "+1e2", "n/a", "", "--", "NaN"]),
    "iso": (Kind.DATE, ["2020-02-01T10:00:00.5Z", "2020-02-01", "", None, "2019-12-31 23:59", "2020-02-01 09:00"]),
    "name": (None, ["NGC 1", "M 31", "1", "2", "3", "4"]),
    "almost": (None, ["1", "2", "3", "4", "5", "six"]),
    "clock": (None, ["10:00", "11:00", "12:00", "13:00", "14:00", "15:00"]),
    "nothing": (None, [None, "", "nan", "-", None, "null"]),
    "vector": (None, [[1.0], [2.0], [3.0], [4.0], [5.0], [6.0]]),
}
TABLE = pa.table({name: values for name, (_, values) in COLUMNS.items()})


@pytest.mark.parametrize("chunks", [1, 2])
def test_kinds_of_columns(chunks):
    table = TABLE if chunks == 1 else pa.concat_tables([TABLE[:2], TABLE[2:]])
    assert Columns(table).kinds == {name: kind for name, (kind, _) in COLUMNS.items() if kind is not None}
    assert Columns(None).kinds == {}
    assert Columns(pa.table({"x": pa.array([], pa.float64())})).kinds == {}


@pytest.mark.parametrize(
    ("name", "ascending"),
    [
        ("magnitude", [2, 0, 4, 5, 1, 3]),
        ("count", [5, 1, 3, 0, 4, 2]),
        ("edge on", [1, 4, 5, 0, 3, 2]),
        ("taken", [1, 2, 0, 5, 4, 3]),
        ("utc", [1, 2, 0, 5, 4, 3]),
        ("written", [0, 1, 2, 3, 4, 5]),
        ("iso", [4, 1, 5, 0, 2, 3]),
    ],
)
def test_orders_by_hand(name, ascending):
    columns = Columns(TABLE)
    assert columns.order(ColumnOrder(name)).tolist() == ascending
    texts = columns.texts(name, np.arange(6))
    missing = [i for i in ascending if not texts[i]]
    assert missing == sorted(missing) == ascending[6 - len(missing) :], "missing values come last"
    back = columns.order(ColumnOrder(name, descending=True)).tolist()
    assert back[6 - len(missing) :] == missing
    known = [texts[i] for i in ascending if texts[i]]
    assert [texts[i] for i in back if texts[i]] == known[::-1]


VALUE = st.one_of(
    st.none(), st.sampled_from([0.0, -0.0, math.nan, math.inf, -math.inf, 1e300]), st.floats(), st.integers(-3, 3)
)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(VALUE, min_size=1, max_size=40).filter(lambda values: any(v is not None and v == v for v in values)),
    st.floats(-2, 0),
    st.floats(0, 2),
    st.booleans(),
)
def test_order_and_range_equal_plain_python(values, low, high, descending):
    values = [None if value is None else float(value) for value in values]
    is_missing = [value is None or math.isnan(value) for value in values]
    sign = -1 if descending else 1
    expected = sorted(range(len(values)), key=lambda i: (is_missing[i], 0 if is_missing[i] else sign * values[i], i))
    inside = [not gone and low <= value <= high for gone, value in zip(is_missing, values, strict=True)]
    written = ["" if value is None else repr(value) for value in values]
    for table in (pa.table({"x": pa.array(values, pa.float64())}), pa.table({"x": written})):
        columns = Columns(table)
        assert columns.order(ColumnOrder("x", descending)).tolist() == expected
        assert columns.within(ColumnRange("x", low, high)).tolist() == inside


def test_short_texts_and_limits():
    times = ["2020-01-01 10:00:01.5", "", ""]
    table = pa.table({"x": [1.5, 1 / 3, None], "id": [587722981742084096, 2, 3], "at": times})
    columns = Columns(table)
    assert columns.texts("x", np.array([2, 1, 0])) == ["", "0.333333", "1.5"]
    assert columns.texts("id", np.array([0])) == ["5.87723e+17"]
    assert columns.texts("at", np.array([0])) == ["2020-01-01 10:00"]
    assert Columns(TABLE).limits("magnitude") == (-3.5, 17.25)
    assert Columns(TABLE).texts("taken", np.array([0])) == ["2021-05-03"]


@pytest.mark.parametrize("name", ["name", "vector", "absent"])
def test_a_column_without_an_order_is_refused(name):
    for ask in (Columns(TABLE).values, Columns(TABLE).limits, lambda name: Columns(TABLE).order(ColumnOrder(name))):
        with pytest.raises(DataError, match=f"{name}.*magnitude"):
            ask(name)


MANY = tuple((str(k), 0, 1) for k in range(21))


@pytest.mark.parametrize("ranges", [(("x", 2, 1),), (("x", math.nan, 1),), (("x", 0, 1), ("x", 2, 3)), MANY])
def test_impossible_ranges_are_refused(ranges):
    with pytest.raises(ConfigError, match="range"):
        Query(ranges=tuple(ColumnRange(*words) for words in ranges))


class TestScoreFile:
    """Score files: the columns of numbers, in the order of the archive."""

    SCORES = pa.table({"id": [IDS[4], IDS[1], IDS[2]], "value": [0.5, 2.0, None], "by": ["me", "me", "you"]})

    def write(self, table, path):
        pa_csv.write_csv(table, path) if path.suffix == ".csv" else pq.write_table(table, path)
        return path

    @pytest.mark.parametrize("suffix", [".csv", ".parquet"])
    @pytest.mark.parametrize("key", ["id", "filename", "ID"])
    def test_part_of_the_archive_is_enough(self, tmp_path, suffix, key):
        table = self.SCORES.rename_columns([key, "value", "by"])
        scores = read_scores(self.write(table, tmp_path / f"scores{suffix}"), IDS)
        assert scores.column_names == ["value"]
        columns = Columns(scores)
        np.testing.assert_equal(columns.values("value"), [math.nan, 2.0, math.nan, math.nan, 0.5, math.nan])
        assert columns.order(ColumnOrder("value")).tolist() == [4, 1, 0, 2, 3, 5]

    def test_ids_of_other_images_are_counted(self, tmp_path, caplog):
        path = self.write(self.SCORES, tmp_path / "scores.csv")
        with caplog.at_level(logging.WARNING, logger="anomalymatch"):
            read_scores(path, IDS[:3])
        assert "1 of 3 ids" in caplog.text
        assert "im000004" in caplog.text

    def test_ids_of_a_spreadsheet_and_of_numbers(self, tmp_path):
        (tmp_path / "scores.csv").write_text("filename,x\n'=1+1.png,1\n'quoted.png,2\n")
        scores = read_scores(tmp_path / "scores.csv", ["=1+1.png", "'quoted.png"])
        assert scores.to_pydict() == {"x": ["1", "2"]}
        pq.write_table(pa.table({"id": [10, 7], "x": [1, 2]}), tmp_path / "scores.parquet")
        assert read_scores(tmp_path / "scores.parquet", ["7", "10"]).to_pydict() == {"x": ["2", "1"]}

    def test_scores_of_another_run(self, tmp_path):
        ranking = Ranking(["=1.png", *IDS[::-1]], np.arange(7.0) - 3)
        ranking.write_csv(tmp_path / "scores.csv")
        columns = Columns(read_scores(tmp_path / "scores.csv", IDS))
        assert set(columns.kinds) == {"rank", "score", "logit"}
        np.testing.assert_allclose(columns.values("logit"), np.arange(3.0, -3, -1))

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("name,value\nim000001,1\n", "id or filename.*name, value"),
            ("id\nim000001\n", "numbers.*id"),
            ("id,by\nim000001,me\n", "numbers.*id, by"),
            ("id,value\n", "numbers"),
            ("id,value\nim000001,1\nim000001,2\nim000002,1\n", "1 ids occur more than once.*im000001"),
            ("id,value\nx,1\ny,2\n", "none of the 6 images.*im000000"),
            ("id,value\nim000001,1,2\n", "cannot be read"),
            ("id,id,value\nim000001,1,2\n", "unique"),
        ],
    )
    def test_wrong_files_are_one_sentence(self, tmp_path, text, words):
        path = tmp_path / "scores.csv"
        path.write_text(text)
        with pytest.raises(DataError, match=words) as refused:
            read_scores(path, IDS)
        assert "scores.csv" in str(refused.value)
        assert "\n" not in str(refused.value)

    @pytest.mark.parametrize("name", ["absent.csv", ".", "scores.txt", "damaged.parquet"])
    def test_missing_and_damaged_files(self, tmp_path, name):
        (tmp_path / "scores.txt").write_text("id,value\nim000001,1\n")
        (tmp_path / "damaged.parquet").write_bytes(b"PAR1 no")
        with pytest.raises(DataError):
            read_scores(tmp_path / name, IDS)

    def test_scores_join_the_metadata(self):
        scores = pa.table({"magnitude": ["1"] * 6, "value": ["2"] * 6})
        joined = add_scores(TABLE, scores)
        assert joined.column_names[-2:] == ["magnitude (scores)", "value"]
        assert joined["count"].equals(TABLE["count"])
        assert add_scores(None, scores) is scores
        assert add_scores(TABLE, None) is TABLE


def test_the_service_orders_and_filters_by_scores(make_service):
    values = [None if i % 7 == 0 else (i * 37 % 40) / 4 for i in range(40)]
    service = make_service(trained=True, scores=pa.table({"value": [None if v is None else str(v) for v in values]}))
    ids = list(service.source.ids)
    assert service.columns.kinds == {"value": Kind.NUMBER}
    known = sorted((i for i in range(40) if values[i] is not None), key=lambda i: (-values[i], i))
    query = Query(sort=ColumnOrder("value", descending=True), show=Show.ALL, size=12)
    top = service.page(query)
    assert [tile.id for tile in top.tiles] == [ids[i] for i in known[:12]]
    assert top.values == {ids[i]: f"{values[i]}" for i in known[:12]}
    assert service.place(query, ids[0]) == len(known)
    assert service.values(query, [ids[0], ids[1]]) == {ids[0]: "", ids[1]: "9.25"}
    assert service.values(Query(), ids) is None
    for instead in ({"audit": 20}, {"like": ids[0]}, {"group": 0}, {"kind": 0}, {"show": Show.REVIEW}):
        assert service.values(replace(query, **instead), ids) is None, "something else orders the images"
    assert service.page(Query()).values is None
    inside = Query(sort=ColumnOrder("value"), show=Show.ALL, ranges=(ColumnRange("value", 2, 3.5),))
    assert service.found(inside) == [ids[i] for i in known[::-1] if 2 <= values[i] <= 3.5]
    ranked = Query(show=Show.ALL, ranges=(ColumnRange("value", high=3.5),))
    assert service.found(ranked) == [ids[i] for i in range(40) if values[i] is not None and values[i] <= 3.5]
    assert service.details(ids[1]).metadata["value"] == "9.25"
    with pytest.raises(DataError, match=r"no column flux.*value"):
        service.page(Query(sort=ColumnOrder("flux")))
