"""The report of a run: one HTML file that holds everything, for the browser, the printer and the archive."""

import base64
import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Literal

from jinja2 import Environment, StrictUndefined

from anomalymatch.errors import StorageError
from anomalymatch.files import write_text

Value = float | int | str

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
UNDEFINED, MINUS = "\N{EN DASH}", "\N{MINUS SIGN}"
KEY_COLUMNS = ("auroc", "ap", "precision_at_1pct", "recall_at_1pct", "discovery_yield", "found", "anomalies_found")
"""Columns shown large at the top, in this order, of those that the metrics have.

Of what is held out where there is such: what was found leaves the rest, whose measures fall as a search succeeds.
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
    """One picture of a report.

    Attributes:
        title: heading, and the text for those who cannot see the picture.
        caption: what to see in it; may be empty.
        path: a PNG file.
        kind: `plot` is a drawing on white: half the page wide, and inverted (hues kept) on a dark page. `image` shows
            photographs, such as a contact sheet: full width, colours untouched.
    """

    title: str
    caption: str
    path: Path
    kind: Literal["plot", "image"] = "image"


@dataclass(frozen=True, slots=True)
class Report:
    """What a report says; every text is plain text, escaped when it is written.

    Attributes:
        title: name of the run.
        subtitle: one line below it; may be empty.
        facts: name -> value, such as dataset, algorithm, labels, images, rejects, time.
        metrics: one row per cycle; the columns are the union of the keys, in order of appearance, and the first one
            names the row.
        figures: pictures in order of appearance.
        notes: warnings and remarks, such as why a metric is undefined.
        config: the composed configuration as YAML; may be empty.
        command: the command that makes the run again; may be empty.
        cycles: whether the rows of the metrics are cycles, one after the other, so that changes between them are shown.
    """

    title: str
    subtitle: str = ""
    facts: Mapping[str, str] = field(default_factory=dict)
    metrics: Sequence[Mapping[str, Value]] = ()
    figures: Sequence[ReportFigure] = ()
    notes: Sequence[str] = ()
    config: str = ""
    command: str = ""
    cycles: bool = True


@dataclass(frozen=True, slots=True)
class _Cell:
    text: str
    delta: str = ""
    undefined: bool = False


@dataclass(frozen=True, slots=True)
class _KeyNumber:
    name: str
    cell: _Cell


@dataclass(frozen=True, slots=True)
class _Picture:
    title: str
    caption: str
    kind: str
    data: str
    width: int
    height: int


def write_report(path: Path, report: Report) -> None:
    """Write `report` as one self-contained HTML file: pictures inside, no script, nothing loaded from a network.

    Args:
        path: the file to write, whole or not at all.
        report: what to say.

    Raises:
        StorageError: if a figure is missing or no PNG file, or `path` cannot be written.
    """
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(resources.files(__package__).joinpath("report.html.j2").read_text("utf-8"))
    columns = list(dict.fromkeys(key for row in report.metrics for key in row))
    html = template.render(
        report=report,
        columns=[column_name(column) for column in columns],
        rows=list(_rows(report.metrics, columns, changes=report.cycles)),
        key_numbers=_key_numbers(report.metrics) if report.cycles else [],
        pictures=[_picture(figure) for figure in report.figures],
    )
    write_text(path, html)


def column_name(key: str) -> str:
    """Return the heading for a key of the metrics: `heldout_ap` gives `Held-out AP`."""
    if key in COLUMN_NAMES:
        return COLUMN_NAMES[key]
    for known, name in COLUMN_NAMES.items():
        if key.endswith(f"_{known}"):
            prefix = column_name(key.removesuffix(f"_{known}"))
            return f"{prefix} {name if name.isupper() else name.lower()}"
    text = key.replace("_", " ").strip()
    return text[:1].upper() + text[1:]


def format_value(value: Value) -> str:
    """Format for reading: whole numbers with thousands separators, others to about three digits, NaN as a dash."""
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


def _rows(metrics: Sequence[Mapping[str, Value]], columns: Sequence[str], *, changes: bool) -> Iterator[list[_Cell]]:
    before: Mapping[str, Value] = {}
    for row in metrics:
        yield [_cell(row.get(column, math.nan), before.get(column)) for column in columns]
        before = row if changes else {}


def _cell(value: Value, before: Value | None) -> _Cell:
    text = format_value(value)
    return _Cell(text, _delta(value, before), text == UNDEFINED)


def _delta(value: Value, before: Value | None) -> str:
    """Return the change since the cycle before, for measures alone: counts only ever grow, and that says little."""
    if not isinstance(value, float) or not isinstance(before, float) or not math.isfinite(value - before):
        return ""
    text = format_value(abs(value - before))
    if not text.strip("0.,"):
        return "±0"
    return f"{'+' if value > before else MINUS}{text}"


def _key_numbers(metrics: Sequence[Mapping[str, Value]]) -> list[_KeyNumber]:
    """Take the last cycle's key columns, with the change since the first cycle."""
    if not metrics:
        return []
    first, last = metrics[0], metrics[-1]
    before = first if len(metrics) > 1 else {}
    held_out = {key for key in KEY_COLUMNS if not math.isnan(float(last.get(f"heldout_{key}", math.nan)))}
    keys = (f"heldout_{key}" if key in held_out else key for key in KEY_COLUMNS if key in last)
    return [_KeyNumber(column_name(key), _cell(last[key], before.get(key))) for key in keys]


def _picture(figure: ReportFigure) -> _Picture:
    try:
        content = figure.path.read_bytes()
    except OSError as error:
        raise StorageError(f"cannot read the figure {figure.path}: {error.strerror}") from error
    if content[:8] != PNG_SIGNATURE or len(content) < 24:
        raise StorageError(f"the figure {figure.path} is no PNG file")
    # A PNG begins with its header chunk: width and height stand at bytes 16 to 24.
    width, height = struct.unpack(">II", content[16:24])
    data = base64.b64encode(content).decode("ascii")
    return _Picture(figure.title, figure.caption, figure.kind, data, width, height)


def _minus(number: str) -> str:
    return number.replace("-", MINUS)
