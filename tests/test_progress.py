import io
import logging
import re

import pytest
from rich.console import Console

from anomalymatch import progress as module
from anomalymatch.progress import Advance, progress


class Clock:
    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(module, "console", Console(file=io.StringIO(), force_terminal=False))
    return clock


def test_names_in_a_bar_are_no_markup(monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(module, "console", Console(file=screen, force_terminal=True, color_system=None, width=120))
    with progress("[/bold]\x1b]0;x\x07", 3) as advance:
        advance(note="[/red]\x1b[2J")
    assert "[/bold]?]0;x?" in screen.getvalue()
    assert not {"\x1b]0", "\x1b[2J"} & set(re.findall("\x1b.[02]J?", screen.getvalue()))


@pytest.mark.parametrize(
    ("total", "calls", "seconds", "images", "lines"),
    [
        (
            1000,
            25,
            1.0,
            20,
            ["200/1000, 20.0 images/s, 40 s left loss 0.5", "400/1000, 20.0 images/s, 30 s left loss 0.5"],
        ),
        (3, 3, 3.0, 1, []),
        (10, 1, 60.0, 0, ["0/10, 0 images/s, inf s left loss 0.5"]),
        (100, 1, 20.0, 1, ["1/100, 0.05 images/s, 1980 s left loss 0.5"]),
        (0, 1, 0.0, 0, []),
    ],
    ids=["one line every ten seconds", "short work is quiet", "nothing done", "slow", "no images"],
)
def test_log_lines_away_from_a_terminal(clock, caplog, total, calls, seconds, images, lines):
    caplog.set_level(logging.INFO, logger="anomalymatch.progress")
    with progress("Ranking", total) as advance:
        assert isinstance(advance, Advance)
        for _ in range(calls):
            clock.now += seconds
            advance(images, note="loss 0.5")
    assert [record.getMessage() for record in caplog.records] == [f"Ranking: {line}" for line in lines]


def test_program_without_logging_gets_printed_lines(clock, monkeypatch):
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    with progress("Ranking [x]", 100) as advance:
        clock.now += 20
        advance(40)
    assert module.console.file.getvalue() == "Ranking [x]: 40/100, 2.0 images/s, 30 s left \n"


@pytest.mark.parametrize("widgets", [True, False])
def test_notebook_has_a_bar_with_widgets_and_lines_without(clock, monkeypatch, caplog, widgets):
    caplog.set_level(logging.INFO, logger="anomalymatch.progress")
    monkeypatch.setattr(module.console, "is_jupyter", True)
    monkeypatch.setattr(module, "find_spec", lambda name: "found" if widgets else None)
    bars = []
    monkeypatch.setattr(module, "_bar", lambda *args: bars.append(args) or iter([lambda n=1, note="": None]))
    with progress("Ranking", 100) as advance:
        clock.now += 20
        advance(40)
    assert (len(bars), len(caplog.records)) == ((1, 0) if widgets else (0, 1))


def test_a_bar_on_a_terminal(monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(module, "console", Console(file=screen, force_terminal=True, width=120))
    with progress("Training", 4, unit="steps") as advance:
        advance(3, note="loss 0.25")
        assert isinstance(advance, Advance)
    assert all(part in screen.getvalue() for part in ("Training", "3/4", "loss 0.25"))
