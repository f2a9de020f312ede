"""Progress bars on a terminal, and plain log lines elsewhere, with rate and remaining time."""

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib.util import find_spec
from typing import NamedTuple, Protocol, runtime_checkable

from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from anomalymatch.terminal import console
from anomalymatch.text import printable

logger = logging.getLogger(__name__)
PLAIN_INTERVAL_S = 10.0


@runtime_checkable
class Advance(Protocol):
    """Function that `progress` yields."""

    def __call__(self, n: int = 1, note: str = "") -> None:
        """Report that `n` more items are done, with an optional short note such as a loss."""
        ...


ShowProgress = Callable[[str, int], AbstractContextManager[Advance]]
"""Function that shows the progress of work, given its name and the number of items: `progress`, or one of a page."""


def ignore_progress(n: int = 1, note: str = "") -> None:
    """Ignore progress: an `Advance` for short work, or while another bar is shown."""


class CancelledError(Exception):
    """Work in the background was cancelled by `ProgressMeter.cancel`."""


class ProgressStatus(NamedTuple):
    """Progress at one moment: what is done, items per second and seconds left (NaN where unknown)."""

    description: str = ""
    done: int = 0
    total: int = 0
    rate: float = math.nan
    left: float = math.nan


class ProgressMeter:
    """Progress of work in the background, which other threads can read and cancel; `show` is a `ShowProgress`."""

    def __init__(self) -> None:
        self._description, self._done, self._total, self._start = "", 0, 0, 0.0
        self._is_cancelled = False

    @contextmanager
    def show(self, description: str, total: int) -> Iterator[Advance]:
        """Measure the progress of `total` items while the block runs; after `cancel`, a start or a step ends the work.

        Raises:
            CancelledError: after `cancel`, here or from the function that is yielded.
        """
        if self._is_cancelled:
            raise CancelledError
        self._description, self._done, self._total, self._start = description, 0, total, time.monotonic()

        def advance(n: int = 1, note: str = "") -> None:
            if self._is_cancelled:
                raise CancelledError
            self._done += n

        try:
            yield advance
        finally:
            self._description, self._done, self._total = "", 0, 0

    def status(self) -> ProgressStatus:
        """Return the progress; its `total` is 0 while nothing is measured."""
        done, seconds = self._done, time.monotonic() - self._start
        if not done or seconds <= 0:
            return ProgressStatus(self._description, done, self._total)
        rate = done / seconds
        return ProgressStatus(self._description, done, self._total, rate, (self._total - done) / rate)

    def cancel(self) -> None:
        """End the work at its next step."""
        self._is_cancelled = True


class _Rate(ProgressColumn):
    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{rate_text(speed)} {self.unit}/s" if speed else "", style="cyan")


def rate_text(rate: float) -> str:
    """Return a rate with two digits where it is below 1: a training step may take half a minute."""
    return f"{rate:,.1f}" if rate >= 1 else f"{rate:.2g}"


@contextmanager
def progress(description: str, total: int, unit: str = "images") -> Iterator[Advance]:
    """Show the progress of `total` items while the block runs.

    On a terminal, and in a notebook with ipywidgets, this is a bar with rate and remaining time; elsewhere a line every
    ten seconds: a log line, or a printed one in a program that has not set up logging.
    """
    if console.is_terminal or (console.is_jupyter and find_spec("ipywidgets") is not None):
        yield from _bar(description, total, unit)
    else:
        yield _plain(description, total, unit)


def _plain_column(name: str) -> TextColumn:
    return TextColumn(f"{{task.{name}}}", markup=False)


def _bar(description: str, total: int, unit: str) -> Iterator[Advance]:
    columns = (_plain_column("description"), BarColumn(), MofNCompleteColumn(), _Rate(unit), TimeRemainingColumn())
    with Progress(*columns, _plain_column("fields[note]"), console=console, transient=True) as bar:
        task = bar.add_task(printable(description), total=total, note="")

        def advance(n: int = 1, note: str = "") -> None:
            bar.update(task, advance=n, note=printable(note))

        yield advance


def _plain(description: str, total: int, unit: str) -> Advance:
    start = last = time.monotonic()
    done = 0
    report = logger.info if logging.getLogger().handlers else _print

    def advance(n: int = 1, note: str = "") -> None:
        nonlocal done, last
        done += n
        now = time.monotonic()
        if now - last < PLAIN_INTERVAL_S:
            return
        last = now
        rate = done / (now - start)
        left = (total - done) / rate if rate else float("inf")
        report("%s: %d/%d, %s %s/s, %.0f s left %s", description, done, total, rate_text(rate), unit, left, note)

    return advance


def _print(line: str, *values: object) -> None:
    console.print(line % values, highlight=False, markup=False, soft_wrap=True)
