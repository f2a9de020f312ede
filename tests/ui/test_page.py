import asyncio
import threading

import numpy as np
import pytest


async def until(condition, seconds=5.0):
    """Wait for something that happens in a thread or on the next turn of the page."""
    for _ in range(int(seconds / 0.02)):
        if condition():
            return
        await asyncio.sleep(0.02)
    raise AssertionError("it did not happen")


async def gallery_of(user):
    """The gallery, once it shows its first page."""
    from anomalymatch.ui.web.gallery import GalleryElement

    (gallery,) = user.find(kind=GalleryElement).elements
    await until(lambda: gallery._props["page"]["tiles"] is not None)
    return gallery


def send(user, event, args=None):
    """Send an event of the gallery, as the browser does."""
    from anomalymatch.ui.web.gallery import GalleryElement

    user.find(kind=GalleryElement).trigger(event, args)


def by_test_id(user, name):
    """The one element with this test id, shown or not."""
    found = [e for e in user.client.elements.values() if e.props.get("data-testid") == name]
    assert len(found) == 1, f"{len(found)} elements are called {name}"
    return found[0]


def has(user, name):
    return any(element.props.get("data-testid") == name for element in user.client.elements.values())


def click(user, name):
    from nicegui.testing.user_interaction import UserInteraction

    UserInteraction(user, {by_test_id(user, name)}, None).click()


def blur(user, name):
    from nicegui.testing.user_interaction import UserInteraction

    UserInteraction(user, {by_test_id(user, name)}, None).trigger("blur")


def test_it_opens_with_the_highest_scores(make_fake, visit):
    service = make_fake(60)

    async def act(user):
        gallery = await gallery_of(user)
        ranks = [tile["rank"] for tile in gallery.tiles]
        assert ranks == list(range(1, 49))
        assert gallery._props["page"]["pages"] == 2
        assert "No labels yet" in gallery._props["page"]["note"]
        await user.should_see("60 images")
        await user.should_see("label 5 images first")
        assert not by_test_id(user, "advice").visible

    visit(service, act)


def test_what_is_left_comes_with_advice(make_fake, visit):
    from anomalymatch.types import Label

    service = make_fake(60)
    service.label(service.source.ids[:6], Label.NORMAL, "ada")

    async def act(user):
        await gallery_of(user)
        await user.should_see("About 120 anomalies are left (90 %: 80 to 190)")
        await user.should_see("going on at the present rate finds one in 6 labels")
        assert by_test_id(user, "advice").visible

    visit(service, act)


def test_a_label_is_in_the_log_and_leaves_the_page_with_the_next_ranking(make_fake, visit):
    service = make_fake()

    async def act(user):
        gallery = await gallery_of(user)
        id_ = gallery.ids[0]
        send(user, "label", {"ids": [id_], "label": "anomaly"})
        await until(lambda: service.labels == {id_: "anomaly"})
        await until(lambda: id_ not in gallery.ids)
        assert gallery._props["page"]["keep"]
        await until(lambda: by_test_id(user, "standing").text == "40 images · 1 labelled · 1 found")

    visit(service, act)


def test_without_following_tiles_stay_and_change_in_place(make_fake, visit):
    service = make_fake()

    async def act(user):
        gallery = await gallery_of(user)
        by_test_id(user, "follow").value = False
        before, scores = gallery.ids, [tile["score"] for tile in gallery.tiles]
        send(user, "label", {"ids": before[:2], "label": "normal"})
        await until(lambda: [tile["label"] for tile in gallery.tiles[:3]] == ["normal", "normal", None])
        await until(lambda: [tile["score"] for tile in gallery.tiles] != scores)
        assert gallery.ids == before
        send(user, "rerank")
        await until(lambda: gallery.ids != before)
        assert not set(before[:2]) & set(gallery.ids)

    visit(service, act)


def test_undo_takes_labels_back_at_any_depth(make_fake, visit):
    service = make_fake()

    async def act(user):
        gallery = await gallery_of(user)
        first, second = gallery.ids[:2]
        for id_ in (first, second):
            send(user, "label", {"ids": [id_], "label": "artefact"})
        await until(lambda: len(service.labels) == 2)
        send(user, "undo")
        await until(lambda: set(service.labels) == {first})
        send(user, "undo")
        await until(lambda: not service.labels)
        send(user, "undo")
        await user.should_see("Nothing to undo for me", retries=20)

    visit(service, act)


