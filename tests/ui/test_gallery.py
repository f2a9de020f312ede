import math
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit

from anomalymatch.lru import LRU
from anomalymatch.types import Label
from anomalymatch.ui import gallery as module
from anomalymatch.ui.gallery import CODES, Gallery, TextFilter
from anomalymatch.ui.views import ColumnOrder, ColumnRange, Query, Show, Sort

COUNT = 90
WORDS = ["Red Spiral", "blue ELLIPTICAL", None, "", "Äther", "50%_.*"]
IDS = [f"{'North' if i % 3 else 'south'}/im_{i:03d}.JPG" for i in range(COUNT)]
METADATA = pa.table(
    {
        "kind": [WORDS[i % len(WORDS)] for i in range(COUNT)],
        "magnitude": [i / 4 for i in range(COUNT)],
        "wave": pa.array([None if i % 5 == 0 else i * 37 % 11 for i in range(COUNT)]),
        "tags": [[i] for i in range(COUNT)],
        "survey": pa.array([f"S{i % 2}" for i in range(COUNT)]).dictionary_encode(),
    }
)
TEXT = [
    "\n".join([id_, row["kind"] or "", f"{row['magnitude']:g}", str(row["wave"] or 0), row["survey"]]).lower()
    for id_, row in zip(IDS, METADATA.to_pylist(), strict=True)
]


def keep(candidates, count):
    return candidates[:count]


def backwards(candidates, count):
    """Reverse the candidates and omit each fifth image, as if it could not be read."""
    return candidates[candidates % 5 != 0][::-1][:count]


def update(gallery, logits, labels, newest=(), conflicts=(), diverse=keep, novelty=None, described=None):
    gallery.update(
        logits=logits,
        novelty=novelty,
        described=described,
        labels=np.asarray(labels, dtype=np.int8),
        newest=np.asarray(newest, dtype=np.int64),
        marked={Show.CONFLICTS: np.asarray(conflicts, dtype=np.int64)},
        diverse=diverse,
    )


def passes(i, query, logits, labels, conflicts):
    """Filter slowly in plain Python."""
    shown = {
        Show.ALL: True,
        Show.UNLABELLED: labels[i] == 0,
        Show.LABELLED: labels[i] > 0,
        Show.CONFLICTS: i in conflicts,
        Show.REVIEW: True,  # their images are given as a list
        Show.SECOND: True,
    }
    if not shown.get(query.show, query.show.value == (["", *Label][labels[i]])):
        return False
    score = math.nan if logits is None else float(expit(float(logits[i])))
    if (query.low > 0 or query.high < 1) and not query.low <= score <= query.high:
        return False
    for column, low, high in query.ranges:
        value = METADATA[column][i].as_py()
        if value is None or not low <= value <= high:
            return False
    return query.text.lower() in TEXT[i]


def ordered(query, logits, newest, audit, novelty, described):
    """Sort slowly in plain Python; the diverse order is tested by itself."""
    positions = list(range(COUNT))
    if isinstance(query.sort, ColumnOrder):
        values, sign = METADATA[query.sort.column].to_pylist(), -1 if query.sort.descending else 1
        return sorted(positions, key=lambda i: (values[i] is None, sign * (values[i] or 0), i))
    if query.sort is Sort.AUDIT:
        return audit
    if query.sort in (Sort.NOVELTY, Sort.DESCRIPTION):
        scores = novelty if query.sort is Sort.NOVELTY else described
        return ordered(replace(query, sort=Sort.SCORE), scores, newest, audit, None, None)

    def by(key):
        return sorted(positions, key=lambda i: (math.isnan(logits[i]), 0 if math.isnan(logits[i]) else key(i), i))

    score = positions if logits is None else by(lambda i: -logits[i])
    if query.sort is Sort.NEWEST:
        return [*newest, *(i for i in score if i not in newest)]
    if logits is None or query.sort in (Sort.SCORE, Sort.DIVERSE):
        return score
    if query.sort is Sort.LOWEST:
        return by(lambda i: logits[i])
    if query.sort is Sort.UNCERTAIN:
        return by(lambda i: abs(logits[i]))
    if np.isnan(logits).all():
        return positions
    median = np.nanmedian(logits)
    return by(lambda i: abs(logits[i] - median))


def all_pages(gallery, query, like=None):
    """Return the images of all pages and check the totals."""
    found, number = [], 0
    while True:
        page = Query(**{**query.__dict__, "page": number})
        positions, total = gallery.page(page, like)
        assert positions.dtype == np.int64
        assert len(positions) == min(query.size, total - len(found))
        found += positions.tolist()
        number += 1
        if len(found) >= total:
            return found


