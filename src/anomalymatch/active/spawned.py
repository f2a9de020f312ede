"""Trainings in several processes: which Lightning may start, and that none of them stays behind."""

import os
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager

from pytorch_lightning import Trainer
from torch.multiprocessing.spawn import ProcessRaisedException

from anomalymatch import errors
from anomalymatch.data.draws import BatchSpec
from anomalymatch.errors import ConfigError


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
