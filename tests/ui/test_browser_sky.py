"""Tests of the tools for the sky in a real browser."""

import io
import queue
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from urllib.parse import parse_qs, urlsplit
from urllib.request import urlopen

import cv2
import numpy as np
import pytest
from astropy.io import fits
from astropy.io.votable import parse_single_table
from astropy.wcs import WCS
from browser import SMALL, running

pytestmark = [pytest.mark.ui, pytest.mark.slow, pytest.mark.timeout(600)]


def write_images(folder):
    """Write ten FITS images of 40 x 40 pixels of half an arcsecond, with north up and east to the left."""
    wcs = WCS(naxis=2)
    wcs.wcs.ctype, wcs.wcs.crpix, wcs.wcs.crval = ["RA---TAN", "DEC--TAN"], [20.5, 20.5], [150.0, 2.0]
    wcs.wcs.cdelt = [-0.5 / 3600, -0.5 / 3600]
    folder.mkdir()
    for k in range(10):
        values = np.random.default_rng(k).normal(size=(40, 40)).astype(np.float32)
        values[:] += 100 * np.arange(40)
        fits.writeto(folder / f"{k}.fits", values, wcs.to_header())


@pytest.fixture(scope="module")
def survey():
    """HiPS cut-out service on this machine; it has no pictures of 2MASS."""
    asked = []

    class Service(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append({name: values[0] for name, values in parse_qs(urlsplit(self.path).query).items()})
            known = "2MASS" not in asked[-1]["hips"]
            side = int(asked[-1]["width"])
            data = cv2.imencode(".jpg", np.full((side, side, 3), 90, np.uint8))[1].tobytes() if known else b""
            self.send_response(200 if known else 404)
            self.send_header("content-type", "image/jpeg")
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Service) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield SimpleNamespace(address=f"http://127.0.0.1:{server.server_port}/hips2fits", asked=asked)
        server.shutdown()


@pytest.fixture(scope="module")
def command(tmp_path_factory, cache_word, survey):
    """Command that needs a token, with a folder for the lock file of a SAMP hub."""
    folder = tmp_path_factory.mktemp("command")
    write_images(folder / "sky")
    rest = [word for word in SMALL if not word.startswith("dataset")]
    words = ["dataset=fits", f"data.root={folder / 'sky'}", "dataset.image_size=32", cache_word, *rest]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAMP_HUB", f"std-lockurl:file://{folder / 'samp'}")
        with running(folder, *words, f"ui.survey={survey.address}", "ui.token=a-token-of-the-test") as command:
            yield command


def test_a_survey_picture_is_requested_only_when_asked_for(opened, command, survey):
    page = opened(command)
    page.press(" ")
    page.get("compass").wait_for()
    page.get("neighbour").first.wait_for()  # after which it would be requested
    assert survey.asked == page.foreign == []
    page.press("v")
    picture = page.get("survey-picture")
    page.until(lambda: picture.evaluate("image => image.naturalWidth") == 768, "the picture is shown")
    page.get("survey-message").wait_for(state="hidden")
    (asked,) = survey.asked
    assert (asked["ra"], asked["dec"], asked["hips"]) == ("150.000000", "2.000000", "CDS/P/DSS2/color")
    assert float(asked["fov"]) == pytest.approx(2**0.5 * 20 / 3600, rel=1e-4)  # 40 pixels of half an arcsecond
    frame = picture.locator("xpath=..").bounding_box()
    stage = page.get("stage").bounding_box()
    assert picture.evaluate("image => getComputedStyle(image).transform") == "matrix(1, 0, 0, 1, 0, 0)"  # north is up
    assert frame["width"] == pytest.approx(min(stage["width"], stage["height"]), abs=2)  # of one scale with the image

    page.choose("survey-name", "2MASS")
    page.until(lambda: "cannot be loaded" in page.get("survey-message").inner_text(), "a sentence says why")
    again = opened(command)
    again.press(" ", "v")
    again.until(lambda: again.foreign, "the survey is requested")
    assert "DSS2" in again.foreign[-1]  # another browser
    page.press("v")
    page.get("survey-pane").wait_for(state="hidden")
    page.page.reload()
    page.get("compass").wait_for()
    count = len(page.foreign)
    page.press("v")
    page.until(lambda: len(page.foreign) > count, "the survey is requested")
    assert "2MASS" in page.foreign[-1]  # remembered
    for opened_page in (page, again):
        assert all(address.startswith(survey.address + "?") for address in opened_page.foreign)
        opened_page.foreign.clear()
    assert all("404" in complaint for complaint in page.complaints)


