"""Run the tutorials as a reader does, and compare what they print with what their pages show."""

import json
from importlib import import_module

import pytest
import tutorials

from anomalymatch.__main__ import COMMANDS
from anomalymatch.terminal import console

PAGES = tutorials.pages()


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Rendered galaxies and their features, which the tutorials share."""
    return tmp_path_factory.mktemp("cache")


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=[page.stem for page in PAGES])
def test_a_tutorial_prints_what_its_page_shows(page, cache, call_main, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ANOMALYMATCH_CACHE", str(cache))
    monkeypatch.setattr(console, "width", 300)  # a log line is not wrapped, however long the path is
    monkeypatch.setattr("anomalymatch.ui.web.app.serve", lambda service, site, **options: label_by_eye(service))

    def command(name, *words):
        page = ["ui.port=0", "ui.show=false"] if name == "label" else []
        outcome = call_main(import_module(COMMANDS[name][0]).main, *words, *page)
        assert outcome.code == 0, outcome.err
        return outcome.err + outcome.out if name != "label" else ""

    results = list(tutorials.run_page(page, command))
    assert len(results) >= 5
    found = {block.code: tutorials.differences(block.shown, out) for block, out in results if block.shown is not None}
    assert {code: lines for code, lines in found.items() if lines} == {}


def label_by_eye(service):
    """Label on the page's service as the reader of the tutorial does, and find that the order follows."""
    from anomalymatch.types import Label
    from anomalymatch.ui import Query

    service.preparation.wait()
    odd = tutorials.odd_ones()
    for count in tutorials.LABELS:
        tiles = service.page(Query(size=count)).tiles
        for tile in tiles:
            service.label([tile.id], Label.ANOMALY if tile.id in odd else Label.NORMAL, "ada")
        service.rerank()
    top = [tile.id for tile in service.page(Query(size=20)).tiles]
    assert sum(id_ in odd for id_ in top) > 3


def test_the_comparison_allows_other_times_and_small_differences_only():
    table = " cycle   AP    s\n ──────────\n     1   0.500   2.0\nReport: r\n"
    assert tutorials.differences(table, table.replace("2.0", "9.0").replace("0.500", "0.510")) == []
    assert tutorials.differences(table, table.replace("0.500", "0.700")) != []
    assert tutorials.differences("found 20 of 40", "found 21 of 40") == []  # another machine may swap two images
    assert tutorials.differences("found 20 of 40", "found 24 of 40") != []
    assert tutorials.differences("3 demo-000001 0.9", "3 demo-000002 0.9") == []
    assert tutorials.differences("3 demo-000001 0.9", "3 demo-000002 0.7") != []
    assert tutorials.differences("demo-000001", "demo-000002 demo-000003") != []
    log = (
        "[10:00:01] INFO     Report  \n           INFO     Done\n[10:00:09] INFO     Scoring: 5/10, 4.5 images/s, 1 s\n"
    )
    assert tutorials.tidy(log) == "Report\nDone\n"


def test_a_tutorial_becomes_a_notebook(tmp_path):
    tutorials.write_notebooks(tmp_path)
    for page in PAGES:
        book = json.loads((tmp_path / f"{page.stem}.ipynb").read_text(encoding="utf-8"))
        code = ["".join(cell["source"]) for cell in book["cells"] if cell["cell_type"] == "code"]
        assert len(code) == len(tutorials.blocks(page.read_text(encoding="utf-8")))
        assert not any(line.startswith("anomalymatch") for cell in code for line in cell.splitlines())
        assert "```" not in "".join("".join(cell["source"]) for cell in book["cells"])
