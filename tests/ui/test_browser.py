"""Tests of the page in a real browser on a real server, with galaxies if available, otherwise the demo."""

import os
import re
import signal
from pathlib import Path
from typing import ClassVar

import pytest
from browser import running

from anomalymatch.ui import FirstOrder

pytestmark = [pytest.mark.ui, pytest.mark.slow, pytest.mark.timeout(1800)]

GALAXIES = ["dataset=galaxyzoo1", "algorithm=probe", "logger=none"]
LENSES = [  # without the galaxies; with a real model, since random features find nothing
    *("dataset=demo", "dataset.source.count=600", "dataset.source.size=64", "dataset.image_size=64"),
    *("dataset.source.rare_fraction=0.05", "algorithm=probe", "inference.workers=1", "logger=none"),
]


@pytest.fixture(scope="module")
def archive(cache_word):
    """Overrides of the command, the class of each image, and the rare class."""
    from anomalymatch.build_images import build_source
    from anomalymatch.config import compose

    given = os.environ.get("ANOMALYMATCH_DATA")
    are_there = given is not None and (Path(given) / "galaxyzoo1").is_dir()
    words, rare = (GALAXIES, "merger") if are_there else ([*LENSES, cache_word], "lens_arc")
    return words, dict(build_source(compose(*words, name="label")).truth), rare


@pytest.fixture(scope="module")
def galaxies(archive, tmp_path_factory):
    """Command on the images of `archive`; each test continues the search of the one before."""
    with running(tmp_path_factory.mktemp("galaxies"), *archive[0]) as command:
        yield command


def judge(page, truth, rare, count):
    """Label the images under the cursor correctly, one after the other; return the labels."""
    page.switch("follow", False)
    labels = {}
    for _ in range(count):
        is_rare = truth[page.cursor] == rare
        id_ = page.label("a" if is_rare else "n", "anomaly" if is_rare else "normal")
        labels[id_] = "anomaly" if is_rare else "normal"
    return labels


