"""Plotly figures of the side panel, readable on dark and light backgrounds."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
from jaxtyping import Float64

from anomalymatch.evaluation.contact_sheet import FRAME_COLOURS
from anomalymatch.types import Label
from anomalymatch.ui.sky_map import SkyView
from anomalymatch.ui.views import Histogram
from anomalymatch.ui.web.theme import ACCENT, GREY

AXIS = {"gridcolor": "rgba(138,148,163,0.22)", "zeroline": False, "tickfont": {"size": 10}, "automargin": True}
CONFIG = {"displayModeBar": False, "responsive": False}
LINE = {"type": "scatter", "mode": "lines"}
WIDTH, HEIGHT = 314, 150
"""Size of a plot in CSS pixels; fixed, because Plotly cannot fit a plot in a collapsed section."""
RUG_POINTS = 400
"""Most marks of one label below the histogram; more are slow and unreadable."""


def histogram(scores: Histogram | None, limits: tuple[float, float] = (0.0, 1.0)) -> dict[str, Any]:
    """Plot the scores of the unlabelled images on a logarithmic scale, with marks of the labelled ones below.

    Scores outside of `limits` are shaded. Dragging selects a range.
    """
    if scores is None:
        return _figure([], note="no ranking yet")
    traces: list[dict[str, Any]] = [
        {
            "type": "bar",
            "x": ((scores.edges[:-1] + scores.edges[1:]) / 2).tolist(),
            "y": [count or None for count in scores.counts.tolist()],
            "width": np.diff(scores.edges).tolist(),
            "marker": {"color": ACCENT},
            "hovertemplate": "%{y:,} at %{x:.2f}<extra></extra>",
        }
    ]
    for row, (label, values) in enumerate(scores.labelled.items()):
        shown = values[np.linspace(0, len(values) - 1, min(len(values), RUG_POINTS)).astype(int)]
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "yaxis": "y2",
                "x": shown.tolist(),
                "y": [-row] * len(shown),
                "marker": {"symbol": "line-ns-open", "size": 8, "color": FRAME_COLOURS[label], "line": {"width": 1.5}},
                "hovertemplate": f"{label}, %{{x:.3f}}<extra></extra>",
            }
        )
    layout = {
        "yaxis": AXIS
        | _title("images")
        | {"type": "log", "domain": [0.3, 1], "dtick": 1, "exponentformat": "power", "fixedrange": True},
        "yaxis2": AXIS | {"domain": [0, 0.2], "range": [-3.6, 0.6], "visible": False, "fixedrange": True},
        "xaxis": AXIS | _title("score") | {"range": [0, 1], "anchor": "free", "position": 0, "fixedrange": True},
        "bargap": 0,
        "dragmode": "select",
        "selectdirection": "h",
        "selections": [],
        "shapes": [_shade(start, end) for start, end in ((0.0, limits[0]), (limits[1], 1.0)) if start < end],
    }
    return _figure(traces, layout)


def _shade(start: float, end: float) -> dict[str, Any]:
    box = {"type": "rect", "x0": start, "x1": end, "xref": "x", "y0": 0, "y1": 1, "yref": "paper"}
    return box | {"fillcolor": "rgba(138,148,163,0.4)", "line": {"width": 0}}


def discovery(found: Sequence[int]) -> dict[str, Any]:
    """Plot the anomalies found against the labels given, and the line of one anomaly for each label."""
    if not found:
        return _figure([], note="no labels yet")
    keep = np.unique(np.linspace(0, len(found) - 1, min(len(found), 500)).astype(int))
    curve = LINE | {
        "x": [0, *(int(place) + 1 for place in keep)],
        "y": [0, *(found[place] for place in keep)],
        "line": {"color": FRAME_COLOURS[Label.ANOMALY], "width": 2, "shape": "hv"},
        "hovertemplate": "%{y} found with %{x} labels<extra></extra>",
    }
    end = len(found)
    dots = {"color": GREY, "width": 1, "dash": "dot"}
    ideal = LINE | {"x": [0, end], "y": [0, end], "line": dots, "hoverinfo": "skip"}
    top = max(1, found[-1]) * 1.15
    xaxis = AXIS | _title("labels") | _whole(end) | {"range": [0, end]}
    yaxis = AXIS | _title("anomalies found") | _whole(top) | {"range": [0, top]}
    return _figure([ideal, curve], {"xaxis": xaxis, "yaxis": yaxis})


def sky(view: SkyView) -> dict[str, Any]:
    """Plot what was found over the archive, on a map of the sky; its points have the ids as `customdata`."""
    x, y = _joined(view.lines)
    grid = LINE | {"x": x, "y": y, "line": {"color": AXIS["gridcolor"], "width": 1}, "hoverinfo": "skip"}
    points = {"type": "scatter", "mode": "markers"}
    archive = points | _places(view.archive) | {"marker": {"color": ACCENT, "size": 3, "opacity": 0.5}}
    found = points | _places(view.found) | {"customdata": list(view.ids), "text": [escape(id_) for id_ in view.ids]}
    found |= {"marker": {"color": FRAME_COLOURS[Label.ANOMALY], "size": 8, "line": {"color": "#101317", "width": 1}}}
    names: dict[str, Any] = {"type": "scatter", "mode": "text", "hoverinfo": "skip", "textposition": "bottom center"}
    names |= dict(zip(("text", "x", "y"), zip(*view.names, strict=True), strict=True))
    names["textfont"] = {"size": 9, "color": GREY}
    left, right, low, high = view.limits
    hidden = {"visible": False, "zeroline": False}
    layout = {
        "height": HEIGHT + 12,
        "margin": {"l": 2, "r": 2, "t": 2, "b": 2},
        "hovermode": "closest",
        "xaxis": hidden | {"range": [left, right], "constrain": "domain"},
        "yaxis": hidden | {"range": [low, high], "scaleanchor": "x"},
    }
    archive |= {"hoverinfo": "skip"}
    found |= {"hovertemplate": "%{text}<extra></extra>"}
    return _figure([grid, archive, names, found], layout)


def _places(places: Float64[np.ndarray, "n 2"]) -> dict[str, Any]:
    return dict(zip("xy", np.round(places, 6).T.tolist(), strict=True))


def _joined(lines: Sequence[Float64[np.ndarray, "_ 2"]]) -> tuple[list[float | None], list[float | None]]:
    """Join lines to one, with a gap after each."""
    x: list[float | None] = []
    y: list[float | None] = []
    for line in lines:
        for axis, values in zip((x, y), np.round(line, 6).T.tolist(), strict=True):
            axis += [*values, None]
    return x, y


def _title(text: str) -> dict[str, Any]:
    return {"title": {"text": text, "font": {"size": 10}, "standoff": 4}}


def _whole(end: int | float) -> dict[str, Any]:
    """Return ticks at whole numbers for an axis of counts from 0 to `end`."""
    return {"tickformat": ",d"} | ({"dtick": 1} if end < 6 else {})


def training(losses: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Plot losses on the left axis, and rates on the right axis from 0 to 1."""
    colours = [ACCENT, "#E69F00", "#009E73", "#CC79A7", "#D55E00"]
    if not any(losses.values()):
        return _figure([], note="no steps yet")
    traces = []
    for number, (name, values) in enumerate(losses.items()):
        axis, dash = ("y2", "dot") if "rate" in name else ("y", "solid")
        line = {"color": colours[number % len(colours)], "width": 1.5, "dash": dash}
        shown = [value if np.isfinite(value) else None for value in values]
        traces.append(LINE | {"name": name, "y": shown, "yaxis": axis, "line": line})
    layout = {
        "xaxis": AXIS | _title("step"),
        "yaxis": AXIS | _title("loss") | {"rangemode": "tozero", "nticks": 5},
        "yaxis2": AXIS | {"overlaying": "y", "side": "right", "range": [0, 1.02], "showgrid": False},
        "showlegend": True,
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0, "font": {"size": 10}},
    }
    return _figure(traces, layout)


def _figure(
    traces: Sequence[Mapping[str, Any]], layout: Mapping[str, Any] | None = None, note: str = ""
) -> dict[str, Any]:
    whole: dict[str, Any] = {
        "width": WIDTH,
        "height": HEIGHT,
        "margin": {"l": 34, "r": 10, "t": 6, "b": 34},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"color": GREY, "size": 11},
        "showlegend": False,
        "xaxis": AXIS,
        "yaxis": AXIS,
        "hoverlabel": {"font": {"size": 11}},
    }
    if note:
        hidden = {"visible": False}
        whole |= {"xaxis": hidden, "yaxis": hidden}
        middle = {"xref": "paper", "yref": "paper", "x": 0.5, "y": 0.5}
        whole["annotations"] = [{"text": note, "showarrow": False, **middle}]
    return {"data": list(traces), "layout": whole | dict(layout or {}), "config": CONFIG}
