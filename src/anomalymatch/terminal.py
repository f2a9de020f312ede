"""Terminal output of the commands: log lines, tables, errors and the message after Ctrl-C."""

import copy
import logging
import math
import os
import select
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NoReturn, TextIO

from rich.box import SIMPLE
from rich.console import Console
from rich.logging import RichHandler
from rich.table import Table
from rich.text import Text

from anomalymatch.checks import check_choice
from anomalymatch.errors import AnomalyMatchError, describe_missing_package
from anomalymatch.text import printable


class Terminal(Console):
    """Console that stays quiet once its reader has closed the pipe; the command goes on."""

    def on_broken_pipe(self) -> None:
        """Send everything that follows nowhere."""
        self.quiet = True
        _discard(sys.stderr)


console = Terminal(stderr=True)
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


@contextmanager
def errors_in_a_line(*kinds: type[Exception], stopped: str) -> Iterator[None]:
    """Print an error of the user or the machine in one line and exit with 1; exit with 130 on Ctrl-C.

    A reader that closes the pipe of the output early (`| head`) is no error.

    Args:
        kinds: kinds of errors with a message for the user, besides those of this package.
        stopped: message after Ctrl-C.
    """
    users: tuple[type[Exception], ...] = (AnomalyMatchError, *kinds)
    try:
        yield
        sys.stdout.flush()
    except KeyboardInterrupt:
        stop(stopped)
    except users as error:
        fail(str(error))
    except ModuleNotFoundError as error:
        fail(describe_missing_package(error))
    except MemoryError as error:
        fail(f"the memory is full: use smaller batches or images ({error})")
    except OSError as error:
        if not isinstance(error, BrokenPipeError) or not _reader_left():
            fail(f"operating system error: {error}")
        _discard(sys.stdout)


def _reader_left() -> bool:
    """Tell whether the reader of the output has closed its pipe; other pipes, of worker processes, break as well."""
    if not hasattr(select, "poll"):  # Windows
        return True
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _discard(stream: TextIO) -> None:
    """Send what is written to a stream nowhere."""
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), stream.fileno())


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
