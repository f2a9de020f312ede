"""The main job: `python -m anomalymatch.run dataset=galaxymnist al.cycles=3`."""

import logging
import math
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.box import SIMPLE
from rich.table import Table

from anomalymatch.cli import launch, make_callable
from anomalymatch.config import FILE, check_same_run, compose, config_folder, resumed
from anomalymatch.errors import AnomalyMatchError
from anomalymatch.files import write_text
from anomalymatch.terminal import console, fail, set_up_logging, stop

logger = logging.getLogger(__name__)
Row = Mapping[str, float | int | str]
SHOWN = {
    "cycle": "cycle",
    "labels": "labels",
    "found": "found",
    "auroc": "AUROC",
    "ap": "AP",
    "precision_at_1pct": "P@1%",
    "probe_ap": "probe AP",
    "heldout_auroc": "held-out AUROC",
    "heldout_ap": "held-out AP",
    "seconds": "s",
}


def main() -> None:
    """Entry point of the command."""
    launch(_command, stopped="What the finished cycles gave is kept; continue with resume=RUN_FOLDER.")


def run(*overrides: str, folder: Path | str) -> list[dict[str, float | int | str]]:
    """Do what the command does, from Python: `run("dataset=demo", "al.cycles=2", folder="runs/mine")`.

    Args:
        overrides: as on the command line.
        folder: the run folder; one that holds an unfinished run of the same configuration is continued.

    Returns:
        The metrics, one row for each cycle.

    Raises:
        AnomalyMatchError: with one clear sentence.
    """
    return execute(compose(*overrides), Path(folder))


@hydra.main(config_path=str(config_folder()), config_name="config", version_base="1.3")
def _command(config: DictConfig) -> float | None:
    """One job of a run or a sweep; returns the held-out (else the pool's) average precision to a sweeper."""
    hydra_config = HydraConfig.get()
    folder = Path(hydra_config.runtime.output_dir)
    try:
        set_up_logging(config.log_level)
        if config.resume is not None:
            config = resumed(folder, config, list(hydra_config.overrides.task))
        rows = execute(config, folder)
    # Both here already, because Hydra adds lines of its own to an exception, and knows no folder.
    except (AnomalyMatchError, OmegaConfBaseException) as error:
        if hydra_config.mode == RunMode.MULTIRUN:
            from anomalymatch.sweep import record_failure

            record_failure(folder, hydra_config.overrides.task, error)
            return None
        fail(str(error))
    except KeyboardInterrupt:
        if hydra_config.mode == RunMode.MULTIRUN or not (folder / FILE).exists():
            raise
        stop(f"Continue with: python -m anomalymatch.run resume={folder}")
    finally:
        _remove_if_empty(folder)
    if hydra_config.mode == RunMode.RUN:
        show(rows, folder)
    objective = rows[-1].get("heldout_ap", rows[-1].get("ap"))
    return None if objective is None else float(objective)


def execute(config: DictConfig, folder: Path) -> list[dict[str, float | int | str]]:
    """Run (or go on with) the experiment of `config` in `folder`."""
    # Imported late: a mistyped word on the command line should not have to wait for torch.
    from anomalymatch.active.run_folder import RunFolder
    from anomalymatch.build import build_loop, build_tracker

    loop = build_loop(config)  # what is wrong with images or values shows here, before anything is written
    check_same_run(folder, config)
    run_folder = RunFolder(folder)
    try:
        write_text(folder / FILE, OmegaConf.to_yaml(config))
        tracker = build_tracker(config, folder)
        try:
            return loop.run(run_folder, tracker)
        finally:
            tracker.finish()
    finally:
        run_folder.close()


def show(rows: list[dict[str, float | int | str]], folder: Path) -> None:
    """Print the summary table."""
    columns = [column for column in SHOWN if column in rows[-1]]
    table = Table(header_style="bold", box=SIMPLE, padding=0)
    for column in columns:
        table.add_column(SHOWN[column], justify="right")
    for row in rows:
        table.add_row(*(_cell(row.get(column, "")) for column in columns))
    console.print(table)
    console.print(f"Report: {folder / 'report.html'}", soft_wrap=True, markup=False)


def _remove_if_empty(folder: Path) -> None:
    """Hydra makes the folder before the job starts; a job that fails at once should leave nothing behind."""
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def _cell(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return "-" if math.isnan(value) else f"{value:.3f}"


if __name__ == "__main__":
    # By its proper name: a launcher can send only that to other processes.
    import_module("anomalymatch.run").main()
else:
    make_callable(__name__, run)
