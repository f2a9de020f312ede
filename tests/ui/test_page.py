import asyncio
import json
from collections import Counter
from contextlib import suppress
from types import SimpleNamespace

import pytest
from visitor import on_page

from anomalymatch.errors import StorageError
from anomalymatch.evaluation.contact_sheet import FRAME_COLOURS
from anomalymatch.types import Label
from anomalymatch.ui.keys import KEYS
from anomalymatch.ui.state import WANTED
from anomalymatch.ui.views import Change, Query, Show, Sort
from anomalymatch.ui.web import session as session_module
from anomalymatch.ui.web.light import Light
from anomalymatch.ui.web.status import StatusBar
from anomalymatch.ui.web.theme import SHAPES, label_colours
from anomalymatch.ui.web.viewer import Zoom


@on_page
async def test_first_page_has_the_highest_scores(page):
    assert [tile["rank"] for tile in page.gallery.tiles] == list(range(1, 49))
    assert page.page["pages"] == 2
    assert "no labels yet" in page.page["note"]
    await page.sees("60 images")
    await page.sees(f"label {WANTED} images")
    assert not page.get("advice").visible


@on_page
async def test_estimate_and_advice(page, service):
    audit = service.page(Query(sort=Sort.AUDIT, size=WANTED + 10)).tiles
    service.label([tile.id for tile in audit], Label.NORMAL, "ada")
    await page.until(lambda: page.get("advice").visible)
    estimate = service.summary().estimate
    assert f"{estimate.low:,.0f} to {estimate.high:,.0f}" in page.get("estimate").text
    assert page.get("advice").text.lower() == estimate.advice.lower()


@on_page
async def test_with_follow_a_labelled_image_leaves_the_page_with_the_next_ranking(page, service):
    page.get("follow").value = True
    id_ = page.ids[0]
    page.label([id_], "anomaly")
    await page.until(lambda: service.labels == {id_: "anomaly"})
    await page.until(lambda: id_ not in page.ids)
    assert page.page["keep"]
    await page.until(lambda: page.get("standing").text == "60 images · 1 labelled · 1 found")


@on_page
async def test_with_many_pages_an_own_label_is_shown_at_once(page, service, monkeypatch):
    monkeypatch.setattr(session_module, "CROWD", 0.5)
    monkeypatch.setattr(session_module.Session, "pace", lambda *_: 3.0)
    monkeypatch.setattr(session_module, "random", SimpleNamespace(uniform=lambda low, high: high))
    other = page.ids[1]
    service.label([other], Label.NORMAL, "bob")
    page.label(page.ids[:1], "anomaly")
    await page.until(lambda: page.gallery.tiles[0]["label"] == "anomaly")
    assert page.gallery.tiles[1]["label"] is None  # that of others follows later


@on_page
async def test_a_label_makes_one_patch_and_a_ranking_one_page(page, service, monkeypatch):
    calls = Counter()

    def count(name):
        method = getattr(service, name)
        monkeypatch.setattr(service, name, lambda *args: calls.update([name]) or method(*args))

    count("tiles")
    count("page")
    monkeypatch.setattr(service._reranking, "request", lambda: None)
    page.get("follow").value = True
    await asyncio.sleep(0.1)
    calls.clear()
    page.label(page.ids[:1], "anomaly")
    await page.until(lambda: page.gallery.tiles[0]["label"] == "anomaly")
    await asyncio.sleep(0.2)
    assert calls == {"tiles": 1}
    service.rerank()
    await page.until(lambda: page.gallery.tiles[0]["label"] is None)
    assert calls == {"tiles": 1, "page": 1}


@on_page
async def test_tiles_stay_and_change_in_place_until_the_new_order_is_taken(page, service):
    before, scores = page.ids, [tile["score"] for tile in page.gallery.tiles]
    page.label(before[:2], "anomaly")
    await page.until(lambda: [tile["label"] for tile in page.gallery.tiles[:3]] == ["anomaly", "anomaly", None])
    await page.until(lambda: [tile["score"] for tile in page.gallery.tiles] != scores)
    await page.until(lambda: page.status["offered"])
    await asyncio.to_thread(service.label, [before[2]], Label.NORMAL, "bob")
    service.rank_by("trained")
    await page.until(lambda: page.gallery.tiles[2]["annotator"] == "bob")
    assert page.ids == before
    page.send("rerank")
    await page.until(lambda: not set(before[:3]) & set(page.ids))
    await page.until(lambda: not page.status["offered"])
    page.send("rerank")
    await page.says("Ranked 60 images")


