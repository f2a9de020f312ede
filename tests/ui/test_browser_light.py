"""Tests of light, scale and layout of the page in a real browser, on FITS images and on the demo."""

from itertools import pairwise

import numpy as np
import pytest
from astropy.io import fits
from browser import running

pytestmark = [pytest.mark.ui, pytest.mark.slow, pytest.mark.timeout(600)]

SIDE = 40
SIZES = [(1280, 800), (2560, 1440)]


@pytest.fixture(scope="module")
def sky(demo_words, tmp_path_factory):
    """Command on 60 FITS images with coordinates; the second half is twice as large."""
    root = tmp_path_factory.mktemp("sky")
    random = np.random.default_rng(0)
    (root / "images").mkdir()
    for number in range(60):
        side = SIDE * (1 + (number >= 30))
        header = fits.Header({"CTYPE1": "RA---TAN", "CTYPE2": "DEC--TAN", "CRVAL1": 150.0 + number, "CRVAL2": 2.0})
        header.update({"CRPIX1": 20, "CRPIX2": 20, "CD1_1": -1e-4, "CD2_2": 1e-4, "OBJECT": f"NGC {7000 + number}"})
        pixels = random.normal(100, 3, (side, side)).astype(np.float32)
        pixels[side // 2 - 2 : side // 2 + 2, side // 2 - 2 : side // 2 + 2] += 50 * (number + 1)
        fits.PrimaryHDU(pixels, header).writeto(root / f"images/{number:03d}.fits")
    words = [word for word in demo_words if not word.startswith("dataset")]
    with running(root, "dataset=fits", "data.root=images", "dataset.image_size=32", *words) as command:
        yield command


def box(page, name):
    return page.get(name).bounding_box()


def wait_for_pictures(page):
    page.until(
        lambda: all(page.page.eval_on_selector_all("[data-testid=tile] img", "all => all.map(i => i.complete)")[:6]),
        "the pictures are there",
    )


def pictures(page):
    return page.page.eval_on_selector_all("[data-testid=tile] img", "all => all.map(image => image.src)")


class TestTiles:
    def test_a_page_fills_the_window(self, sky, opened):
        page = opened(sky)

        def shape():
            """Return the used part of the height and of the width, the side of a tile, and the columns."""
            return page.page.evaluate(
                """() => {
                  const [well, grid] = [".am-well", ".am-grid"].map((name) => document.querySelector(name));
                  return [grid.offsetHeight / well.clientHeight, grid.scrollWidth / well.clientWidth,
                    grid.firstElementChild.offsetWidth, getComputedStyle(grid).gridTemplateColumns.split(" ").length];
                }"""
            )

        for density, least in (("dense", 64), ("comfortable", 112)):
            page.get("look").click()
            page.choose("density", density)
            page.press("Escape")
            page.until(lambda: page.page.locator(".q-menu").count() == 0, "the menu is closed")
            for width, height in SIZES:
                page.page.set_viewport_size({"width": width, "height": height})
                page.until(lambda: shape()[0] > 0.85 and shape()[1] <= 1, "the window is filled")
                assert shape()[2] >= least - 1
                if width == 2560:
                    assert shape()[0] <= 1, "nothing to scroll"
        page.page.set_viewport_size({"width": 390, "height": 844})
        page.until(lambda: shape()[3] >= 3 and shape()[1] <= 1, "three columns on a phone")
        assert page.complaints == []

    def test_filters_move_no_tile(self, sky, opened):
        page = opened(sky, viewport={"width": 1280, "height": 800})
        top = page.tile(page.cursor).bounding_box()["y"]
        assert box(page, "filters")["y"] + box(page, "filters")["height"] <= top
        heights = {name: box(page, name)["height"] for name in ("filters", "look")}
        page.press(" ")
        page.get("like").click()
        page.get("like-off").wait_for()
        assert {name: box(page, name)["height"] for name in ("filters", "look")} == heights
        field = page.page.get_by_label("text filter", exact=True)
        field.evaluate("field => { field.value = '587722981742084096' }")
        assert field.evaluate("field => field.scrollWidth <= field.clientWidth"), "an id of 18 digits can be read"
        score = page.page.locator(".am-range .am-figures")
        assert score.inner_text() == "score 0.00 to 1.00"
        page.get("scores").get_by_role("slider").first.press("PageUp")
        page.until(lambda: score.inner_text() != "score 0.00 to 1.00", "the range is told beside the slider")


def pinch(page, apart):
    """Put two fingers on the large view at a distance, and move them to another one."""
    at, devtools = box(page, "stage"), page.page.context.new_cdp_session(page.page)
    x, y = at["x"] + at["width"] / 2, at["y"] + at["height"] / 2
    for kind, distance in zip(("touchStart", "touchMove"), apart, strict=True):
        points = [{"x": x + side * distance / 2, "y": y, "id": id_} for id_, side in enumerate((-1, 1))]
        devtools.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
    devtools.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})


