import threading
import time
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.path import Path as Polygon
from starlette.applications import Starlette
from starlette.testclient import TestClient

from anomalymatch.errors import ConfigError
from anomalymatch.types import Label
from anomalymatch.ui import Query, Show
from anomalymatch.ui import map as module
from anomalymatch.ui.gallery import CODES
from anomalymatch.ui.map import ArchiveMap, inside
from anomalymatch.ui.web.routes import routes

WHOLE = ((-2.0, -2.0), (2.0, -2.0), (2.0, 2.0), (-2.0, 2.0))
LEFT = ((-2.0, -2.0), (0.0, -2.0), (0.0, 2.0), (-2.0, 2.0))
coordinates = st.integers(-8, 8).map(lambda k: k / 4)


def wait(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@given(st.lists(st.tuples(coordinates, coordinates), min_size=3, max_size=3, unique=True), st.integers(0, 9))
def test_inside_a_triangle_equals_matplotlib(corners, seed):
    (x1, y1), (x2, y2), (x3, y3) = corners
    if (x2 - x1) * (y3 - y1) == (x3 - x1) * (y2 - y1):
        return  # a line
    places = np.random.default_rng(seed).uniform(-2, 2, (50, 2)).astype(np.float32)
    assert inside(places, tuple(corners)).tolist() == Polygon(corners).contains_points(places).tolist()


def test_inside_does_not_depend_on_the_first_corner_or_the_direction():
    places = np.random.default_rng(0).uniform(-1, 1, (500, 2)).astype(np.float32)
    star = tuple((float(np.cos(a)), float(np.sin(a))) for a in 4 * np.pi * np.arange(5) / 5)  # crosses itself
    found = inside(places, star)
    assert 0 < found.sum() < 500
    assert np.array_equal(found, inside(places, star[2:] + star[:2]))
    assert np.array_equal(found, inside(places, star[::-1]))
    assert not inside(np.zeros((1, 2), np.float32), star)[0]  # even-odd: its middle is outside


@pytest.mark.parametrize("area", [WHOLE[:1], WHOLE[:2], WHOLE * 51])
def test_an_area_has_a_sensible_number_of_corners(area):
    with pytest.raises(ConfigError, match=str(len(area))):
        Query(area=area)


@pytest.fixture
def make_map(tmp_path):
    made = []

    def make(store, **options):
        made.append(ArchiveMap(store, tmp_path / "maps", **{"seed": 0, "on_change": lambda: None} | options))
        return made[-1]

    yield make
    for each in made:
        each.close()


def two_kinds(count=80):
    """Make unit vectors of two kinds, which alternate."""
    rows = np.random.default_rng(0).normal(size=(count, 6)) * 0.1 + 4 * np.eye(6)[np.arange(count) % 2]
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_the_map_waits_for_features_and_is_kept(make_map, make_store, monkeypatch):
    stores, changes = [], []
    first = make_map(lambda: stores[-1] if stores else None, on_change=lambda: changes.append(1))
    first.resume()
    assert first.message == ""  # nobody has asked for it
    first.request()
    assert first.message == module.WAITING
    stores.append(make_store(two_kinds(), bad={7}))
    first.resume()
    wait(lambda: changes)
    points = first.points
    assert (first.message, changes) == ("", [1])
    assert points.positions.tolist() == [k for k in range(80) if k != 7]
    assert np.abs(points.places).max() == pytest.approx(1)
    assert points.find(np.array([0, 7, 8, 79])).tolist() == [0, -1, 7, 78]
    kind = points.positions % 2
    middles = [points.places[kind == k].mean(axis=0) for k in (0, 1)]
    own, other = (np.linalg.norm(points.places - np.array(middles)[k], axis=1) for k in (kind, 1 - kind))
    assert (own < other).all()

    monkeypatch.setattr(module, "umap", lambda *_, **__: pytest.fail("it is in the cache"))
    again = make_map(lambda: stores[-1])
    again.request()
    wait(lambda: again.points)
    assert np.array_equal(again.points.places, points.places)
    assert again.points.version == points.version


def test_other_features_have_another_map(make_map, make_store):
    versions = set()
    for rows in (two_kinds(), two_kinds()[::-1]):
        made = make_map(lambda rows=rows: make_store(rows))
        made.request()
        wait(lambda made=made: made.points)
        versions.add(made.points.version)
    assert len(versions) == 2


def test_a_large_archive_is_sampled(make_map, make_store, monkeypatch):
    monkeypatch.setattr(module, "MAPPED", 30)
    made = make_map(lambda: make_store(two_kinds()))
    made.request()
    wait(lambda: made.points)
    assert len(set(made.points.positions.tolist())) == 30
    assert made.within(WHOLE).tolist() == made.points.positions.tolist()


@pytest.mark.parametrize("rows", [two_kinds(2), two_kinds(80)])
def test_a_failure_is_told_and_tried_again(make_map, make_store, monkeypatch, rows):
    changes = []
    made = make_map(lambda: make_store(rows), on_change=lambda: changes.append(1))
    monkeypatch.setattr(module, "umap", lambda *_, **__: 1 / 0)
    made.request()
    wait(lambda: changes)
    assert ("at least 3" if len(rows) == 2 else "division by zero") in made.message
    assert made.within(WHOLE).tolist() == []
    made.request()
    wait(lambda: len(changes) == 2)


def test_closing_ends_the_computation(make_map, make_store, monkeypatch):
    started = threading.Event()

    def endless(*_, advance, **__):
        while True:
            started.set()
            advance()

    monkeypatch.setattr(module, "umap", endless)
    made = make_map(lambda: make_store(two_kinds()))
    made.request()
    assert started.wait(10)
    made.close()  # would wait for ever
    assert made.points is None


@pytest.fixture
def mapped(make_service):
    """Service with a map of its 40 images."""
    service = make_service(40)
    service.map.request()
    wait(lambda: service.map.points)
    return service


def test_an_area_shows_its_images_in_every_order(mapped):
    left = {mapped.source.ids[k] for k in mapped.map.within(LEFT)}
    assert 0 < len(left) < 40
    page = mapped.page(Query(area=LEFT))
    assert ({tile.id for tile in page.tiles}, page.total) == (left, len(left))
    mapped.label([*left][:3], Label.ANOMALY, "me")
    mapped.rerank()
    unlabelled = mapped.page(Query(area=LEFT))
    assert {tile.id for tile in unlabelled.tiles} == set([*left][3:])
    scores = [tile.score for tile in unlabelled.tiles]
    assert scores == sorted(scores, reverse=True)
    assert {tile.id for tile in mapped.page(Query(area=LEFT, show=Show.ALL)).tiles} == left
    assert mapped.page(Query()).total == 37


def test_all_images_found_in_an_area_are_those_of_its_pages(mapped):
    query = Query(area=WHOLE, size=12)
    pages = [mapped.page(Query(area=WHOLE, size=12, page=k)).tiles for k in range(4)]
    assert sorted(mapped.found(query)) == sorted(tile.id for tiles in pages for tile in tiles)


def test_routes_of_the_map(mapped):
    client = TestClient(Starlette(routes=routes(mapped)))
    points = mapped.map.points
    assert np.array_equal(np.frombuffer(client.get("/map").content, "<f4").reshape(-1, 2), points.places)
    ids = [mapped.source.ids[k] for k in points.positions]
    assert client.get("/map/marks").content == bytes([255] * 40 + [0] * 40)
    mapped.label(ids[3:4], Label.ANOMALY, "me")
    mapped.label(ids[5:6], Label.ARTEFACT, "me")
    mapped.rerank()
    marks = np.frombuffer(client.get("/map/marks").content, np.uint8)
    scores = [tile.score for tile in mapped.tiles(ids)]
    assert marks[:40].tolist() == [int(score * 254) for score in scores]
    assert np.flatnonzero(marks[40:]).tolist() == [3, 5]
    assert marks[[43, 45]].tolist() == [CODES[Label.ANOMALY], CODES[Label.ARTEFACT]]
    veiled = client.get("/map/marks?veiled=1&blind=me").content
    assert veiled == bytes([255] * 40) + marks[40:].tobytes(), "without scores, with own labels"
    assert client.get("/map/marks?blind=ada").content == marks[:40].tobytes() + bytes(40), "without others' labels"
    seen = client.get(f"/map/tile?number=3&version={points.version}&veiled=1&blind=ada").json()
    assert (seen["id"], seen["score"], seen["label"]) == (ids[3], None, None)
    answer = client.get("/map/tile", params={"number": 3, "version": points.version})
    assert answer.json() == asdict(mapped.tiles(ids[3:4])[0])
    assert mapped.map_numbers(ids[:5]) == {id_: k for k, id_ in enumerate(ids[:5])}


@pytest.mark.parametrize("words", [{}, {"number": "40"}, {"number": "-1"}, {"number": "x"}, {"number": "9" * 30}])
def test_there_is_no_image_with_such_a_number(mapped, words):
    client = TestClient(Starlette(routes=routes(mapped)))
    assert client.get("/map/tile", params=words | {"version": mapped.map.points.version}).status_code == 404
    assert client.get("/map/tile", params={"number": 3, "version": "another"}).status_code == 404


def test_before_the_map_is_ready(make_service):
    service = make_service(40)
    client = TestClient(Starlette(routes=routes(service)))
    assert client.get("/map").status_code == 404
    assert client.get("/map/marks").content == b""
    assert (service.map_numbers(service.source.ids), service.page(Query(area=WHOLE)).total) == ({}, 0)
