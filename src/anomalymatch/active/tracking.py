"""Logging to Weights & Biases: metrics, curves, contact sheets, labels and weights. Never a prompt, never a stop."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable
from uuid import uuid4

import numpy as np

from anomalymatch.active.report import FALSE_POSITIVES, TOP
from anomalymatch.active.run_folder import STEPS, Row, RunFolder
from anomalymatch.algorithms.base import BACKBONE, NOVELTY, WEIGHTS
from anomalymatch.errors import ConfigError
from anomalymatch.evaluation.metrics import Curves
from anomalymatch.files import write_text

MODES = ("auto", "online", "offline")
RUN_ID = "wandb_run_id"


@runtime_checkable
class Tracker(Protocol):
    """Gets what happens in a run as it happens."""

    def log_step(self, cycle: int, row: Mapping[str, float]) -> None:
        """Losses of one training step."""
        ...

    def log_cycle(self, cycle: int, row: Row, folder: RunFolder, points: Curves | None) -> None:
        """Metrics, figures, curves, labels and weights of a finished cycle; after a resume once more, of its last."""
        ...

    def log_groups(self, rows: Sequence[Mapping[str, float | int | str]], pictures: Sequence[Path]) -> None:
        """The table of a clustering, one row a group, and its pictures."""
        ...

    def finish(self) -> None:
        """The run is over."""
        ...


class NoTracker:
    """Tracks nothing: the run folder has everything anyway."""

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        """Made like every tracker."""

    def log_step(self, cycle: int, row: Mapping[str, float]) -> None:
        """Nothing."""

    def log_cycle(self, cycle: int, row: Row, folder: RunFolder, points: Curves | None) -> None:
        """Nothing."""

    def log_groups(self, rows: Sequence[Mapping[str, float | int | str]], pictures: Sequence[Path]) -> None:
        """Nothing."""

    def finish(self) -> None:
        """Nothing."""


class WandbTracker:
    """A W&B run; a resumed run folder goes on in the same one.

    Args:
        folder: the run folder; offline runs are kept in its `wandb` folder.
        config: the composed configuration.
        project: W&B project.
        entity: W&B team; None for the user's own.
        mode: `auto` is online where a key is set and offline otherwise.
        group: W&B group, which keeps the runs of a sweep together.
        tags: W&B tags.
    """

    def __init__(
        self,
        folder: Path,
        config: dict[str, Any],
        *,
        project: str,
        entity: str | None,
        mode: str,
        group: str | None,
        tags: Sequence[str],
    ) -> None:
        import wandb

        if mode not in MODES:
            raise ConfigError(f"logger.mode is {mode!r}: choose one of {', '.join(MODES)}")
        os.environ.setdefault("WANDB_SILENT", "true")
        self._wandb = wandb
        self._run = wandb.init(
            dir=folder,
            id=_run_id(folder),
            resume="allow",
            config=config,
            project=project,
            entity=entity,
            group=group,
            tags=list(tags),
            name=folder.name,
            mode=cast(Any, _resolve(mode)),
        )
        self._run.define_metric("train/*", step_metric="train/step")
        self._run.define_metric("cycle/*", step_metric="cycle/cycle")
        self._steps = _steps_done(folder)

    def log_step(self, cycle: int, row: Mapping[str, float]) -> None:
        """See `Tracker`; steps count on over the cycles."""
        values = {k: v for k, v in row.items() if k != "step"}
        self._run.log({f"train/{k}": v for k, v in values.items()} | {"train/step": self._steps, "train/cycle": cycle})
        self._steps += 1

    def log_cycle(self, cycle: int, row: Row, folder: RunFolder, points: Curves | None) -> None:
        """See `Tracker`."""
        known = {k: v for k, v in row.items() if v == v}  # without an audit, what is left is not a number
        values: dict[str, Any] = {f"cycle/{k}": v for k, v in known.items()}
        pictures = sorted(folder.plots.glob("*.png")) + [folder.cycle(cycle) / n for n in (TOP, FALSE_POSITIVES)]
        values |= {f"figures/{p.stem}": self._wandb.Image(str(p)) for p in pictures if p.exists()}
        events = [
            [e.id, str(e.label or ""), e.annotator, e.at.isoformat(), e.cycle, e.score] for e in folder.labels.events()
        ]
        columns: list[str | int] = ["image", "label", "annotator", "at", "cycle", "score"]
        values["labels"] = self._wandb.Table(columns=columns, data=events)
        self._run.log(values | self._curves(points))
        artifact = self._wandb.Artifact(f"weights-{self._run.id}", type="model", metadata=known)
        for path in (folder.cycle(cycle) / name for name in (WEIGHTS, NOVELTY, BACKBONE)):
            for file in (path, path.with_suffix(".json")):
                if file.exists():
                    artifact.add_file(str(file), policy="immutable")
        self._run.log_artifact(artifact, aliases=["latest", f"cycle-{cycle}"])

    def _curves(self, points: Curves | None) -> dict[str, Any]:
        """Precision-recall and ROC as charts that one can point at and compare between runs."""
        if points is None or not points.recall.size:
            return {}
        charts = {}
        for title, x, y, xy in (
            ("Precision and recall", "recall", "precision", (points.recall, points.precision)),
            ("ROC", "false positive rate", "true positive rate", (points.fpr, points.tpr)),
        ):
            table = self._wandb.Table(columns=[x, y], data=np.stack(xy, axis=1).tolist())
            charts[f"curves/{title}"] = self._wandb.plot.line(table, x=x, y=y, title=f"{title}, unlabelled rest")
        return charts

    def log_groups(self, rows: Sequence[Mapping[str, float | int | str]], pictures: Sequence[Path]) -> None:
        """See `Tracker`."""
        columns: list[str | int] = list(rows[0]) if rows else []
        table = self._wandb.Table(columns=columns, data=[list(row.values()) for row in rows])
        self._run.log({"groups/table": table} | {f"groups/{p.stem}": self._wandb.Image(str(p)) for p in pictures})

    def finish(self) -> None:
        """See `Tracker`."""
        self._run.finish()


def _run_id(folder: Path) -> str:
    """The W&B run of this folder, the same after a resume; the agent of a W&B sweep chooses it."""
    path = folder / RUN_ID
    if not path.exists():
        write_text(path, os.environ.get("WANDB_RUN_ID") or uuid4().hex[:8])
    return path.read_text(encoding="utf-8").strip()


def _steps_done(folder: Path) -> int:
    """Steps that the finished cycles took: a resumed run counts on from there."""
    files = (folder / "cycles").glob(f"[0-9]*/{STEPS}")
    return sum(max(0, len(path.read_text(encoding="utf-8").splitlines()) - 1) for path in files)


def _resolve(mode: str) -> str:
    """W&B asks on the terminal when it has no key: without one it must be offline."""
    if mode != "auto":
        return mode
    if os.environ.get("WANDB_MODE"):
        return os.environ["WANDB_MODE"]
    import wandb

    return "online" if wandb.login(prompt=False) else "offline"