@on_page
async def test_the_next_page_begins_where_the_labels_have_moved_it(page, service):
    page.get("show").value = "unlabelled"
    page.get("sort").value = "random audit"
    everything = [tile.id for tile in service.page(Query(sort=Sort.AUDIT, size=60)).tiles]
    await page.until(lambda: page.ids == everything[:48])
    page.label([*everything[:5], everything[47]], "normal")
    await page.until(lambda: page.gallery.tiles[47]["label"] == "normal")
    assert not page.status["offered"]  # the order of the audit does not change
    page.send("turn", to=1, at="first")
    await page.until(lambda: page.ids == everything[48:])
    assert (page.page["page"], page.page["pages"]) == (1, 2)
    page.send("turn", to=0, at="last")
    await page.until(lambda: page.ids == [*everything[5:47], *everything[48:54]])


@on_page
async def test_the_hint_stays_until_what_is_missing_is_there(page, service):
    assert "Press a" in page.page["note"]
    service._state.scores.trained = None  # as before the first ranking
    service._state.update_scores()
    service.label(service.source.ids[:31], Label.NORMAL, "me")
    await page.until(lambda: "label one anomaly (a)" in page.page["note"])
    service.label(service.source.ids[31:32], Label.ANOMALY, "me")
    await page.until(lambda: "anomaly" not in page.page["note"])
    service.label(service.source.ids[:31], None, "me")
    await page.until(lambda: "label one normal image (n)" in page.page["note"])
    service.label(service.source.ids[:1], Label.NORMAL, "me")
    await page.until(lambda: page.page["note"] == "")


@on_page
async def test_after_the_last_image_a_label_key_only_says_so(page):
    page.send("end")
    await page.says("→ to turn")
    page.send("turn", to=1, at="first")
    await page.until(lambda: len(page.ids) == 12)
    page.send("end")
    await page.says("the last image:")


@on_page
async def test_undo_and_redo_say_what_and_go_there(page, service):
    first, elsewhere = page.ids[0], service.source.ids[-1]
    page.label([first], "anomaly")
    await page.says(f"anomaly: {first}")
    await page.until(lambda: page.status["recent"] == [{"id": first, "label": "anomaly"}])
    await asyncio.to_thread(service.label, [elsewhere], Label.NORMAL, "me")
    await page.until(lambda: [one["id"] for one in page.status["recent"]] == [elsewhere, first])
    page.send("undo")
    await page.says(f"Undid normal: {elsewhere}")
    assert (page.status["image"], page.status["label"]) == (elsewhere, "normal")
    await page.until(lambda: elsewhere in page.ids and page.page["at"] == elsewhere)
    assert page.page["page"] == 1
    page.send("redo")
    await page.says(f"Redid normal: {elsewhere}")
    page.send("redo")
    await page.says("Nothing to redo for me")
    page.send("look", id=first)
    page.send("undo")
    await page.until(lambda: page.gallery._props["viewing"] == elsewhere)
    page.user.find(kind=StatusBar).trigger("pick", {"id": first})
    await page.until(lambda: page.gallery._props["viewing"] == first)


@on_page
async def test_labels_in_the_order_of_the_keys_and_undo(page, service):
    id_, labels = page.ids[0], ("anomaly", "normal", None, "unsure")
    for label in labels:
        page.label([id_], label)
    await page.until(lambda: len(service.events) == 4)
    assert tuple(event.label for event in service.events) == labels
    for expected in ({}, {id_: "normal"}, {id_: "anomaly"}, {}):
        page.send("undo")
        await page.until(lambda expected=expected: service.labels == expected)
    page.send("undo")
    await page.says("Nothing to undo for me")


