"""Figures of a run, drawn with matplotlib's object interface: no pyplot, no global state, safe in threads."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Real
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from anomalymatch.evaluation.metrics import Curves
from anomalymatch.evaluation.report import column_name
from anomalymatch.files import atomic_file

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
"""Okabe and Ito's colours for colour-blind readers (jfly.uni-koeln.de/color), without yellow and black."""
ANOMALY, NORMAL, POOL, INK, FAINT = "#D55E00", "#0072B2", "#B8C0CC", "#20252D", "#8A929E"
MARKERS = "osD^vP"
MAX_LEGEND = 8
SIZE = (6.4, 4.0)
DPI = 160
PLAIN = FuncFormatter(lambda value, _: f"{value:,.0f}")


def roc_figure(curves_by_cycle: Mapping[Any, Curves]) -> Figure:
    """Draw the ROC curve of each cycle (or of each method, if the keys are names)."""
    figure, axes = make_figure("false positive rate", "true positive rate")
    if curves_by_cycle:
        axes.plot([0, 1], [0, 1], color=FAINT, linestyle=":", linewidth=1.2, label="chance")
    for (key, curve), style in zip(curves_by_cycle.items(), _styles(len(curves_by_cycle)), strict=True):
        axes.plot(curve.fpr, curve.tpr, label=_label(key, "AUROC", curve.auroc), **style)
    _unit_square(axes)
    legend(axes, loc="lower right")
    return figure


def pr_figure(curves_by_cycle: Mapping[Any, Curves]) -> Figure:
    """Draw the precision-recall curve of each cycle, and the precision of a random order (the prevalence)."""
    figure, axes = make_figure("recall", "precision")
    prevalences = [curve.prevalence for curve in curves_by_cycle.values() if curve.recall.size]
    if prevalences:
        label = f"chance ({prevalences[-1]:.2g})"
        axes.axhline(prevalences[-1], color=FAINT, linestyle=":", linewidth=1.2, label=label)
    for (key, curve), style in zip(curves_by_cycle.items(), _styles(len(curves_by_cycle)), strict=True):
        axes.plot(curve.recall, curve.precision, label=_label(key, "AP", curve.ap), **style)
    _unit_square(axes)
    legend(axes, loc="best")
    return figure


def histogram_figure(
    scores: Real[np.ndarray, " n"],
    *,
    labelled_anomalies: Real[np.ndarray, " a"] | None = None,
    labelled_normals: Real[np.ndarray, " b"] | None = None,
    true_anomalies: Real[np.ndarray, " t"] | None = None,
    bins: int = 60,
    name: str = "pool",
) -> Figure:
    """Draw a histogram of the scores, with a logarithmic axis so that few anomalies are visible.

    Args:
        scores: scores of the pool; infinite ones are left out.
        labelled_anomalies: scores of the images labelled anomalous.
        labelled_normals: scores of the images labelled normal.
        true_anomalies: scores of the pool's true anomalies, for benchmarks.
        bins: number of bins.
        name: name of the scored set, for the legend.
    """
    figure, axes = make_figure("anomaly score", "images")
    groups = [(scores, name, POOL, 1.0)]
    if true_anomalies is not None:
        groups.append((true_anomalies, "true anomalies in the pool", ANOMALY, 0.6))
    labelled = {"labelled normal": labelled_normals, "labelled anomaly": labelled_anomalies}
    rugs = {kind: values for kind, values in labelled.items() if values is not None}
    edges = _edges(np.concatenate([scores, *(group[0] for group in groups[1:]), *rugs.values()]), bins)
    tallest = 1
    for values, title, colour, alpha in groups:
        counts = np.histogram(values, edges)[0]
        tallest = max(tallest, int(counts.max()))
        # An empty bin has no logarithm: its top is drawn below the axis.
        tops, label = np.maximum(counts, 0.1), f"{title} ({values.size:,})"
        axes.stairs(tops, edges, baseline=0.1, fill=True, color=colour, alpha=alpha, label=label)
    axes.set_yscale("log")
    axes.set_ylim(0.7, tallest * 2)
    # A small margin, so that ticks of scores of exactly 0 or 1 are visible.
    room = 0.01 * (edges[-1] - edges[0])
    axes.set_xlim(edges[0] - room, edges[-1] + room)
    axes.yaxis.set_major_formatter(PLAIN)
    axes.yaxis.set_minor_formatter(NullFormatter())
    _draw_rugs(axes, rugs)
    legend(axes, loc="upper right")
    return figure


