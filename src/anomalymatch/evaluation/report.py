"""Report of a run as one self-contained HTML file."""

import base64
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image, UnidentifiedImageError

from anomalymatch.errors import StorageError
from anomalymatch.evaluation.metrics import MEASURES
from anomalymatch.files import write_text

Value = float | int | str

UNDEFINED, MINUS = "\N{EN DASH}", "\N{MINUS SIGN}"
POOL, HELD_OUT = "Unlabelled images of the pool", "Held-out images"
"""Titles of the tables of metrics."""
KEY_COLUMNS = ("auroc", "ap", "precision_at_1pct", "recall_at_1pct", "discovery_yield", "found", "anomalies_found")
"""Metrics shown large at the top, in this order.

Their held-out values are preferred: found anomalies leave the pool, so its metrics fall as a search succeeds.
"""
COLUMN_NAMES = {
    "auroc": "AUROC",
    "ap": "AP",
    "auprc": "AUPRC",
    "precision_at_0_1pct": "Precision top\N{NO-BREAK SPACE}0.1\N{NO-BREAK SPACE}%",
    "recall_at_0_1pct": "Recall top\N{NO-BREAK SPACE}0.1\N{NO-BREAK SPACE}%",
    "precision_at_1pct": "Precision top\N{NO-BREAK SPACE}1\N{NO-BREAK SPACE}%",
    "recall_at_1pct": "Recall top\N{NO-BREAK SPACE}1\N{NO-BREAK SPACE}%",
    "heldout": "Held\N{NON-BREAKING HYPHEN}out",
}


@dataclass(frozen=True, slots=True)
class ReportFigure:
    """Picture of a report.

    Attributes:
        title: heading, and alternative text.
        caption: description; may be empty.
        path: a PNG file.
        kind: `plot` is a drawing on white: half the page wide, inverted (hues kept) on a dark page. `image` contains
            photographs, such as a contact sheet: full width, colours unchanged.
    """

    title: str
    caption: str
    path: Path
    kind: Literal["plot", "image"] = "image"


@dataclass(frozen=True, slots=True)
class Report:
    """Contents of a report, all as plain text, which is escaped when the report is written.

    Attributes:
        title: name of the run.
        subtitle: one line below the title; may be empty.
        facts: value by name, such as dataset, algorithm, labels, images, rejects, time.
        metrics: one row per cycle; the columns are the union of the keys, and the first one names the row.
        figures: pictures, in order.
        notes: warnings and remarks, such as the reason why a metric is undefined.
        config: composed configuration as YAML; may be empty.
        command: command that repeats the run; may be empty.
        details: text below the large number of a metric, by its key, such as an interval.
        cycles: show the changes between the rows of the metrics, because they are consecutive cycles.
    """

    title: str
    subtitle: str = ""
    facts: Mapping[str, str] = field(default_factory=dict)
    metrics: Sequence[Mapping[str, Value]] = ()
    figures: Sequence[ReportFigure] = ()
    notes: Sequence[str] = ()
    config: str = ""
    command: str = ""
    details: Mapping[str, str] = field(default_factory=dict)
    cycles: bool = True


class _Cell(NamedTuple):
    text: str
    delta: str = ""
    undefined: bool = False


class _KeyNumber(NamedTuple):
    name: str
    cell: _Cell
    detail: str


class _Table(NamedTuple):
    title: str
    columns: list[str]
    rows: list[list[_Cell]]


class _Picture(NamedTuple):
    title: str
    caption: str
    kind: str
    data: str
    width: int
    height: int


def write_report(path: Path, report: Report) -> None:
    """Write a report as one HTML file with embedded pictures, without scripts or external resources.

    Args:
        path: the file, written atomically.
        report: contents.

    Raises:
        StorageError: if a figure is missing or not a PNG file, or `path` cannot be written.
    """
    html = render_html(
        "report.html.j2",
        report=report,
        tables=list(_tables(report.metrics, changes=report.cycles)),
        key_numbers=_key_numbers(report.metrics, report.details) if report.cycles else [],
        pictures=[_picture(figure) for figure in report.figures],
    )
    write_text(path, html)


def render_html(template: str, **values: object) -> str:
    """Render a template of this package; the values are escaped."""
    loader = PackageLoader("anomalymatch.evaluation", "")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template(template).render(**values)


