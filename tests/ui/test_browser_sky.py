"""Test of the tools for the sky in a real browser."""

import re

import numpy as np
import pytest
from astropy.io import fits
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


def test_position_scale_and_values_of_an_image(opened, tmp_path, cache_word):
    write_images(tmp_path / "sky")
    rest = [word for word in SMALL if not word.startswith("dataset")]
    words = ["dataset=fits", f"data.root={tmp_path / 'sky'}", "dataset.image_size=32", cache_word, *rest]
    with running(tmp_path, *words) as command:
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