@on_page
async def test_each_key_has_one_effect_and_is_acknowledged(page, service, monkeypatch):
    answered = []
    monkeypatch.setattr(page.gallery, "acknowledge", answered.append)
    first, second = page.ids[:2]
    for _ in range(2):
        page.send("label", ids=[first], label="anomaly", key="1")
        page.send("label", ids=[second], label="normal", key="2")
        page.send("undo", key="3")
    page.send("label", ids=["nowhere"], label="normal", key="4")
    await page.until(lambda: len(answered) == 7)
    assert sorted(answered) == ["1", "1", "2", "2", "3", "3", "4"]
    assert service.labels == {first: "anomaly"}
    assert len(service.events) == 3
    assert page.status["isError"]


@on_page
async def test_filters_and_order_make_the_query(page):
    page.get("filter-text").value = "IM00001"
    await page.until(lambda: sorted(page.ids) == [f"im00001{k}" for k in range(10)])
    page.get("sort").value = "lowest score"
    await page.until(lambda: page.gallery.tiles[0]["score"] < page.gallery.tiles[-1]["score"])
    page.get("show").value = "anomaly"
    await page.until(lambda: not page.ids)
    assert "filters" in page.page["empty"]
    assert page.page["filtered"]
    page.send("clear")
    await page.until(lambda: len(page.ids) == 48)
    assert page.get("filter-text").value == ""
    page.get("scores").value = {"min": 0.4, "max": 0.7}
    page.act("scores", "change")
    await page.until(lambda: page.ids and all(0.4 <= tile["score"] <= 0.7 for tile in page.gallery.tiles))


@on_page
async def test_an_empty_page_says_why_and_pages_turn(page):
    for show, text in (("conflicts", "no conflicts"), ("unsure", "labelled unsure"), ("labelled", "has a label")):
        page.get("show").value = show
        await page.until(lambda text=text: text in page.page["empty"])
    page.get("show").value = "unlabelled"
    await page.until(lambda: len(page.ids) == 48)
    page.send("turn", to=1, at="last")
    await page.until(lambda: page.page["page"] == 1)
    assert [tile["rank"] for tile in page.gallery.tiles] == list(range(49, 61))
    assert (page.page["at"], page.page["keep"]) == ("last", False)


@on_page
async def test_settings_of_the_browser(page, service):
    wrong = {"annotator": "", "count": "1000000", "density": "-5", "theme": "<b>"}
    kept = {"annotator": "ada", "count": "24", "density": "dense", "follow": "false", "advance": "false"}
    page.send("hello", **wrong)
    await asyncio.sleep(0.05)
    assert (len(page.ids), page.gallery._props["dense"], page.get("annotator").value) == (48, False, "me")
    page.send("hello", **kept, theme="dark")
    await page.until(lambda: len(page.ids) == 24)
    assert (page.gallery._props["dense"], page.gallery._props["advance"]) == (True, False)
    assert page.get("theme").props["icon"] == "dark_mode"
    page.label(page.ids[:1], "normal")
    await page.until(lambda: service.events)
    assert service.events[0].annotator == "ada"


@on_page
async def test_large_view_with_neighbours_history_and_links(page, service, monkeypatch):
    monkeypatch.setattr(service.pictures, "coordinates", lambda id_: (210.802429, 54.34875))
    id_ = page.ids[3]
    page.send("look", id=id_)
    await page.sees("16 x 16 pixels")
    await page.sees("no label yet")
    assert page.gallery._props["viewing"] == id_
    await page.until(lambda: len(page.all("neighbour")) == 12)
    link = page.get("link-aladin").props
    assert (link["rel"], link["target"]) == ("noopener noreferrer", "_blank")
    assert "210.802429" in link["href"]
    page.label([id_], "unsure")
    await page.sees("unsure by me")
    assert page.get("view-unsure").props["aria-pressed"] == "true"
    page.send("shut")
    await page.until(lambda: page.gallery._props["viewing"] == "")