def test_position_scale_and_values_of_an_image(opened, command):
    page = opened(command)
    page.press(" ")
    page.get("compass").wait_for()
    assert page.get("position").inner_text().split("\n")[0].startswith("150.000000 +2.000000")
    assert "10:00:00.000 +02:00:00.00" in page.get("position").inner_text()
    page.page.context.grant_permissions(["clipboard-read"])
    page.get("copy").last.click()
    assert page.page.evaluate("navigator.clipboard.readText()") == "10:00:00.000 +02:00:00.00"
    turns = page.get("compass").locator("g").evaluate_all("all => all.map(one => one.getAttribute('transform'))")
    north, east = (float(turn.removeprefix("rotate(").removesuffix(")")) for turn in turns)
    assert (north, east) == pytest.approx((0, -90), abs=0.5)
    assert re.search(r"fov=0\.01667", page.get("link-aladin").get_attribute("href"))

    bar, image = page.get("scale-bar"), page.get("full").bounding_box()
    fit = min(image["width"], image["height"]) / 20  # pixels of the page for each arcsecond
    assert bar.bounding_box()["width"] == pytest.approx(float(bar.inner_text()[:-1]) * fit, rel=0.02)
    page.page.mouse.move(image["x"] + image["width"] / 2, image["y"] + image["height"] / 2)
    pixel = page.get("pixel")
    page.until(lambda: pixel.count() and "20, 20:" in pixel.inner_text(), "the value is shown")
    assert float(pixel.inner_text().split()[3]) == pytest.approx(2000, abs=5)
    assert page.complaints == []


@pytest.mark.filterwarnings("ignore:No client was able", "ignore:astropy.samp was deprecated")
def test_the_table_and_an_image_are_sent_to_other_applications(opened, command):
    samp = pytest.importorskip("astropy.samp")
    page = opened(command)
    id_ = page.label("a", "anomaly")
    button = page.get("send-table")
    page.until(button.is_enabled, "the table can be sent")
    button.click()
    page.until(lambda: "no SAMP hub runs" in page.get("status-error").first.inner_text(), "it is refused")
    tables, images = queue.Queue(), queue.Queue()
    with samp.conf.set_temp("use_internet", False):
        hub = samp.SAMPHubServer(addr="127.0.0.1", web_profile=False, mode="single")
        hub.start()
        application = samp.SAMPIntegratedClient(name="TOPCAT", addr="127.0.0.1")
        application.connect(hub)
    try:
        application.bind_receive_notification("table.load.votable", lambda a, b, c, words, d: tables.put(words))
        application.bind_receive_notification("image.load.fits", lambda a, b, c, words, d: images.put(words))
        page.until(lambda: arrives(tables, button), "the table")
        first, *_ = parse_single_table(io.BytesIO(download(tables))).to_table()
        assert (first["ra"], first["dec"], first["label"]) == (pytest.approx(150), pytest.approx(2), "anomaly")
        page.get("sky-map").locator(".nsewdrag").click()  # all images are at one place, in the middle of the map
        page.until(lambda: page.get("view-id").inner_text() == id_, "the image is in the large view")
        page.get("neighbour").first.wait_for()  # nothing moves any more
        page.until(lambda: arrives(images, page.get("send-image")), "the image")
        with fits.open(io.BytesIO(download(images))) as file:
            assert file[0].data.shape == (40, 40)
        page.until(lambda: "to TOPCAT" in page.get("status").last.inner_text(), "the page says so")
    finally:
        application.disconnect()
        hub.stop()


def arrives(taken, button):
    """Press a button and return True if a message arrives soon: a busy hub may still register the application."""
    button.click()
    end = time.monotonic() + 10
    while taken.empty() and time.monotonic() < end:
        time.sleep(0.05)
    return not taken.empty()


def download(taken):
    """Download what the next message names, as another application does: without the cookie."""
    with urlopen(taken.get(timeout=60)["url"]) as answer:
        return answer.read()
