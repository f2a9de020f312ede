import math
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest
from astropy.coordinates import SkyCoord
from astropy.io import fits
from astropy.wcs import WCS
from hypothesis import given
from hypothesis import strategies as st
from nicegui import ui
from starlette.applications import Starlette
from starlette.testclient import TestClient

from anomalymatch.data.sources.fits import FitsSource
from anomalymatch.data.sources.sky import Sky
from anomalymatch.errors import ConfigError
from anomalymatch.types import Orientation
from anomalymatch.ui.originals import has_fits
from anomalymatch.ui.sky import (
    SURVEYS,
    check_survey,
    decimal,
    field_of_view,
    is_mirrored,
    origin_of,
    sexagesimal,
    sky_links,
    survey_picture,
)
from anomalymatch.ui.web.routes import routes


@given(st.floats(0, 359.99999), st.floats(-89.9999, 89.9999))
def test_sexagesimal_can_be_read_by_astropy(ra, dec):
    back = SkyCoord(sexagesimal((ra, dec)), unit=("hourangle", "deg"))
    assert abs((back.ra.deg - ra + 180) % 360 - 180) <= 0.5e-3 * 15 / 3600 + 1e-9
    assert back.dec.deg == pytest.approx(dec, abs=0.5e-2 / 3600 + 1e-9)


@pytest.mark.parametrize(
    ("coordinates", "text"),
    [
        ((10.684708, 41.26875), "00:42:44.330 +41:16:07.50"),
        ((0.0, -0.5), "00:00:00.000 -00:30:00.00"),
        ((359.9999999, 59.9999999), "00:00:00.000 +60:00:00.00"),  # no second is rounded to 60
    ],
)
def test_sexagesimal_by_hand(coordinates, text):
    assert sexagesimal(coordinates) == text
    assert decimal((10.684708, -5.0)) == "10.684708 -5.000000"


def test_links_show_the_image_with_its_surroundings():
    assert sky_links(None) == {}
    links = sky_links((10.5, -5.25), field_of_view(Orientation(0.4, 0, -90), (450, 300)))
    assert links["ESASky"].startswith("https://sky.esa.int/esasky/?target=10.500000+-5.250000&fov=0.15&")
    assert links["Aladin Lite"] == "https://aladin.cds.unistra.fr/AladinLite/?target=10.500000+-5.250000&fov=0.15"
    assert field_of_view(None, (450, 300)) == field_of_view(Orientation(0.4, 0, -90), None) == 0.05


CDS = "https://alasky.cds.unistra.fr/hips-image-services/hips2fits"


def test_a_survey_picture_fills_a_turned_square_of_the_field():
    address = survey_picture(CDS, "SDSS DR9", (10.5, -5.25), 0.01)
    assert address.startswith(CDS + "?")
    words = {name: value for name, (value,) in parse_qs(urlsplit(address).query).items()}
    assert float(words.pop("fov")) == pytest.approx(0.01 * math.sqrt(2), rel=1e-5)
    known = {"hips": "CDS/P/SDSS9/color", "ra": "10.500000", "dec": "-5.250000", "projection": "TAN", "format": "jpg"}
    assert words == known | {"width": "768", "height": "768"}
    assert len({survey_picture(CDS, name, (0.0, 0.0), 1.0) for name in SURVEYS}) == len(SURVEYS) == 7
    assert "fov=180&" in survey_picture(CDS, "DSS2", (0.0, 0.0), 180.0)
    assert field_of_view(Orientation(0.5, 0, -90), (40, 20), sides=1.0) == pytest.approx(20 / 3600)
    assert field_of_view(None, None, sides=1.0) == 0.05


@pytest.mark.parametrize(
    "service", ["ftp://a.org/x", "//a.org", "a.org", "https://", "https://a.org/x?y", "https://a.org/;x", "http://a b"]
)
def test_a_survey_service_needs_an_address(service):
    with pytest.raises(ConfigError, match=r"ui\.survey"):
        check_survey(service)


def test_the_survey_service_and_its_origin():
    for service, origin in ((CDS, "https://alasky.cds.unistra.fr"), ("http://[::1]:8080/h", "http://[::1]:8080")):
        assert origin_of(check_survey(service)) == origin