LOGIT = st.one_of(
    st.sampled_from([0.0, -0.0, 1.5, -1.5, math.nan, 40.0, -40.0, math.inf, -math.inf]), st.floats(-6, 6, width=32)
)
STATES = st.fixed_dictionaries(
    {
        "logits": st.none() | st.lists(LOGIT, min_size=COUNT, max_size=COUNT),
        "labels": st.lists(st.sampled_from([0, 0, 0, 1, 2, 3, 4]), min_size=COUNT, max_size=COUNT),
        "conflicts": st.sets(st.integers(0, COUNT - 1), max_size=10),
        "seed": st.integers(0, 3),
    }
)
COLUMN_ORDERS = [ColumnOrder(name, is_down) for name in ("wave", "magnitude") for is_down in (True, False)]
RANGES = (ColumnRange("wave", 2, 7), ColumnRange("magnitude", 1, 9.5))
QUERIES = st.fixed_dictionaries(  # a check of the types of a query draws random numbers
    {
        "sort": st.sampled_from([*Sort, *COLUMN_ORDERS]),
        "show": st.sampled_from(Show),
        "low": st.sampled_from([0.0, 0.0, 0.3, 0.5]),
        "high": st.sampled_from([1.0, 1.0, 0.5, 0.9]),
        "text": st.sampled_from(
            ["", "", "NORTH", "south/", "im_00", "spiral", "äTHER", "%_.*", "2.25", "s1", "nothing"]
        ),
        "size": st.sampled_from([12, 25, 200]),
        "ranges": st.sampled_from([(), (), RANGES, RANGES[:1], RANGES[1:]]),
    }
)


@settings(max_examples=60, deadline=None)
@given(STATES, st.lists(QUERIES, min_size=1, max_size=6))
def test_pages_equal_plain_python(state, queries):
    logits = None if state["logits"] is None else np.array(state["logits"], dtype=np.float32)
    if logits is not None and np.isinf(logits).any() and np.isinf(np.nanmedian(logits)):
        logits[np.isinf(logits)] = 9.0  # an infinite median has no distances
    labels, conflicts = state["labels"], sorted(state["conflicts"])
    newest = np.random.default_rng(state["seed"]).permutation(np.flatnonzero(labels)).tolist()
    gallery = Gallery(IDS, seed=state["seed"], metadata=METADATA)
    novelty = None if state["seed"] == 3 else np.roll(np.arange(COUNT) % 7, state["seed"]).astype(np.float32)
    described = None if state["seed"] == 0 else np.roll(np.arange(COUNT) % 5, state["seed"]).astype(np.float32)
    update(gallery, logits, labels, newest, conflicts, novelty=novelty, described=described)
    audit = np.random.default_rng(state["seed"]).permutation(COUNT).tolist()
    for query in (Query(**words) for words in queries):
        order = ordered(query, logits, newest, audit, novelty, described)
        expected = [i for i in order if passes(i, query, logits, labels, conflicts)]
        assert all_pages(gallery, query) == expected
        near = list(range(COUNT - 1, -1, -2))
        expected = [i for i in near if passes(i, query, logits, labels, conflicts)]
        assert all_pages(gallery, query, np.array(near)) == expected


