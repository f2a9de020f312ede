"""Test of the page in a notebook: a process of its own, shown in a frame of another page of this machine."""

import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest

import anomalymatch as am
from anomalymatch.types import Label

pytestmark = [pytest.mark.ui, pytest.mark.slow, pytest.mark.timeout(600)]


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def notebook(tmp_path):
    """Folder and address of a server like that of a notebook."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield tmp_path, f"http://localhost:{server.server_port}"
        server.shutdown()


def test_a_notebook_shows_the_page_and_reads_its_labels(chromium, demo_words, notebook):
    folder, address = notebook
    page = am.label(*demo_words, folder=folder / "a run", height=700)
    try:
        assert page.labels == {}
        (folder / "notebook.html").write_text(f"<!DOCTYPE html>{page._repr_html_()}", encoding="utf-8")
        context = chromium.new_context(viewport={"width": 1200, "height": 800})
        tab = context.new_page()
        tab.goto(f"{address}/notebook.html")
        frame = tab.frame_locator("iframe")
        frame.locator("[data-testid=tile].am-cursor").wait_for(timeout=60_000)
        id_ = frame.locator("[data-testid=tile].am-cursor").get_attribute("data-id")
        frame.locator("[data-testid=action-normal]").click()
        frame.locator("[data-testid=tile][data-label=normal]").wait_for(timeout=60_000)
        assert page.labels == {id_: Label.NORMAL}
        context.close()
    finally:
        page.close()
    assert page.labels == {id_: Label.NORMAL}
    assert repr(page) == "LabelPage(closed)"
    assert (folder / "a run" / "labels.csv").exists()
    page.close()  # again


def test_a_wrong_word_is_told_in_one_sentence(tmp_path):
    with pytest.raises(am.AnomalyMatchError, match=r"data\.rooot") as caught:
        am.label("data.rooot=x", folder=tmp_path / "run")
    assert "Traceback" not in str(caught.value)
