"""Lightning for all learners: trainers, step listeners, progress bars, training processes and their exchange."""

import json
import logging
import os
import re
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Shaped
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.loggers.logger import Logger
from pytorch_lightning.plugins.environments import LightningEnvironment
from pytorch_lightning.profilers import SimpleProfiler
from pytorch_lightning.utilities import rank_zero_only
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.multiprocessing.spawn import ProcessRaisedException
from torch.optim import Optimizer

from anomalymatch import errors
from anomalymatch.algorithms.base import StepListener
from anomalymatch.errors import ConfigError
from anomalymatch.progress import progress
from anomalymatch.terminal import LEVELS, set_up_logging


def filter_lightning_warnings() -> None:
    """Ignore Lightning's warnings about intended settings (a frozen average, few workers) and of its dependencies."""
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Silence Lightning's warnings, its list of devices and its tips within the block."""
    talk = logging.getLogger("pytorch_lightning.utilities.rank_zero")
    level = talk.level
    with warnings.catch_warnings():
        filter_lightning_warnings()
        talk.setLevel(logging.WARNING)
        try:
            yield
        finally:
            talk.setLevel(level)


class StepFile:
    """JSON-lines file of training steps, which carries them from a training process to its parent."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __call__(self, row: dict[str, float]) -> None:
        """Append one step."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def rows(self) -> list[dict[str, float]]:
        """Return all steps written so far."""
        if not self.path.exists():
            return []
        return [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]


class StepLogger(Logger):
    """Lightning logger that passes each step's metrics to listeners; of several processes, only in the first.

    Listeners must be picklable where several processes train.
    """

    def __init__(self, *listeners: StepListener) -> None:
        super().__init__()
        self._listeners = listeners

    def __getstate__(self) -> dict[str, Any]:
        root = logging.getLogger()
        return self.__dict__ | {"log_level": logging.getLevelName(root.level) if root.handlers else ""}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A spawned process does not inherit the logging and the warning filters of its parent.
        level = state.pop("log_level")
        self.__dict__.update(state)
        if level.lower() in LEVELS:
            set_up_logging(level)
        for name in ("pytorch_lightning", "lightning_fabric"):
            logging.getLogger(name).setLevel(logging.ERROR)
        filter_lightning_warnings()

    @property
    def name(self) -> str:
        """Name, which Lightning requires."""
        return "steps"

    @property
    def version(self) -> int:
        """Version, which Lightning requires."""
        return 0

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the run folder keeps the configuration."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Pass one row to all listeners."""
        row = {k: float(v) for k, v in metrics.items() if k != "epoch"}
        if row:
            for listener in self._listeners:
                listener({"step": float(step or 0), **row})


class StepProgress(Callback):
    """Progress bar over the steps, with the loss and any pass rate; of several processes, only in the first."""

    def __init__(self, description: str, iterations: int) -> None:
        self._description, self._iterations = description, iterations
        self._open = ExitStack()

    @rank_zero_only
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the bar."""
        self._advance = self._open.enter_context(progress(self._description, self._iterations, unit="steps"))

    @rank_zero_only
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Advance by one step."""
        metrics = trainer.callback_metrics
        passed = f", pass rate {metrics['pass_rate']:.2f}" if "pass_rate" in metrics else ""
        self._advance(1, f"loss {metrics['loss']:.3f}{passed}")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove the bar."""
        self._open.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Remove the bar after an error too, even before the first step."""
        self._open.close()


class AfterEpochs(Callback):
    """Callback that calls a function after each pass over the images; for Lightning the whole training is one epoch.

    Args:
        steps: number of steps in an epoch.
        passed: function of the number of epochs that this training has finished.
    """

    def __init__(self, steps: int, passed: Callable[[int], None]) -> None:
        self._steps, self._passed = steps, passed

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Call the function after the last step of an epoch."""
        if (batch_idx + 1) % self._steps == 0:
            self._passed((batch_idx + 1) // self._steps)


def check_optimizer(optimizer: Callable[..., Optimizer], key: str = "algorithm.learner.optimizer") -> None:
    """Build the optimiser once, so that wrong settings are found before anything is written.

    Raises:
        ConfigError: if it cannot be built.
    """
    try:
        optimizer([torch.nn.Parameter(torch.zeros(1))])
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"{key}: {error}. Another optimiser comes with its own keys: optimizer=adamw, or a "
            f"file optimizer/NAME.yaml in a folder that --config-dir names"
        ) from error


def training_profiler() -> SimpleProfiler:
    """Make a profiler of a training, which writes `profile/fit-training.txt` in the working folder."""
    return SimpleProfiler("profile", "training")


@quiet_lightning()
def build_trainer(make: Callable[..., Trainer], **options: Any) -> Trainer:
    """Build Lightning's Trainer from a partial and the options of one training.

    Raises:
        ConfigError: if Lightning refuses a setting.
    """
    try:
        # `LightningEnvironment`: a batch scheduler counts the tasks that it started, not the processes that Lightning
        # starts in one of them.
        return make(plugins=[LightningEnvironment()], **options)
    except (TypeError, ValueError, MisconfigurationException) as error:
        raise ConfigError(f"trainer.lightning: {error}") from error


@contextmanager
def training_processes(trainer: Trainer) -> Iterator[None]:
    """Kill all training processes that the block leaves behind, and raise their errors as if raised here."""
    port = os.environ.get("MASTER_PORT")
    try:
        yield
    except SystemExit:
        raise KeyboardInterrupt from None  # Lightning turns Ctrl-C into SystemExit
    except ProcessRaisedException as error:
        found = re.search(rf"^{re.escape(errors.__name__)}\.(\w+): (.*)", str(error), re.MULTILINE)
        if found is None:
            raise
        raise getattr(errors, found[1])(found[2]) from error
    finally:
        if trainer.strategy.launcher is not None:
            trainer.strategy.launcher.kill(signal.SIGKILL)
            if port is None:  # Lightning chooses a port and would use it again, free or not
                os.environ.pop("MASTER_PORT", None)


def is_distributed() -> bool:
    """Return True if several processes train together."""
    return dist.is_available() and dist.is_initialized()


def mean_over_processes(values: Shaped[Tensor, " n"]) -> Shaped[Tensor, " n"]:
    """Average `values` over all processes; a single process keeps its own."""
    if not is_distributed():
        return values
    total = values.clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def gather(values: Shaped[Tensor, "b ..."]) -> Shaped[Tensor, "n ..."]:
    """Concatenate the rows of all processes, which have equally many; no gradient flows back."""
    values = values.detach()
    if not is_distributed():
        return values
    parts = [torch.empty_like(values) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, values.contiguous())
    return torch.cat(parts)
