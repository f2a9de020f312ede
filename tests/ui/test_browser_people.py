"""Tests in a real browser of the guided random audit, and of two people at one search."""

import pytest
from browser import running

pytestmark = [pytest.mark.ui, pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def demo(demo_words, tmp_path_factory):
    with running(tmp_path_factory.mktemp("demo"), *demo_words) as command:
        yield command


def search(page):
    """Return the words of the address."""
    return page.page.evaluate("location.search.slice(1)")


def labels(page):
    """Return the label of each tile, empty without one."""
    return page.page.eval_on_selector_all("[data-testid=tile]", "tiles => tiles.map((tile) => tile.dataset.label)")


def count(page):
    return page.get("audit-count").inner_text()


def test_a_guided_audit(demo, opened):
    page = opened(demo)
    page.get("audit-goal").fill("20")
    page.until(lambda: "15 %" in page.get("audit-why").inner_text(), "what 20 images can show")
    page.get("audit-start").click()
    page.until(lambda: search(page) == "audit=20" and len(page.ids) == 20, "the audit")
    page.until(lambda: count(page) == "0 of 20", "the goal")
    assert not page.get("sort").is_visible()
    ids = page.ids
    page.tile(ids[0]).click()
    page.press(*"nan")
    page.until(lambda: "3 random images, 1 is an anomaly" in page.get("note").inner_text(), "the estimate in words")
    page.until(lambda: count(page) == "3 of 20", "the progress")
    page.until(lambda: "ranked" in page.get("speed").inner_text(), "the images have scores")
    captions = "".join(page.page.locator("[data-testid=tile] .am-caption").all_inner_texts())
    assert not any(character.isdigit() for character in captions), "the audit hides them"
    page.press("z")
    page.until(lambda: count(page) == "2 of 20", "undo")
    assert page.cursor == ids[2]
    page.page.reload()
    page.until(lambda: count(page) == "2 of 20" and page.ids == ids, "a reload")
    other = opened(demo, path="?" + search(page))
    other.until(lambda: count(other) == "2 of 20" and len(other.ids) == 18, "a link for another person")
    other.press(*"n" * 17)
    page.until(lambda: count(page) == "19 of 20", "the labels of another person")
    other.press("x")
    page.until(lambda: "complete" in page.get("status").inner_text(), "the goal is reached")
    assert page.get("audit-advice").is_visible()
    page.get("audit-stop").click()
    page.until(lambda: search(page) == "" and page.get("audit-start").is_visible(), "the end")
    assert page.complaints == other.complaints == []


def test_two_people_give_names_and_second_opinions(demo, opened):
    ada = opened(demo)
    ada.until(lambda: not ada.get("who").is_visible(), "a single person is not asked")
    bob = opened(demo)
    for person, name in ((ada, "ada"), (bob, "bob")):
        person.get("who").wait_for()
        person.get("annotator").fill(name)
        person.get("who").wait_for(state="hidden")
    ada.tile(ada.ids[0]).click()
    seen = ada.ids[:2]
    ada.press("a", "u")
    ada.until(lambda: ada.get("review").is_visible(), "one image is unsure")
    bob.choose("show", "second opinion")
    bob.until(lambda: bob.ids[-2:] == seen, "the images of one other person, oldest label first")
    assert set(labels(bob)) == {""}
    bob.tile(seen[0]).click()
    bob.press("n")
    bob.until(lambda: labels(bob)[-2:] == ["normal", ""], "one's own label")
    ada.press("q")
    ada.until(lambda: ada.ids == seen, "the conflict, and the unsure image")
    assert search(ada) == "show=to-review"
    ada.press("n")
    ada.until(lambda: not ada.get("conflict").count(), "the conflict is settled")
    ada.until(lambda: ada.cursor == seen[1], "the next one")
    ada.press("q")
    ada.until(lambda: search(ada) == "" and ada.ids[0] not in seen, "back")
    assert ada.complaints == bob.complaints == []


def test_blind_mode_and_parts(demo, opened):
    other = opened(demo)
    for _ in range(2):
        other.label("n", "normal")
    page = opened(demo, path="?show=labelled")
    page.until(lambda: "" not in labels(page), "the labels of others")
    page.get("annotator").fill("cy")
    page.get("blind").click()
    page.until(lambda: set(labels(page)) == {""}, "are hidden")
    page.tile(page.ids[0]).click()
    page.press("u")
    page.until(lambda: labels(page)[0] == "unsure", "but one's own")
    page.page.reload()
    page.until(lambda: labels(page)[:1] == ["unsure"] and set(labels(page)[1:]) == {""}, "also after a reload")
    page.get("blind").click()
    page.until(lambda: "" not in labels(page), "and shown again")
    page.page.goto(demo.url + "?share=1of2")
    page.get("part-off").wait_for()
    first = page.ids
    page.choose("part", "part 2 of 2")
    page.until(lambda: search(page) == "share=2of2" and not set(first) & set(page.ids), "the other part")
    page.get("part-off").click()
    page.until(lambda: set(first) & set(page.ids), "all images")
    assert page.complaints == other.complaints == []
