import io
import logging

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


def test_away_from_a_terminal_one_line_every_ten_seconds(clock, caplog):
    caplog.set_level(logging.INFO, logger="anomalymatch.progress")
    with progress("Ranking", 1000) as advance:
        assert isinstance(advance, Advance)
        for _ in range(25):
            clock.now += 1.0
            advance(20, note="loss 0.5")
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [
        "Ranking: 200/1000, 20.0 images/s, 40 s left loss 0.5",
        "Ranking: 400/1000, 20.0 images/s, 30 s left loss 0.5",
    ]


def test_what_ends_soon_stays_quiet(clock, caplog):
    caplog.set_level(logging.INFO, logger="anomalymatch.progress")
    with progress("Features", 3, unit="shards") as advance:
        for _ in range(3):
            clock.now += 3.0
            advance()
    assert caplog.records == []


def test_nothing_done_in_a_long_time_is_no_division_by_zero(clock, caplog):
    caplog.set_level(logging.INFO, logger="anomalymatch.progress")
    with progress("Ranking", 10) as advance:
        clock.now += 60.0
        advance(0)
    assert caplog.records[0].getMessage() == "Ranking: 0/10, 0.0 images/s, inf s left "


def test_a_bar_on_a_terminal(monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(module, "console", Console(file=screen, force_terminal=True, width=120))
    with progress("Training", 4, unit="steps") as advance:
        advance(3, note="loss 0.25")
        assert isinstance(advance, Advance)
    text = screen.getvalue()
    assert "Training" in text
    assert "3/4" in text
    assert "loss 0.25" in text


@pytest.mark.parametrize("terminal", [True, False])
def test_errors_pass_through(monkeypatch, terminal):
    monkeypatch.setattr(module, "console", Console(file=io.StringIO(), force_terminal=terminal))
    with pytest.raises(KeyError), progress("Ranking", 10):
        raise KeyError("stop")


def test_an_empty_task(clock, caplog):
    with caplog.at_level("INFO"), progress("Ranking", 0) as advance:
        advance(0)
    assert caplog.records == []