class TestSearch:
    """One search, from the first label to the export after a crash."""

    labels: ClassVar[dict[str, str]] = {}

    def test_search_by_keyboard(self, galaxies, archive, opened):
        _, truth, rare = archive
        page = opened(galaxies)
        assert FirstOrder.MIXED in page.get("note").inner_text()
        labels = {}
        for _ in range(12):
            labels |= judge(page, truth, rare, 10)
            if sum(label == "anomaly" for label in labels.values()) >= 8:
                break
            page.rerank()
        found = sum(label == "anomaly" for label in labels.values())
        assert found / len(labels) > sum(name == rare for name in truth.values()) / len(truth), "no better than chance"
        page.until(lambda: sum(page.counts().values()) == len(labels), "the counts follow")
        assert page.count("anomaly") == found
        assert page.exported() == labels
        assert page.complaints == []
        self.labels.update(labels)

    def test_tiles_have_accessible_names(self, galaxies, opened):
        page = opened(galaxies)
        spoken = page.page.eval_on_selector_all(
            "[data-testid=tile]", "tiles => tiles.map(tile => tile.getAttribute('aria-label'))"
        )
        assert all(re.fullmatch(r"place \d+, score [01]\.\d\d, no label", words) for words in spoken)
        ranks = [int(re.search(r"\d+", words)[0]) for words in spoken]
        assert ranks == sorted(ranks)

    def test_the_ranking_follows_each_label(self, galaxies, archive, opened):
        _, truth, rare = archive
        page = opened(galaxies)
        page.switch("follow", True)
        id_ = page.cursor
        page.press("a" if truth[id_] == rare else "n")
        page.until(lambda: page.tile(id_).count() == 0, "the labelled image leaves the page")
        self.labels[id_] = "anomaly" if truth[id_] == rare else "normal"
        assert page.exported() == self.labels

    def test_a_range_gets_one_label(self, galaxies, opened):
        page = opened(galaxies)
        page.switch("follow", False)
        ids = page.ids[:4]
        page.press("Home", "Shift+ArrowRight", "Shift+ArrowRight", "Shift+ArrowRight")
        assert page.get("selection").inner_text() == "4 selected"
        page.press("u")
        page.until(lambda: page.counts()["unsure"] == 4, "four labels")
        assert {id_ for id_, label in page.exported().items() if label == "unsure"} == set(ids)
        page.press("z")
        page.until(lambda: page.counts()["unsure"] == 0, "one undo takes back all four")

    def test_labels_in_the_large_view(self, galaxies, opened):
        page = opened(galaxies)
        page.switch("follow", False)
        id_ = page.cursor
        page.press(" ")
        page.get("viewer").wait_for()
        full = page.get("full").first
        page.until(lambda: full.evaluate("image => image.naturalWidth") >= 32, "the picture is there")
        page.until(lambda: page.get("neighbour").count() > 0, "similar images are there")
        page.press("x")
        page.until(lambda: page.tile(id_).get_attribute("data-label") == "artefact", "the label is there")
        page.press("z")
        page.until(lambda: page.tile(id_).get_attribute("data-label") == "", "the label is undone")
        labelled = page.label("a", "anomaly")
        page.until(lambda: "no score" not in page.get("view-state").inner_text(), "there is a ranking")
        page.press("h")
        page.until(lambda: "/heat?" in (full.get_attribute("src") or ""), "the heat map is there")
        page.until(lambda: full.evaluate("image => image.naturalWidth") >= 32, "it is drawn")
        assert page.get("heat-legend").is_visible()
        page.press("h")
        page.until(lambda: "/full?" in (full.get_attribute("src") or ""), "the heat map is gone")
        page.press("z")
        page.until(lambda: page.tile(labelled).get_attribute("data-label") == "", "the label is undone")
        page.press("Escape")
        page.get("viewer").wait_for(state="detached")
        assert page.complaints == []

    def test_training(self, galaxies, opened):
        page = opened(galaxies)
        assert not page.get("mode").is_visible()
        page.press("t")
        page.get("train-yes").click()
        page.until(lambda: page.get("training-state").inner_text().startswith("Training"), "it begins")
        page.get("train-yes").wait_for(state="detached")
        before = page.cursor
        page.press("ArrowRight")  # the page works during the training
        assert page.cursor != before
        page.until(lambda: page.get("training-state").inner_text().startswith("Finished"), "it ends", 900)
        page.get("mode").wait_for()
        page.until(lambda: sum(page.counts().values()) == len(self.labels), "no label is lost")

    def test_labels_survive_a_crash(self, galaxies, archive, opened):
        _, truth, rare = archive
        page = opened(galaxies)
        self.labels.update(judge(page, truth, rare, 5))
        page.press(*"nnn")  # in progress during the crash: they may be stored or not
        galaxies.end(signal.SIGKILL)
        galaxies.start()
        again = opened(galaxies)
        again.until(lambda: sum(again.counts().values()) >= len(self.labels), "the labels are there")
        kept = again.exported()
        assert kept | self.labels == kept
        assert 0 <= len(kept) - len(self.labels) <= 3
        assert again.get("training-state").inner_text().startswith("Finished") or again.get("mode").is_visible()
        self.labels.update(kept)
        self.labels.update(judge(again, truth, rare, 1))
        assert again.exported() == self.labels


def test_digits_label_kinds(galaxies, opened):
    page = opened(galaxies)
    page.switch("follow", False)
    page.get("kind-name").fill("lenses")
    page.get("kind-name").press("Enter")
    page.get("group-0").wait_for()
    page.press("Escape")
    id_ = page.cursor
    page.press("9")  # no such group
    page.press("1")
    tile = page.tile(id_)
    page.until(lambda: tile.get_attribute("data-label") == "anomaly", "the image is labelled")
    assert tile.get_by_test_id("kind").inner_text() == "1"
    page.get("group-find-0").click()
    page.until(lambda: page.ids and id_ not in page.ids, "the unlabelled images, ranked for the kind")
    assert page.complaints == []


def test_on_a_phone_nothing_is_cut_off(galaxies, opened):
    page = opened(galaxies, viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    width = page.page.evaluate("document.documentElement.scrollWidth")
    assert width <= 390
    page.tile(page.cursor).tap()
    assert page.get("action-anomaly").is_visible()
