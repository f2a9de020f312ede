"""After a sweep: mean and 95 % interval over the seeds, for each combination of the other values."""

import csv
import logging
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from anomalymatch.active.run_folder import to_csv
from anomalymatch.files import write_text
from anomalymatch.terminal import console

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
FAILURE = "error.txt"
Row = dict[str, float | int | str]
Run = tuple[dict[str, Any], list[Row]]


class SweepSummary(Callback):
    """Hydra callback: writes summary.csv in the folder of the sweep and prints it, and what went wrong."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Forget what failed when the same sweep was last tried."""
        for path in Path(config.hydra.sweep.dir).glob(f"*/{FAILURE}"):
            path.unlink()

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Collect metrics.csv of all jobs; exit code 1 if one of them failed."""
        folder = Path(config.hydra.sweep.dir)
        failures = [path.read_text(encoding="utf-8") for path in sorted(folder.glob(f"*/{FAILURE}"))]
        rows = summarise(folder)
        if rows:
            write_text(folder / "summary.csv", to_csv(rows))
            _show(rows, folder)
        for failure in failures:
            console.print(Text.assemble(("error:", "bold red"), f" {failure}"), soft_wrap=True, highlight=False)
        if failures:
            sys.exit(1)


def record_failure(folder: Path, overrides: Sequence[str], error: Exception) -> None:
    """Write down why a job of a sweep failed: the other jobs go on, and the end of the sweep tells."""
    write_text(folder / FAILURE, f"job {folder.name} ({' '.join(overrides)}): {' '.join(str(error).split())}")


def summarise(folder: Path) -> list[Row]:
    """Mean and interval of each measure over the runs below `folder` that differ in nothing but the seed.

    Returns:
        One row for each such group and cycle: what varies, `cycle`, `runs`, and for each measure its mean with
        `_low` and `_high`.
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


def _columns(runs: Sequence[Run]) -> list[str]:
    """The settings that tell the runs apart, but for the seed; names of groups first.

    A setting that follows from the ones before it (the oracle's class from its name, say) is left out: the groups are
    the same without it.
    """
    keys = sorted({key for settings, _ in runs for key in settings} - {"seed"}, key=lambda key: (_rank(key), key))
    columns: list[str] = []
    for key in keys:
        if _parts(runs, [*columns, key]) > _parts(runs, columns):
            columns.append(key)
    return columns


def _rank(key: str) -> int:
    return 0 if key.endswith(".name") else 2 if key.endswith("._target_") else 1


def _parts(runs: Sequence[Run], keys: Sequence[str]) -> int:
    """Into how many groups `keys` part the runs."""
    return len({tuple(settings.get(key) for key in keys) for settings, _ in runs})


def _read(path: Path) -> list[Row]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _show(rows: list[Row], folder: Path) -> None:
    names = [key for key in rows[0] if not key.endswith(("_low", "_high")) and (key in SHOWN or key not in MEASURES)]
    table = Table(title=f"{escape(str(folder))}: mean and 95 % interval over the runs", title_justify="left")
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
