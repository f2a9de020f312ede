"""The plots of the benchmark: what each algorithm has found by then, and what fine-tuning adds to its probe."""

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from bench import Row
from benchmark_tables import unchanged
from matplotlib.artist import Artist
from matplotlib.figure import Figure

from anomalymatch.evaluation.confidence import mean_interval
from anomalymatch.evaluation.plots import FAINT, INK, MARKERS, PALETTE, canvas, dress, save

ACROSS, PANEL = 4, 1.9
"""Panels in a row, and the height of one in inches."""
LINES = ("-", "--", "-.")


def draw(rows: Sequence[Row], folder: Path) -> None:
    """Write the plots of the rows from five examples that ask for the top.

    What was searched with on less than half of the tasks is for the tables, and so are the changes to `fixmatch`: with
    all of it a panel would be a tangle.
    """
    rows = [row for row in rows if (row["start"], row["oracle"]) == ("5", "top_k")]
    searched = {(row["task"], row["algorithm"]) for row in rows if int(row["spent"]) > 0}
    tasks, times = {task for task, _ in searched}, Counter(algorithm for _, algorithm in searched)
    wide = {algorithm for algorithm, count in times.items() if 2 * count >= len(tasks)}
    searches = [row for row in rows if row["algorithm"] in wide and (row["task"], row["algorithm"]) in searched]
    if searches:
        save(discovery_figure(searches), folder / "benchmark_found.png")
    trained = [row for row in rows if (row["task"], row["algorithm"]) not in searched]
    once = [row for row in trained if not unchanged(row)]
    if once:
        save(gain_figure(once), folder / "benchmark_gain.png")


def discovery_figure(rows: Sequence[Row]) -> Figure:
    """A panel a task: anomalies found by labels spent, means over the draws, under what could be found at best."""
    tasks, algorithms = _names(rows, "task"), _names(rows, "algorithm")
    figure = canvas(PANEL * -(-len(tasks) // ACROSS) + 0.5)
    figure.set_figwidth(2 * figure.get_figwidth())
    legend: dict[str, Artist] = {}  # an algorithm may be missing in some panels
    for number, task in enumerate(tasks, 1):
        axes = figure.add_subplot(-(-len(tasks) // ACROSS), ACROSS, number)
        dress(axes, "labels", "found")
        axes.set_title(task, fontsize=10, color=INK)
        some = [row for row in rows if row["task"] == task]
        spent = sorted({int(row["spent"]) for row in some})
        best = max(int(row["anomalies"]) for row in some if int(row["spent"]) == 0)
        axes.plot(spent, np.minimum(spent, best), color=FAINT, linestyle=":", label="at best")
        for place, algorithm in enumerate(algorithms):
            colour, line = PALETTE[place % len(PALETTE)], LINES[place // len(PALETTE) % len(LINES)]
            own = [row for row in some if row["algorithm"] == algorithm]
            found = [[float(row["found"]) for row in own if int(row["spent"]) == labels] for labels in spent]
            if not all(found):
                continue
            intervals = [mean_interval(values) for values in found]
            axes.plot(spent, [i.mean for i in intervals], color=colour, linestyle=line, label=algorithm)
            if not any(math.isnan(i.low) for i in intervals):
                low, high = ([getattr(i, end) for i in intervals] for end in ("low", "high"))
                axes.fill_between(spent, low, high, color=colour, alpha=0.12, linewidth=0)
        axes.set_ylim(bottom=0)
        handles, names = axes.get_legend_handles_labels()
        legend |= dict(zip(names, handles, strict=True))
    where = {"loc": "outside lower center", "ncols": min(len(legend), 5), "frameon": False}
    figure.legend(list(legend.values()), list(legend), labelcolor=INK, **where)
    return figure


def gain_figure(rows: Sequence[Row]) -> Figure:
    """A point a draw: average precision after a fine-tuning, over that of the probe on the same labels."""
    algorithms = _names(rows, "algorithm")
    figure = canvas(4.6)
    axes = figure.add_subplot()
    dress(axes, "average precision of the probe", "after fine-tuning")
    axes.plot([0, 1], [0, 1], color=FAINT, linestyle=":", label="no gain")
    for place, algorithm in enumerate(algorithms):
        colour, marker = PALETTE[place % len(PALETTE)], MARKERS[place // len(PALETTE) % len(MARKERS)]
        own = [row for row in rows if row["algorithm"] == algorithm]
        ap, probe = ([float(row[key]) for row in own] for key in ("ap", "probe_ap"))
        axes.scatter(probe, ap, color=colour, marker=marker, label=algorithm, s=26, alpha=0.8, linewidth=0)
    axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
    figure.legend(loc="outside right upper", frameon=False, labelcolor=INK)
    return figure


def _names(rows: Sequence[Row], key: str) -> list[str]:
    return list(dict.fromkeys(str(row[key]) for row in rows))
