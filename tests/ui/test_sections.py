"""Tests of the sections of the side panel, without a browser."""

import json

import pytest
from visitor import on_page

from anomalymatch.types import Label


@pytest.fixture
def service(make_service):
    """60 images without a ranking, as on the first visit."""
    return make_service(60)


def opened(page):
    names = ("description", "ranking", "discovery", "groups", "training", "annotators", "examples", "exchange")
    return {name for name in names if page.get(f"section-{name}").value}


ALWAYS = {"groups", "training", "annotators", "examples", "exchange"}


@on_page
async def test_empty_sections_are_folded_until_they_have_something_to_show(page, service):
    await page.until(lambda: opened(page) == ALWAYS)
    service.label(service.source.ids[:2], Label.UNSURE, "ada")
    await page.until(lambda: opened(page) == ALWAYS | {"discovery"})
    service.undo("ada")
    await page.until(lambda: opened(page) == ALWAYS)


@on_page
async def test_what_a_person_chose_stays(page, service, monkeypatch):
    remembered = {}
    monkeypatch.setattr(page.gallery, "remember", remembered.__setitem__)
    await page.until(lambda: opened(page) == ALWAYS)
    page.get("section-ranking").value = True
    page.get("section-groups").value = False
    assert json.loads(remembered["closed"]) == ["groups"]
    service.label(service.source.ids[:1], Label.UNSURE, "ada")
    await page.until(lambda: "discovery" in opened(page))
    page.get("section-discovery").value = False
    service.label(service.source.ids[1:2], Label.UNSURE, "ada")
    await page.sees("2 of 60 labelled")
    assert opened(page) == (ALWAYS | {"ranking"}) - {"groups"}
    page.get("section-groups").value = True
    assert json.loads(remembered["closed"]) == ["discovery"]
    for kept in ('["training", "none"]', "[", "7", '[["x"]]'):
        page.send("hello", closed=kept)
    await page.until(lambda: "discovery" in opened(page))
    page.send("hello", closed='["training", "none"]')
    await page.until(lambda: "training" not in opened(page))