def test_labels_reach_the_service_in_the_order_of_the_keys(make_fake, visit):
    service = make_fake()

    async def act(user):
        gallery = await gallery_of(user)
        for label in ("anomaly", "normal", None, "unsure"):
            send(user, "label", {"ids": gallery.ids[:1], "label": label})
        await until(lambda: len(service.events) == 4)
        assert [event.label for event in service.events] == ["anomaly", "normal", None, "unsure"]

    visit(service, act)


def test_filters_and_order_make_the_query(make_fake, visit):
    service = make_fake(60)

    async def act(user):
        gallery = await gallery_of(user)
        by_test_id(user, "filter-text").value = "IM00001"
        await until(lambda: sorted(gallery.ids) == [f"im00001{k}" for k in range(10)])
        by_test_id(user, "sort").value = "lowest score"
        await until(lambda: len(gallery.ids) == 10 and gallery.tiles[0]["score"] < gallery.tiles[-1]["score"])
        by_test_id(user, "show").value = "anomaly"
        await until(lambda: gallery._props["page"]["empty"] == "Nothing matches these filters.")
        assert gallery._props["page"]["filtered"]
        send(user, "clear")
        await until(lambda: len(gallery.ids) == 48)
        assert by_test_id(user, "filter-text").value == ""

    visit(service, act)


def test_a_score_range_filters(make_fake, visit):
    service = make_fake(60)

    async def act(user):
        from nicegui.testing.user_interaction import UserInteraction

        gallery = await gallery_of(user)
        scores = by_test_id(user, "scores")
        scores.value = {"min": 0.4, "max": 0.7}
        UserInteraction(user, {scores}, None).trigger("change")
        await until(lambda: gallery.tiles and all(0.4 <= tile["score"] <= 0.7 for tile in gallery.tiles))

    visit(service, act)


@pytest.mark.parametrize(
    ("show", "says"),
    [("conflicts", "No conflicts"), ("unsure", "Nothing is labelled unsure yet"), ("labelled", "Nothing has a label")],
)
def test_an_empty_page_says_why(make_fake, visit, show, says):
    async def act(user):
        gallery = await gallery_of(user)
        by_test_id(user, "show").value = show
        await until(lambda: gallery._props["page"]["empty"].startswith(says))

    visit(make_fake(), act)


def test_pages_turn(make_fake, visit):
    async def act(user):
        gallery = await gallery_of(user)
        send(user, "turn", {"to": 1, "at": "last"})
        await until(lambda: gallery._props["page"]["page"] == 1)
        assert [tile["rank"] for tile in gallery.tiles] == list(range(49, 61))
        assert gallery._props["page"]["at"] == "last"
        assert not gallery._props["page"]["keep"]

    visit(make_fake(60), act)


def test_what_the_browser_remembers_comes_back(make_fake, visit):
    service = make_fake(60)
    kept = {"annotator": "ada", "count": "24", "tile": "200", "follow": "false", "advance": "false", "theme": "dark"}

    async def act(user):
        gallery = await gallery_of(user)
        send(user, "hello", kept)
        await until(lambda: len(gallery.ids) == 24)
        assert (gallery._props["tile"], gallery._props["advance"]) == (200, False)
        assert by_test_id(user, "theme").props["icon"] == "dark_mode"
        send(user, "label", {"ids": gallery.ids[:1], "label": "normal"})
        await until(lambda: service.events)
        assert service.events[0].annotator == "ada"

    visit(service, act)


def test_nonsense_from_the_browser_is_ignored(make_fake, visit):
    kept = {"annotator": "", "count": "1000000", "tile": "-5", "theme": "<b>"}

    async def act(user):
        gallery = await gallery_of(user)
        send(user, "hello", kept)
        await asyncio.sleep(0.1)
        assert (len(gallery.ids), gallery._props["tile"]) == (48, 128)
        assert by_test_id(user, "annotator").value == "me"

    visit(make_fake(60), act)


