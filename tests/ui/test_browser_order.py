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
