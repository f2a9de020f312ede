"""Trackers of runs; that of Weights & Biases logs metrics, curves, pictures, labels and weights, without any prompt."""

import logging
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast
from uuid import uuid4

import numpy as np
import requests
from requests.utils import get_netrc_auth

from anomalymatch.active.report import EVIDENCE, FALSE_POSITIVES, TOP
from anomalymatch.active.run_folder import STEPS, RunFolder
from anomalymatch.algorithms.base import BACKBONE, NOVELTY, WEIGHTS
from anomalymatch.checks import check_choice, check_range
from anomalymatch.evaluation.metrics import Curves
from anomalymatch.files import write_text
from anomalymatch.text import printable, reason
from anomalymatch.types import Row

logger = logging.getLogger(__name__)
MODES = ("auto", "online", "offline")
RUN_ID = "wandb_run_id"


class Tracker:
    """Logger of a run. This base class logs nothing: the run folder has all results."""

    def __init__(self, folder: Path, config: dict[str, Any], name: str, sweep: str | None) -> None:
        """Accept the arguments of every tracker: run folder, configuration, name of the run, and its sweep if any."""

    def log_step(self, cycle: int, row: Mapping[str, float]) -> None:
        """Log the losses of a training step."""

    def log_cycle(self, cycle: int, row: Row, folder: RunFolder, points: Curves | None) -> None:
        """Log metrics, figures, curves, labels and weights of a finished cycle; a resumed run repeats its last one."""

    def log_groups(self, rows: Sequence[Row], pictures: Sequence[Path]) -> None:
        """Log the table of a clustering, one row for each group, and its pictures."""

    def finish(self) -> None:
        """Finish the run."""