def discovery_figure(
    spent: Sequence[int], found: Sequence[int], *, total: int | None = None, images: int | None = None
) -> Figure:
    """Draw the anomalies found against the labels spent.

    Args:
        spent: labels spent after each cycle, ascending, beginning with the initial labels.
        found: anomalies among these labels.
        total: anomalies in the whole set, if known; adds the ceiling and the best possible curve.
        images: images in the whole set; with `total` adds the expected curve of random labels, which finds
            (total - initial anomalies) / (images - initial labels) anomalies per label.

    Raises:
        ValueError: if the lengths differ.
    """
    if len(spent) != len(found):
        raise ValueError(f"expected one count per cycle, got {len(spent)} of labels and {len(found)} of anomalies")
    figure, axes = make_figure("labels spent", "anomalies found")
    if total is not None and spent:
        _draw_bounds(axes, np.asarray(spent, dtype=np.float64), found[0], total, images)
    axes.plot(spent, found, color=ANOMALY, marker="o", markersize=5.5, linewidth=2.2, label="found", zorder=3)
    for x, y in zip(spent, found, strict=True):
        axes.annotate(f"{y:,}", (x, y), (0, 7), textcoords="offset points", ha="center", fontsize=9, color=INK)
    axes.set_ylim(bottom=0)
    axes.margins(y=0.12)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(nbins=7, integer=True, steps=[1, 2, 5, 10]))
        axis.set_major_formatter(PLAIN)
    # Below the axes: a legend inside would hide points and their numbers.
    legend(axes, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)
    return figure


