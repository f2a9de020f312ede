"""Tests of several images side by side, of blinking and of accessibility in a real browser, on the demo."""

import pytest
from browser import running

pytestmark = [pytest.mark.ui, pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def demo(demo_words, tmp_path_factory):
    with running(tmp_path_factory.mktemp("compare"), *demo_words, "ui.kinds={lens: l}") as command:
        yield command


def marked(page):
    """Return the ids of the marked panes."""
    return page.page.eval_on_selector_all("[data-testid=pane].am-at", "all => all.map(one => one.dataset.name)")


def pane(page, id_):
    return page.page.locator(f'[data-testid=pane][data-name="{id_}"]')


def test_keys_label_the_image_under_the_pointer_or_the_marked_one(demo, opened):
    page = opened(demo)
    ids = page.ids[:3]
    page.press("Home", "Shift+ArrowRight", "Shift+ArrowRight", "c")
    page.get("viewer").wait_for()
    page.until(lambda: marked(page) == [ids[2]], "the image under the cursor is marked")
    page.get("full").nth(2).wait_for()
    pane(page, ids[1]).hover()
    page.press("a")  # at once: the server need not know of the pointer
    page.until(lambda: pane(page, ids[1]).get_attribute("data-label") == "anomaly", "the image under the pointer")
    assert marked(page) == [ids[1]]
    page.press("ArrowLeft", "n")
    page.until(lambda: pane(page, ids[0]).get_attribute("data-label") == "normal", "the marked image")
    page.until(lambda: page.get("view-id").inner_text() == ids[0], "the side panel follows")
    page.press("ArrowDown", "u")
    page.until(lambda: pane(page, ids[2]).get_attribute("data-label") == "unsure", "the image below")
    page.until(lambda: "view=compare" in page.page.url and f"image={ids[2]}" in page.page.url, "the address")
    page.page.reload()
    page.get("viewer").wait_for()
    page.until(lambda: marked(page) == [ids[2]], "a reload shows the same images")
    page.until(lambda: pane(page, ids[0]).get_attribute("data-label") == "normal", "with their labels")
    page.press("Escape")
    page.page.locator(".q-dialog").wait_for(state="detached")  # until then, it gets the keys
    page.until(lambda: page.get("selection").inner_text() == "3 selected", "the selection stays")
    page.press("Home", "End", "l")
    last = page.tile(page.ids[-1])
    page.until(lambda: last.get_attribute("data-label") == "anomaly" and last.get_by_test_id("kind").count(), "a lens")
    page.press("z")
    page.until(lambda: not last.get_attribute("data-label") and not last.get_by_test_id("kind").count(), "it is undone")
    assert page.complaints == []


def test_blinking_moves_no_zoom(demo, opened):
    page = opened(demo)
    page.press(" ")
    full = page.get("full")
    page.until(lambda: full.evaluate("image => image.naturalWidth") > 0, "the picture is there")
    page.press("+", "+", "+")
    look = full.get_attribute("style")
    assert "visible" in look
    before = full.get_attribute("src")
    image = full.element_handle()
    page.press("b")
    page.until(lambda: full.get_attribute("src") != before, "another stretch")
    assert full.get_attribute("style") == look, "the same zoom, and visible while the picture is loaded"
    page.press("Shift+B")
    page.until(lambda: full.get_attribute("src") == before, "the first stretch again")
    page.press("w")
    page.until(lambda: "channel=" in full.get_attribute("src"), "one channel")
    assert image.evaluate("image => image.isConnected"), "the picture is changed in place, and does not flash"
    assert full.get_attribute("style") == look
    assert page.complaints == []


def faults(page):
    """Return the serious and critical faults that axe finds, and where, once nothing fades in or out."""
    page.page.wait_for_function("!document.querySelector('[class*=-enter-active], [class*=-leave-active]')")
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(page.page).response["violations"]
    return [
        (fault["id"], node["html"][:200], node["any"][:1])
        for fault in found
        if fault["impact"] in ("serious", "critical")
        for node in fault["nodes"]
    ]


@pytest.mark.parametrize("scheme", ["dark", "light"])
def test_accessibility(demo, opened, scheme):
    pytest.importorskip("axe_playwright_python", reason="pip install axe-playwright-python")
    page = opened(demo, viewport={"width": 1280, "height": 800}, color_scheme=scheme, reduced_motion="reduce")
    page.until(lambda: page.page.locator(".am-section").count() > 5, "the panel is there")
    page.label("a", "anomaly")
    page.label("n", "normal")
    page.get("discovery").wait_for()
    assert faults(page) == []
    page.press("m")
    page.get("map-stage").wait_for()
    assert faults(page) == []
    page.press("m")
    page.get("map-stage").wait_for(state="hidden")
    page.press("Home", "Shift+ArrowRight", "c")
    page.until(lambda: page.get("neighbour").count() > 0, "the large view is complete")
    assert faults(page) == []
    page.press("Escape")
    page.page.locator(".q-dialog").wait_for(state="detached")  # until then, it gets the keys
    page.get("look").click()
    page.get("light-default").wait_for()
    assert faults(page) == []
    page.get("look").click()
    page.until(lambda: page.page.locator(".q-menu").count() == 0, "the menu is closed")
    page.get("help-button").click()
    page.get("help").wait_for()
    assert faults(page) == []
