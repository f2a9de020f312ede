import numpy as np
import pytest
from astropy.wcs import WCS

from anomalymatch.types import Label
from anomalymatch.ui import sky_map
from anomalymatch.ui.sky_map import RIM, SkyMap, hammer
from anomalymatch.ui.web import charts

A, N = Label.ANOMALY, Label.NORMAL


def project(ra, dec, centre):
    return hammer(np.array([ra], float), np.array([dec], float), float(centre))[0]


@pytest.mark.parametrize("centre", [0.0, 180.0, 255.0])
def test_projection_is_that_of_astropy(centre):
    rng = np.random.default_rng(0)
    ra, dec = rng.uniform(0, 360, 500), np.degrees(np.arcsin(rng.uniform(-1, 1, 500)))
    wcs = WCS(naxis=2)
    wcs.wcs.ctype, wcs.wcs.crval, wcs.wcs.cdelt = ["RA---AIT", "DEC--AIT"], [centre, 0.0], [-1.0, 1.0]
    expected = np.radians(np.stack(wcs.wcs_world2pix(ra, dec, 0), axis=1) + 1)
    np.testing.assert_allclose(hammer(ra, dec, centre), expected, atol=1e-9)


def test_projection_by_hand():
    for ra, dec, place in (
        (40, 0, (0, 0)),
        (220 - 1e-9, 0, (-RIM[0], 0)),  # east is left
        (220 + 1e-9, 0, (RIM[0], 0)),
        (77, 90, (0, RIM[1])),
        (3, -90, (0, -RIM[1])),
        (130, 0, (-2, 0)),  # sin 45 degrees times 2 times the root of 2 / (1 + cos 45 degrees)
    ):
        factor = np.sqrt(2 / (1 + np.sqrt(0.5))) * np.sqrt(0.5) if ra == 130 else 1
        np.testing.assert_allclose(project(ra, dec, 40), np.array(place) * factor, atol=1e-6)


def test_areas_are_equal():
    for ra, dec in ((40.0, 0.0), (140.0, 10.0), (300.0, -70.0)):
        corner, east, north = (project(ra + a, dec + d, 40) for a, d in ((0, 0), (0.01, 0), (0, 0.01)))
        area = abs(np.linalg.det([east - corner, north - corner]))
        assert area == pytest.approx(np.radians(0.01) ** 2 * np.cos(np.radians(dec + 0.005)), rel=1e-3)


def make(places, labels):
    asked = []

    def coordinates(id_):
        asked.append(id_)
        return places[id_]

    return SkyMap(list(places), coordinates, lambda: labels), asked


def test_whole_sky():
    rng = np.random.default_rng(0)
    places = {f"i{k}": (float(rng.uniform(0, 360)), float(rng.uniform(-80, 80))) for k in range(50)} | {"bad": None}
    labels = {"i3": A, "i4": N, "bad": A}
    sky, asked = make(places, labels)
    view = sky.view()
    assert (len(view.archive), view.ids, view.found.shape) == (50, ["i3"], (1, 2))
    assert view.limits[0] < -RIM[0]
    assert view.limits[3] > RIM[1]
    assert any(np.allclose(view.found[0], place) for place in view.archive)
    count = len(asked)
    labels["i5"] = A
    assert sky.view().ids == ["i3", "i5"]
    assert len(asked) == count + 1  # positions are kept
    one = sky.view().without({"i3"})
    assert one.ids == ["i5"]
    assert (one.found == sky.view().found[1:]).all()
    assert len(one.without({"i5"}).found) == 0


def test_a_part_of_the_sky_fills_the_map():
    places = {f"i{k}": (float(359.9 + 0.02 * k) % 360, float(60 + 0.01 * (k % 5))) for k in range(20)}
    view = make(places, {"i0": A})[0].view()
    left, right, low, high = view.limits
    assert right - left < 0.02  # radians
    everything = np.concatenate([view.archive, view.found])
    assert (everything > (left, low)).all()
    assert (everything < (right, high)).all()
    np.testing.assert_allclose(np.ptp(view.archive[:, 1]), np.radians(0.04), rtol=0.2)
    assert {text for text, _, _ in view.names} >= {"0°", "+60°"}


def test_there_is_no_map_without_positions(monkeypatch):
    none, asked = make(dict.fromkeys((f"i{k}" for k in range(500)), None), {"i0": A})
    assert none.view() is None
    assert len(asked) <= sky_map.TRIED + 1
    few = {f"i{k}": (1.0, 2.0) if k % 3 == 0 else None for k in range(90)}
    assert make(few, {})[0].view() is None
    assert make({"a": (1.0, 2.0), "b": (1.0, 2.0)}, {})[0].view() is None
    monkeypatch.setattr(sky_map, "PATIENCE_S", -1.0)
    slow, asked = make({f"i{k}": (1.0, 2.0) for k in range(90)}, {})
    assert slow.view() is None
    assert len(asked) == 1


def test_one_place_has_a_map_and_ids_are_not_markup():
    places = {f"<b>{k}": (10.0, 90.0) for k in range(3)}
    figure = charts.sky(make(places, {"<b>1": A})[0].view())
    found = figure["data"][-1]
    assert (found["customdata"], found["text"]) == (["<b>1"], ["&lt;b&gt;1"])
    left, right = figure["layout"]["xaxis"]["range"]
    assert left < found["x"][0] < right