def test_the_large_view_shows_an_image_with_its_neighbours_and_history(make_fake, visit):
    service = make_fake(sky=True)

    async def act(user):
        gallery = await gallery_of(user)
        id_ = gallery.ids[3]
        send(user, "look", {"id": id_})
        await user.should_see("424 x 424 px", retries=20)
        await user.should_see("no label yet")
        assert gallery._props["viewing"] == id_
        await until(lambda: sum("am-neighbour" in e.classes for e in user.client.elements.values()) == 12)
        link = by_test_id(user, "link-aladin").props
        assert (link["rel"], link["target"]) == ("noopener noreferrer", "_blank")
        assert "210.802429" in link["href"]
        send(user, "label", {"ids": [id_], "label": "unsure"})
        await user.should_see("unsure by me", retries=20)
        assert by_test_id(user, "view-unsure").props["aria-pressed"] == "true"
        send(user, "shut")
        await until(lambda: gallery._props["viewing"] == "")

    visit(service, act)


def test_the_large_view_changes_stretch_and_channel_and_compares(make_fake, visit):
    async def act(user):
        from anomalymatch.ui.web.viewer import Zoom

        gallery = await gallery_of(user)
        send(user, "look", {"id": gallery.ids[0]})
        (zoom,) = user.find(kind=Zoom).elements
        assert [pane["name"] for pane in zoom._props["panes"]] == ["as trained"]
        assert len(zoom._props["ahead"]) == 1
        by_test_id(user, "stretch").value = "asinh"
        by_test_id(user, "channel").value = "G"
        assert "stretch=asinh" in zoom._props["panes"][0]["src"]
        assert zoom._props["panes"][0]["src"].endswith("channel=G")
        by_test_id(user, "compare").value = True
        assert [pane["name"] for pane in zoom._props["panes"]] == list(make_fake().stretches)
        user.find(kind=Zoom).trigger("pick", "log")
        assert [pane["name"] for pane in zoom._props["panes"]] == ["log"]

    visit(make_fake(), act)


def test_next_and_previous_image_and_all_neighbours(make_fake, visit):
    async def act(user):
        gallery = await gallery_of(user)
        first, second = gallery.ids[:2]
        send(user, "look", {"id": first})
        click(user, "view-next")
        await until(lambda: gallery._props["viewing"] == second)
        click(user, "view-previous")
        click(user, "view-previous")
        assert gallery._props["viewing"] == first
        click(user, "view-next")
        await user.should_see("no label yet", retries=20)
        click(user, "like")
        await until(lambda: gallery.ids[0] == second)
        assert by_test_id(user, "like-off").visible
        assert gallery._props["viewing"] == ""
        click(user, "like-off")
        await until(lambda: [tile["rank"] for tile in gallery.tiles] == list(range(1, 41)))

    visit(make_fake(), act)


def test_help_shows_all_keys(make_fake, visit):
    async def act(user):
        await gallery_of(user)
        assert not by_test_id(user, "help").parent_slot.parent.value
        send(user, "help")
        assert by_test_id(user, "help").parent_slot.parent.value
        for text in ("anomaly", "take the label away", "undo, any depth", "train in the background"):
            await user.should_see(text)

    visit(make_fake(), act)


def test_labels_of_others_arrive_by_themselves(make_fake, visit):
    from anomalymatch.types import Label

    service = make_fake()

    async def act(user):
        gallery = await gallery_of(user)
        by_test_id(user, "follow").value = False
        id_ = gallery.ids[5]
        thread = threading.Thread(target=service.label, args=([id_], Label.ANOMALY, "bob"))
        thread.start()
        await until(lambda: gallery.tiles[5]["label"] == "anomaly")
        assert gallery.tiles[5]["annotator"] == "bob"
        thread.join()
        send(user, "label", {"ids": [id_], "label": "normal"})
        await until(lambda: gallery.tiles[5]["conflict"])
        await user.should_see("bob and me", retries=40)
        await user.should_see("1 conflict")
        click(user, "conflicts")
        await until(lambda: gallery.ids == [id_])

    visit(service, act)