class Trackers(Tracker):
    """Several trackers as one."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self._trackers = trackers

    def log_step(self, cycle: int, row: Mapping[str, float]) -> None:
        """See `Tracker`."""
        for tracker in self._trackers:
            tracker.log_step(cycle, row)

    def log_cycle(self, cycle: int, row: Row, folder: RunFolder, points: Curves | None) -> None:
        """See `Tracker`."""
        for tracker in self._trackers:
            tracker.log_cycle(cycle, row, folder, points)

    def log_groups(self, rows: Sequence[Row], pictures: Sequence[Path]) -> None:
        """See `Tracker`."""
        for tracker in self._trackers:
            tracker.log_groups(rows, pictures)

    def finish(self) -> None:
        """See `Tracker`."""
        for tracker in self._trackers:
            tracker.finish()


class WandbTracker(Tracker):
    """Tracker that logs to a W&B run; a resumed run folder continues the same one.

    A server that cannot be reached is no error: the run is logged offline, and the log says how to upload it later.

    Args:
        folder: the run folder; its `wandb` folder keeps offline runs.
        config: the composed configuration.
        name: name of the run.
        sweep: name of the sweep that the run belongs to; the W&B group unless `group` is given.
        project: W&B project.
        entity: W&B team; None is the user's own.
        mode: `auto` is online if a key is set, and offline otherwise.
        group: W&B group.
        tags: W&B tags.
        media: log pictures; without, they stay in the run folder.
        timeout: longest wait for an answer of the server, in seconds.
    """

    def __init__(
        self,
        folder: Path,
        config: dict[str, Any],
        name: str,
        sweep: str | None,
        *,
        project: str,
        entity: str | None,
        mode: str,
        group: str | None,
        tags: Sequence[str],
        media: bool,
        timeout: float,
    ) -> None:
        import wandb

        check_choice("logger.wandb.mode", mode, MODES)
        check_range("logger.wandb.timeout", timeout, above=0)
        os.environ.setdefault("WANDB_SILENT", "true")
        self._wandb, self._media = wandb, media
        start = partial(
            wandb.init,
            dir=folder,
            id=_run_id(folder),
            resume="allow",
            config=config,
            project=project,
            entity=entity,
            group=group or sweep,
            tags=list(tags),
            name=name,
            settings=wandb.Settings(init_timeout=3 * timeout),
        )
        try:
            mode = _resolve(mode, timeout)
            self._run = start(mode=cast(Any, mode))
        except (requests.RequestException, wandb.Error) as error:
            why = "no answer" if isinstance(error, requests.RequestException) else printable(reason(error), limit=200)
            logger.warning("W&B cannot be used (%s: %s): this run is logged offline", _server(), why)
            mode = "offline"
            self._run = start(mode="offline")
        self._offline = mode == "offline"
        if self._run.url:
            logger.info("W&B: %s", self._run.url)
        self._run.define_metric("train/*", step_metric="train/step")
        self._run.define_metric("cycle/*", step_metric="cycle/cycle")
        self._steps = steps_done(folder)

    def log_step(self, cycle: int, row: Mapping[str, float]) -> None:
        """See `Tracker`; steps are counted over all cycles."""
        values = {k: v for k, v in row.items() if k != "step"}
        self._run.log({f"train/{k}": v for k, v in values.items()} | {"train/step": self._steps, "train/cycle": cycle})
        self._steps += 1

    def log_cycle(self, cycle: int, row: Row, folder: RunFolder, points: Curves | None) -> None:
        """See `Tracker`."""
        known = known_metrics(row)
        values: dict[str, Any] = {f"cycle/{k}": v for k, v in known.items()}
        values |= self._pictures("figures", cycle_pictures(folder, cycle))
        events = [
            [e.id, str(e.label or ""), e.annotator, e.at.isoformat(), e.cycle, e.score] for e in folder.labels.events()
        ]
        columns: list[str | int] = ["image", "label", "annotator", "at", "cycle", "score"]
        values["labels"] = self._wandb.Table(columns=columns, data=events)
        self._run.log(values | self._curves(points))
        artifact = self._wandb.Artifact(f"weights-{self._run.id}", type="model", metadata=known)
        for file in cycle_weights(folder, cycle):
            artifact.add_file(str(file), policy="immutable")
        self._run.log_artifact(artifact, aliases=["latest", f"cycle-{cycle}"])

    def _curves(self, points: Curves | None) -> dict[str, Any]:
        """Make interactive charts of precision-recall and ROC, which can be compared between runs."""
        if points is None or not points.recall.size:
            return {}
        charts = {}
        for title, x, y, xy in (
            ("Precision and recall", "recall", "precision", (points.recall, points.precision)),
            ("ROC", "false positive rate", "true positive rate", (points.fpr, points.tpr)),
        ):
            table = self._wandb.Table(columns=[x, y], data=np.stack(xy, axis=1).tolist())
            charts[f"curves/{title}"] = self._wandb.plot.line(table, x=x, y=y, title=f"{title}, unlabelled images")
        return charts

    def log_groups(self, rows: Sequence[Row], pictures: Sequence[Path]) -> None:
        """See `Tracker`."""
        columns: list[str | int] = list(rows[0]) if rows else []
        table = self._wandb.Table(columns=columns, data=[list(row.values()) for row in rows])
        self._run.log({"groups/table": table} | self._pictures("groups", pictures))

    def _pictures(self, section: str, paths: Sequence[Path]) -> dict[str, Any]:
        return {f"{section}/{path.stem}": self._wandb.Image(str(path)) for path in paths} if self._media else {}

    def finish(self) -> None:
        """See `Tracker`."""
        self._run.finish()
        if self._offline:
            logger.info("W&B: logged offline; upload it with: wandb sync %s", Path(self._run.dir).parent)


def _run_id(folder: Path) -> str:
    """Return the id of the W&B run of this folder, the same after a resume; the agent of a W&B sweep chooses it."""
    path = folder / RUN_ID
    if not path.exists():
        write_text(path, os.environ.get("WANDB_RUN_ID") or uuid4().hex[:8])
    return path.read_text(encoding="utf-8").strip()


def known_metrics(row: Row) -> Row:
    """Leave out undefined metrics: without an audit, the remaining anomalies are NaN."""
    return {k: v for k, v in row.items() if v == v}


def cycle_pictures(folder: RunFolder, cycle: int) -> list[Path]:
    """List the plots of a run and the contact sheets of a cycle that exist."""
    sheets = [folder.cycle(cycle) / name for name in (TOP, EVIDENCE, FALSE_POSITIVES)]
    return [path for path in sorted(folder.plots.glob("*.png")) + sheets if path.exists()]


def cycle_weights(folder: RunFolder, cycle: int) -> list[Path]:
    """List the files of the trained model of a cycle."""
    files = [folder.cycle(cycle) / name for name in (WEIGHTS, NOVELTY, BACKBONE)]
    return [file for path in files for file in (path, path.with_suffix(".json")) if file.exists()]


def steps_done(folder: Path) -> int:
    """Count the training steps of the finished cycles."""
    files = (folder / "cycles").glob(f"[0-9]*/{STEPS}")
    return sum(max(0, path.read_bytes().count(b"\n") - 1) for path in files)


def _resolve(mode: str, timeout: float) -> str:
    """Resolve `auto`: without a key W&B would ask on the terminal, so it must be offline.

    Raises:
        requests.RequestException: if there is a key, and the server does not answer.
    """
    import wandb

    if mode == "auto":
        mode = os.environ.get("WANDB_MODE") or mode
    if mode not in ("auto", "online"):
        return mode
    if mode == "online" or wandb.setup().settings.api_key or get_netrc_auth(_server()):
        requests.get(_server(), timeout=timeout)  # W&B itself tries for minutes
    return "online" if mode == "online" or wandb.login(prompt=False) else "offline"


def _server() -> str:
    import wandb

    return str(wandb.setup().settings.base_url)
