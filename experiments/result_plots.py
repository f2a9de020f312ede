"""Plot the ten results of the documentation from the tables of `results/`: `result_plots.py [--plots FOLDER]`."""

import argparse
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from bench import RESULTS, Row, group_by, read_csv
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from probe_miniimagenet import CLASSES

from anomalymatch.evaluation.confidence import Interval, mean_interval, paired_difference, proportion_interval
from anomalymatch.evaluation.plots import INK, MARKERS, PALETTE, canvas, dress, save

PHOTOGRAPHS = (
    "hourglass", "piano", "school bus", "orange", "cliff", "photocopier",
    "house finch", "golden retriever", "electric guitar", "frying pan",
)  # fmt: skip
GALAXIES = ("don't know", "edge-on", "spirals", "merger")
TASKS = (*PHOTOGRAPHS, *GALAXIES, "airplane", "demo lenses")
OVER_DRAWS, OVER_TASKS = "four tasks, ± over draws", "four tasks, ± over tasks"
POINT = 0.14
"""Height of a point with its interval, in inches."""
Series = dict[str, Sequence[Interval | None]]


class Panel(NamedTuple):
    """Points with intervals along one measure.

    Attributes:
        measure: title of the axis, with its unit.
        groups: names of the rows, from the top.
        series: name in the legend -> interval of each row; None leaves a gap.
        line: value and name of a dotted line.
        title: title of the panel.
        start: left end of the axis, for measures that cannot be negative.
    """

    measure: str
    groups: Sequence[str]
    series: Series
    line: tuple[float, str] | None = None
    title: str = ""
    start: float | None = None


