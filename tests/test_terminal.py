import io

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
