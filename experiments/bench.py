"""Share options, resumable measurements, CSV files and Markdown tables between the experiments."""

import argparse
import csv
import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anomalymatch import run
from anomalymatch.active.run_folder import to_csv
from anomalymatch.evaluation.confidence import Interval, mean_interval
from anomalymatch.files import write_text
from anomalymatch.terminal import console, set_up_logging

RESULTS = Path(__file__).resolve().parent / "results"
DATA = Path(os.environ.get("ANOMALYMATCH_DATA", RESULTS.parents[2] / "shared" / "data"))
ALONE = "algorithm.learner.average_with_probe=false"
"""Ranks by the trained network alone, as in all measurements from before the mean with the probe was the default."""
NO_CROPS = ("model.crops=0", "probe.orientations=2")
"""Overrides that switch off the crops and rotations which `dataset=galaxyzoo1` switches on."""
Row = dict[str, float | int | str]


@dataclass(frozen=True)
class Job:
    """Run of the main job.

    Attributes:
        name: the columns that identify the run in the table.
        overrides: its command line.
    """

    name: Mapping[str, str | int]
    overrides: Sequence[str]


def make_parser(description: str | None, quick: str = "run the smallest form of every part") -> argparse.ArgumentParser:
    """Create a parser with the options of every experiment."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--runs", type=Path, default=Path("runs/experiments"), help="folder for partial results")
    parser.add_argument("--results", type=Path, help="folder for tables and plots (default: experiments/results)")
    parser.add_argument("--quick", action="store_true", help=f"{quick}; write everything below RUNS/quick")
    return parser


def parse_options(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the command line, choose the folders and hide log messages below warnings."""
    options = parser.parse_args()
    if options.quick:
        options.runs /= "quick"
    options.results = options.results or (options.runs / "results" if options.quick else RESULTS)
    set_up_logging("warning")
    return options


def dataset_overrides(name: str) -> list[str]:
    """Return the overrides that select a data set and its folder."""
    return [f"dataset={name}", f"data.root={DATA / name}"]


def run_jobs(experiment: str, jobs: Iterable[Job], options: argparse.Namespace) -> list[Row]:
    """Run the jobs, skip finished ones, and return one row for each cycle; also write the rows to a CSV file."""
    rows: list[Row] = []
    for job in jobs:
        folder = options.runs / experiment / "-".join(str(value) for value in job.name.values())
        console.print(f"{experiment}: {dict(job.name)}", highlight=False)
        rows += [{**job.name, **row} for row in run(*job.overrides, "logger=none", folder=folder)]
    write_csv(options.results / f"{experiment}.csv", rows)
    return rows


def run_once(path: Path, measure: Callable[..., Iterable[Row]], *arguments: Any) -> list[Row]:
    """Return the rows of a CSV file; if it does not exist, call `measure` and write it first."""
    if not path.exists():
        console.print(f"{path.parent.name}: {path.stem}", highlight=False)
        write_csv(path, list(measure(*arguments)))
    return read_csv(path)


def read_csv(path: Path) -> list[Row]:
    """Read the rows of a CSV file; every value is a string."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """Write rows to a CSV file."""
    write_text(path, to_csv(rows))


def interleaved_rates(work: dict[str, Callable[[], int]], repeats: int) -> dict[str, float]:
    """Return the median rate of each function, in units of its return value per second.

    The functions are called once each as a warm-up, and then in turn, so that a slow moment of the machine affects all.
    """
    for call in work.values():
        call()
    rates: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(repeats):
        for name, call in work.items():
            start = time.perf_counter()
            done = call()
            rates[name].append(done / (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in rates.items()}


def group_by(rows: Iterable[Row], keys: Sequence[str]) -> dict[tuple[str, ...], list[Row]]:
    """Group rows by the values of some columns."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(str(row[key]) for key in keys), []).append(row)
    return groups


def table(rows: Sequence[Row], by: Sequence[str], measures: Sequence[str]) -> str:
    """Format the mean and 95 % interval of some columns as a Markdown table, one line for each group of rows."""
    lines = []
    for key, members in group_by(rows, by).items():
        cells = [mean_interval([float(row.get(measure, "nan")) for row in members]) for measure in measures]
        lines.append([*key, str(len(members)), *map(format_interval, cells)])
    return markdown([*by, "runs", *measures], lines)


def table_over_tasks(rows: Sequence[Row], by: Sequence[str], task: str, measures: Sequence[str]) -> str:
    """Format means with two half widths, "mean ± over draws / over tasks", as a Markdown table.

    The first is of all runs: how much other labels of the same tasks change the mean. The second is of the means of the
    tasks: how much other tasks would.
    """
    lines = []
    for key, members in group_by(rows, by).items():
        cells = []
        for measure in measures:
            values = {name: [float(row[measure]) for row in some] for name, some in group_by(members, (task,)).items()}
            runs = mean_interval([value for some in values.values() for value in some])
            tasks = mean_interval([mean_interval(some).mean for some in values.values()])
            cells.append(f"{format_interval(runs)} / {(tasks.high - tasks.low) / 2:.3f}")
        lines.append([*key, str(len(members)), *cells])
    return markdown([*by, "runs", *measures], lines)


def format_interval(interval: Interval, spec: str = ".3f") -> str:
    """Format an interval as "mean ± half width", or as the mean alone where the width is not defined."""
    half = (interval.high - interval.low) / 2
    return f"{interval.mean:{spec}}" + ("" if math.isnan(half) else f" ± {half:.3f}")


def markdown(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Format cells as a Markdown table."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *lines))