@pytest.mark.parametrize("block", [7, 30, 500])
@pytest.mark.parametrize("size", [12, 25])
def test_diverse_order_in_blocks(monkeypatch, block, size):
    monkeypatch.setattr(module, "DIVERSE_BLOCK", block)
    logits = np.random.default_rng(0).normal(size=COUNT).astype(np.float32)
    gallery = Gallery(IDS, seed=0, metadata=None)
    update(gallery, logits, np.zeros(COUNT), diverse=backwards)
    top, expected = np.argsort(-logits), []
    for start in range(0, COUNT, block):
        part = top[start : start + block]
        first = [i for i in part[::-1] if i % 5]
        expected += [*first, *(i for i in part if i not in first)]
    assert all_pages(gallery, Query(sort=Sort.DIVERSE, size=size)) == expected
    calls = []
    update(gallery, logits, np.zeros(COUNT), diverse=lambda c, k: calls.append((len(c), k)) or c)
    assert not calls  # computed on demand
    for _ in range(2):
        gallery.page(Query(sort=Sort.DIVERSE, size=12))
    assert len(calls) == -(-12 // block)
    assert calls[0] == (min(block, COUNT), min(block, COUNT))


def test_ranks_of_images_with_a_score():
    gallery = Gallery(IDS, seed=0, metadata=None)
    assert gallery.rank(np.array([0, 5])).tolist() == [0, 0]
    logits = np.full(COUNT, np.nan, dtype=np.float32)
    logits[[3, 8, 1, 7]] = [0.5, 2.0, 0.5, -1.0]
    update(gallery, logits, np.zeros(COUNT))
    assert gallery.rank(np.array([8, 1, 3, 7, 0])).tolist() == [1, 2, 3, 4, 0]
    everything = gallery.rank(np.arange(COUNT))
    assert sorted(everything[everything > 0]) == [1, 2, 3, 4]


def test_page_beyond_the_end_is_the_last_page():
    gallery = Gallery(IDS, seed=0, metadata=None)
    assert gallery.page(Query(size=40, page=99))[0].tolist() == list(range(80, 90))
    assert gallery.page(Query(size=45, page=99))[0].tolist() == list(range(45, 90))
    assert gallery.page(Query(text="nothing", page=3))[1] == 0


def test_labels_are_copied_and_the_same_scores_are_not_sorted_again(monkeypatch):
    logits = np.random.default_rng(0).normal(size=COUNT).astype(np.float32)
    labels = np.zeros(COUNT, dtype=np.int8)
    gallery = Gallery(IDS, seed=0, metadata=None)
    update(gallery, logits, labels)
    best = int(gallery.page(Query())[0][0])
    labels[best] = CODES[Label.ANOMALY]
    gallery._snapshot.results = LRU(2)
    assert gallery.page(Query())[0][0] == best

    def never(_):
        raise AssertionError("sorted again")

    with monkeypatch.context() as patch:
        patch.setattr(module, "_ascending", never)
        update(gallery, logits, labels, newest=[best])
        assert best not in gallery.page(Query())[0]
        assert gallery.page(Query(show=Show.ANOMALY))[0].tolist() == [best]
        assert gallery.page(Query(sort=Sort.NEWEST, show=Show.ALL))[0][0] == best
        update(gallery, logits.copy(), labels)
        with pytest.raises(AssertionError, match="sorted again"):
            gallery.page(Query())


def test_pages_while_another_thread_updates():
    gallery = Gallery(IDS, seed=0, metadata=METADATA)
    stop = threading.Event()

    def look():
        while not stop.is_set():
            for sort in Sort:
                positions, total = gallery.page(Query(sort=sort, show=Show.ALL, size=100))
                assert (total, sorted(positions)) == (COUNT, list(range(COUNT)))

    with ThreadPoolExecutor(3) as pool:
        looking = [pool.submit(look) for _ in range(3)]
        for seed in range(60):
            rng = np.random.default_rng(seed)
            update(gallery, rng.normal(size=COUNT).astype(np.float32), rng.integers(0, 5, COUNT), diverse=backwards)
        stop.set()
    for one in looking:
        one.result()  # raises the errors of its thread


def test_text_filter_ignores_case_and_is_literal():
    words = TextFilter(IDS, METADATA)
    assert np.flatnonzero(words.matches("IM_00")).tolist() == list(range(10))
    assert words.matches("im.00").sum() == 0
    assert words.matches("50%_.*").sum() == 15
    assert words.matches("[0]").sum() == 0  # a list has no text
    assert words.matches("s0").tolist() == [i % 2 == 0 for i in range(COUNT)]
    assert words.matches("SPIRAL") is words.matches("SPIRAL")
    assert TextFilter(IDS, None).matches("spiral").sum() == 0
    chunked = pa.concat_tables([METADATA.slice(0, 40), METADATA.slice(40)])
    np.testing.assert_array_equal(TextFilter(IDS, chunked).matches("blue"), words.matches("blue"))


def test_text_is_found_in_classes_and_headers():
    headers = {id_: {"OBJECT": f"NGC {number}", "FILTER": "r"} for number, id_ in enumerate(IDS)}
    may_read = threading.Event()

    def header(id_):
        assert may_read.wait(10)
        return headers[id_]

    text = TextFilter(IDS, None, {IDS[2]: "Merger"}, header)
    assert np.flatnonzero(text.matches("merger")).tolist() == [2]
    text.read_headers(0.01)
    assert text.unread == len(IDS)
    assert not text.matches("ngc 3").any()
    may_read.set()
    text.read_headers(10.0)
    assert text.unread == 0
    assert np.flatnonzero(text.matches("object ngc 3"))[0] == 3
    assert text.matches("FILTER r").all()
    assert TextFilter(IDS, None).unread == 0


def test_results_of_a_text_grow_with_the_headers():
    gallery = Gallery(IDS, seed=0, metadata=None, header=lambda id_: {"OBJECT": "M 31"})
    query = Query(text="m 31", show=Show.ALL)
    assert gallery.page(query)[1] == 0
    gallery.text.read_headers(10.0)
    assert gallery.page(query)[1] == len(IDS)