@on_page
async def test_large_view_changes_stretch_and_channel_and_compares(page, service):
    page.send("look", id=page.ids[0])
    (zoom,) = page.user.find(kind=Zoom).elements
    assert [pane["name"] for pane in zoom._props["panes"]] == ["as trained"]
    assert len(zoom._props["ahead"]) == 1
    page.get("stretch").value = "asinh"
    page.get("channel").value = "green"
    assert "stretch=asinh" in zoom._props["panes"][0]["src"]
    assert zoom._props["panes"][0]["src"].endswith("channel=green")
    page.get("compare").value = True
    assert [pane["name"] for pane in zoom._props["panes"]] == list(service.stretches)
    page.user.find(kind=Zoom).trigger("pick", "sqrt")
    assert [pane["name"] for pane in zoom._props["panes"]] == ["sqrt"]


@on_page
async def test_light_of_the_tiles_is_that_of_the_large_view(page, service):
    (zoom,) = page.user.find(kind=Zoom).elements
    version = page.gallery._props["version"]
    light = {"stretch": "asinh", "channel": "green", "brightness": 1.5, "contrast": 9}
    page.send("hello", **{f"light.{version}": json.dumps(light), "light.other": "{}"})
    shown = {"parameters": {"stretch": "asinh", "channel": "green"}, "brightness": 1.5, "contrast": 1.0}
    await page.until(lambda: page.gallery._props["light"] == shown)
    page.send("look", id=page.ids[0])
    assert "stretch=asinh" in zoom._props["panes"][0]["src"]
    assert zoom._props["light"]["brightness"] == 1.5
    await page.until(lambda: page.all("neighbour"))
    (picture,) = next(iter(page.get("neighbours"))).default_slot.children
    assert "channel=green" in picture.props["src"]
    page.get("stretch").value = "sqrt"  # of the large view only
    assert page.gallery._props["light"] == shown
    page.act("light-default")
    assert page.gallery._props["light"] == {"parameters": {}, "brightness": 1.0, "contrast": 1.0}
    assert (page.get("light-stretch").value, page.get("stretch").value) == ("as trained", "as trained")
    assert (page.get("light-brightness").value, page.get("light-channel").value) == (1.0, "all")


@pytest.mark.parametrize("text", ["", "[]", "null", '{"stretch": ["asinh"], "brightness": "2", "contrast": 0}'])
def test_wrong_light_of_an_earlier_visit(text):
    assert Light.from_json(text, ("as trained", "asinh"), ("all",)) == Light()


@on_page
async def test_one_key_shows_heat_maps_of_the_current_ranking(page, service):
    page.send("heat")  # nothing is open
    page.send("look", id=page.ids[0])
    (zoom,) = page.user.find(kind=Zoom).elements
    assert not page.get("heat-legend").visible
    page.send("heat")
    before = zoom._props["panes"][0]["src"]
    assert before.startswith("/heat?")
    assert zoom._props["ahead"] == []
    assert page.get("heat-legend").visible
    page.label([page.ids[1]], "anomaly")
    await page.until(lambda: zoom._props["panes"][0]["src"] != before)
    page.send("heat")
    assert zoom._props["panes"][0]["src"].startswith("/full?")
    assert not page.get("heat-legend").visible


@on_page
async def test_next_previous_and_similar_images(page, service):
    first, second = page.ids[:2]
    page.send("look", id=first)
    page.act("view-next")
    await page.until(lambda: page.gallery._props["viewing"] == second)
    page.act("view-previous")
    page.act("view-previous")
    assert page.gallery._props["viewing"] == first
    page.act("like")
    near = [tile.id for tile in service.neighbours(first, 48)]
    await page.until(lambda: page.ids == near)
    assert page.get("like-off").visible
    assert page.gallery._props["viewing"] == ""
    page.act("like-off")
    await page.until(lambda: [tile["rank"] for tile in page.gallery.tiles] == list(range(1, 49)))


@on_page
async def test_help_lists_all_keys(page):
    assert not page.get("help").parent_slot.parent.value
    page.send("help")
    assert page.get("help").parent_slot.parent.value
    for keys in KEYS.values():
        for meaning in keys.values():
            await page.sees(meaning)


