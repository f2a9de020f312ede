"""What a label looks like: a colour, a shape and a letter each, so that nobody depends on colours alone."""

from anomalymatch.evaluation.contact_sheet import FRAME_COLOURS
from anomalymatch.types import Label

SHAPES = {Label.ANOMALY: "▲ A", Label.NORMAL: "● N", Label.UNSURE: "◆ U", Label.ARTEFACT: "✕ X"}
"""Shape and letter of each label; the letter is its key, too."""

GREY, ACCENT = "#8A94A3", "#5B8DEF"
"""Of axes and lines that read on dark and on light."""

LEAVE = "() => setTimeout(() => document.activeElement?.blur())"
"""JavaScript for a menu that closes: the keys belong to the images again, not to its field."""


def label_colours() -> str:
    """The colours of the labels as CSS variables `--anomaly` and so on."""
    return "".join(f"--{label}: {colour};" for label, colour in FRAME_COLOURS.items())


def many(number: int, thing: str) -> str:
    """A number of things: "1 label", "1,200 labels"."""
    return f"{number:,} {thing}{'s' * (number != 1)}"
