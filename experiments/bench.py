"""Shared by the experiments: run jobs one after the other, resumably, and turn their metrics into tables."""

import argparse
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from anomalymatch import run
from anomalymatch.active.run_folder import to_csv
from anomalymatch.evaluation.confidence import mean_interval
from anomalymatch.files import write_text
from anomalymatch.terminal import console

HERE = Path(__file__).resolve().parent
DATA = Path(os.environ.get("ANOMALYMATCH_DATA", HERE.parent.parent / "shared" / "data"))
Row = dict[str, float | int | str]


@dataclass(frozen=True)
class Job:
    """One run: what names it in the table, and the words of its command line."""

    name: Mapping[str, str | int]
    overrides: Sequence[str]


def arguments(description: str) -> argparse.Namespace:
    """The options that every experiment has."""
    return make_parser(description).parse_args()


def make_parser(description: str) -> argparse.ArgumentParser:
    """The same, for an experiment that has more."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--runs", type=Path, default=Path("runs/experiments"), help="folder of the run folders")
    parser.add_argument("--quick", action="store_true", help="the smallest form that still runs every part")
    return parser


def measure(experiment: str, jobs: Iterable[Job], runs: Path) -> list[Row]:
    """Run `jobs`, or read what an earlier call has finished; one row for each cycle of each.

    The rows are also written to experiments/results/<experiment>.csv.
    """
    rows: list[Row] = []
    for job in jobs:
        folder = runs / experiment / "-".join(str(value) for value in job.name.values())
        console.print(f"{experiment}: {dict(job.name)}", highlight=False)
        for row in run(*job.overrides, "logger=none", folder=folder):
            rows.append({**job.name, **row})
    write_text(HERE / "results" / f"{experiment}.csv", to_csv(rows))
    return rows


def table(rows: Sequence[Row], by: Sequence[str], measures: Sequence[str]) -> str:
    """A Markdown table: mean and 95 % interval of `measures` over the rows that agree in `by`."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(str(row[key]) for key in by), []).append(row)
    lines = [" | ".join([*by, "runs", *measures]), " | ".join("---" for _ in range(len(by) + 1 + len(measures)))]
    for key, members in groups.items():
        cells = [_cell([float(row.get(measure, "nan")) for row in members]) for measure in measures]
        lines.append(" | ".join([*key, str(len(members)), *cells]))
    return "\n".join(f"| {line} |" for line in lines)


def _cell(values: list[float]) -> str:
    interval = mean_interval(values)
    if interval.low != interval.low:
        return f"{interval.mean:.3f}"
    return f"{interval.mean:.3f} ± {(interval.high - interval.low) / 2:.3f}"