def wcs(*, turn=0.0, flip=1.0, dec=-30.0, scale=0.5):
    """World coordinates that are turned by `turn` degrees; with `flip` of -1, the image is a mirror image."""
    made = WCS(naxis=2)
    made.wcs.ctype = ["RA---TAN", "DEC--TAN"]
    made.wcs.crval, made.wcs.crpix = [150.0, dec], [33.0, 25.0]
    c, s = math.cos(math.radians(turn)), math.sin(math.radians(turn))
    made.wcs.cd = np.array([[-flip * c, s], [flip * s, c]]) * scale / 3600
    return made


@pytest.mark.parametrize("dec", [-30.0, 0.0, 85.0])
@pytest.mark.parametrize(
    ("turn", "flip", "north", "east"),
    # The first row is on top, so that a usual image (its second axis points north) is shown with north down.
    [(0, 1, 180, -90), (0, -1, 180, 90), (90, 1, 90, 180), (180, 1, 0, 90), (30, 1, 150, -120)],
)
def test_directions_on_an_image(turn, flip, north, east, dec):
    found = Sky(wcs(turn=turn, flip=flip, dec=dec), (48, 64)).orientation(32.0, 24.0)
    assert found.scale == pytest.approx(0.5)
    assert abs((found.north - north + 180) % 360 - 180) < 0.1
    assert abs((found.east - east + 180) % 360 - 180) < 0.1
    assert is_mirrored(found) == (flip == 1)  # the first row is on top


def test_there_is_no_direction_at_the_pole():
    assert Sky(wcs(dec=90.0), (48, 64)).orientation(32.0, 24.0) is None


@pytest.fixture
def service(make_service, tmp_path):
    (tmp_path / "fits").mkdir()
    values = np.arange(48 * 64, dtype=np.float32).reshape(48, 64)
    fits.writeto(tmp_path / "fits" / "a.fits", values, wcs(turn=180).to_header())
    fits.writeto(tmp_path / "fits" / "b.fits", values)
    return make_service(source=FitsSource(tmp_path / "fits"))


def test_details_have_scale_directions_and_size(service):
    known, unknown = service.details("a.fits"), service.details("b.fits")
    assert known.orientation.scale == pytest.approx(0.5)
    assert known.orientation.north == pytest.approx(0, abs=0.1)
    assert known.coordinates == pytest.approx((150.0, -30.0), abs=0.001)
    assert (known.size, unknown.size) == ((64, 48), (64, 48))
    assert (unknown.orientation, unknown.coordinates) == (None, None)


def test_values_of_pixels(service):
    client = TestClient(Starlette(routes=routes(service)))

    def ask(**words):
        return client.get("/pixel", params={"id": "a.fits"} | words)

    (band,) = service.source.bands
    for x, y, pixel in ((0, 0, (0, 0)), (1, 1, (63, 47)), (0.5, 0.25, (32, 12))):
        answer = ask(x=x, y=y).json()
        assert (answer["x"], answer["y"]) == pixel
        assert answer["values"] == {band: f"{64 * pixel[1] + pixel[0]:.6g}"}
    for wrong in ({}, {"x": 0.5}, {"x": "nan", "y": 0.5}, {"x": 1.01, "y": 0.5}, {"x": 0.5, "y": "-0.1"}):
        assert ask(**wrong).status_code == 400
    assert ask(id="c.fits", x=0.5, y=0.5).status_code in (400, 404)


def test_original_files(service, tmp_path):
    client = TestClient(Starlette(routes=routes(service)))
    answer = client.get("/original", params={"id": "a.fits"})
    assert answer.content == (tmp_path / "fits" / "a.fits").read_bytes()
    assert answer.headers["content-disposition"] == 'attachment; filename="a.fits"'
    assert client.get("/original", params={"id": "../fits/a.fits"}).status_code == 400
    assert has_fits(service.source, "a.fits")
    (tmp_path / "fits" / "b.fits").write_bytes(b"\xff\xd8\xff")
    (tmp_path / "fits" / "a.fits").unlink()
    assert not has_fits(service.source, "a.fits")
    assert not has_fits(service.source, "b.fits")


@pytest.mark.parametrize("survey", [None, CDS])
def test_survey_pictures_are_offered_only_with_a_service(service, visit, survey):
    async def act(user):
        switches = user.find(kind=ui.switch).elements
        assert ("survey" in [switch.props["data-testid"] for switch in switches]) == (survey is not None)

    visit(service, act, survey=survey)