def column_name(key: str) -> str:
    """Convert a key of the metrics to a column heading: `heldout_ap` gives `Held-out AP`."""
    if key in COLUMN_NAMES:
        return COLUMN_NAMES[key]
    for known, name in COLUMN_NAMES.items():
        if key.endswith(f"_{known}"):
            prefix = column_name(key.removesuffix(f"_{known}"))
            return f"{prefix} {name if name.isupper() else name.lower()}"
    text = key.replace("_", " ").strip()
    return text[:1].upper() + text[1:]


def format_value(value: Value) -> str:
    """Format a value: integers with thousands separators, floats with about three digits, NaN as a dash."""
    if isinstance(value, str):
        return value
    if isinstance(value, int):
        return _minus(f"{value:,}")
    if math.isnan(value):
        return UNDEFINED
    if math.isinf(value):
        return "∞" if value > 0 else f"{MINUS}∞"
    size = abs(value)
    if size != 0 and (size < 0.001 or size >= 1e7):
        return _minus(f"{value:.2e}")
    digits = 3 if size < 10 else 1 if size < 1000 else 0
    return _minus(f"{value:,.{digits}f}")


def _tables(metrics: Sequence[Mapping[str, Value]], *, changes: bool) -> Iterator[_Table]:
    """Divide the metrics of cycles into tables that fit the page, each with the first column; others into none."""
    first, *others = list(dict.fromkeys(key for row in metrics for key in row)) or [""]
    if not first:
        return
    groups: dict[str, list[str]] = {"": [], POOL: [], HELD_OUT: []}
    for key in others:
        measure = key.removeprefix("probe_").removeprefix("heldout_") in MEASURES
        groups[(HELD_OUT if "heldout_" in key else POOL if measure else "") if changes else ""].append(key)
    for title, keys in groups.items():
        if keys or (not title and not others):
            names = [column_name(key.replace("heldout_", "")) for key in (first, *keys)]
            yield _Table(title, names, list(_rows(metrics, [first, *keys], changes=changes)))


def _rows(metrics: Sequence[Mapping[str, Value]], columns: Sequence[str], *, changes: bool) -> Iterator[list[_Cell]]:
    before: Mapping[str, Value] = {}
    for row in metrics:
        yield [_cell(row.get(column, math.nan), before.get(column)) for column in columns]
        before = row if changes else {}


def _cell(value: Value, before: Value | None) -> _Cell:
    text = format_value(value)
    return _Cell(text, _delta(value, before), text == UNDEFINED)


def _delta(value: Value, before: Value | None) -> str:
    """Format the change since the previous cycle, for floats only: counts always grow."""
    if not isinstance(value, float) or not isinstance(before, float) or not math.isfinite(value - before):
        return ""
    text = format_value(abs(value - before))
    if not text.strip("0.,"):
        return "±0"
    return f"{'+' if value > before else MINUS}{text}"


def _key_numbers(metrics: Sequence[Mapping[str, Value]], details: Mapping[str, str]) -> list[_KeyNumber]:
    """Return the key metrics of the last cycle, with the change since the first one."""
    if not metrics:
        return []
    first, last = metrics[0], metrics[-1]
    before = first if len(metrics) > 1 else {}
    held_out = {key for key in KEY_COLUMNS if not math.isnan(float(last.get(f"heldout_{key}", math.nan)))}
    keys = (f"heldout_{key}" if key in held_out else key for key in KEY_COLUMNS if key in last)
    return [_KeyNumber(column_name(key), _cell(last[key], before.get(key)), details.get(key, "")) for key in keys]


def _picture(figure: ReportFigure) -> _Picture:
    try:
        with Image.open(figure.path, formats=["PNG"]) as picture:
            width, height = picture.size
        data = base64.b64encode(figure.path.read_bytes()).decode("ascii")
    except UnidentifiedImageError as error:
        raise StorageError(f"the figure {figure.path} is not a PNG file") from error
    except OSError as error:
        raise StorageError(f"cannot read the figure {figure.path}: {error.strerror}") from error
    return _Picture(figure.title, figure.caption, figure.kind, data, width, height)


def _minus(number: str) -> str:
    return number.replace("-", MINUS)