@on_page
async def test_labels_of_others_and_conflicts(page, service):
    id_ = page.ids[5]
    await asyncio.to_thread(service.label, [id_], Label.ANOMALY, "bob")
    await page.until(lambda: page.gallery.tiles[5]["label"] == "anomaly")
    assert page.gallery.tiles[5]["annotator"] == "bob"
    page.label([id_], "normal")
    await page.until(lambda: page.gallery.tiles[5]["conflict"])
    await page.sees("1 to review")
    page.act("review")
    await page.until(lambda: page.ids == [id_])


@on_page
async def test_a_burst_of_changes_redraws_the_page_a_few_times_and_a_closed_one_never(page, service):
    await asyncio.sleep(0.2)
    page.get("follow").value = True
    serial = page.gallery._serial
    await asyncio.to_thread(lambda: [service._tell(Change("ranking")) for _ in range(1000)])
    await asyncio.sleep(0.4)
    assert 1 <= page.gallery._serial - serial <= 3
    page.user.client.delete()
    assert not service._listeners


@on_page
async def test_a_full_disk_becomes_an_error(page, service):
    connection = service._log._connection
    pages = connection.execute("PRAGMA page_count").fetchone()[0]
    connection.execute(f"PRAGMA max_page_count={pages}")
    ids = [tile.id for tile in service.page(Query(size=60, show=Show.ALL)).tiles]
    with suppress(StorageError):
        for _ in range(200):
            service.label(ids, Label.NORMAL, "ada")
    with suppress(StorageError):
        for _ in range(200):  # fill the last page
            service.label(ids[:1], Label.NORMAL, "ada")
    page.label(page.ids[:1], "anomaly")
    await page.says("the disk is full", error=True)
    assert "restore" not in page.status["text"]
    assert page.gallery.tiles[0]["label"] != "anomaly"


@on_page
async def test_a_labelled_image_that_is_hidden_can_be_shown(page, service):
    id_ = page.ids[7]
    service.label([id_], Label.NORMAL, "ada")
    page.get("filter-text").value = id_
    await page.until(lambda: page.get("elsewhere").visible)
    assert page.get("elsewhere").text == f"{id_} is labelled normal: show it"
    page.act("elsewhere")
    await page.until(lambda: page.ids == [id_] and not page.get("elsewhere").visible)
    page.get("filter-text").value = "no such image"
    await page.until(lambda: not page.ids)
    assert not page.get("elsewhere").visible


@on_page
async def test_places_are_among_what_is_shown(page, service):
    service.label(page.ids[:5], Label.NORMAL, "ada")
    page.send("turn", to=1, at="first")
    await page.until(lambda: page.page["page"] == 1)
    assert page.page["start"] == 43, "the five labelled images have left the order"


@on_page
async def test_stars_and_notes(page, service):
    one, other = page.ids[:2]
    page.send("star", ids=[one])
    await page.until(lambda: service.notes.get(one).star)
    await page.until(lambda: page.gallery.tiles[0]["star"])
    page.send("look", id=other)
    await page.until(lambda: page.get("view-state").text)
    page.get("view-note").value = "two nuclei"
    page.act("view-note", "blur")
    await page.until(lambda: service.notes.get(other).text == "two nuclei")
    service.label([other], Label.UNSURE, "bob")  # the note stays while others label
    page.get("view-note").value = "two nuclei, or three"
    await page.until(lambda: "unsure" in page.get("view-state").text)
    assert page.get("view-note").value == "two nuclei, or three"
    page.send("look", id=one)
    await page.until(lambda: "starred" in page.get("view-state").text)
    assert page.get("view-note").value == ""
    page.send("shut")
    for show, expected in ((Show.STARRED, [one]), (Show.NOTED, [other])):
        page.get("show").value = str(show)
        await page.until(lambda expected=expected: page.ids == expected)
    page.send("star", ids=[one])
    await page.until(lambda: not service.notes.get(one).star)


def test_each_label_has_a_colour_a_shape_and_a_key():
    keys = KEYS["Label"]
    assert len({shape[0] for shape in SHAPES.values()}) == len(Label)
    for label in Label:
        assert keys[SHAPES[label][-1].lower()] == label
        assert f"--{label}: {FRAME_COLOURS[label]};" in label_colours()
