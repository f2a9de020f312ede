"""Colours, shapes and letters of the labels, so that nobody depends on colours alone."""

from anomalymatch.evaluation.contact_sheet import FRAME_COLOURS
from anomalymatch.types import Label

SHAPES = {Label.ANOMALY: "▲ A", Label.NORMAL: "● N", Label.UNSURE: "◆ U", Label.ARTEFACT: "✕ X"}
"""Shape and letter of each label; the letter is also its key."""

GREY, ACCENT = "#8A94A3", "#5B8DEF"
"""Colours of axes and lines on dark and light backgrounds."""

LEAVE = "() => setTimeout(() => document.activeElement?.blur())"
"""JavaScript that gives the keyboard back to the gallery when a menu closes."""


def label_colours() -> str:
    """Return the colours of the labels as CSS variables, `--anomaly` and so on."""
    return "".join(f"--{label}: {colour};" for label, colour in FRAME_COLOURS.items())


def many(number: int, thing: str) -> str:
    """Format a number with its noun: "1 label", "1,200 labels"."""
    return f"{number:,} {thing}{'s' * (number != 1)}"
