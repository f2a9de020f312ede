"""Tests in a real browser that a label moves no image, and of what the page remembers."""

import pytest
from browser import running

pytestmark = [pytest.mark.ui, pytest.mark.slow, pytest.mark.timeout(600)]

PLACES = """() => Object.fromEntries([...document.querySelectorAll("[data-testid=tile]")].map((tile) => {
  const box = tile.getBoundingClientRect();
  return [tile.dataset.id, [box.x, box.y, box.width, box.height]];
}))"""


@pytest.fixture(scope="module")
def demo(demo_words, tmp_path_factory):
    with running(tmp_path_factory.mktemp("demo"), *demo_words) as command:
        yield command


def places(page):
    """Return the place of each tile on the screen."""
    return page.page.evaluate(PLACES)


def test_no_tile_moves_at_a_key_until_the_new_order_is_taken(demo, opened):
    page, other = opened(demo), opened(demo)
    before = places(page)
    assert len(before) == 48
    mine = [page.cursor]
    page.press("a")  # the first ranking of all
    page.get("new-order").wait_for()
    assert places(page) == before
    page.press(*"nnnnn")
    page.until(lambda: page.page.locator("[data-testid=tile].am-done").count() == 6, "labelled tiles are dimmed")
    other.press("End", "x")
    page.until(lambda: page.tile(page.ids[-1]).get_attribute("data-label") == "artefact", "the label of another page")
    page.until(lambda: "press r" in page.get("note").inner_text(), "the hint follows")
    assert places(page) == before
    page.press("r")
    page.until(lambda: not set(mine) & set(page.ids), "the new order is there")
    assert not page.get("new-order").is_visible()
    page.press("n")
    page.get("new-order").click()
    page.until(lambda: page.page.locator("[data-testid=tile].am-done").count() == 0, "the order by a click")
    assert page.complaints == other.complaints == []


def test_after_the_last_image_of_a_page_a_key_labels_nothing(demo, opened):
    page = opened(demo)
    labelled = sum(page.counts().values())
    page.press("End", "u", "u", "u")
    page.until(lambda: "last image of this page" in page.get("status").inner_text(), "the page says so")
    page.until(lambda: sum(page.counts().values()) == labelled + 1, "one label")
    seen = page.ids
    page.press("ArrowRight")
    page.until(lambda: not set(seen) & set(page.ids), "the next page begins where this one ended")
    assert page.cursor == page.ids[0]
    assert page.complaints == []
