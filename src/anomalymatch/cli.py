"""Launch a Hydra command: check its words, and report an error or Ctrl-C in one line."""

import os
import sys
from argparse import ArgumentParser
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import wraps
from pathlib import Path
from types import ModuleType
from typing import Any

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from anomalymatch.config import check_overrides, config_folder, expand
from anomalymatch.errors import AnomalyMatchError, MissingValueError
from anomalymatch.terminal import fail, set_up_logging, stop


def make_callable(module: str, function: Callable[..., Any]) -> None:
    """Make a module callable as its function of the same name, so that `anomalymatch.run(...)` always works."""

    class CallableModule(ModuleType):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return function(*args, **kwargs)

    sys.modules[module].__class__ = CallableModule


def launch(job: Callable[[DictConfig], object], *, name: str = "config", stopped: str) -> None:
    """Run a job with the configuration of the command line; exit with 1 on an error of the user, with 130 on Ctrl-C.

    Args:
        job: function of the composed configuration.
        name: name of the primary configuration.
        stopped: message after Ctrl-C.
    """

    @wraps(job)
    def report_errors(config: DictConfig) -> object:
        with errors_in_a_line():  # inside of `hydra.main`, which would add lines to them
            set_up_logging(config.log_level)  # again, because a launcher may have started this process
            return job(config)

    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # raise errors instead of printing them
    sys.argv[1:] = map(expand, sys.argv[1:])
    folder, multirun, asks, overrides = _parse(sys.argv[1:])
    try:
        with errors_in_a_line():
            # A missing value is no error for --help and --cfg.
            with suppress(MissingValueError) if asks else nullcontext():
                set_up_logging(check_overrides(overrides, multirun=multirun, folder=folder, name=name).log_level)
            # Inside of the block, because Hydra makes the run folder, which may fail.
            hydra.main(config_path=str(config_folder()), config_name=name, version_base="1.3")(report_errors)()
    except KeyboardInterrupt:
        stop(stopped)


@contextmanager
def errors_in_a_line() -> Iterator[None]:
    """Print errors of the user in one line and exit with code 1."""
    try:
        yield
    except (AnomalyMatchError, HydraException, OmegaConfBaseException) as error:
        fail(str(error))
    except OSError as error:
        fail(f"operating system error: {error}")


def _parse(words: Sequence[str]) -> tuple[Path | None, bool, bool, list[str]]:
    """Return --config-dir, --multirun, whether the user asks for --help or --cfg, and the overrides."""
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config-dir", "-cd", type=Path)
    parser.add_argument("--multirun", "-m", action="store_true")
    parser.add_argument("--help", "-h", action="store_true")
    parser.add_argument("--cfg", "-c")
    for option in (("--package", "-p"), ("--config-path", "-cp"), ("--config-name", "-cn"), ("--experimental-rerun",)):
        parser.add_argument(*option)
    known, rest = parser.parse_known_args(words)
    overrides = [word for word in rest if not word.startswith("-")]
    return known.config_dir, known.multirun, known.help or known.cfg is not None, overrides
