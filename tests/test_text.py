import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anomalymatch.text import printable, reason, safe_name


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


def test_default_and_limit():
    assert safe_name("/", default="run") == "run"
    assert safe_name("abcdef", limit=3) == "abc"


@given(st.text())
def test_a_safe_name_is_safe_and_stays_as_it_is(text):
    name = safe_name(text)
    assert re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,59}|[A-Za-z0-9_-]{1,60}", name)
    assert name[0] not in ".-"
    assert safe_name(name) == name


def test_invisible_characters_are_replaced():
    assert printable("a\nb\x00c\u202ed\u200be é") == "a?b?c?d?e é"
    assert printable("a\nb", " ") == "a b"
    assert printable("a\nb", "") == "ab"


def test_a_long_text_ends_in_an_ellipsis():
    assert printable("abcde", limit=5) == "abcde"
    assert printable("abcdef", limit=5) == "abcd…"
    assert printable("x" * 10**6, limit=2) == "x…"


def test_the_reason_of_an_error_is_one_line():
    assert reason(FileNotFoundError(2, "No such file or directory", "x")) == "No such file or directory"
    assert reason(ValueError(" bad header.\nline 2")) == "bad header"
    assert reason(ValueError()) == "ValueError"
