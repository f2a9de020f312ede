"""Losses of every training step, handed from Lightning to whoever listens, and its progress bar."""

import copy
import logging
import os
import re
import signal
import warnings
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection
from threading import Event
from typing import Any, cast

from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.loggers.logger import Logger
from pytorch_lightning.utilities import rank_zero_only
from torch.multiprocessing.spawn import ProcessRaisedException

from anomalymatch import errors
from anomalymatch.algorithms.fixmatch.batches import BatchSpec
from anomalymatch.algorithms.fixmatch.module import FixMatch
from anomalymatch.backbones.network import Network
from anomalymatch.errors import ConfigError
from anomalymatch.progress import progress
from anomalymatch.terminal import LEVELS, set_up_logging

StepListener = Callable[[dict[str, float]], None]
POLL_S = 0.05


def ignore_step(row: dict[str, float]) -> None:
    """The listener of a learner that nobody listens to."""


def quieten_lightning() -> None:
    """Silence what Lightning warns of and is meant here: a frozen average in evaluation mode, few loader workers.

    Its own dependencies deprecate what it calls, too.
    """
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Within it Lightning warns of nothing that is meant, lists no devices and advertises nothing."""
    talk = logging.getLogger("pytorch_lightning.utilities.rank_zero")
    level = talk.level
    with warnings.catch_warnings():
        quieten_lightning()
        talk.setLevel(logging.WARNING)
        try:
            yield
        finally:
            talk.setLevel(level)


@contextmanager
def relayed(listener: StepListener) -> Iterator[StepListener]:
    """A stand-in for `listener` that can be sent to a spawned process: what it is told there, `listener` hears here.

    Rows arrive as they come, in a thread; when the block ends, all have. An error of the listener is raised then.
    """
    reader, writer = get_context("spawn").Pipe(duplex=False)
    done = Event()
    with reader, writer, ThreadPoolExecutor(1, "steps") as thread:
        passing_on = thread.submit(_pass_on, reader, listener, done)
        try:
            yield writer.send
        finally:
            done.set()
        passing_on.result()


def _pass_on(reader: Connection, listener: StepListener, done: Event) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # Ctrl-C has to wake the main thread, not this one
    failure: Exception | None = None
    while True:
        last = done.is_set()  # before looking: what was sent before it was set is there then
        if reader.poll(0 if last else POLL_S):
            row = reader.recv()
            try:
                if failure is None:
                    listener(row)
            except Exception as error:
                failure = error  # the pipe must be emptied all the same, or the training would wait for it
        elif last:
            break
    if failure is not None:
        raise failure


class StepLogger(Logger):
    """A Lightning logger that passes each step's metrics on as one plain row, of several processes from the first."""

    def __init__(self, listener: StepListener) -> None:
        super().__init__()
        self._listener = listener

    def __getstate__(self) -> dict[str, Any]:
        root = logging.getLogger()
        return self.__dict__ | {"log_level": logging.getLevelName(root.level) if root.handlers else ""}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A spawned process trains, and knows nothing yet of what the one that started it shows on the terminal.
        level = state.pop("log_level")
        self.__dict__.update(state)
        if level.lower() in LEVELS:
            set_up_logging(level)
        for name in ("pytorch_lightning", "lightning_fabric"):
            logging.getLogger(name).setLevel(logging.ERROR)
        quieten_lightning()

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

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Pass one row on."""
        row = {k: float(v) for k, v in metrics.items() if k != "epoch"}
        if row:
            self._listener({"step": float(step or 0), **row})


class AtSteps(Callback):
    """Shows the average that scores, a copy of it, after some of the steps.

    Args:
        steps: after how many.
        look: gets their number and the network.
    """

    def __init__(self, steps: Collection[int], look: Callable[[int, Network], None]) -> None:
        self._steps, self._look = steps, look

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Before the next step begins, when the average has followed the last one."""
        if trainer.global_step in self._steps:
            network = copy.deepcopy(cast(FixMatch, pl_module).ema.network)
            network.backbone.averages = True
            self._look(trainer.global_step, network)


class StepProgress(Callback):
    """A progress bar over the steps, with the loss and any pass rate; only the first of several processes shows it."""

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
        """One step further."""
        metrics = trainer.callback_metrics
        passed = f", pass rate {metrics['pass_rate']:.2f}" if "pass_rate" in metrics else ""
        self._advance(1, f"loss {metrics['loss']:.3f}{passed}")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the bar away."""
        self._open.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Take the bar away also when training breaks off, be it before the first step."""
        self._open.close()


def spawns(trainer: Trainer, batch: BatchSpec) -> bool:
    """Whether `trainer` starts processes of its own; refuses those that would repeat the program, or cannot train.

    Raises:
        ConfigError: with what to set instead.
    """
    launcher = trainer.strategy.launcher
    # Lightning's `ddp` starts the command line anew for every device: each would go through the whole loop and write
    # the run folder. A fork inherits threads that stand still and a GPU that it cannot use.
    if launcher is not None and getattr(launcher, "_start_method", None) != "spawn":
        raise ConfigError(
            f"trainer.lightning: {type(trainer.strategy).__name__} with {trainer.num_devices} devices would start this "
            "program anew, or fork it: set trainer.lightning.strategy=ddp_spawn to train on several devices"
        )
    if trainer.num_nodes > 1:
        raise ConfigError(f"trainer.lightning.num_nodes is {trainer.num_nodes}: training is on one host")
    if getattr(trainer.strategy, "_layer_sync", None) is not None:
        raise ConfigError(
            "trainer.lightning.sync_batchnorm would take the activations out of timm's networks: leave it out, "
            "the statistics are averaged over the processes after every step"
        )
    batch.shared_by(trainer.world_size)
    return launcher is not None


@contextmanager
def processes_of(trainer: Trainer) -> Iterator[None]:
    """Leave none of the processes behind that the block starts, and raise what they raise as if it were raised here."""
    port = os.environ.get("MASTER_PORT")
    try:
        yield
    except SystemExit:
        raise KeyboardInterrupt from None  # into which Lightning turns Ctrl-C
    except ProcessRaisedException as error:
        found = re.search(rf"^{re.escape(errors.__name__)}\.(\w+): (.*)", str(error), re.MULTILINE)
        if found is None:
            raise
        raise getattr(errors, found[1])(found[2]) from error
    finally:
        if trainer.strategy.launcher is not None:
            trainer.strategy.launcher.kill(signal.SIGKILL)
            if port is None:  # Lightning chooses one and would keep to it, free or not
                os.environ.pop("MASTER_PORT", None)
