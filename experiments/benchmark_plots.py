"""Plot the benchmark: anomalies found by labels spent, and the gain of fine-tuning over the probe."""

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from bench import Row
from benchmark_tables import ablation_base
from matplotlib.artist import Artist
from matplotlib.figure import Figure

from anomalymatch.evaluation.confidence import mean_interval
from anomalymatch.evaluation.plots import FAINT, INK, MARKERS, PALETTE, canvas, dress, save

COLUMNS, PANEL_HEIGHT = 4, 1.9
"""Panels in a row, and the height of a panel in inches."""
LINES = ("-", "--", "-.")


def save_plots(rows: Sequence[Row], folder: Path) -> None:
    """Save the plots of all searches by `top_k` that start with five anomalies.

    Algorithms that searched less than half of the tasks and ablations of `fixmatch` are left out, to keep the panels
    readable; the tables have them.
    """
    rows = [row for row in rows if (row["start"], row["oracle"]) == ("5", "top_k")]
    searched = {(row["task"], row["algorithm"]) for row in rows if int(row["spent"]) > 0}
    tasks, counts = {task for task, _ in searched}, Counter(algorithm for _, algorithm in searched)
    wide = {algorithm for algorithm, count in counts.items() if 2 * count >= len(tasks)}
    searches = [row for row in rows if row["algorithm"] in wide and (row["task"], row["algorithm"]) in searched]
    if searches:
        save(discovery_figure(searches), folder / "benchmark_found.png")
    trainings = [row for row in rows if (row["task"], row["algorithm"]) not in searched and not ablation_base(row)]
    if trainings:
        save(gain_figure(trainings), folder / "benchmark_gain.png")


def discovery_figure(rows: Sequence[Row]) -> Figure:
    """Plot anomalies found against labels spent, one panel for each task, with the maximum that is possible."""
    tasks, algorithms = _values(rows, "task"), _values(rows, "algorithm")
    lines = -(-len(tasks) // COLUMNS)
    figure = canvas(PANEL_HEIGHT * lines + 0.5)
    figure.set_figwidth(2 * figure.get_figwidth())
    legend: dict[str, Artist] = {}  # collected from all panels: a panel may lack an algorithm
    for number, task in enumerate(tasks, 1):
        axes = figure.add_subplot(lines, COLUMNS, number)
        dress(axes, "labels", "found")
        axes.set_title(task, fontsize=10, color=INK)
        task_rows = [row for row in rows if row["task"] == task]
        spent = sorted({int(row["spent"]) for row in task_rows})
        best = max(int(row["anomalies"]) for row in task_rows if int(row["spent"]) == 0)
        axes.plot(spent, np.minimum(spent, best), color=FAINT, linestyle=":", label="maximum")
        for place, algorithm in enumerate(algorithms):
            colour, line = PALETTE[place % len(PALETTE)], LINES[place // len(PALETTE) % len(LINES)]
            own = [row for row in task_rows if row["algorithm"] == algorithm]
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
    """Plot the average precision after fine-tuning against that of the probe, one point for each draw."""
    figure = canvas(6.4)
    axes = figure.add_subplot()
    dress(axes, "average precision of the probe", "after fine-tuning")
    axes.plot([0, 1], [0, 1], color=FAINT, linestyle=":", label="no gain")
    for place, algorithm in enumerate(_values(rows, "algorithm")):
        colour, marker = PALETTE[place % len(PALETTE)], MARKERS[place // len(PALETTE) % len(MARKERS)]
        own = [row for row in rows if row["algorithm"] == algorithm]
        ap, probe = ([float(row[key]) for row in own] for key in ("ap", "probe_ap"))
        axes.scatter(probe, ap, color=colour, marker=marker, label=algorithm, s=26, alpha=0.8, linewidth=0)
    axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
    figure.legend(loc="outside lower center", ncols=2, frameon=False, labelcolor=INK)
    return figure


def _values(rows: Sequence[Row], key: str) -> list[str]:
    return list(dict.fromkeys(str(row[key]) for row in rows))
