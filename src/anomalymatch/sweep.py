"""After a sweep: mean and 95 % interval over the seeds, for each combination of the other values."""

import csv
import logging
from collections import defaultdict
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from rich.table import Table

from anomalymatch.active.run_folder import to_csv
from anomalymatch.evaluation.confidence import mean_interval
from anomalymatch.files import write_text
from anomalymatch.progress import console

logger = logging.getLogger(__name__)
MEASURES = (
    "auroc",
    "ap",
    "auprc",
    "precision_at_1pct",
    "recall_at_1pct",
    "probe_ap",
    "heldout_auroc",
    "heldout_ap",
    "found",
)
SHOWN = ("auroc", "ap", "precision_at_1pct", "heldout_ap", "found")
Row = dict[str, float | int | str]


class SweepSummary(Callback):
    """Hydra callback: writes summary.csv in the folder of the sweep and prints it."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Collect metrics.csv of all jobs."""
        folder = Path(config.hydra.sweep.dir)
        rows = summarise(folder)
        if rows:
            write_text(folder / "summary.csv", to_csv(rows))
            _show(rows, folder)


def summarise(folder: Path) -> list[Row]:
    """Mean and interval of each measure over the runs below `folder` that differ in nothing but the seed.

    Returns:
        One row for each such group and cycle: what varies, `cycle`, `runs`, and for each measure its mean with
        `_low` and `_high`.
    """
    runs = [(_settings(path.parent), _read(path)) for path in sorted(folder.glob("**/metrics.csv"))]
    varying = [key for key in {k: None for settings, _ in runs for k in settings} if _varies(key, runs)]
    groups: dict[tuple[Any, ...], list[list[Row]]] = defaultdict(list)
    for settings, cycles in runs:
        groups[tuple(settings.get(key) for key in varying)].append(cycles)
    return [
        {**dict(zip(varying, map(str, values), strict=True)), **_interval_row(cycle, members)}
        for values, members in groups.items()
        for cycle in range(1, 1 + min(len(cycles) for cycles in members))
    ]


def _interval_row(cycle: int, members: list[list[Row]]) -> Row:
    row: Row = {"cycle": cycle, "runs": len(members)}
    for measure in MEASURES:
        if all(measure in cycles[cycle - 1] for cycles in members):
            interval = mean_interval([float(cycles[cycle - 1][measure] or "nan") for cycles in members])
            row |= {measure: interval.mean, f"{measure}_low": interval.low, f"{measure}_high": interval.high}
    return row


def _settings(folder: Path) -> dict[str, Any]:
    """All settings of a run, flat."""
    flat: dict[str, Any] = {}

    def visit(node: Any, prefix: str) -> None:
        for key, value in node.items():
            if isinstance(value, dict):
                visit(value, f"{prefix}{key}.")
            else:
                flat[f"{prefix}{key}"] = str(value)

    visit(OmegaConf.to_container(OmegaConf.load(folder / "config.yaml")), "")
    return flat


def _varies(key: str, runs: list[tuple[dict[str, Any], list[Row]]]) -> bool:
    """Whether a setting tells groups apart; where a whole group of settings was swapped its name is enough."""
    if key == "seed" or (key.startswith("algorithm.") and key != "algorithm.name"):
        return False
    return len({settings.get(key) for settings, _ in runs}) > 1


def _read(path: Path) -> list[Row]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _show(rows: list[Row], folder: Path) -> None:
    names = [key for key in rows[0] if not key.endswith(("_low", "_high")) and (key in SHOWN or key not in MEASURES)]
    table = Table(title=f"{folder}: mean and 95 % interval over the runs", title_justify="left")
    for name in names:
        table.add_column(name.replace("_", " "), justify="right")
    for row in rows:
        table.add_row(*(_cell(row, name) for name in names))
    console.print(table)


def _cell(row: Row, name: str) -> str:
    value = row.get(name, "")
    if not isinstance(value, float):
        return str(value)
    half = (float(row[f"{name}_high"]) - float(row[f"{name}_low"])) / 2
    return f"{value:.3f}" + (f" ± {half:.3f}" if half == half else "")
