"""Conversion of text from users and files to safe file names and printable lines."""

import re


def safe_name(text: str, *, default: str = "images", limit: int = 60) -> str:
    """Convert text to a part of a file name that all operating systems accept.

    Args:
        text: any text.
        default: name to use if nothing of the text is left.
        limit: largest length.
    """
    return re.sub(r"[^A-Za-z0-9_-]+", "-", text).strip("-")[:limit].rstrip("-") or default


def printable(text: str, replacement: str = "?", *, limit: int | None = None) -> str:
    """Replace control characters, line ends and other invisible characters.

    Args:
        text: any text.
        replacement: text for each such character; may be empty.
        limit: largest length; longer texts end in an ellipsis.
    """
    cut = text if limit is None else text[: limit + 1]  # the text may be very long
    line = "".join(character if character.isprintable() else replacement for character in cut)
    return line if limit is None or len(line) <= limit else f"{line[: limit - 1]}…"


def reason(error: Exception) -> str:
    """Return the operating system's message of an error, else the first line of its text, else its type."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).strip().split("\n", 1)[0].rstrip(". ") or type(error).__name__
