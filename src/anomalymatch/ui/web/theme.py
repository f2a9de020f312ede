"""Look of the whole page: colours, shapes and letters of the labels, and its drop-down lists."""

from collections.abc import Callable, Sequence
from typing import Any

from nicegui import ui

from anomalymatch.evaluation.contact_sheet import FRAME_COLOURS
from anomalymatch.evaluation.heat_maps import legend_strip
from anomalymatch.types import Label

SHAPES = {Label.ANOMALY: "▲ A", Label.NORMAL: "● N", Label.UNSURE: "◆ U", Label.ARTEFACT: "✕ X"}
"""Shape and letter of each label, so that nobody depends on colours alone; the letter is also its key."""

KIND_COLOURS = (
    "#77AADD", "#EE8866", "#EEDD88", "#FFAABB", "#99DDFF", "#44BB99", "#BBCC33", "#AAAA00", "#DDDDDD",
)  # fmt: skip
"""Colours of the first nine groups, distinct for colour-blind readers (Paul Tol's light scheme)."""

GREY, ACCENT = "#8A94A3", "#5B8DEF"
"""Colours of axes and lines on dark and light backgrounds."""


def label_colours() -> str:
    """Return the colours of the labels as CSS variables, `--anomaly` and so on."""
    return "".join(f"--{label}: {colour};" for label, colour in FRAME_COLOURS.items())


def kind_colours() -> str:
    """Return the CSS classes of the groups' colours, `am-kind-0` and so on."""
    return "".join(f".am-kind-{number} {{--kind: {colour};}}" for number, colour in enumerate(KIND_COLOURS))


def heat_colours() -> str:
    """Return the colours of heat maps, from negative to positive, as the CSS variable `--heat`."""
    stops = (f"rgb({red},{green},{blue})" for red, green, blue in legend_strip(1, 17)[0].tolist())
    return f"--heat: linear-gradient(to right, {', '.join(stops)});"


def drop_down(
    options: Sequence[str], value: str, text: str, name: str, on_change: Callable[..., Any] | None = None
) -> ui.select:
    """Create a drop-down list, with a text for screen readers, that gives the keyboard back when it closes."""
    select = ui.select([str(option) for option in options], value=str(value), on_change=on_change)
    select.props(f"dense options-dense borderless aria-label='{text}' data-testid={name}").classes("am-select")
    return select.on("popup-hide", js_handler="() => setTimeout(() => document.activeElement?.blur())")


def many(number: int, thing: str) -> str:
    """Format a number with its noun: "1 label", "1,200 labels"."""
    return f"{number:,} {thing}{'s' * (number != 1)}"
