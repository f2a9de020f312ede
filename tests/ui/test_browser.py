"""Tests of the page in a real browser on a real server, with galaxies if available, otherwise the demo."""

import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import pytest
from browser import running
from pictures import png
from tiny_clip import write_tiny_clip

from anomalymatch.ranking import Ranking
from anomalymatch.text import from_csv_cell
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


NAMES = [
    *("=1+1.png", "[/bold].png", "a\nb.png", "\x1b[2J.png", "$x_{$.png", "@x, y.png", "{{ 7 * 7 }}.png"),
    *("<img src=x onerror=document.title='run'>.png", "'; DROP TABLE events; --.png", "ü &amp; #?%2e.png"),
    *(f"{k}.png" for k in range(6)),
]


@pytest.fixture(scope="module")
def strange(demo_words, tmp_path_factory):
    """Command on images with strange names, in a folder with a strange name."""
    root = tmp_path_factory.mktemp("strange")
    for number, name in enumerate(NAMES):
        (path := root / "[b]x" / name).parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(15 * number, 32, 32))
    words = [word for word in demo_words if not word.startswith("dataset")]
    (root / "run").mkdir()
    os.symlink(root / "[b]x", root / "images")
    with running(root, "dataset=folder", "data.root=images", "dataset.image_size=32", *words) as command:
        yield command
    assert "\x1b" not in command.output()


class TestData:
    """Ids, labels files and the disk, as people and strangers give them."""

    def test_ids_are_data(self, strange, opened):
        page = opened(strange)
        assert set(page.ids) == set(NAMES)
        labels = {}
        for _ in NAMES:
            labels[page.label("a", "anomaly")] = "anomaly"
        assert labels.keys() == set(NAMES)
        page.press(" ")
        page.get("viewer").wait_for()
        assert page.get("view-id").inner_text() in {" ".join(name.split()) for name in NAMES}
        page.press("Escape")
        exported = page.exported()
        assert {from_csv_cell(id_): label for id_, label in exported.items()} == labels
        assert not any(id_.startswith(("=", "@")) for id_ in exported)
        assert "run" not in page.page.title()
        page.press(*"z" * len(NAMES))
        page.until(lambda: sum(page.counts().values()) == 0, "every label is undone")
        assert page.complaints == []

    def test_case_of_imported_labels_does_not_matter(self, strange, opened, tmp_path):
        page = opened(strange)
        (tmp_path / "labels.csv").write_text("Filename,LABEL\n'=1+1.png,Normal\n0.png, ARTEFACT\n")
        page.get("import-file").set_input_files(tmp_path / "labels.csv")
        page.page.get_by_text("2 labels imported.").wait_for()
        exported = page.exported()
        assert (exported["'=1+1.png"], exported["0.png"]) == ("normal", "artefact")

    def test_a_full_disk_is_told_as_such(self, strange, opened):
        page = opened(strange)
        before = page.exported()
        page.choose("show", "all")
        page.until(lambda: len(page.ids) == len(NAMES), "all images")
        process = strange.process.pid
        try:
            resource.prlimit(process, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
            page.press("u")
            page.page.get_by_text("All earlier labels are safe.").wait_for()
            assert "restore" not in page.page.inner_text("body")
        finally:
            resource.prlimit(process, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        assert page.exported() == before
        id_ = page.label("u", "unsure")
        assert {from_csv_cell(name) for name, label in page.exported().items() if label == "unsure"} == {id_}

    def test_a_second_page_on_the_same_run_is_refused(self, strange, opened):
        words = [f"resume={strange.folder / 'run'}", "ui.port=0", "ui.show=false"]
        command = [sys.executable, "-m", "anomalymatch.label", *words]
        second = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=strange.folder)
        assert second.returncode == 1
        assert "another labelling page is open" in second.stderr
        assert "Traceback" not in second.stderr
        assert opened(strange).ids


class TestToken:
    def test_a_page_on_the_network_needs_its_token(self, demo_words, tmp_path, opened, chromium):
        with running(tmp_path, *demo_words, "ui.host=0.0.0.0") as command:
            port, token = re.search(r":(\d+)/\?token=(\S+)", command.url).groups()
            command.url = f"http://127.0.0.1:{port}/"
            page = opened(command, path=f"?token={token}")
            assert page.page.url == command.url
            labels = {page.label("a", "anomaly"): "anomaly"}
            assert page.exported() == labels
            (cookie,) = page.page.context.cookies()
            assert (cookie["httpOnly"], cookie["sameSite"]) == (True, "Strict")
            stranger = chromium.new_context().new_page()
            assert stranger.goto(command.url).status == 401
            assert "needs a token" in stranger.inner_text("body")
            tried = [stranger.goto(f"{command.url}?token=guess{number}").status for number in range(11)]
            assert tried == [401] * 10 + [429]
            assert "try again in" in stranger.inner_text("body")
            page.page.reload()
            page.page.wait_for_selector("[data-testid=tile]")  # whoever is inside stays inside
            stranger.context.close()


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


def test_a_description_orders_the_page(demo_words, opened, tmp_path):
    pytest.importorskip("open_clip", reason='pip install "anomalymatch[text]"')
    words = [*demo_words, f"text.model={write_tiny_clip(tmp_path / 'clip')}"]
    with running(tmp_path, *words) as command:
        page = opened(command)
        field = page.page.get_by_label("describe what you look for", exact=True)
        field.press_sequentially("an unusual galaxy")  # its letters are keys of labels elsewhere
        field.press("Enter")
        page.until(lambda: "is ready" in page.get("description-state").inner_text(), "the order is ready")
        best = Ranking.read(tmp_path / "run" / "description.parquet").top(len(page.ids))
        page.until(lambda: page.ids == best, "the page shows the order")
        assert page.counts() == dict.fromkeys(page.counts(), 0)
        assert page.complaints == []
    with running(tmp_path, *words) as command:
        page = opened(command)
        assert page.page.get_by_label("describe what you look for", exact=True).input_value() == "an unusual galaxy"
        page.choose("sort", "by description")
        page.until(lambda: page.ids == best, "the same order after a restart")
        page.get("section-description").get_by_role("button", name="Clear").click()
        page.get("new-order").click()
        page.until(lambda: "Nothing is described" in page.get("note").inner_text(), "the description is removed")
