"""Terminal output of the commands: log lines, tables, errors and the message after Ctrl-C."""

import copy
import logging
import math
import os
import sys
from collections.abc import Collection, Mapping, Sequence
from typing import NoReturn

from rich.box import SIMPLE
from rich.console import Console
from rich.logging import RichHandler
from rich.table import Table
from rich.text import Text

from anomalymatch.checks import check_choice
from anomalymatch.text import printable

console = Console(stderr=True)
LEVELS = ("debug", "info", "warning", "error")
NOISY = ("pytorch_lightning", "httpx", "urllib3", "wandb", "matplotlib", "PIL", "huggingface_hub")


def set_up_logging(level: str) -> None:
    """Send log lines to the terminal; noisy libraries log errors only.

    Raises:
        ConfigError: if `level` is unknown.
    """
    check_choice("log_level", level.lower(), LEVELS)
    handler = RichHandler(console=console, show_path=False, log_time_format="[%X]")
    handler.setFormatter(PlainFormatter("%(message)s"))
    handler.addFilter(lambda record: record.name.split(".")[0] not in NOISY or record.levelno >= logging.ERROR)
    logging.basicConfig(level=level.upper(), format="%(message)s", handlers=[handler], force=True)


class PlainFormatter(logging.Formatter):
    """Formatter of log lines without control characters: ids and file names must not steer the terminal."""

    def format(self, record: logging.LogRecord) -> str:
        """Format a record; its arguments fill one line."""
        plain = copy.copy(record)
        if isinstance(record.args, tuple):  # a line end in an id must not begin a log line
            plain.args = tuple(_in_one_line(arg) for arg in record.args)
        return "\n".join(map(printable, super().format(plain).expandtabs().split("\n")))


def _in_one_line(value: object) -> object:
    return " ".join(str(value).splitlines()) if isinstance(value, str | os.PathLike | BaseException) else value


def fail(message: str) -> NoReturn:
    """Print an error line and exit with code 1."""
    line = printable(" ".join(message.split()))
    console.print(Text.assemble(("error:", "bold red"), f" {line}"), soft_wrap=True, highlight=False)
    sys.exit(1)


def stop(message: str) -> NoReturn:
    """Print a line and exit with the code of Ctrl-C."""
    console.print(f"Stopped. {printable(message)}", soft_wrap=True, highlight=False, markup=False)
    sys.exit(130)


def print_table(
    rows: Sequence[Mapping[str, object]],
    columns: Mapping[str, str] | None = None,
    *,
    left: Collection[str] = (),
    title: str = "",
) -> None:
    """Print rows as a table, with NaN as a dash and without markup.

    Args:
        rows: cells by column; None and missing cells are empty.
        columns: heading of each column, in order; None takes the keys of the first row.
        left: columns that are aligned to the left, such as ids; the others are aligned to the right.
        title: line above the table.
    """
    headings = columns if columns is not None else {key: key for key in (rows[0] if rows else ())}
    table = Table(header_style="bold", box=SIMPLE, padding=0)
    for key, heading in headings.items():
        table.add_column(Text(printable(heading)), justify="left" if key in left else "right")
    for row in rows:
        table.add_row(*(Text(printable(cell(row.get(key)))) for key in headings))
    if title:
        console.print(Text(printable(title)), soft_wrap=True)
    console.print(table)


def cell(value: object) -> str:
    """Format a value for a table: floats with three decimals, NaN as a dash, None as nothing."""
    if value is None:
        return ""
    if not isinstance(value, float):
        return str(value)
    return "-" if math.isnan(value) else f"{value:.3f}"
