import io
import logging

import pytest
from rich.console import Console

import anomalymatch.terminal as module
from anomalymatch.terminal import cell, print_table


@pytest.fixture
def printed(monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(module, "console", Console(file=screen, width=60, force_terminal=False))
    return lambda: [line.rstrip() for line in screen.getvalue().splitlines() if line.strip()]


@pytest.mark.parametrize(
    ("value", "said"),
    [(0.12345, "0.123"), (float("nan"), "-"), (3, "3"), (12_345, "12345"), (None, ""), ("", ""), ("[red]", "[red]")],
)
def test_cells(value, said):
    assert cell(value) == said


HOSTILE = "[/bold] \x1b[2J\x1b]0;owned\x07 a\nb"


@pytest.mark.parametrize("is_terminal", [False, True])
def test_ids_do_not_steer_the_terminal(monkeypatch, is_terminal):
    screen = io.StringIO()
    monkeypatch.setattr(
        module, "console", Console(file=screen, width=200, force_terminal=is_terminal, color_system=None)
    )
    print_table([{HOSTILE: HOSTILE, "score": 0.5}], left=[HOSTILE], title=HOSTILE)
    with pytest.raises(SystemExit):
        module.fail(HOSTILE)
    with pytest.raises(SystemExit):
        module.stop(HOSTILE)
    before = logging.root.handlers[:], logging.root.level
    try:
        module.set_up_logging("info")
        logging.getLogger("anomalymatch.x").info("image %s, %r, %d of %s", HOSTILE, HOSTILE, 3, [HOSTILE])
        logging.getLogger("anomalymatch.x").warning("failed: %s", ValueError(HOSTILE))
        try:
            raise ValueError(HOSTILE)
        except ValueError:
            logging.getLogger("anomalymatch.x").exception("traceback")
    finally:
        logging.root.handlers[:], level = before
        logging.root.setLevel(level)
    shown = screen.getvalue()
    assert shown.replace("\n", "").isprintable()
    lines = shown.splitlines()
    broken = [line.strip() for line in lines if line.strip().startswith("b")]
    assert broken == ["b"], "only in the traceback, which is a text of its own"
    assert sum("[/bold] ?[2J?]0;owned?" in line for line in lines) >= 6
    assert any("3 of" in line for line in lines)


def test_columns_can_be_chosen_and_named(printed):
    rows = [{"cycle": 1, "ap": 0.5, "hidden": 7}, {"cycle": 10, "ap": float("nan")}, {"cycle": 2}]
    print_table(rows, {"cycle": "cycle", "ap": "AP"}, title="[bold]: two runs")
    title, heading, rule, *lines = printed()
    assert title == "[bold]: two runs"
    assert heading.split() == ["cycle", "AP"]
    assert set(rule.strip()) == {"─"}
    assert [line.split() for line in lines] == [["1", "0.500"], ["10", "-"], ["2"]]
    assert lines[0].index("1") == lines[1].index("0")  # aligned to the right


def test_without_columns_the_first_row_names_them(printed):
    print_table([])
    print_table([{"id": "[b]x", "score": 0.25}, {"id": "longer/name", "score": 1.0}], left=["id"])
    heading, _, *lines = printed()
    assert heading.split() == ["id", "score"]
    assert [line.split() for line in lines] == [["[b]x", "0.250"], ["longer/name", "1.000"]]
    assert lines[0].index("[") == lines[1].index("l")
