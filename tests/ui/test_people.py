"""Tests of several people at one search: blind mode, second opinions, the review queue, disjoint parts and names."""

from dataclasses import replace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from visitor import on_page

from anomalymatch.data.label_log import FROM_FILE
from anomalymatch.types import Label
from anomalymatch.ui.gallery import Gallery, share_numbers
from anomalymatch.ui.people import People, needs_name
from anomalymatch.ui.veil import NO_VEIL, Veil
from anomalymatch.ui.views import Query, Show, Sort

A, N, U = Label.ANOMALY, Label.NORMAL, Label.UNSURE


def ids(service, **words):
    return [tile.id for tile in service.page(Query(size=60, **words)).tiles]


def test_blind_hides_labels_of_others_until_ones_own(service):
    first, second = ids(service)[:2]
    service.label([first, second], A, "ada")
    service.groups.add("rings")
    service.groups.assign(0, [first])
    veil = Veil(blind="bob")
    hidden = veil.tiles(service.tiles([first]))[0]
    assert (hidden.label, hidden.annotator, hidden.group, hidden.people) == (None, None, None, ())
    assert hidden.score is not None
    assert veil.details(service.details(first)).history == []
    service.label([first], N, "bob")
    tiles = service.tiles([first, second])
    bare = replace(tiles[1], label=None, annotator=None, group=None, people=())
    assert veil.tiles(tiles) == [tiles[0], bare]
    assert len(veil.details(service.details(first)).history) == 2
    service.undo("bob")
    assert veil.tiles(service.tiles([first]))[0].label is None, "an undone label is none"
    assert Veil(blind="ada").tiles(tiles) == NO_VEIL.tiles(tiles) == tiles
    positions = service._state.positions([first, second])
    assert service._state.marks(positions, veil)[1].tolist() == [0, 0]
    assert service._state.marks(positions, Veil(blind="ada"))[1].tolist() == [1, 1]


def test_second_opinions_are_images_with_one_other_label(service):
    first, second, third, fourth = ids(service)[:4]
    service.label([second], A, "ada")
    service.label([first], N, "bob")
    service.label([third], N, "ada")
    service.add_given_labels({fourth: A})
    assert service.tiles([fourth])[0].annotator == FROM_FILE

    def queue(name):
        return ids(service, show=Show.SECOND, annotator=name)

    assert queue("cy") == [second, first, third], "oldest first"
    assert queue("ada") == [first]
    assert queue("bob") == [second, third]
    service.label([second], N, "bob")
    assert queue("cy") == [first, third], "a third opinion is not asked for"
    query = Query(show=Show.SECOND, annotator="bob")
    assert [query.passes(tile) for tile in service.tiles([first, second, third, fourth])] == [False, False, True, False]
    service.label([third], None, "cy")
    assert queue("bob") == [], "an image without a label has no opinion"


def test_the_review_queue_holds_conflicts_and_unsure_images_newest_first(service):
    first, second, third, fourth = ids(service)[:4]
    service.label([first], U, "ada")
    service.label([second, third], A, "ada")
    service.label([third], N, "bob")
    service.label([fourth], U, "bob")
    assert ids(service, show=Show.REVIEW) == [fourth, third, first]
    assert ids(service, show=Show.REVIEW, sort=Sort.LOWEST) == [fourth, third, first]
    assert service.summary().reviews == 3
    query = Query(show=Show.REVIEW)
    assert [query.passes(tile) for tile in service.tiles([first, second, third])] == [True, False, True]
    service.label([third], N, "bob")  # the same again settles a conflict
    service.label([first], N, "ada")
    assert ids(service, show=Show.REVIEW) == [fourth]
    service.undo("bob")
    assert ids(service, show=Show.REVIEW) == [fourth, third]
    assert service.summary().reviews == 2


NAMES = st.lists(st.text(min_size=1, max_size=6), unique=True, max_size=60)


@given(NAMES, st.integers(2, 7), st.randoms(use_true_random=False))
def test_parts_are_disjoint_complete_and_stay_in_any_order_of_any_archive(names, parts, random):
    gallery = Gallery(names, seed=0, metadata=None)

    def part(gallery, number, **words):
        found = gallery.found(Query(show=Show.ALL, share=(number, parts), **words)).tolist()
        assert found == [i for i in gallery.found(Query(show=Show.ALL, **words)).tolist() if i in set(found)]
        return found

    whole = [part(gallery, number) for number in range(1, parts + 1)]
    assert sorted(position for each in whole for position in each) == list(range(len(names)))
    audit = [part(gallery, number, sort=Sort.AUDIT) for number in range(1, parts + 1)]
    assert [sorted(each) for each in audit] == whole
    shuffled = random.sample(names, len(names))
    other = Gallery(shuffled, seed=1, metadata=None)
    for number, each in enumerate(whole, start=1):
        assert {shuffled[i] for i in part(other, number)} == {names[i] for i in each}


