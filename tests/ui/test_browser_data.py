"""Tests in a real browser with strange ids, labels files, a full disk, a token and a description."""

import os
import re
import resource
import subprocess
import sys

import pytest
from browser import running
from pictures import png
from tiny_clip import write_tiny_clip

from anomalymatch.ranking import Ranking
from anomalymatch.text import from_csv_cell

pytestmark = [pytest.mark.ui, pytest.mark.slow, pytest.mark.timeout(1800)]

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