def main() -> None:
    """Draw all plots."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--plots", type=Path, default=RESULTS, help="folder for the plots (default: experiments/results)"
    )
    folder = parser.parse_args().plots
    for name, panels in PLOTS.items():
        save(draw(panels()), folder / f"result_{name}.png")


def draw(panels: Sequence[Panel]) -> Figure:
    """Draw panels side by side, with the same rows and one legend below."""
    names, groups = list(panels[0].series), panels[0].groups
    room = len(names) + 0.8  # the points of a row, and a gap to the next row
    figure = canvas(1.2 + POINT * max(room, 2) * len(groups))
    for place, panel in enumerate(panels, 1):
        axes = figure.add_subplot(1, len(panels), place)
        dress(axes, panel.measure, "")
        axes.set_title(panel.title, fontsize=10.5, color=INK)
        axes.grid(visible=False, axis="y")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=9 if len(panels) == 1 else 4, steps=[1, 2, 5, 10]))
        if panel.line:
            axes.axvline(panel.line[0], color=INK, linestyle=":", linewidth=1.2, label=panel.line[1])
        for number, name in enumerate(names):
            known = [(row, interval) for row, interval in enumerate(panel.series[name]) if interval is not None]
            heights = [row + (number - (len(names) - 1) / 2) / room for row, _ in known]
            means = [interval.mean for _, interval in known]
            sides = [[i.mean - i.low for _, i in known], [i.high - i.mean for _, i in known]]
            style = {"color": PALETTE[number], "fmt": MARKERS[number], "markersize": 5, "capsize": 2.5}
            axes.errorbar(means, heights, xerr=sides, label=name, elinewidth=1.4, **style)
        for row in range(1, len(groups)):
            axes.axhline(row - 0.5, color="#E4E7EC", linewidth=0.8)
        axes.set_ylim(len(groups) - 0.5, -0.5)
        axes.set_yticks(range(len(groups)), groups if place == 1 else [""] * len(groups))
        if panel.start is not None:
            # A little room, so that points at the end are not cut.
            axes.set_xlim(left=panel.start - 0.015 * (axes.get_xlim()[1] - panel.start))
    handles, labels = figure.axes[0].get_legend_handles_labels()
    if len(labels) > 1:
        where = {"loc": "outside lower center", "ncols": 3 if len(labels) == 3 else 2, "frameon": False}
        figure.legend(handles, labels, fontsize=9.5, labelcolor=INK, **where)
    return figure


def found() -> list[Panel]:
    """Compare the probe as configured with a plain one."""
    return [_share_of_found(TASKS, {"plain probe": "plain probe", "probe, as configured": "probe, as configured"})]


def size_and_crops() -> list[Panel]:
    """Compare magnified images, crops and crops with rotated labels with the whole image at its original size.

    The ratio of a task is that of the sums over common draws, and its interval that of the paired differences. The
    interval of the photographs is over the classes.
    """
    names = {
        "224 px": "probe, 224 px",
        "5 crops": "probe, 5 crops",
        "5 crops, rotated labels": "probe, 5 crops, turned",
    }
    rows = [row for row in _benchmark(["probe", *names.values()], TASKS) if int(row["spent"]) == 200]
    counts = {
        key: {row["draw"]: float(row["found"]) for row in own}
        for key, own in group_by(rows, ("algorithm", "task")).items()
    }
    series: Series = {}
    for name, algorithm in names.items():
        ratios: dict[str, Interval] = {}
        for task in TASKS:
            own, base = counts.get((algorithm, task), {}), counts["probe", task]
            if own:
                common = fmean(base[draw] for draw in own)
                ratios[task] = mean_interval([1 + (value - base[draw]) / common for draw, value in own.items()])
        photographs = [ratios[task].mean for task in PHOTOGRAPHS if task in ratios]
        series[name] = [mean_interval(photographs) if photographs else None, *(ratios.get(task) for task in GALAXIES)]
    line = (1.0, "whole image, original size")
    return [
        Panel(
            "anomalies found, relative to the whole image", ["ten classes of photographs", *GALAXIES], series, line=line
        )
    ]


def fixmatch() -> list[Panel]:
    """Compare `fixmatch` with its own probe."""
    return [_gain({"fixmatch": "fixmatch"}, TASKS)]


def reference() -> list[Panel]:
    """Compare the recipe of the paper, and the same number of steps from the probe, with the probe."""
    names = {"from a random head, all layers": "fixmatch_reference", "from the probe": "fixmatch of 200"}
    return [_gain(names, ("hourglass", "piano", "don't know", "merger"))]


def networks() -> list[Panel]:
    """Compare networks on miniImageNet after each cycle."""
    names = {"Lite0, last layer": "last_layer", "Lite2, last layer": "lite2_last_layer"}
    names["Lite0, 1 and 2, ten rounds"] = "lites_10_rounds"
    rows = {title: group_by(_paper_oracle(name), ("cycle",)) for title, name in names.items()}
    cycles = [cycle for (cycle,) in rows["Lite0, last layer"]]
    panels = []
    for measure, title, target in (("auroc", "AUROC", 0.99), ("ap", "average precision", 0.88)):
        series: Series = {name: [_mean(own[cycle,], measure) for cycle in cycles] for name, own in rows.items()}
        panels.append(Panel(title, [f"cycle {cycle}" for cycle in cycles], series, line=(target, "target")))
    return panels


def without_labels() -> list[Panel]:
    """Compare what is shown first when nothing is labelled."""
    orders = ("knn", "mahalanobis", "pca_residual", "mixed", "diverse", "random")
    columns = {"first 100 images": "found", "after 100 more labels": "found_after_100_more"}
    rows = group_by(_read("cold_start.csv"), ("anomaly", "method"))
    panels = []
    for anomaly, title in (("dont_know", "don't know (56)"), ("merger", "merger (115)")):
        series: Series = {name: [_mean(rows[anomaly, order], key) for order in orders] for name, key in columns.items()}
        panels.append(Panel("anomalies found", orders, series, title=title, start=0))
    series = {
        name: [mean_interval([_mean(rows[one, order], key).mean for one in CLASSES.values()]) for order in orders]
        for name, key in columns.items()
    }
    return [*panels, Panel("anomalies found", orders, series, title="photographs (200)", start=0)]


def adapted() -> list[Panel]:
    """Compare pretrained and adapted features on draws that chose nothing."""
    rows = [row for row in _read("adaptation_20.csv") if int(row["draw"]) >= 10]
    groups, tasks = {"pretrained": "pretrained", "adapted": "simclr"}, {"don't know": 51, "merger": 110}
    cells = group_by(rows, ("task", "method"))
    series: Series = {name: [_mean(cells[task, key], "found") for task in tasks] for name, key in groups.items()}
    labels = [f"{task} ({there})" for task, there in tasks.items()]
    return [Panel("anomalies found with 200 labels", labels, series, start=0)]


def audit() -> list[Panel]:
    """Show how often the interval of the remaining anomalies contains the truth.

    An audit gives one interval after each of three rankings, which are not independent: the number of audits counts.
    """
    rows = [row for row in _read("discovery_coverage.csv") if row["what"] == "all"]
    shown = {"sealed": "{} audited", "trained": "{}, trained on"}
    rows = [row for row in rows if row["method"] in shown]
    kinds = list(dict.fromkeys((str(row["method"]), str(row["audited"])) for row in rows))
    kinds.sort(key=lambda kind: kind[0])
    cells = {(str(row["method"]), str(row["audited"]), float(row["prevalence"])): row for row in rows}
    series: Series = {}
    for prevalence in sorted({float(row["prevalence"]) for row in rows}):
        own = [cells[method, audited, prevalence] for method, audited in kinds]
        series[f"{prevalence * 100:g} % anomalies"] = [
            Interval(share, *proportion_interval(share, int(row["intervals"]) // 3))
            for row in own
            for share in [float(row["coverage"])]
        ]
    groups = [shown[method].format(f"{int(audited):,}") for method, audited in kinds]
    return [Panel("share of 90 % intervals that contain the truth", groups, series, line=(0.9, "90 %"))]


def kinds() -> list[Panel]:
    """Compare groupings by pooled features and by weighted patches."""
    methods = {
        "pooled features": ("pooled", "inf"),
        "patches, no weights": ("average", "inf"),
        "weighted, no labels (default)": ("unsupervised", "0.03"),
        "weighted, 20 normal images": ("normals_20", "0.03"),
        "weighted, all normal images": ("normals_all", "0.03"),
    }
    datasets = {"neu_steel": "six steel defects", "magnetic_tile": "magnetic tiles", "miniimagenet_5": "photographs"}
    rows = group_by(_read("clustering.csv"), ("levels", "size", "dataset", "method", "tau"))
    series: Series = {
        name: [_mean(own, "nmi") if (own := rows.get(("3+4", "224", dataset, *key))) else None for dataset in datasets]
        for name, key in methods.items()
    }
    return [Panel("NMI of groups with the true kinds", [*datasets.values()], series, start=0)]


def speed() -> list[Panel]:
    """Show the images per second of each kind of archive, each measured once."""
    rates = {str(row["what"]): float(row["per_second"]) for row in _read("throughput.csv") if row["ratio"]}
    names = {"plain loop over files": "plain loop: PIL, fp32, NCHW", "PyTorch, no reading": "forward, torch"}
    names |= {f"{kind}": f"end to end, {kind}" for kind in ("JPEG folder", "zip", "WebDataset", "Parquet")}
    names |= {"arrays: npy": "end to end, npy", "arrays: HDF5": "end to end, HDF5", "arrays: Zarr": "end to end, Zarr"}
    points = [Interval(rates[key], math.nan, math.nan) for key in names.values()]
    return [Panel("images of 84 px per second", [*names], {"rate": points}, start=0)]


def _share_of_found(tasks: Sequence[str], algorithms: Mapping[str, str]) -> Panel:
    rows = _benchmark(algorithms.values(), tasks)
    there = {str(row["task"]): int(row["anomalies"]) for row in rows if int(row["spent"]) == 0}
    cells = group_by([row for row in rows if int(row["spent"]) == 200], ("task", "algorithm"))
    series: Series = {}
    for name, algorithm in algorithms.items():
        shares = [
            [float(row["found"]) / there[task] * 100 for row in cells.get((task, algorithm), [])] for task in tasks
        ]
        series[name] = [mean_interval(values) if values else None for values in shares]
    groups = [f"{task} ({there[task]})" for task in tasks]
    return Panel("anomalies found with 200 labels, % of those there", groups, series, start=0)


def _gain(algorithms: Mapping[str, str], tasks: Sequence[str]) -> Panel:
    """Compare the AP of trainings with that of the probe on the same labels, paired by draw; one draw has no interval.

    The two means are of the tasks with several draws.
    """
    cells = group_by(_benchmark(algorithms.values(), tasks), ("algorithm", "task"))
    series: Series = {}
    for name, algorithm in algorithms.items():
        values = {
            task: [(float(row["ap"]), float(row["probe_ap"])) for row in cells[algorithm, task]] for task in tasks
        }
        gains = {task: paired_difference(*zip(*pairs, strict=True)) for task, pairs in values.items()}
        several = [task for task in tasks if len(values[task]) > 1]
        draws = paired_difference(*zip(*(pair for task in several for pair in values[task]), strict=True))
        over_tasks = mean_interval([gains[task].mean for task in several])
        series[name] = [*gains.values(), draws, over_tasks]
    groups = [*(f"{task}, {_draws(len(values[task]))}" for task in tasks), OVER_DRAWS, OVER_TASKS]
    return Panel("gain in average precision over the probe", groups, series, line=(0.0, "no gain"))


@cache
def _read(name: str) -> list[Row]:
    return read_csv(RESULTS / name)


def _draws(count: int) -> str:
    return f"{count} draw" + "s" * (count > 1)


def _benchmark(algorithms: Iterable[str], tasks: Iterable[str]) -> list[Row]:
    """Read the searches and trainings that start with five anomalies."""
    wanted = {(algorithm, task, "5", "top_k") for algorithm in algorithms for task in tasks}
    rows = _read("benchmark.csv")
    return [row for row in rows if (row["algorithm"], row["task"], row["start"], row["oracle"]) in wanted]


def _paper_oracle(name: str) -> list[Row]:
    rows = _read(f"probe_miniimagenet_{name}.csv")
    return [row for row in rows if row["oracle"] == "paper_oracle"]


def _mean(rows: Iterable[Row], measure: str) -> Interval:
    return mean_interval([float(row[measure]) for row in rows])


PLOTS: dict[str, Callable[[], list[Panel]]] = {
    "found": found,
    "fixmatch": fixmatch,
    "reference": reference,
    "size_and_crops": size_and_crops,
    "networks": networks,
    "without_labels": without_labels,
    "adapted": adapted,
    "audit": audit,
    "kinds": kinds,
    "speed": speed,
}
"""Plots in the order of the results: name of the file -> its panels."""

if __name__ == "__main__":
    main()
