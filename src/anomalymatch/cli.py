"""Launch a Hydra command: check its words, and report an error or Ctrl-C in one line."""

import logging
import os
import sys
from argparse import ArgumentError, ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from functools import partial, wraps
from importlib.metadata import version
from inspect import signature
from pathlib import Path
from types import ModuleType
from typing import Any

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from anomalymatch.config import check_complete, compose_partly, expand
from anomalymatch.config_folders import config_folder, plugin_folders, search_path
from anomalymatch.errors import ConfigError
from anomalymatch.help import help_text
from anomalymatch.terminal import errors_in_a_line, set_up_logging

logger = logging.getLogger(__name__)


def make_callable(module: str, function: Callable[..., Any]) -> None:
    """Make a module callable as its function of the same name, so that `anomalymatch.run(...)` always works.

    Signature and help of the module are those of the function.
    """

    class CallableModule(ModuleType):
        __signature__ = signature(function)

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return function(*args, **kwargs)

    sys.modules[module].__class__ = CallableModule
    sys.modules[module].__doc__ = function.__doc__


def launch(job: Callable[[DictConfig], object], *, name: str = "config", stopped: str) -> None:
    """Run a job with the configuration of the command line; exit with 1 on an error of the user, with 130 on Ctrl-C.

    Args:
        job: function of the composed configuration.
        name: name of the primary configuration.
        stopped: message after Ctrl-C.
    """
    report = partial(errors_in_a_line, HydraException, OmegaConfBaseException, stopped=stopped)

    @wraps(job)
    def report_errors(config: DictConfig) -> object:
        with report():  # inside of `hydra.main`, which would add lines to them
            set_up_logging(config.log_level)  # again, because a launcher may have started this process
            return job(config)

    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # raise errors instead of printing them
    with report():
        options, overrides = _parse(sys.argv[1:])
        if options.version:
            print(f"anomalymatch {version('anomalymatch')}")
            return
        expanded = [expand(word, multirun=options.multirun, name=name) for word in overrides]
        if not options.about_hydra:
            composed = compose_partly(expanded, multirun=options.multirun, folder=options.config_dir, name=name)
            if options.help:
                print(help_text(composed, options.config_dir, name))
                return
            if options.cfg is None:
                check_complete(composed.config)
                set_up_logging(composed.config.log_level)
                logger.info("anomalymatch %s: opening the images", version("anomalymatch"))
        by_word = dict(zip(overrides, expanded, strict=True))
        sys.argv[1:] = [by_word.get(word, word) for word in sys.argv[1:]] + search_path(list(plugin_folders()))
        # Inside of the block, because Hydra makes the run folder, which may fail.
        hydra.main(config_path=str(config_folder()), config_name=name, version_base="1.3")(report_errors)()


def _parse(words: Sequence[str]) -> tuple[Namespace, list[str]]:
    """Return the options that matter before Hydra starts, and the overrides.

    Raises:
        ConfigError: if an option is wrong.
    """
    parser = ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config-dir", "-cd", type=Path)
    for flag in (("--multirun", "-m"), ("--help", "-h"), ("--version",), ("--run", "-r"), ("--resolve",)):
        parser.add_argument(*flag, action="store_true")
    for flag in (("--shell-completion", "-sc"), ("--hydra-help",)):
        parser.add_argument(*flag, action="store_true", dest="about_hydra")
    parser.add_argument("--info", "-i", nargs="?", const="all")
    for option in (("--cfg", "-c"), ("--package", "-p"), ("--config-path", "-cp"), ("--config-name", "-cn")):
        parser.add_argument(*option)
    try:
        options, rest = parser.parse_known_args(words)
    except ArgumentError as error:
        raise ConfigError(f"{error}: see --help") from error
    unknown = [word for word in rest if word.startswith("-")]
    if unknown:
        raise ConfigError(f"there is no option {unknown[0]}: see --help")
    if options.config_dir is not None and not options.config_dir.is_dir():
        raise ConfigError(f"--config-dir {options.config_dir}: there is no such folder")
    return options, rest
