"""Tests of several images in the large view, of the pinned image, and of blinking, without a browser."""

import pytest
from visitor import on_page

from anomalymatch.types import Label
from anomalymatch.ui.views import Tile
from anomalymatch.ui.web.viewer import Zoom, caption


def panes(page):
    (zoom,) = page.user.find(kind=Zoom).elements
    return zoom._props["panes"]


def names(page):
    return [pane["name"] for pane in panes(page)]


@on_page
async def test_two_to_four_images_side_by_side(page, service):
    ids = page.ids[:6]
    page.send("compare", ids=ids[:1], at=ids[0])
    await page.says("Select two to four images")
    assert page.gallery._props["viewing"] == ""
    page.send("compare", ids=ids, at=ids[1])
    await page.says("6 images are selected: the first 4 are side by side")
    assert (names(page), page.gallery._props["viewing"]) == (ids[:4], ids[1])
    assert page.gallery._props["panes"] == {"ids": ids[:4], "pinned": False}
    assert [f"id={id_}" in pane["src"] for id_, pane in zip(ids, panes(page), strict=False)] == [True] * 4
    await page.until(lambda: all("no label" in pane.get("text", "") for pane in panes(page)))
    page.send("pane", id=ids[2])  # the buttons of the side panel follow the marked image
    await page.until(lambda: page.get("view-id").text == ids[2])
    page.act("view-unsure")
    await page.until(lambda: panes(page)[2]["label"] == "unsure" and "unsure" in panes(page)[2]["text"])
    assert service.labels == {ids[2]: Label.UNSURE}
    page.act("view-next")
    await page.until(lambda: page.get("view-id").text == ids[3])
    page.send("pane", id="none")
    assert page.get("view-id").text == ids[3]
    page.user.find(kind=Zoom).trigger("pick", ids[0])
    assert (names(page), page.gallery._props["panes"]["ids"]) == (["as trained"], [])
    page.send("shut")
    await page.until(lambda: page.gallery._props["viewing"] == "")


@on_page
async def test_an_undo_marks_its_image_and_the_comparison_stays(page, service):
    ids = page.ids[:2]
    service.label([ids[1]], Label.NORMAL, "me")
    page.send("compare", ids=ids, at=ids[0])
    page.send("undo")
    await page.until(lambda: page.get("view-id").text == ids[1])
    assert names(page) == ids


@on_page
async def test_the_pinned_image_stays_beside_each_of_its_neighbours(page, service):
    pinned = page.ids[0]
    page.send("look", id=pinned)
    assert not page.get("pin").visible
    page.act("like")
    await page.until(lambda: page.ids and page.ids[0] != pinned)
    first, second = page.ids[:2]
    page.send("look", id=first)
    assert (names(page), page.gallery._props["viewing"]) == ([pinned, first], first)
    assert page.gallery._props["panes"]["pinned"]
    page.act("view-next")
    assert names(page) == [pinned, second]
    page.get("pin").value = False
    assert (names(page), panes(page)[0]["alt"]) == (["as trained"], second)
    page.get("pin").value = True
    assert names(page) == [pinned, second]


@on_page
async def test_blinking_steps_through_stretches_and_channels(page, service):
    page.send("look", id=page.ids[0])
    (zoom,) = page.user.find(kind=Zoom).elements
    blink = page.user.find(kind=Zoom)
    first, second, *_, last = service.stretches
    blink.trigger("blink", {"of": "stretch", "step": -1})
    assert names(page) == [last]
    blink.trigger("blink", {"of": "stretch", "step": 1})
    assert names(page) == [first]
    assert f"stretch={second}" in zoom._props["ahead"][-1], "the next one is fetched"
    page.get("compare").value = True
    blink.trigger("blink", {"of": "channel", "step": 1})
    assert names(page) == [first]
    assert panes(page)[0]["src"].endswith(f"channel={service.channels[0]}")
    for _ in service.channels:
        blink.trigger("blink", {"of": "channel", "step": 1})
    assert "channel" not in panes(page)[0]["src"], "after the last one, all channels"


@pytest.mark.parametrize(
    ("score", "label", "text"),
    [(0.25, Label.ANOMALY, "0.250 · ▲ anomaly"), (None, None, "no label"), (1.0, None, "1.000 · no label")],
)
def test_caption_of_a_pane(score, label, text):
    assert caption(Tile("a", score, None, label, None, False)) == text
