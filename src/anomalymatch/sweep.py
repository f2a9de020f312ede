"""Summarise a sweep: mean and 95 % interval over the seeds, for each combination of the other values."""

import csv
import math
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from rich.text import Text

from anomalymatch.config import FILE, flatten
from anomalymatch.files import write_text
from anomalymatch.terminal import cell, console, print_table
from anomalymatch.text import printable
from anomalymatch.types import Row

MEASURES = (
    "auroc",
    "ap",
    "auprc",
    "precision_at_1pct",
    "recall_at_1pct",
    "probe_ap",
    "heldout_auroc",
    "heldout_ap",
    "probe_heldout_ap",
    "found",
)
SHOWN = {"ap": "AP", "heldout_ap": "held-out AP", "probe_heldout_ap": "probe's", "found": "found"}
"""Measures of the table, which fits 80 columns; the pool's AP only without a held-out set."""
ENOUGH = 3
"""Number of runs from which an interval is shown: that of two is thirteen times as wide as their difference."""
FAILURE = "error.txt"
Run = tuple[dict[str, Any], list[Row]]


class SweepSummary(Callback):
    """Hydra callback that writes and prints summary.csv of a sweep, and the errors of its jobs."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Delete the errors of an earlier attempt at the same sweep."""
        for path in Path(config.hydra.sweep.dir).glob(f"*/{FAILURE}"):
            path.unlink()

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Summarise metrics.csv of all jobs; exit with code 1 if one of them failed."""
        from anomalymatch.active.run_folder import to_csv  # imported late, because it imports torch

        folder = Path(config.hydra.sweep.dir)
        failures = [path.read_text(encoding="utf-8") for path in sorted(folder.glob(f"*/{FAILURE}"))]
        rows = summarise(folder)
        if rows:
            write_text(folder / "summary.csv", to_csv(rows))
            _show(rows, folder)
        for failure in failures:
            line = printable(" ".join(failure.split()))
            console.print(Text.assemble(("error:", "bold red"), f" {line}"), soft_wrap=True, highlight=False)
        if failures:
            sys.exit(1)


def record_failure(folder: Path, overrides: Sequence[str], error: Exception) -> None:
    """Record why a job of a sweep failed, for the end of the sweep; the other jobs continue."""
    write_text(folder / FAILURE, f"job {folder.name} ({' '.join(overrides)}): {' '.join(str(error).split())}")


def summarise(folder: Path) -> list[Row]:
    """Compute mean and interval of each measure over the runs below `folder` that differ only in the seed.

    Returns:
        One row for each such group and cycle: the settings that vary, `cycle`, `runs`, and for each measure its mean
        with `_low` and `_high`.
    """
    runs = [(_settings(path.parent), _read(path)) for path in sorted(folder.glob("**/metrics.csv"))]
    varying = _columns(runs)
    groups: dict[tuple[Any, ...], list[list[Row]]] = defaultdict(list)
    for settings, cycles in runs:
        groups[tuple(settings.get(key) for key in varying)].append(cycles)
    return [
        {**dict(zip(varying, map(str, values), strict=True)), **_interval_row(cycle, members)}
        for values, members in groups.items()
        for cycle in range(1, 1 + min(len(cycles) for cycles in members))
    ]


def _interval_row(cycle: int, members: list[list[Row]]) -> Row:
    from anomalymatch.evaluation import mean_interval  # imported late, because it imports torch

    row: Row = {"cycle": cycle, "runs": len(members)}
    for measure in MEASURES:
        if all(measure in cycles[cycle - 1] for cycles in members):
            interval = mean_interval([float(cycles[cycle - 1][measure] or "nan") for cycles in members])
            row |= {measure: interval.mean, f"{measure}_low": interval.low, f"{measure}_high": interval.high}
    return row


def _settings(folder: Path) -> dict[str, Any]:
    """Return all settings of a run by dotted key."""
    config = flatten(cast(DictConfig, OmegaConf.load(folder / FILE)), resolve=False)
    return {key: str(value) for key, value in config.items() if not isinstance(value, dict)}


def _columns(runs: Sequence[Run]) -> list[str]:
    """Return the settings that distinguish the runs, other than the seed; names of config groups first.

    A setting that follows from earlier ones (the oracle's class from its name) is left out.
    """
    keys = sorted({key for settings, _ in runs for key in settings} - {"seed"}, key=lambda key: (_rank(key), key))
    columns: list[str] = []
    for key in keys:
        if _count_groups(runs, [*columns, key]) > _count_groups(runs, columns):
            columns.append(key)
    return columns


def _rank(key: str) -> int:
    return 0 if key.endswith(".name") else 2 if key.endswith("._target_") else 1


def _count_groups(runs: Sequence[Run], keys: Sequence[str]) -> int:
    """Count the groups of runs with the same values of `keys`."""
    return len({tuple(settings.get(key) for key in keys) for settings, _ in runs})


def _read(path: Path) -> list[Row]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _show(rows: list[Row], folder: Path) -> None:
    held_out = any("heldout_ap" in row for row in rows)
    shown = {key: name for key, name in SHOWN.items() if not held_out or key != "ap"}
    settings = list(rows[0])[: list(rows[0]).index("cycle")]
    headings = {key: key.removesuffix(".name").rpartition(".")[2] for key in settings}
    names = headings | {"cycle": "cycle", "runs": "runs"} | {key: n for key, n in shown.items() if key in rows[0]}
    print_table(
        [{name: _cell(row, name) for name in names} for row in rows],
        names,
        left=settings,
        title=f"{folder}: mean over the runs, with a 95 % interval from {ENOUGH} runs on; summary.csv has all measures",
    )


def _cell(row: Row, name: str) -> str:
    value, half = row.get(name), math.nan
    if isinstance(value, float) and int(row["runs"]) >= ENOUGH:
        half = (float(row[f"{name}_high"]) - float(row[f"{name}_low"])) / 2
    return cell(value) if math.isnan(half) else f"{cell(value)} ± {cell(half)}"