class TestLight:
    def test_light_of_all_tiles_is_remembered(self, sky, opened):
        page = opened(sky)
        wait_for_pictures(page)
        before = pictures(page)
        page.get("look").click()
        page.get("light-stretch").click()
        offered = page.page.get_by_role("option").all_inner_texts()
        assert {"zscale", "log"} <= set(offered), "these are floating-point images"
        page.page.get_by_role("option", name="zscale", exact=True).click()
        page.until(lambda: all("stretch=zscale" in address for address in pictures(page)), "the tiles change")
        requests = []
        page.page.on("request", lambda request: requests.append(request.url))
        slider = page.get("light-brightness").locator("[tabindex='0']")
        image = page.page.locator("[data-testid=tile] img").first
        lit = "image => getComputedStyle(image).filter === 'brightness(1.2) contrast(1)'"
        page.until(lambda: image.evaluate(lit) or slider.press("ArrowRight"), "the browser makes them brighter")
        assert requests == [], "the browser does it"
        key = "Object.keys(localStorage).filter(key => key.includes('.light.')).map(key => localStorage[key])"
        page.press("Escape")
        page.until(lambda: page.page.locator(".q-menu").count() == 0, "the menu is closed")
        page.press("ArrowRight")
        page.until(lambda: page.cursor == page.ids[1], "the keys are for the tiles again")
        page.until(lambda: '"brightness": 1.2' in "".join(page.page.evaluate(key)), "it is stored")
        page.page.reload()
        page.page.wait_for_selector("[data-testid=tile].am-cursor")
        page.until(lambda: all("stretch=zscale" in address for address in pictures(page)), "as before")
        page.until(lambda: "brightness(1.2)" in image.evaluate("image => getComputedStyle(image).filter"), "as before")
        assert pictures(page) != before
        page.press(" ")
        page.until(lambda: "stretch=zscale" in (page.get("full").get_attribute("src") or ""), "also in the large view")
        assert page.get("brightness").input_value() == "1.2"
        assert page.complaints == []

    @pytest.mark.parametrize("ratio", [1, 2])
    def test_scale_is_true_and_stays_from_image_to_image(self, sky, opened, ratio):
        page = opened(sky, device_scale_factor=ratio, has_touch=True, viewport={"width": 1280, "height": 800})
        page.press(" ")
        full = page.get("full")
        page.until(lambda: "%" in page.get("zoom-fit").inner_text(), "the scale is shown")

        def real():
            """Return screen pixels for each pixel of the image, from the boxes on the screen."""
            return full.evaluate(
                """image => {
                  const box = image.getBoundingClientRect();
                  const [width, height] = [box.width / image.naturalWidth, box.height / image.naturalHeight];
                  return Math.min(width, height) * devicePixelRatio;
                }"""
            )

        def shown():
            return int(page.get("zoom-fit").inner_text().removesuffix(" %")) / 100

        def width():
            return full.evaluate("image => image.complete && image.naturalWidth")

        page.until(lambda: real() == pytest.approx(shown(), abs=0.01), "true, once the view has opened")
        assert real() > 3, "a small image fills the view"
        page.press("o")
        page.until(lambda: shown() == 1, "one to one")
        page.until(lambda: real() == pytest.approx(1, abs=1e-3), "on the screen")
        page.press("+")
        page.until(lambda: shown() == 1.4, "a step")
        before = width()
        for _ in range(30):
            page.press("ArrowRight")
            page.until(width, "it is loaded")
            if width() != before:
                break
        assert {before, width()} == {SIDE, 2 * SIDE}
        page.until(lambda: real() == pytest.approx(1.4, abs=1e-3), "the same scale")
        page.press("0")
        page.until(lambda: shown() > 3, "it fits")
        before = shown()
        pinch(page, apart=(100, 200))
        page.until(lambda: shown() == pytest.approx(2 * before, rel=0.02), "two fingers")
        page.until(lambda: real() == pytest.approx(shown(), abs=0.01), "on the screen")

    def test_parts_of_the_side_panel_do_not_overlap(self, sky, opened):
        page = opened(sky, viewport={"width": 1280, "height": 700})
        page.press(" ")
        page.until(lambda: page.get("neighbour").count() == 12, "similar images are there")
        page.get("metadata").get_by_text("NGC 70").wait_for()
        parts = page.page.locator(".am-view-side > *:visible").all()
        boxes = [part.bounding_box() for part in parts]
        assert len(boxes) > 6
        for above, below in pairwise(boxes):
            assert above["y"] + above["height"] <= below["y"] + 0.5
        tiles = [neighbour.bounding_box() for neighbour in page.get("neighbour").all()]
        assert all(tile["height"] == pytest.approx(tile["width"], abs=1) for tile in tiles)
        assert tiles[-1]["y"] + tiles[-1]["height"] <= box(page, "like")["y"]