def test_a_thousand_changes_at_once_redraw_the_page_once(make_fake, visit):
    service = make_fake()

    async def act(user):
        gallery = await gallery_of(user)
        await asyncio.sleep(0.2)
        serial = gallery._serial
        threads = [threading.Thread(target=service.tell, args=("ranking",)) for _ in range(1000)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        await asyncio.sleep(0.5)
        assert 1 <= gallery._serial - serial <= 3

    visit(service, act)


def test_who_leaves_is_unsubscribed(make_fake, visit):
    service = make_fake()

    async def act(user):
        await gallery_of(user)
        assert len(service.listeners) == 1
        user.client.delete()
        assert not service.listeners
        service.tell("ranking")

    visit(service, act)


def test_a_failed_training_is_told_and_loses_no_label(make_fake, visit):
    service = make_fake()

    async def act(user):
        gallery = await gallery_of(user)
        send(user, "label", {"ids": gallery.ids[:1], "label": "anomaly"})
        send(user, "train")
        await until(
            lambda: by_test_id(user, "training-state").text.startswith("Training · cycle 1 · step 200 of 1,000")
        )
        assert by_test_id(user, "training-stop").visible
        assert not by_test_id(user, "training-start").visible
        await user.should_see("step 200: loss 0.24")
        threading.Thread(target=service.training.fail, args=("the GPU is out of memory",)).start()
        await until(lambda: by_test_id(user, "training-message").visible)
        assert by_test_id(user, "training-message").text == "the GPU is out of memory"
        assert user.notify.contains("all labels are safe: the GPU is out of memory")
        assert by_test_id(user, "training-start").text == "Resume"
        assert len(service.labels) == 1

    visit(service, act)


def test_training_starts_and_stops(make_fake, visit):
    service = make_fake()

    async def act(user):
        await gallery_of(user)
        click(user, "training-start")
        await until(lambda: by_test_id(user, "training-stop").visible)
        click(user, "training-stop")
        await until(lambda: by_test_id(user, "training-state").text.startswith("Finished"))

    visit(service, act)


def test_an_error_of_the_service_becomes_a_notification(make_fake, visit, monkeypatch):
    from anomalymatch.errors import StorageError

    service = make_fake()

    def full(*args):
        raise StorageError("the disk is full")

    monkeypatch.setattr(service, "label", full)

    async def act(user):
        gallery = await gallery_of(user)
        send(user, "label", {"ids": gallery.ids[:1], "label": "anomaly"})
        await user.should_see("the disk is full", retries=20)
        assert gallery.tiles[0]["label"] is None

    visit(service, act)


def test_the_ranking_mode_changes(make_fake, visit):
    service = make_fake()

    async def act(user):
        await gallery_of(user)
        await until(lambda: by_test_id(user, "mode").value == "live")
        assert service.reranks == 0
        by_test_id(user, "mode").value = "both"
        await until(lambda: service.mode == "both")

    visit(service, act)


def test_examples_come_and_go(make_fake, visit):
    service = make_fake()

    async def act(user):
        from anomalymatch.ui.web.gallery import DropZone

        await gallery_of(user)
        id_ = service.add_example("a.png", b"x", "me")
        await until(lambda: any(e.props.get("data-testid") == "example" for e in user.client.elements.values()))
        zones = user.find(kind=DropZone).elements
        assert {zone._props["url"] for zone in zones} == {"/examples", "/import"}
        user.find(kind=DropZone).trigger("sent", {"ok": True, "message": '{"added": ["a"], "refused": []}'})
        assert user.notify.contains("1 example came in.")
        refused = '{"added": [], "refused": [{"name": "b.png", "reason": "it is no image"}]}'
        user.find(kind=DropZone).trigger("sent", {"ok": False, "message": refused})
        assert user.notify.contains("b.png: it is no image")
        user.find(kind=DropZone).trigger("sent", {"ok": True, "message": '{"labels": 1200}'})
        assert user.notify.contains("1,200 labels came in.")
        click(user, "example-remove")
        await until(lambda: id_ not in service.example_ids())

    visit(service, act)


def test_sky_links_point_to_the_place():
    from anomalymatch.ui.web.viewer import sky_links

    links = sky_links((10.5, -5.25))
    assert links["ESASky"].startswith("https://sky.esa.int/esasky/?target=10.500000+-5.250000&")
    assert links["Aladin Lite"].startswith("https://aladin.cds.unistra.fr/AladinLite/?target=10.500000+-5.250000&")
    assert sky_links(None) == {}


def test_the_discovery_curve_keeps_its_ends_when_thinned():
    from anomalymatch.ui.web import charts

    found = np.arange(5000) // 10
    curve = charts.discovery(range(1, 5001), found.tolist())["data"][1]
    assert len(curve["x"]) <= 502
    assert (curve["x"][0], curve["y"][0]) == (0, 0)
    assert (curve["x"][-1], curve["y"][-1]) == (5000, 499)


def test_plots_without_data_say_so():
    from anomalymatch.ui.web import charts

    for figure, says in (
        (charts.histogram(None), "no ranking yet"),
        (charts.discovery([], []), "no labels yet"),
        (charts.training({"loss": []}), "no steps yet"),
    ):
        assert figure["data"] == []
        assert figure["layout"]["annotations"][0]["text"] == says


def test_losses_that_are_no_numbers_are_gaps():
    from anomalymatch.ui.web import charts

    (trace,) = charts.training({"loss": [1.0, float("nan"), float("inf"), 0.5]})["data"]
    assert trace["y"] == [1.0, None, None, 0.5]


def test_each_label_has_a_colour_a_shape_and_its_key():
    from anomalymatch.evaluation.contact_sheet import FRAME_COLOURS
    from anomalymatch.types import Label
    from anomalymatch.ui.web.page import KEYS
    from anomalymatch.ui.web.theme import SHAPES, label_colours

    keys = dict(KEYS[0][1])
    assert len({shape[0] for shape in SHAPES.values()}) == len(Label)
    for label in Label:
        assert keys[SHAPES[label][-1].lower()] == label
        assert f"--{label}: {FRAME_COLOURS[label]};" in label_colours()


def test_groups_are_made_shown_named_and_labelled_as_a_whole(make_fake, visit):
    service = make_fake(60)

    async def act(user):
        gallery = await gallery_of(user)
        send(user, "group")
        await user.should_see("There are no groups yet")
        by_test_id(user, "groups-what").value = "top 100"
        click(user, "groups-make")
        await until(lambda: len(service.groups.all()) == 3)
        first, second, _ = service.groups.all()
        await until(lambda: has(user, "group-2"))
        send(user, "group")
        await until(lambda: gallery.ids == list(first.ids)[:48])
        assert gallery._props["grouped"]
        assert "group 1 of 3" in gallery._props["page"]["note"]
        send(user, "group")
        await until(lambda: gallery.ids == list(second.ids))
        send(user, "whole", {"label": "artefact"})
        await until(lambda: service.labels == dict.fromkeys(second.ids, "artefact"))
        by_test_id(user, "group-name-1").value = "trails"
        blur(user, "group-name-1")
        await until(lambda: service.groups.all()[1].name == "trails")
        click(user, "group-off")
        await until(lambda: not gallery._props["grouped"] and len(gallery.ids) > len(second.ids))
        assert not set(gallery.ids) & set(second.ids)

    visit(service, act)


def test_groups_split_and_merge_on_the_page(make_fake, visit):
    service = make_fake(60)
    service.groups.make("top 100", None)

    async def act(user):
        gallery = await gallery_of(user)
        click(user, "group-show-0")
        await until(lambda: gallery._props["grouped"])
        click(user, "group-split-0")
        await until(lambda: has(user, "group-3"))
        ticks = [e for e in user.client.elements.values() if type(e).__name__ == "Checkbox"]
        for tick in ticks[:2]:
            tick.value = True
        click(user, "groups-merge")
        await until(lambda: len(service.groups.all()) == 3)
        await until(lambda: not gallery._props["grouped"])

    visit(service, act)


def test_the_group_that_is_shown_follows_when_another_person_changes_it(make_fake, visit):
    service = make_fake(60)
    service.groups.make("top 100", None)

    async def act(user):
        gallery = await gallery_of(user)
        click(user, "group-show-0")
        first = list(service.groups.all()[0].ids)
        await until(lambda: gallery.ids == first[:48])
        service.groups.split(0)
        half = list(service.groups.all()[0].ids)
        assert 0 < len(half) < len(first)
        await until(lambda: gallery.ids == half)

    visit(service, act)
