"""Tests of the map in a real browser on a real server."""

import pytest
from browser import running

pytestmark = [pytest.mark.ui, pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def command(demo_words, tmp_path_factory):
    with running(tmp_path_factory.mktemp("map"), *demo_words) as command:
        yield command


COMPONENT = 'const map = getElement(document.querySelector("[data-testid=archive-map]").id.slice(1));'
POINT = f"""number => {{ {COMPONENT} const box = map.$refs.stage.getBoundingClientRect();
  const [x, y] = map.onScreen(map.place(number)); return [box.left + x, box.top + y]; }}"""
VIEW = f"""() => {{ {COMPONENT}
  return [map.cursor.cursor, map.page[map.cursor.cursor] !== undefined, map.zoom, ...map.centre]; }}"""
PAINTED = f"""canvas => {{ {COMPONENT} map.redraw();
  const copy = new OffscreenCanvas(canvas.width, canvas.height).getContext("2d");
  copy.drawImage(canvas, 0, 0); // before the browser empties the drawing buffer
  const values = copy.getImageData(0, 0, canvas.width, canvas.height).data;
  return values.filter((value, k) => k % 4 === 3 && value).length; }}"""


def open_map(page):
    page.press("m")
    page.until(lambda: "600" in page.get("map-state").inner_text(), "the map is there")


def lasso(page, *, left, right):
    """Draw around the part of the map between two shares of its width."""
    box = page.get("map-stage").bounding_box()
    corners = [(left, 0.02), (right, 0.02), (right, 0.98), (left, 0.98)]
    x, y = zip(*((box["x"] + a * box["width"], box["y"] + b * box["height"]) for a, b in corners), strict=True)
    mouse = page.page.mouse
    mouse.move(x[0], y[0])
    mouse.down()
    for across, down in zip(x[1:], y[1:], strict=True):
        mouse.move(across, down, steps=5)
    mouse.up()


def found(page):
    return int(page.get("found").inner_text().split()[0].replace(",", ""))


def test_a_lasso_selects_and_one_key_labels(command, opened):
    page = opened(command)
    open_map(page)
    assert page.get("map-points").evaluate(PAINTED) > 600
    page.get("map-lasso").click()
    lasso(page, left=0.01, right=0.5)
    page.get("area-off").wait_for()
    page.until(lambda: 0 < found(page) < 600, "the gallery shows the area")
    count = found(page)
    assert f"{count:,} selected" in page.get("map-state").inner_text()
    ids = page.ids
    page.press("Shift+N")
    page.until(lambda: page.count("normal") == count, "all images of the area are labelled")
    assert set(ids) <= page.exported().keys()
    page.until(lambda: page.tile(ids[-1]).get_attribute("data-label") == "normal", "the tiles have the label")
    page.press("z")
    page.until(lambda: page.count("normal") == 0, "one undo takes all back")
    page.get("map-clear").click()
    page.until(lambda: found(page) == 600, "the whole archive is shown")
    assert not page.get("area-off").is_visible()
    page.press("m")
    page.until(lambda: not page.get("archive-map").is_visible(), "the map is closed")


def test_the_point_under_the_pointer_is_shown_and_opened(command, opened):
    page = opened(command)
    open_map(page)
    at = page.page.evaluate(POINT, 7)
    page.page.mouse.move(*at)
    card = page.get("map-card")
    card.wait_for()
    id_ = card.get_attribute("data-id")
    page.until(lambda: card.locator("img").evaluate("image => image.naturalWidth") > 0, "its picture is shown")
    page.page.mouse.click(*at)
    page.get("viewer").wait_for()
    assert page.get("view-id").inner_text() == id_
    page.press("Escape")
    page.get("viewer").wait_for(state="detached")
    assert page.complaints == []


def test_the_cursor_is_marked_and_the_view_moves(command, opened):
    page = opened(command)
    open_map(page)
    assert page.page.evaluate(VIEW) == [page.cursor, True, 1, 0, 0]
    page.press("ArrowRight", "ArrowRight")
    page.until(lambda: page.page.evaluate(VIEW)[:2] == [page.cursor, True], "the mark follows the cursor")
    page.get("map-in").click()
    assert page.page.evaluate(VIEW)[2] > 1
    box = page.get("map-stage").bounding_box()
    page.page.mouse.move(box["x"] + 50, box["y"] + 50)
    page.page.mouse.wheel(0, -300)
    page.until(lambda: page.page.evaluate(VIEW)[2] > 2, "the wheel zooms")
    page.page.mouse.down()
    page.page.mouse.move(box["x"] + 150, box["y"] + 60, steps=3)
    page.page.mouse.up()
    assert page.page.evaluate(VIEW)[3] < 0
    page.get("map-fit").click()
    assert page.page.evaluate(VIEW)[2:] == [1, 0, 0]
    assert page.complaints == []
