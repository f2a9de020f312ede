import base64
import math
from html.parser import HTMLParser

import pytest
from PIL import Image

from anomalymatch.errors import StorageError
from anomalymatch.evaluation.report import Report, ReportFigure, column_name, format_value, write_report

VOID = {"meta", "img", "link", "br", "hr", "input"}
HOSTILE = '"><script>alert(1)</script>&amp;<img src=x onerror=alert(2)>'


class Page(HTMLParser):
    """Parsed page: tags and texts; checks that tags are closed in order."""

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.texts = [], [], []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style" and data.strip():
            self.texts.append(" ".join(data.split()))

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


@pytest.fixture
def figure(tmp_path):
    path = tmp_path / "roc.png"
    Image.new("RGB", (40, 30), "red").save(path)
    return path


def write(tmp_path, report):
    path = tmp_path / "out" / "report.html"
    write_report(path, report)
    html = path.read_text(encoding="utf-8")
    return html, Page(html)


def full_report(figure):
    return Report(
        title="Demo run",
        subtitle="four morphologies",
        facts={"Dataset": "demo", "Rejects": "3"},
        metrics=[
            {"cycle": 0, "auroc": 0.9, "ap": math.nan, "images": 10000},
            {"cycle": 1, "auroc": 0.95, "ap": 0.5, "images": 9980, "found": 15},
        ],
        figures=[ReportFigure("ROC", "one line", figure, "plot"), ReportFigure("Sheet", "", figure)],
        notes=["AP of cycle 0 is undefined"],
        config="seed: 42\nal:\n  cycles: 3\n",
        command="python -m anomalymatch.run dataset=demo",
    )


def test_a_full_report_says_everything(tmp_path, figure):
    _, page = write(tmp_path, full_report(figure))
    for text in ("Demo run", "four morphologies", "Dataset", "demo", "0.900", "0.950", "+0.050", "10,000", "15"):
        assert text in page.texts
    assert "+0.050 since the first cycle" in page.texts
    assert "AP of cycle 0 is undefined" in page.texts
    assert "seed: 42 al: cycles: 3" in page.texts
    assert "python -m anomalymatch.run dataset=demo" in page.texts
    assert "nan" not in " ".join(page.texts).lower()
    # AP of the first cycle, and found, which the first row lacks.
    assert page.texts.count("\N{EN DASH}") == 2

    scopes = [attrs["scope"] for attrs in page.all("th")]
    assert scopes == 2 * (["col"] * 3 + ["row"] * 2)  # counts, and metrics of the pool
    assert len(page.all("td")) == 2 * 4


def test_the_page_is_self_contained_and_accessible(tmp_path, figure):
    html, page = write(tmp_path, full_report(figure))
    assert "http://" not in html
    assert "https://" not in html
    assert not page.all("script")
    assert not page.all("link")
    pictures = page.all("img")
    assert [picture["alt"] for picture in pictures] == ["ROC", "Sheet"]
    assert (pictures[0]["width"], pictures[0]["height"]) == ("40", "30")
    assert base64.b64decode(pictures[0]["src"].removeprefix("data:image/png;base64,")) == figure.read_bytes()
    assert [attrs["class"] for attrs in page.all("figure")] == ["card plot", "card image"]
    assert page.all("html")[0]["lang"] == "en"
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert {attrs["href"].removeprefix("#") for attrs in page.all("a")} <= set(ids)
    assert "prefers-color-scheme: dark" in html
    assert "@media print" in html


def test_hostile_strings_stay_text(tmp_path, figure):
    report = Report(
        title=HOSTILE,
        subtitle=HOSTILE,
        facts={HOSTILE: HOSTILE},
        metrics=[{HOSTILE: HOSTILE, "ap": 0.5}],
        figures=[ReportFigure(HOSTILE, HOSTILE, figure)],
        notes=[HOSTILE],
        config=HOSTILE,
        command=HOSTILE,
    )
    html, page = write(tmp_path, report)
    assert not page.all("script")
    assert len(page.all("img")) == 1
    assert page.all("img")[0]["alt"] == HOSTILE
    assert page.texts.count(HOSTILE) >= 9
    assert "<script" not in html


