"""Conversion of text from users and files to safe file names and printable lines."""

import re
from collections.abc import Iterable

_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*([eE][+-]?\d+)?|\.\d+|inf|nan)")


def safe_name(text: str) -> str:
    """Convert text to a part of a file name, of at most 60 characters, that all operating systems accept."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", text).strip("-")[:60].rstrip("-") or "images"


def listed(names: Iterable[object], *, most: int = 12, none: str = "nothing") -> str:
    """Join names for a message: the first `most` of them, and the number of the rest."""
    shown = list(names)
    more = f" … ({len(shown):,} in all)" if len(shown) > most else ""
    return ", ".join(map(str, shown[:most])) + more or none


def printable(text: str, replacement: str = "?", *, limit: int | None = None) -> str:
    """Replace control characters, line ends and other invisible ones; texts beyond `limit` end in an ellipsis."""
    cut = text if limit is None else text[: limit + 1]  # the text may be very long
    line = "".join(character if character.isprintable() else replacement for character in cut)
    return line if limit is None or len(line) <= limit else f"{line[: limit - 1]}…"


def csv_cell(text: str) -> str:
    """Put an apostrophe before a text that a spreadsheet would take for a formula; numbers stay as they are.

    `from_csv_cell` removes it, so that an id is the same after writing and reading.
    """
    bare = text.lstrip("'")
    if not bare.startswith(_FORMULA) or (bare == text and _NUMBER.fullmatch(text)):
        return text
    return f"'{text}"


def from_csv_cell(text: str) -> str:
    """Remove the apostrophe of `csv_cell`."""
    return text[1:] if text.startswith("'") and text.lstrip("'").startswith(_FORMULA) else text


def reason(error: Exception) -> str:
    """Return the operating system's message of an error, else the first line of its text, else its type."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).strip().split("\n", 1)[0].rstrip(". ") or type(error).__name__
