import math
from urllib.parse import parse_qsl, unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anomalymatch.ui.views import ColumnOrder, ColumnRange, Query, Show, Sort
from anomalymatch.ui.web.address import read_address, write_address

NAMES = ["magnitude", "a:b..c&d=é %", "", "-x"]
LIMIT = st.just(math.inf) | st.floats(0, allow_nan=False)
RANGES = st.builds(lambda name, low, high: ColumnRange(name, -low, high), st.sampled_from(NAMES), LIMIT, LIMIT)
QUERIES = st.fixed_dictionaries(
    {
        "sort": st.sampled_from(Sort) | st.builds(ColumnOrder, st.sampled_from(NAMES), st.booleans()),
        "show": st.sampled_from(Show),
        "low": st.sampled_from([0.0, 0.25]),
        "high": st.sampled_from([0.75, 1.0]),
        "text": st.text(st.characters(codec="utf-8")),
        "like": st.none() | st.text(st.characters(codec="utf-8"), min_size=1),
        "group": st.none() | st.integers(0, 20),
        "area": st.just(()) | st.lists(st.tuples(*[st.sampled_from([0.0, -0.5, 12.25])] * 2), min_size=3).map(tuple),
        "kind": st.none() | st.integers(0, 20),
        "ranges": st.lists(RANGES, max_size=3, unique_by=lambda limits: limits.column).map(tuple),
        "audit": st.integers(0, 10**6),
        "share": st.sampled_from([(1, 1), (1, 2), (20, 20)]),
        "size": st.integers(12, 200),
        "page": st.integers(1, 10**6),
        "shift": st.integers(0, 11),
    }
)


@given(QUERIES)
def test_an_address_is_read_as_it_was_written(parts):
    query = Query(**parts)
    address = read_address(parse_qsl(write_address(query), keep_blank_values=True), NAMES)
    assert (address.query, address.refused) == (query, [])


def test_words_are_short_and_a_new_page_has_none():
    assert write_address(Query()) == ""
    query = Query(sort=Sort.AUDIT, show=Show.ANOMALY, low=0.4, page=2, size=24)
    assert write_address(query) == "order=random-audit&show=anomaly&score=0.4-1&page=3&size=24"
    ranges = (ColumnRange("mag", 17.0, 20.5), ColumnRange("z", 0.1))
    query = Query(sort=ColumnOrder("mag", descending=True), ranges=ranges)
    assert unquote(write_address(query)) == "descending=mag&range=mag:17.0..20.5&range=z:0.1.."


def test_image_selection_and_large_view():
    address = read_address([("image", "a b"), ("view", "large"), ("select", "x"), ("select", "y")])
    assert address[1:] == ("a b", True, False, ["x", "y"], False, [])
    compared = read_address([("image", "x"), ("view", "compare"), ("select", "x"), ("select", "y")])
    assert (compared.is_large, compared.is_compared) == (True, True)
    assert not read_address([("image", "x"), ("view", "compare"), ("select", "x")]).is_compared
    assert not read_address([("view", "large")]).is_large


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("share", "0of2"), ("share", "3of2"), ("share", "2"), ("share", "1of2of3"), ("audit", "2000000")),
        *(("order", "best"), ("show", ""), ("score", "0.4"), ("score", "1-0"), ("score", "a-b"), ("score", "nan-1")),
        *(("page", "0"), ("page", "-1"), ("page", "1e3"), ("page", "9" * 40), ("size", "11"), ("size", "5000")),
        *(
            ("group", "two"),
            ("shift", "5"),
            ("view", "small"),
            ("area", "1,2_3"),
            ("area", "1,2"),
            ("area", "nan,1_1,2_3,4"),
            ("<b>", "1"),
            *(("range", value) for value in ("mag", "mag:1", "mag:2..1", "mag:a..", "mag:nan..1", "z:1..2")),
            ("ascending", "z"),
            ("", ""),
        ),
    ],
)
def test_bad_words_are_ignored_with_a_sentence(name, value):
    address = read_address([("show", "all"), (name, value), ("text", "ring")], ["mag"])
    assert len(address.refused) == 1
    assert address.complaint
    assert address.query.text == "ring"
    assert address.query == Query(show=address.query.show, text="ring")


def test_the_token_is_neither_read_nor_written():
    address = read_address([("token", "secret"), ("show", "all")])
    assert address.complaint == ""
    assert write_address(address.query) == "show=all"


def test_a_complaint_is_short():
    address = read_address([("\x1b[2J" * 100, "x" * 10_000)] * 50)
    assert len(address.complaint) < 300
    assert "\x1b" not in address.complaint
