"""Launch a Hydra command: check its words, and report an error or Ctrl-C in one line."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

from hydra._internal.utils import get_args_parser
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from anomalymatch.config import check_overrides, expand
from anomalymatch.errors import AnomalyMatchError, MissingValueError
from anomalymatch.terminal import fail, stop


def make_callable(module: str, function: Callable[..., Any]) -> None:
    """Let a module be the function of its own name too: `anomalymatch.run(...)` works whichever was imported."""

    class CallableModule(ModuleType):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return function(*args, **kwargs)

    sys.modules[module].__class__ = CallableModule


def launch(command: Callable[[], object], *, name: str = "config", stopped: str) -> None:
    """Run a command of Hydra's: errors that a user can mend are one line, exit code 1; Ctrl-C is 130.

    Args:
        command: what `hydra.main` decorates.
        name: of its primary configuration.
        stopped: what is said after Ctrl-C.
    """
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # hand errors to the lines below instead of printing them
    sys.argv[1:] = map(expand, sys.argv[1:])
    words = get_args_parser().parse_args()
    folder = Path(words.config_dir) if words.config_dir else None
    try:
        with errors_in_a_line():
            # Who asks what there is to set need not have set it.
            with suppress(MissingValueError) if words.help or words.cfg else nullcontext():
                check_overrides(words.overrides, multirun=words.multirun, folder=folder, name=name)
            command()  # Hydra makes the folder of the run, which may fail, too
    except KeyboardInterrupt:
        stop(stopped)


@contextmanager
def errors_in_a_line() -> Iterator[None]:
    """Errors that a user can mend are one line, exit code 1.

    For what `hydra.main` decorates: Hydra adds lines of its own to an exception that reaches it.
    """
    try:
        yield
    except (AnomalyMatchError, HydraException, OmegaConfBaseException) as error:
        fail(str(error))
    except OSError as error:
        fail(f"the system refused: {error}")
