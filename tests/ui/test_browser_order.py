"""Tests of orders and filters by columns, of the brush on the histogram and of the go-to field in a real browser."""

import pytest
from browser import running

pytestmark = [pytest.mark.ui, pytest.mark.slow, pytest.mark.timeout(600)]

VALUES = {f"demo-{i:06d}": round((i * 37 % 600) / 4, 2) for i in range(0, 600, 2)}
"""Value of each second image."""
TOP = sorted(VALUES, key=lambda id_: -VALUES[id_])


@pytest.fixture(scope="module")
def demo(demo_words, tmp_path_factory):
    """Command on the demo with a score file."""
    root = tmp_path_factory.mktemp("order")
    rows = [f"{id_},{value}" for id_, value in VALUES.items()]
    (root / "scores.csv").write_text("\n".join(["id,flux", *rows]), encoding="utf-8")
    with running(root, *demo_words, "ui.scores=scores.csv") as command:
        yield command


def captions(page):
    return page.page.eval_on_selector_all(".am-caption span:last-child", "all => all.map(one => one.innerText)")


def test_order_and_ranges_of_a_score_file(demo, opened):
    page = opened(demo)
    page.choose("sort", "highest flux")
    page.until(lambda: page.ids[:20] == TOP[:20], "the largest values come first")
    page.until(lambda: captions(page)[:20] == [str(VALUES[id_]) for id_ in TOP[:20]], "on the tiles")
    page.get("range").click()
    page.until(lambda: page.get("range-limits").inner_text() == "0 to 149.5", "the limits of the column are told")
    page.get("range-low").fill("20")
    page.get("range-high").fill("100")
    page.get("range-set").click()
    inside = [id_ for id_ in TOP if 20 <= VALUES[id_] <= 100]
    page.until(lambda: page.ids[:20] == inside[:20], "the others are left out")
    page.until(lambda: page.get("found").inner_text() == f"{len(inside)} images", "they are counted")
    assert page.get("range-off").inner_text().startswith("flux 20 to 100")
    page.until(lambda: "descending=flux&range=flux" in page.page.url, "the address names the view")
    page.page.reload()
    page.page.wait_for_selector("[data-testid=tile].am-cursor")
    page.until(lambda: page.ids[:20] == inside[:20], "a reload changes nothing")
    page.press(" ")
    page.until(lambda: f"flux {VALUES[inside[0]]:g}" in page.get("view-state").inner_text(), "also in the large view")
    page.press("Escape")
    page.page.wait_for_selector("[data-testid=viewer]", state="hidden")
    page.get("range-off").click()
    page.until(lambda: page.ids[:20] == TOP[:20], "the filter is off")
    assert page.complaints == []


def test_a_drag_over_the_scores_is_the_filter(demo, opened):
    page = opened(demo, viewport={"width": 1440, "height": 900})
    for key, label in (("a", "anomaly"), ("n", "normal")):
        page.label(key, label)
    plot = page.get("histogram").locator(".nsewdrag").first
    plot.wait_for()
    plot.scroll_into_view_if_needed()
    text = page.page.locator(".am-range .am-figures")

    def drag():
        box = plot.bounding_box()
        start, end, middle = (box["x"] + share * box["width"] for share in (0.25, 0.75, 0.5))
        page.page.mouse.move(start, box["y"] + 5)
        page.page.mouse.down()
        page.page.mouse.move(middle, box["y"] + 20)
        page.page.mouse.move(end, box["y"] + 20)
        page.page.mouse.up()
        page.page.wait_for_timeout(200)
        return text.inner_text() == "score 0.25 to 0.75"

    page.until(drag, "the filter is that of the drag")  # a ranking that arrives meanwhile draws the plot again
    page.until(lambda: "score=0.25-0.75" in page.page.url, "also in the address")
    shades = page.get("histogram").locator(".shapelayer path")
    page.until(lambda: shades.count() == 2, "the rest is shaded")

    def double_click():
        plot.dblclick()
        page.page.wait_for_timeout(200)
        return text.inner_text() == "score 0.00 to 1.00"

    page.until(double_click, "a double click shows all scores")
    page.until(lambda: shades.count() == 0, "nothing is shaded")
    assert page.complaints == []


def test_go_to_a_page_a_rank_and_an_image(demo, opened):
    page = opened(demo)

    def go(text, key=":"):
        page.press(key) if key else page.get("page-number").click()
        page.get("goto").wait_for()
        page.until(lambda: page.get("goto").evaluate("field => field === document.activeElement"), "it has the focus")
        page.page.keyboard.type(text)
        page.press("Enter")
        page.until(lambda: page.page.locator(".am-goto").count() == 0, "the dialog is closed")

    go("3")
    page.until(lambda: page.get("page-number").inner_text().startswith("3 /"), "page 3")
    go("#50", "Control+g")
    page.until(lambda: page.get("page-number").inner_text().startswith("2 /"), "rank 50 is on page 2")
    page.until(lambda: page.cursor == page.ids[1], "under the cursor")
    chosen = page.ids[5]
    go("1")
    page.until(lambda: chosen not in page.ids, "page 1")
    go(chosen[-6:], None)
    page.until(lambda: chosen in page.ids and page.cursor == chosen, "the image with this end")
    go("99")
    page.until(lambda: "pages" in page.get("status-error").first.inner_text(), "there is no page 99")
    done = page.label("n", "normal")
    go(done)  # it stays on the page until the next order
    page.until(lambda: page.cursor == done, "the image is on this page")
    page.open(demo.url)
    go(done)
    page.until(lambda: page.get("view-id").is_visible() and page.get("view-id").inner_text() == done, "no page has it")
    assert page.complaints == []


def test_a_view_is_saved_for_everybody(demo, opened):
    page, other = opened(demo, path="?descending=flux&show=all&range=flux:20..100&size=24"), opened(demo)
    page.get("views").click()
    page.get("view-name").fill("bright ones")
    page.get("view-save").click()
    other.get("views").click()
    other.get("view-show").get_by_text("bright ones").click()
    other.until(lambda: other.ids[:24] == page.ids, "the same images")
    assert len(other.ids) == 48, "on pages of the size that this person has chosen"
    other.until(lambda: other.get("range-off").inner_text().startswith("flux 20 to 100"), "with the same filter")
    other.until(lambda: other.page.locator(".q-menu").count() == 0, "the menu is closed")
    other.get("views").click()
    other.get("view-remove").click()
    page.until(lambda: page.get("view-show").count() == 0, "it is gone for all")
    assert page.complaints == other.complaints == []
