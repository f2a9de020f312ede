"""Run active learning: `python -m anomalymatch.run dataset=galaxymnist al.cycles=3`."""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from anomalymatch.cli import launch, make_callable
from anomalymatch.config import FILE, check_same_run, compose, resumed
from anomalymatch.errors import AnomalyMatchError, ConfigError, DataError, LabelError
from anomalymatch.files import write_text
from anomalymatch.terminal import console, print_table, stop
from anomalymatch.text import printable

COLUMNS = {
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
    """Start the command."""
    launch(_job, stopped="The finished cycles are kept; continue with resume=RUN_FOLDER.")


def run(*overrides: str, folder: Path | str) -> list[dict[str, float | int | str]]:
    """Run active learning: rank all images, label some, train on the labels, and rank again, cycle by cycle.

    `run("dataset=folder", "data.root=photos", "al.cycles=3", folder="runs/photos")` does what
    `python -m anomalymatch.run` does, and writes scores, weights, metrics and report.html to the folder.

    Keys that are used most; `python -m anomalymatch.run --cfg job` prints all with their defaults:
        dataset=demo: kind of the images: folder, zip, parquet, hdf5, fits, auto …; conf/dataset has all.
        data.root=PATH: folder, file or URL of the images.
        dataset.anomaly=CLASS: the rare class, where classes are known.
        algorithm=fixmatch: or probe, which takes seconds, and others of conf/algorithm.
        model.image_size=224: side to which images are resized, in pixels.
        al.cycles=3: number of cycles.
        al.budget=20: labels after each cycle.
        al.cold_start=mixed: what to label first if there are no labels.
        al.describe="a ring galaxy": rank by a description, without labels.
        oracle=top_k: what is labelled: the top of the ranking.
        seed=0: seed of everything random.

    Args:
        overrides: keys with values, as on the command line.
        folder: the run folder; an unfinished run of the same configuration in it is continued.

    Returns:
        The metrics, one row for each cycle.

    Raises:
        AnomalyMatchError: with a message of one line.

    Example:
        >>> words = ["dataset=demo", "dataset.source.count=200", "dataset.source.rare_fraction=0.1"]
        >>> rows = am.run(*words, "algorithm=probe", "al.cycles=1", "logger=none", folder="runs/demo")
        >>> rows[0]["labels"], rows[0]["found"]
        (100, 5)
    """
    return execute(compose(*overrides), Path(folder))


def _job(config: DictConfig) -> float | None:
    """Do one job of a run or a sweep; return the held-out (else the pool's) average precision to a sweeper."""
    hydra_config = HydraConfig.get()
    folder = Path(hydra_config.runtime.output_dir)
    try:
        if config.resume is not None:
            config = resumed(folder, config, list(hydra_config.overrides.task))
        rows = execute(config, folder, *_sweep_names(hydra_config))
    except (AnomalyMatchError, OmegaConfBaseException) as error:
        if hydra_config.mode != RunMode.MULTIRUN:
            raise
        from anomalymatch.sweep import record_failure

        record_failure(folder, hydra_config.overrides.task, error)
        return None
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


def execute(
    config: DictConfig, folder: Path, name: str = "", sweep: str | None = None
) -> list[dict[str, float | int | str]]:
    """Start or continue the run of `config` in `folder`; return the metrics of all cycles.

    The tracker gets the name of the run (default: that of the folder) and of its sweep, if any.
    """
    # Imported one by one, so that mistyped words and wrong images are reported without the wait for PyTorch.
    from anomalymatch.build_images import build_task

    task = build_task(config)
    from anomalymatch.active.run_folder import RunFolder
    from anomalymatch.build import build_loop, build_tracker

    loop = build_loop(config, task)  # reports wrong values before anything is written
    check_same_run(folder, config)
    with _undo_if_refused(folder), closing(RunFolder(folder)) as run_folder:
        write_text(folder / FILE, OmegaConf.to_yaml(config))
        tracker = build_tracker(config, folder, name=name, sweep=sweep)
        try:
            return loop.run(run_folder, tracker)
        finally:
            tracker.finish()


def show(rows: Sequence[Mapping[str, float | int | str]], folder: Path) -> None:
    """Print the metrics of all cycles and the path of the report."""
    print_table(rows, {key: heading for key, heading in COLUMNS.items() if key in rows[-1]})
    console.print(f"Report: {folder / 'report.html'}", soft_wrap=True, markup=False)


def _sweep_names(job: Any) -> tuple[str, str | None]:
    """Return the name of a job of a sweep, which is the arguments that vary, and of the sweep; else nothing."""
    if job.mode != RunMode.MULTIRUN:
        return "", None
    folder = Path(job.sweep.dir)
    saved = folder / "multirun.yaml"
    fixed = set(OmegaConf.load(saved).hydra.overrides.task) if saved.is_file() else set()
    words = [word for word in job.overrides.task if word not in fixed]
    return printable(" ".join(words), limit=120), folder.name


@contextmanager
def _undo_if_refused(folder: Path) -> Iterator[None]:
    """Remove what a new run wrote if it is refused before its first cycle ends, so that it can be corrected."""
    is_new = not (folder / FILE).exists()
    before = set(folder.iterdir()) if folder.is_dir() else set()
    try:
        yield
    except (ConfigError, DataError, LabelError):
        if is_new and not any(folder.glob("cycles/[0-9]*")):
            for path in set(folder.iterdir()) - before - {folder / "rejects.parquet"}:  # which says why
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        raise


def _remove_if_empty(folder: Path) -> None:
    """Remove the folder that Hydra made for a job which failed before it wrote anything."""
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


if __name__ == "__main__":
    # Imported by name, because a launcher cannot send a function of `__main__` to other processes.
    import_module("anomalymatch.run").main()
else:
    make_callable(__name__, run)
