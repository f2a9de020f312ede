"""Tests in a real browser that a label moves no image, and of what the page remembers."""

import re
import signal

import pytest
from browser import running

from anomalymatch.data.label_log import LabelLog

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
    # The other page's label may have been ranked only after the r.
    page.until(lambda: not page.get("new-order").is_visible() or page.press("r"), "no newer order is left")
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


def search(page):
    """Return the words of the address."""
    return page.page.evaluate("location.search.slice(1)")


def test_the_view_lives_in_the_address(demo, opened):
    page = opened(demo)
    page.choose("show", "all")
    page.choose("sort", "random audit")
    page.until(lambda: search(page) == "order=random-audit&show=all", "order and filter")
    page.get("page-next").click()
    page.until(lambda: "page=2" in search(page), "the page")
    page.tile(page.ids[1]).click()  # a key could reach the list of orders, which takes the focus back as it closes
    page.tile(page.ids[2]).click(modifiers=["Shift"])
    page.until(lambda: len(page.ids) == 48 and search(page).count("select=") == 2, "the selection")
    ids, cursor = page.ids, page.cursor
    page.page.reload()
    page.page.wait_for_selector("[data-testid=tile].am-chosen")
    page.until(lambda: page.get("page-number").inner_text().startswith("2"), "the same page after a reload")
    assert (page.ids, page.cursor, page.get("selection").inner_text()) == (ids, cursor, "2 selected")
    page.press("Escape", " ")
    page.until(lambda: "view=large" in search(page), "the large view")
    linked = opened(demo, path="?" + search(page))
    linked.until(lambda: linked.get("view-id").inner_text() == cursor, "a link opens the same image")
    page.press("ArrowRight")
    page.until(lambda: page.get("view-id").inner_text() == ids[3], "the next image")
    page.page.go_back()
    page.get("viewer").wait_for(state="detached")
    page.page.go_back()
    page.until(lambda: "page=2" not in search(page), "back on the first page")
    page.until(lambda: not set(page.ids) & set(ids), "its images")
    page.page.go_forward()
    page.until(lambda: page.ids == ids, "forward again")
    assert page.complaints == linked.complaints == []


def test_a_link_to_an_image_and_bad_words(demo, opened):
    page = opened(demo)
    page.choose("show", "all")
    page.press("End")
    page.page.wait_for_timeout(0)
    page.get("page-next").click()
    page.until(lambda: "page=2" in search(page), "the second page")
    last = page.ids[-1]
    linked = opened(demo, path=f"?show=all&image={last}&order=best&token=0123456789abcdef")
    linked.until(lambda: linked.cursor == last, "the page of the image")
    linked.until(lambda: "order=best" in linked.get("status").inner_text(), "the bad word is named")
    linked.until(lambda: "order=" not in search(linked), "and leaves the address")
    assert "token" not in search(linked)
    gone = opened(demo, path="?like=nothing&group=7")
    assert len(gone.ids) == 48
    assert page.complaints == linked.complaints == gone.complaints == []


def test_a_reload_keeps_labelled_images_and_their_order(demo, opened):
    page = opened(demo)
    ids = page.ids
    page.press("a", "n")
    page.get("new-order").wait_for()
    page.until(lambda: page.page.locator("[data-testid=tile].am-done").count() == 2, "two labels")
    page.until(lambda: f"image={page.cursor}" in search(page), "the cursor")
    cursor = page.cursor
    page.page.reload()
    page.page.wait_for_selector("[data-testid=tile].am-done")
    page.page.wait_for_selector("[data-testid=tile].am-cursor")
    assert (page.ids, page.cursor) == (ids, cursor)
    assert page.get("new-order").is_visible()
    page.press("r")
    page.until(lambda: not set(ids[:2]) & set(page.ids), "the new order")


def test_undo_and_the_last_labels_go_to_their_image(demo, opened):
    page = opened(demo)
    first = page.cursor
    page.press("x")
    page.until(lambda: page.get("recent-one").first.get_attribute("data-id") == first, "the strip")
    page.press("ArrowRight", "ArrowRight", "ArrowRight", "z")
    page.until(lambda: f"Undid artefact: {first}" in page.get("status").inner_text(), "what was undone")
    page.until(lambda: page.cursor == first, "the cursor is on it")
    page.press("Control+Shift+z")
    page.until(lambda: f"Redid artefact: {first}" in page.get("status").inner_text(), "what was redone")
    page.get("page-next").click()
    page.until(lambda: first not in page.ids, "the next page")
    page.get("recent-one").first.click()
    page.until(lambda: page.get("view-id").inner_text() == first, "a labelled image in the large view")
    page.press("u")
    page.until(lambda: "unsure" in page.get("view-state").inner_text(), "it is revised")
    page.press("z", "Control+z")
    page.until(lambda: "no label" in page.get("view-state").inner_text(), "undone in the large view")
    assert page.complaints == []


def test_keys_wait_for_a_server_that_is_away(demo, opened):
    page, other = opened(demo), opened(demo)
    other.get("annotator").fill("other")  # an undo is of the last label of that name
    other.until(lambda: other.page.evaluate("localStorage['anomalymatch.annotator']") == "other", "the name is stored")
    other.tile(other.cursor).focus()
    before, ids, others = page.exported(), page.ids[:4], other.ids[-3:]
    port = int(re.search(r":(\d+)/", demo.url)[1])
    demo.end(signal.SIGKILL)
    page.press("a", "n", "u", "z")  # the last label is undone before it is sent
    other.press("End", "ArrowLeft", "ArrowLeft", "x", "x")
    page.until(lambda: "4 labels wait" in page.get("status").inner_text(), "they are counted")
    other.until(lambda: "2 labels wait" in other.get("status").inner_text(), "they are counted")
    with pytest.raises(Exception, match="ERR_CONNECTION_REFUSED"):
        page.page.reload()
    demo.start(port)
    page.open(demo.url)
    expected = before | {ids[0]: "anomaly", ids[1]: "normal", others[0]: "artefact", others[1]: "artefact"}
    page.until(lambda: sum(page.counts().values()) == len(expected), "all labels arrive")
    for one in (page, other):  # which reconnects by itself
        one.until(lambda one=one: "wait" not in one.get("status").inner_text(), "nothing waits")
    assert page.exported() == expected
    log = LabelLog(demo.folder / "run" / "labels.sqlite")
    events = [event.id for event in log.events()][-6:]
    log.close()
    assert sorted(events) == sorted([*ids[:2], ids[2], ids[2], *others[:2]])
