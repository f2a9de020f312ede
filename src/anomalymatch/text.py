"""Text from outside made safe: for file names, and for a line on the page or in a picture."""

import re


def safe_name(text: str, *, default: str = "images", limit: int = 60) -> str:
    """Turn text into part of a file name that every system accepts; never hidden, never a path.

    Args:
        text: any text.
        default: the name where nothing of the text is left.
        limit: characters that are kept.
    """
    return re.sub(r"[^A-Za-z0-9_-]+", "-", text).strip("-")[:limit].rstrip("-") or default


def printable(text: str, replacement: str = "?", *, limit: int | None = None) -> str:
    """Replace control and other invisible characters, line ends among them.

    Args:
        text: any text.
        replacement: for each such character; may be empty.
        limit: longest result; a longer text ends in an ellipsis.
    """
    cut = text if limit is None else text[: limit + 1]  # the rest of a very long text need not be looked at
    line = "".join(character if character.isprintable() else replacement for character in cut)
    return line if limit is None or len(line) <= limit else f"{line[: limit - 1]}…"
