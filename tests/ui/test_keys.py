import pytest
from visitor import on_page

from anomalymatch.errors import ConfigError
from anomalymatch.types import Label
from anomalymatch.ui.keys import read_kinds


@pytest.fixture
def service(make_service):
    """60 images, ranked by position, with a kind that has a key of its own."""
    service = make_service(60, trained=True)
    service.groups.add("old")
    service.groups.bind({"lens": "l"})
    return service


@pytest.mark.parametrize(
    ("kinds", "message"),
    [
        ({"lens": "a"}, r"'lens' is 'a', which means 'anomaly' already: choose one of d, e, f"),
        ({"lens": "l", "ring": "l"}, r"'ring' is 'l', which means 'lens' already: choose one of d, e, f, i, j, k, p"),
        ({"lens": "w"}, "next and previous channel"),
        ({"lens": "1"}, "anomaly, of that group"),
        ({"lens": "lm"}, "one lower-case letter"),
        ({"lens": "L"}, "one lower-case letter"),
        ({"lens": 7}, "one lower-case letter"),
        ("lens", "ui.kinds is 'lens'"),
        ({7: "l"}, "7 is no name"),
        ({"": "l"}, "'' is no name of a kind"),
        ({"x" * 61: "l"}, "no name of a kind"),
        ({"a\nb": "l"}, "take 'a b' instead"),
    ],
)
def test_kinds_that_are_refused(kinds, message):
    with pytest.raises(ConfigError, match=message):
        read_kinds(kinds)
    assert read_kinds({"lens": "l", "merger": "e"}) == {"lens": "l", "merger": "e"}
    assert read_kinds(None) == {}


def test_a_key_follows_its_group_when_that_is_renamed(service):
    assert [group.name for group in service.groups.all()] == ["old", "lens"]
    service.groups.rename(1, "arc")
    assert service.groups.keys == {"arc": "l"}
    service.groups.bind({"arc": "e"})
    assert len(service.groups.all()) == 2


@on_page
async def test_the_page_shows_the_keys_of_kinds(page, service):
    assert page.gallery._props["kinds"] == {"l": 1}
    await page.sees("0 images · key l")
    page.send("help")
    await page.sees("anomaly, lens")
    page.send("label", ids=page.ids[:1], label="anomaly", group=1)
    await page.sees("1 image · key l")
    assert service.labels == {page.ids[0]: Label.ANOMALY}
