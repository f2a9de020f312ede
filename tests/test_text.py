import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anomalymatch.text import csv_cell, from_csv_cell, listed, printable, reason, safe_name


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("galaxies", "galaxies"),
        ("../../etc/passwd", "etc-passwd"),
        ("My galaxies (2026).zip", "My-galaxies-2026-zip"),
        (".hidden", "hidden"),
        ("", "images"),
        ("…", "images"),
        ("x" * 59 + "/y", "x" * 59),
    ],
)
def test_safe_names(text, name):
    assert safe_name(text) == name


@pytest.mark.parametrize(
    ("text", "cell"),
    [
        *(
            ("=1+1", "'=1+1"),
            ("+cmd|' /C calc'!A0", "'+cmd|' /C calc'!A0"),
            ("-2+3", "'-2+3"),
            ("@SUM(A1)", "'@SUM(A1)"),
        ),
        *(("\t=1", "'\t=1"), ("\r=1", "'\r=1"), ("\n=1", "'\n=1"), ("'=1", "''=1"), ("'-1", "''-1")),
        *((text, text) for text in ("", "a=1", "'", "'a", "-1", "+2.5", "-1e-5", "-.5", "-inf", "im-1.png")),
    ],
)
def test_cells_are_no_formulas(text, cell):
    assert csv_cell(text) == cell
    assert from_csv_cell(cell) == text


@given(st.text(st.sampled_from("'=+-@\t\r\n1a")))
def test_cells_are_read_as_they_were_written(text):
    assert from_csv_cell(csv_cell(text)) == text


@given(st.text())
def test_a_safe_name_is_safe_and_stays_as_it_is(text):
    name = safe_name(text)
    assert re.fullmatch(r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,58}[A-Za-z0-9_])?", name)
    assert safe_name(name) == name


@pytest.mark.parametrize(
    ("text", "options", "line"),
    [
        ("a\nb\x00c\u202ed\u200be é", {}, "a?b?c?d?e é"),
        ("a\nb", {"replacement": " "}, "a b"),
        ("a\nb", {"replacement": ""}, "ab"),
        ("abcde", {"limit": 5}, "abcde"),
        ("abcdef", {"limit": 5}, "abcd…"),
        ("x" * 10**6, {"limit": 2}, "x…"),
    ],
)
def test_invisible_characters_are_replaced_and_long_texts_cut(text, options, line):
    assert printable(text, **options) == line


def test_the_reason_of_an_error_is_one_line():
    assert reason(FileNotFoundError(2, "No such file or directory", "x")) == "No such file or directory"
    assert reason(ValueError(" bad header.\nline 2")) == "bad header"
    assert reason(ValueError()) == "ValueError"


def test_long_lists_are_cut():
    assert listed(["a", 2]) == "a, 2"
    assert listed([]) == "nothing"
    assert listed(range(1000), most=3) == "0, 1, 2 … (1,000 in all)"