def test_an_empty_report_is_a_page(tmp_path):
    _, page = write(tmp_path, Report(title="Nothing yet"))
    assert "Nothing yet" in page.texts
    assert not page.all("table")
    assert not page.all("a")


def test_key_numbers_prefer_held_out_metrics(tmp_path):
    rows = [
        {"cycle": 1, "ap": 0.4, "heldout_ap": 0.2, "found": 5},
        {"cycle": 2, "ap": 0.1, "heldout_ap": 0.7, "found": 30},
    ]
    _, page = write(tmp_path, Report(title="t", metrics=rows))
    changes = [text for text in page.texts if text.endswith("since the first cycle")]
    assert changes == ["+0.500 since the first cycle"]  # not that of the rest, which falls
    assert "0.700" in page.texts


def test_falling_metrics_have_a_minus_sign(tmp_path):
    _, page = write(tmp_path, Report(title="t", metrics=[{"cycle": 0, "ap": 0.9}, {"cycle": 1, "ap": 0.85}]))
    assert "\N{MINUS SIGN}0.050" in page.texts
    _, page = write(tmp_path, Report(title="t", metrics=[{"cycle": 0, "ap": 0.9}, {"cycle": 1, "ap": 0.9}]))
    assert "±0" in page.texts


def test_missing_or_broken_figures_are_named(tmp_path):
    broken = tmp_path / "broken.png"
    with pytest.raises(StorageError, match=r"cannot read the figure .*broken\.png: No such file"):
        write_report(tmp_path / "r.html", Report("t", figures=[ReportFigure("f", "", broken)]))
    broken.write_bytes(b"<svg>")
    with pytest.raises(StorageError, match=r"broken\.png is not a PNG file"):
        write_report(tmp_path / "r.html", Report("t", figures=[ReportFigure("f", "", broken)]))
    assert not (tmp_path / "r.html").exists()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (12345, "12,345"),
        (-3, "\N{MINUS SIGN}3"),
        (0.98765, "0.988"),
        (-0.5, "\N{MINUS SIGN}0.500"),
        (0.0, "0.000"),
        (83.234, "83.2"),
        (1234.5, "1,234"),
        (2.5e-5, "2.50e\N{MINUS SIGN}05"),
        (3e9, "3.00e+09"),
        (math.nan, "\N{EN DASH}"),
        (math.inf, "∞"),
        (-math.inf, "\N{MINUS SIGN}∞"),
        ("as is", "as is"),
    ],
)
def test_format_value(value, text):
    assert format_value(value) == text


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("auroc", "AUROC"),
        ("heldout_ap", "Held\N{NON-BREAKING HYPHEN}out AP"),
        ("anomalies_found", "Anomalies found"),
        ("probe_precision_at_1pct", "Probe precision top\N{NO-BREAK SPACE}1\N{NO-BREAK SPACE}%"),
        ("", ""),
    ],
)
def test_column_name(key, name):
    assert column_name(key) == name


def test_metrics_are_divided_into_tables_that_fit_the_page(tmp_path):
    keys = ("auroc", "ap", "heldout_ap", "heldout_anomalies", "probe_ap", "probe_heldout_ap", "seconds")
    report = Report(title="t", metrics=[{"cycle": 1} | dict.fromkeys(keys, 0.5)], details={"heldout_ap": "0.2 to 0.9"})
    _, page = write(tmp_path, report)
    titles = [attrs["aria-label"] for attrs in page.all("table")]
    assert titles == ["Metrics", "Unlabelled images of the pool", "Held\N{HYPHEN-MINUS}out images"]
    assert page.texts.count("Cycle") == 3
    assert "Probe AP" in page.texts
    assert "0.2 to 0.9" in page.texts
    write_report(tmp_path / "r.html", Report(title="t", metrics=[{"group": 1, "ap": 0.5}], cycles=False))
    assert (tmp_path / "r.html").read_text(encoding="utf-8").count("<table") == 1
