from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from anomalymatch.errors import ConfigError, StorageError
from anomalymatch.ui.saved_views import MAX_VIEWS, SavedViews
from anomalymatch.ui.views import Query, Show, Sort
from anomalymatch.ui.web.saved_views import parts_to_share


@pytest.fixture
def changes():
    return []


@pytest.fixture
def views(tmp_path, changes):
    return SavedViews(tmp_path / "views.json", lambda: changes.append(1))


def test_views_are_stored_by_name(views, changes):
    views.save("  bright\n and blue ", "show=all&descending=flux")
    views.save("äther", "text=%C3%A4")
    views.save("bright and blue", "descending=flux")
    assert list(views.all().items()) == [("bright and blue", "descending=flux"), ("äther", "text=%C3%A4")]
    assert SavedViews(views.path, print).all() == views.all()
    views.remove("äther")
    views.remove("absent")
    assert SavedViews(views.path, print).all() == {"bright and blue": "descending=flux"}
    assert len(changes) == 5


def test_a_view_needs_a_name_and_room(views, changes):
    with pytest.raises(ConfigError, match="name"):
        views.save(" \x00 ", "show=all")
    for k in range(MAX_VIEWS):
        views.save(f"v{k}", "")
    with pytest.raises(ConfigError, match=str(MAX_VIEWS)):
        views.save("one more", "")
    views.save("v0", "show=all")
    assert len(views.all()) == MAX_VIEWS == len(changes) - 1


def test_a_view_is_order_and_filters_but_nobodys_page_or_share():
    query = Query(sort=Sort.AUDIT, show=Show.ALL, low=0.2, text="ring", size=24, page=3, share=(2, 3))
    parts = parts_to_share(query)
    assert Query(**parts) == replace(query, size=48, page=0, share=(1, 1))
    assert Query(size=100, share=(1, 2)).changed(**parts) == replace(query, size=100, page=0, share=(1, 2))


def test_many_threads_lose_no_view(views):
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda k: views.save(f"v{k}", f"page={k}"), range(40)))
    assert SavedViews(views.path, print).all() == {f"v{k}": f"page={k}" for k in range(40)}


@pytest.mark.parametrize("text", ["{", "[]", "1"])
def test_corrupt_file(views, text):
    views.path.write_text(text)
    with pytest.raises(StorageError, match="corrupt"):
        SavedViews(views.path, print)
