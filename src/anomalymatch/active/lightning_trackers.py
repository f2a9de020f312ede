"""Trackers that log through the loggers of Lightning: CSV files, TensorBoard, MLflow."""

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from PIL import Image as PillowImage

from anomalymatch.active.run_folder import LABELS, RunFolder
from anomalymatch.active.tracking import Tracker, cycle_pictures, cycle_weights, known_metrics, steps_done
from anomalymatch.errors import ConfigError
from anomalymatch.evaluation.metrics import Curves
from anomalymatch.files import write_text
from anomalymatch.text import printable, reason
from anomalymatch.types import Row

if TYPE_CHECKING:
    from pytorch_lightning.loggers.logger import Logger

MLFLOW_RUN_ID = "mlflow_run_id"


class LightningTracker(Tracker, ABC):
    """Base of the trackers that log configuration and numbers to a logger of Lightning.

    Numbers of training steps are logged by step, counted over all cycles, and those of a cycle by its number. Loggers
    are made here and not by the configuration: a stranger's run folder must not choose where files and data go.

    Args:
        folder: the run folder.
        config: the composed configuration.
        name: name of the run.
        sweep: name of the sweep that the run belongs to.
        media: log pictures, too.
    """

    package: ClassVar[str] = ""
    """Optional package that the logger needs; the extra has its name."""

    def __init__(
        self, folder: Path, config: dict[str, Any], name: str, sweep: str | None, *, media: bool = False
    ) -> None:
        if self.package and find_spec(self.package) is None:
            raise ConfigError(f'logger={self.package} needs: pip install "anomalymatch[{self.package}]"')
        self._steps, self._media = steps_done(folder), media
        self._logger: Any = self._start(folder, config, name, sweep)

    @abstractmethod
    def _start(self, folder: Path, config: dict[str, Any], name: str, sweep: str | None) -> "Logger":
        """Make the logger, and log the configuration."""

    def log_step(self, cycle: int, row: Mapping[str, float]) -> None:
        """See `Tracker`; steps are counted over all cycles."""
        values = {f"train/{k}": v for k, v in row.items() if k != "step"} | {"train/cycle": float(cycle)}
        self._logger.log_metrics(values, step=self._steps)
        self._steps += 1

    def log_cycle(self, cycle: int, row: Row, folder: RunFolder, points: Curves | None) -> None:
        """See `Tracker`; only the numbers."""
        values = {f"cycle/{k}": float(v) for k, v in known_metrics(row).items() if not isinstance(v, str)}
        self._logger.log_metrics(values, step=cycle)
        self._logger.save()

    def finish(self) -> None:
        """See `Tracker`."""
        self._logger.finalize("success")


class CsvTracker(LightningTracker):
    """Tracker that logs to `csv/version_N` of the run folder; a resumed run adds a version."""

    def _start(self, folder: Path, config: dict[str, Any], name: str, sweep: str | None) -> "Logger":
        from pytorch_lightning.loggers import CSVLogger

        logger = CSVLogger(folder, name="csv")
        logger.log_hyperparams(config)
        return logger


class TensorBoardTracker(LightningTracker):
    """Tracker that logs to `tensorboard` of the run folder; a resumed run adds to the same curves."""

    package = "tensorboard"

    def _start(self, folder: Path, config: dict[str, Any], name: str, sweep: str | None) -> "Logger":
        from pytorch_lightning.loggers import TensorBoardLogger

        logger = TensorBoardLogger(folder, name="tensorboard", version="", default_hp_metric=False)
        logger.log_hyperparams(config)
        return logger

    def log_cycle(self, cycle: int, row: Row, folder: RunFolder, points: Curves | None) -> None:
        """See `Tracker`; numbers and pictures."""
        self._add_pictures("figures", cycle_pictures(folder, cycle), cycle)
        super().log_cycle(cycle, row, folder, points)

    def log_groups(self, rows: Sequence[Row], pictures: Sequence[Path]) -> None:
        """See `Tracker`."""
        lines: list[list[object]] = [list(rows[0]), ["---"] * len(rows[0])] if rows else []
        lines += [list(row.values()) for row in rows]
        table = "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
        self._logger.experiment.add_text("groups/table", table, 0)
        self._add_pictures("groups", pictures, 0)

    def _add_pictures(self, section: str, paths: Sequence[Path], step: int) -> None:
        for path in paths if self._media else ():
            with PillowImage.open(path) as image:
                pixels = np.asarray(image.convert("RGB"))
            self._logger.experiment.add_image(f"{section}/{path.stem}", pixels, step, dataformats="HWC")


class MlflowTracker(LightningTracker):
    """Tracker that logs to an MLflow run; a resumed run folder continues the same one.

    The weights of each cycle, the labels and, if `media` is set, pictures are artifacts of the run. The environment
    variable `MLFLOW_TRACKING_URI` has the server; without it, the runs are in `mlflow.db` of the working folder.

    Args:
        experiment: name of the experiment that the runs belong to.
        **options: see `LightningTracker`.
    """

    package = "mlflow"

    def __init__(self, *args: Any, experiment: str, **options: Any) -> None:
        self._experiment = experiment
        super().__init__(*args, **options)

    def _start(self, folder: Path, config: dict[str, Any], name: str, sweep: str | None) -> "Logger":
        from pytorch_lightning.loggers import MLFlowLogger

        path = folder / MLFLOW_RUN_ID
        run_id = path.read_text(encoding="utf-8").strip() if path.exists() else None
        place = os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
        try:
            logger = MLFlowLogger(
                self._experiment,
                run_name=name,
                run_id=run_id,
                tracking_uri=place,
                tags={"sweep": sweep} if sweep else None,
            )
            if run_id is None:  # MLflow refuses to change the parameters of a run
                logger.log_hyperparams(config)
                write_text(path, str(logger.run_id))
        except Exception as error:  # MLflow, its storage and its server raise anything
            why = printable(reason(error), limit=200)
            raise ConfigError(f"logger=mlflow cannot use {place}: {why}: see MLFLOW_TRACKING_URI") from error
        return logger

    def log_cycle(self, cycle: int, row: Row, folder: RunFolder, points: Curves | None) -> None:
        """See `Tracker`; numbers, labels, weights and pictures."""
        super().log_cycle(cycle, row, folder, points)
        self._add_files(f"cycles/{folder.cycle(cycle).name}", [*cycle_weights(folder, cycle), folder.path / LABELS])
        self._add_files("figures", cycle_pictures(folder, cycle) if self._media else [])

    def log_groups(self, rows: Sequence[Row], pictures: Sequence[Path]) -> None:
        """See `Tracker`."""
        table = {name: [row[name] for row in rows] for name in rows[0]} if rows else {}
        self._logger.experiment.log_dict(self._logger.run_id, table, "groups/table.json")
        self._add_files("groups", pictures if self._media else [])

    def _add_files(self, section: str, paths: Sequence[Path]) -> None:
        for path in paths:
            self._logger.experiment.log_artifact(self._logger.run_id, str(path), section)
