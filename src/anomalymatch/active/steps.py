"""Losses of every training step, handed from Lightning to whoever listens, and its progress bar."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.loggers.logger import Logger

from anomalymatch.progress import progress

StepListener = Callable[[dict[str, float]], None]


def ignore_step(row: dict[str, float]) -> None:
    """The listener of a learner that nobody listens to."""


class StepLogger(Logger):
    """A Lightning logger that passes each step's metrics on as one plain row."""

    def __init__(self, listener: StepListener) -> None:
        super().__init__()
        self._listener = listener

    @property
    def name(self) -> str:
        """Lightning asks for a name."""
        return "steps"

    @property
    def version(self) -> int:
        """Lightning asks for a version."""
        return 0

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """The run folder keeps the configuration."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Pass one row on."""
        row = {k: float(v) for k, v in metrics.items() if k != "epoch"}
        if row:
            self._listener({"step": float(step or 0), **row})


class StepProgress(Callback):
    """A progress bar over the steps, with the loss and the pass rate."""

    def __init__(self, description: str, iterations: int) -> None:
        self._bar = progress(description, iterations, unit="steps")
        self._open = ExitStack()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the bar."""
        self._advance = self._open.enter_context(self._bar)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """One step further."""
        metrics = trainer.callback_metrics
        self._advance(1, f"loss {metrics['loss']:.3f}, pass rate {metrics['pass_rate']:.2f}")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the bar away."""
        self._open.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Take the bar away also when training breaks off, be it before the first step."""
        self._open.close()