def test_parts_have_equal_sizes():
    numbers = share_numbers([f"field/image_{number:05d}.fits" for number in range(20_000)])
    for parts in (2, 3, 10):
        counts = np.bincount((numbers % np.uint64(parts)).astype(int))
        assert np.abs(counts - 20_000 / parts).max() < 5 * np.sqrt(20_000 / parts)


def test_two_people_with_parts_see_no_common_image(service):
    parts = [ids(service, share=(number, 2)) for number in (1, 2)]
    assert set(parts[0]).isdisjoint(parts[1])
    assert sorted([*parts[0], *parts[1]]) == sorted(ids(service))
    service.label(parts[0][:3], N, "ada")
    assert ids(service, share=(2, 2)) == [id_ for id_ in ids(service) if id_ in parts[1]]
    audit = [ids(service, share=(number, 2), audit=30) for number in (1, 2)]
    assert sorted([*audit[0], *audit[1]]) == sorted(ids(service, audit=30))


def test_a_name_is_asked_for_when_another_browser_is_there():
    changes = []
    people = People(lambda: changes.append(1))
    people.join("page 1", "firefox")
    people.join("page 2", "firefox")
    assert people.others("page 1") == people.others("unknown") == 0, "two pages of one person"
    assert len(changes) == 1
    people.join("page 3", "phone")
    assert [people.others(page) for page in ("page 1", "page 2", "page 3")] == [1, 1, 1]
    people.leave("page 1")
    people.leave("page 1")
    assert (people.others("page 3"), len(changes)) == (1, 2)
    people.leave("page 2")
    assert (people.others("page 3"), len(changes)) == (0, 3)
    assert needs_name("me", 1)
    assert not needs_name("me", 0)
    assert not needs_name("ada", 1)


@on_page
async def test_the_page_asks_for_a_name_while_another_browser_is_there(page, service):
    page.send("hello", browser="mine", address="", ids=[])
    await page.until(lambda: service.people._browsers)
    service.people.join("my other page", "mine")
    service.people.join("another page", "theirs")
    await page.until(lambda: page.get("who").visible)
    await page.says("write your name")
    service.people.leave("another page")
    await page.until(lambda: not page.get("who").visible)
    service.people.join("another page", "theirs")
    await page.until(lambda: page.get("who").visible)
    page.get("annotator").value = "ada"
    assert not page.get("who").visible
    page.user.client.delete()
    service.people.leave("another page")


@on_page
async def test_second_opinions_follow_the_name_and_hide_the_first(page, service):
    mine, other = page.ids[:2]
    service.label([mine], A, "me")
    service.label([other], A, "bob")
    page.get("show").value = "second opinion"
    await page.until(lambda: page.ids == [other])
    assert page.gallery.tiles[0]["label"] is None
    page.get("annotator").value = "bob"
    await page.until(lambda: page.ids == [mine])
    page.label([mine], "normal")
    await page.until(lambda: page.gallery.tiles[0]["label"] == "normal" and page.gallery.tiles[0]["conflict"])
    await page.until(lambda: page.get("review").text == "1 to review (q)")
    page.act("review")
    await page.until(lambda: page.page["address"] == "show=to-review")
    page.send("review")
    await page.until(lambda: page.page["address"] == "")


@on_page
async def test_blind_mode_and_the_part_are_settings_of_the_page(page, service):
    id_ = page.ids[0]
    service.label([id_], A, "ada")
    await page.until(lambda: page.gallery.tiles[0]["label"] == "anomaly")
    assert not page.get("team").visible
    service.label([page.ids[1]], N, "bob")
    await page.until(lambda: page.get("team").visible)
    page.send("hello", blind="true", address="", ids=[])
    await page.until(lambda: page.gallery.tiles[0]["label"] is None)
    page.get("blind").value = False
    await page.until(lambda: page.gallery.tiles[0]["label"] == "anomaly")
    page.get("part").value = "part 2 of 3"
    await page.until(lambda: page.page["address"] == "share=2of3")
    assert page.get("part-off").text == "part 2 of 3"
    page.act("part-off")
    await page.until(lambda: page.page["address"] == "" and page.get("part").value == "all images")