def metrics_figure(
    rows: Sequence[Mapping[str, float | int | str]],
    names: Sequence[str] = ("auroc", "ap", "precision_at_0_1pct", "precision_at_1pct"),
) -> Figure:
    """Draw metrics between 0 and 1 over the cycles; undefined (NaN) or missing values leave a gap.

    Args:
        rows: one per cycle, with `cycle` (default: the position) and the metrics.
        names: metrics to draw; metrics that no row has are left out.
    """
    figure, axes = make_figure("cycle", "")
    cycles = [row.get("cycle", position) for position, row in enumerate(rows)]
    for place, name in enumerate(name for name in names if any(name in row for row in rows)):
        values = [float(row.get(name, np.nan)) for row in rows]
        style: dict[str, Any] = {"color": PALETTE[place % len(PALETTE)], "marker": MARKERS[place % len(MARKERS)]}
        axes.plot(cycles, values, label=column_name(name), linewidth=2, markersize=6, **style)
    axes.set_ylim(-0.02, 1.04)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    legend(axes, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write a figure to `path`, atomically; the suffix chooses the format (png, svg, pdf).

    Raises:
        StorageError: if the disk is full or the folder cannot be written.
    """
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format=path.suffix.removeprefix(".") or "png", facecolor="white")


def make_figure(x: str, y: str) -> tuple[Figure, Axes]:
    """Make a figure with one pair of axes in the common style, and label them."""
    figure = canvas(SIZE[1])
    axes = figure.add_subplot()
    dress(axes, x, y)
    return figure, axes


def canvas(height: float) -> Figure:
    """Make an empty figure of the common width, `height` inches high."""
    layout = ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08)
    figure = Figure(figsize=(SIZE[0], height), dpi=DPI, layout=layout)
    FigureCanvasAgg(figure)
    return figure


def dress(axes: Axes, x: str, y: str) -> None:
    """Give axes the common style, and label them."""
    axes.set_xlabel(x, fontsize=10.5, color=INK)
    axes.set_ylabel(y, fontsize=10.5, color=INK)
    axes.tick_params(labelsize=9.5, colors=INK, length=0, pad=5, which="both")
    axes.grid(color="#E4E7EC", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(FAINT)


def legend(axes: Axes, **where: Any) -> None:
    """Add a legend, or a note if there are no curves."""
    handles, labels = axes.get_legend_handles_labels()
    if not handles:
        axes.text(0.5, 0.5, "nothing to show", transform=axes.transAxes, ha="center", color=FAINT)
        return
    # A long legend would hide the curves: the first, the last and some between them are enough for a colour ramp.
    shown = np.unique(np.linspace(0, len(handles) - 1, min(len(handles), MAX_LEGEND)).round().astype(int))
    handles, labels = [handles[place] for place in shown], [labels[place] for place in shown]
    axes.legend(handles, labels, fontsize=9.5, framealpha=0.9, edgecolor="none", labelcolor=INK, **where)


def _unit_square(axes: Axes) -> None:
    axes.set_xlim(-0.015, 1.015)
    axes.set_ylim(-0.02, 1.04)


def _styles(count: int) -> list[dict[str, Any]]:
    """Make a line style for each cycle: distinct colours for a few, a colour ramp for many, the last one thick."""
    ramp = colormaps["cividis"]
    colours = [to_hex(ramp(0.85 * (1 - place / max(count - 1, 1)))) for place in range(count)]
    if count <= len(PALETTE):
        colours = list(PALETTE)
    widths = [2.4 if place == count - 1 else 1.5 for place in range(count)]
    return [{"color": colours[place], "linewidth": widths[place]} for place in range(count)]


def _label(key: int | str, measure: str, value: float) -> str:
    name = f"cycle {key}" if isinstance(key, int) else key
    return f"{name}: undefined" if np.isnan(value) else f"{name}: {measure} {value:.3f}"


def _draw_rugs(axes: Axes, rugs: Mapping[str, Real[np.ndarray, " _"]]) -> None:
    """Draw single scores as ticks in strips above `axes`, one strip for each name."""
    for lane, (name, values) in enumerate(rugs.items()):
        strip = axes.inset_axes((0, 1.04 + 0.14 * lane, 1, 0.1), sharex=axes)
        finite = values[np.isfinite(values)]
        strip.vlines(finite, 0, 1, color=ANOMALY if "anomaly" in name else NORMAL, linewidth=1, alpha=0.7)
        strip.set_ylim(0, 1)
        strip.set_facecolor("#F4F6F8")
        strip.spines[:].set_visible(False)
        strip.tick_params(length=0, labelbottom=False)
        strip.set_yticks([0.5], [f"{name}\n({values.size:,})"], fontsize=8.5, color=INK)


def _edges(values: Real[np.ndarray, " n"], bins: int) -> Real[np.ndarray, " e"]:
    """Compute bin edges over the finite values; 0 to 1 if these may be probabilities."""
    values = values[np.isfinite(values)]
    low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 1.0)
    if low >= 0 and high <= 1:
        low, high = 0.0, 1.0
    elif high - low <= 1e-9 * max(abs(low), abs(high)):
        low, high = low - 0.5, high + 0.5
    return np.linspace(low, high, bins + 1)


def _draw_bounds(axes: Axes, spent: Real[np.ndarray, " n"], start: int, total: int, images: int | None) -> None:
    """Draw the ceiling, the best possible curve and the expected curve of random labels."""
    x = np.linspace(spent[0], spent[-1], 200)
    best = np.minimum(start + (x - spent[0]), total)
    axes.plot(x, best, color=NORMAL, linestyle="--", linewidth=1.3, label="every label an anomaly")
    if images is not None and images > spent[0]:
        slope = (total - start) / (images - spent[0])
        random = start + (x - spent[0]) * slope
        axes.plot(x, random, color=FAINT, linestyle=":", linewidth=1.6, label="random labels (expected)")
    if best[-1] > total / 4:
        # A ceiling far above the curve would flatten it.
        axes.axhline(total, color=INK, linewidth=1, label=f"all {total:,} anomalies")


def left_figure(rows: Sequence[Mapping[str, float | int | str]], *, total: int | None = None) -> Figure:
    """Draw the anomalies found, and the estimated total (found + left) with its interval.

    Args:
        rows: one per cycle, with `labels`, `found`, `left`, `left_low` and `left_high`; NaN leaves a gap.
        total: true anomalies in the whole set, for benchmarks.
    """
    figure, axes = make_figure("labels spent", "anomalies")
    names = ("labels", "found", "left", "left_low", "left_high")
    spent, found, left, low, high = (np.array([float(row.get(name, np.nan)) for row in rows]) for name in names)
    axes.fill_between(spent, found + low, found + high, color=NORMAL, alpha=0.18, linewidth=0, label="90 % interval")
    axes.plot(spent, found + left, color=NORMAL, marker="s", linestyle="--", linewidth=2, label="found + left")
    if len(rows) == 1:  # a band of one point has no width
        axes.errorbar(spent, found + left, [left - low, high - left], color=NORMAL, capsize=4)
    axes.plot(spent, found, color=ANOMALY, marker="o", linewidth=2.2, label="found")
    if total is not None:
        axes.axhline(total, color=INK, linewidth=1, linestyle=":", label=f"all {total:,} anomalies")
    axes.set_ylim(bottom=0)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(nbins=7, integer=True, steps=[1, 2, 5, 10]))
        axis.set_major_formatter(PLAIN)
    # Below the axes: curves and band leave no free corner.
    where: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.16), "ncols": 2}
    axes.legend(fontsize=9.5, edgecolor="none", labelcolor=INK, **where)
    return figure


COLOURS = {"anomaly": ANOMALY, "normal": NORMAL, "all": INK}
"""The classes look alike in all panels, and nothing else does as they do."""
OTHERS = [colour for colour in PALETTE if colour not in COLOURS.values()]
PlotPanel = Mapping[str, Sequence[float]]


def training_figure(panels: Mapping[str, PlotPanel]) -> Figure:
    """Draw one panel per quantity over the steps of a training, with a running mean of long curves.

    Args:
        panels: panel title -> curve name -> value at each step. Empty names have no legend; NaN leaves a gap.
    """
    figure = canvas(0.9 + 1.35 * max(len(panels), 1))
    rows = figure.subplots(max(len(panels), 1), 1, sharex=True, squeeze=False)[:, 0]
    for place, (axes, (title, curves)) in enumerate(zip(rows, panels.items(), strict=False)):
        for name, values in curves.items():
            _draw(axes, np.asarray(values, dtype=np.float64), name, COLOURS.get(name, OTHERS[place % len(OTHERS)]))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=4))
        dress(axes, "step" if axes is rows[-1] else "", title)
        if any(curves):
            legend(axes, loc="center left", bbox_to_anchor=(1.0, 0.5))
    if not panels:
        dress(rows[0], "step", "")
        legend(rows[0])
    figure.align_ylabels(rows)
    return figure


def _draw(axes: Axes, values: Float[np.ndarray, " n"], name: str, colour: str) -> None:
    width = len(values) // 20
    smooth = width > 1
    # A single value between two gaps is drawn as a dot.
    style: dict[str, Any] = {"linewidth": 1.1, "alpha": 0.35} if smooth else {"linewidth": 2, "label": name or None}
    style |= {"marker": ".", "markersize": 4} if np.isnan(values).any() or len(values) == 1 else {}
    axes.plot(np.arange(len(values)), values, color=colour, **style)
    if smooth:
        axes.plot(*running_mean(values, width), color=colour, linewidth=2, label=name or None)


def running_mean(
    values: Float[np.ndarray, " n"], width: int
) -> tuple[Float[np.ndarray, " m"], Float[np.ndarray, " m"]]:
    """Compute the mean of the last `width` values at each step, ignoring NaN; return the steps and the means."""
    known = ~np.isnan(values)
    window = np.ones(width)
    sums = np.convolve(np.where(known, values, 0.0), window, "valid")
    counts = np.convolve(known, window, "valid").round()
    means = np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)
    return np.arange(width - 1, len(values), dtype=np.float64), means
