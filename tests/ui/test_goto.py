from dataclasses import replace

import numpy as np
import pytest

from anomalymatch.errors import DataError
from anomalymatch.types import Label
from anomalymatch.ui.goto import Target, find_target
from anomalymatch.ui.views import Histogram, Query, Show
from anomalymatch.ui.web import charts
from anomalymatch.ui.web.histogram import brushed

NAMES = ["sky/NGC_0001.fits", "sky/NGC_0012.fits", "sky/M_31.jpg", "587722981742084096", "12", "#7", "a b.png"]
QUERY = Query(size=12, show=Show.ALL)


@pytest.fixture
def search(make_service, make_source):
    """Search of 40 images, the first of which have names that look like numbers, ranked as they lie."""
    ids = [*NAMES, *(f"im{i:03d}.png" for i in range(len(NAMES), 40))]
    return make_service(source=make_source(40, size=16, ids=ids, truth=None), trained=True)


@pytest.mark.parametrize(
    ("text", "target"),
    [
        *(("1", Target(page=0)), ("4", Target(page=3)), (" 2 ", Target(page=1))),
        *(("#1", Target(image=NAMES[0])), ("#13", Target(image="im012.png")), ("#40", Target(image="im039.png"))),
        *((name, Target(image=name)) for name in NAMES if name not in ("12", "#7")),
        *(("m_31.JPG", Target(image=NAMES[2])), ("M_31", Target(image=NAMES[2])), ("0001", Target(image=NAMES[0]))),
        *(("84096", Target(image=NAMES[3])), ("12.fits", Target(image=NAMES[1])), ("b", Target(image="a b.png"))),
    ],
)
def test_pages_ranks_and_images(search, text, target):
    assert find_target(search, QUERY, text) == target
    assert find_target(search, replace(QUERY, page=2, shift=5), text) == target


def test_ranks_are_places_in_the_order_of_the_query(search):
    ids = list(search.source.ids)
    search.label(ids[:3], Label.NORMAL, "ada")
    query = replace(QUERY, show=Show.UNLABELLED, high=0.9)
    found = search.found(query)
    for rank in (1, 12, 13, len(found)):
        assert find_target(search, query, f"#{rank}").image == found[rank - 1]
    assert find_target(search, query, NAMES[0]).image == NAMES[0], "also an image that is not shown"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        *(("#41", "no rank 41: 40 images"), ("#0", "no id ends in '#0'"), ("5", "there are 4 pages.*'5'")),
        *(("nothing", "no id ends in 'nothing'"), ("fits", "2 ids end in 'fits'.*NGC_0001"), ("0", "ids end in '0'")),
        *(("9" * 30, "no id"), ("x" * 9000 + "\x1b", "no id ends in 'x{59}…'")),
    ],
)
def test_an_impossible_one_is_one_sentence(search, text, words):
    with pytest.raises(DataError, match=words):
        find_target(search, QUERY, text)


@pytest.mark.parametrize(
    ("ends", "limits"),
    [
        ((0.1049, 0.9), (0.1, 0.9)),
        ((0.9, 0.1049), (0.1, 0.9)),
        ((-0.2, 1.5), (0.0, 1.0)),
        ((0.501, 0.504), None),
        ((1.2, 1.5), None),
    ],
)
def test_a_drag_over_the_histogram_is_a_range_of_scores(ends, limits):
    assert brushed(*ends) == limits
    if limits:
        Query(low=limits[0], high=limits[1])


@pytest.mark.parametrize(
    ("limits", "shaded"),
    [((0, 1), []), ((0.2, 1), [(0, 0.2)]), ((0.2, 0.7), [(0, 0.2), (0.7, 1)]), ((0, 0.7), [(0.7, 1)])],
)
def test_scores_outside_of_the_filter_are_shaded(limits, shaded):
    scores = Histogram(np.linspace(0, 1, 61), np.arange(60), {})
    figure = charts.histogram(scores, tuple(map(float, limits)))
    assert [(shape["x0"], shape["x1"]) for shape in figure["layout"]["shapes"]] == shaded
