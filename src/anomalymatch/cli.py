"""What the commands share: one line for an error, one for Ctrl-C, and quiet logs."""

import logging
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any, NoReturn

from rich.logging import RichHandler
from rich.text import Text

from anomalymatch.errors import ConfigError
from anomalymatch.progress import console

LEVELS = ("debug", "info", "warning", "error")
NOISY = ("pytorch_lightning", "httpx", "urllib3", "wandb", "matplotlib", "PIL", "huggingface_hub")


def set_up_logging(level: str) -> None:
    """Our own lines on the terminal, those of chatty libraries only if they are errors.

    Raises:
        ConfigError: if there is no such level.
    """
    if level.lower() not in LEVELS:
        raise ConfigError(f"log_level is {level!r}: choose one of {', '.join(LEVELS)}")
    handler = RichHandler(console=console, show_path=False, log_time_format="[%X]")
    handler.addFilter(lambda record: record.name.split(".")[0] not in NOISY or record.levelno >= logging.ERROR)
    logging.basicConfig(level=level.upper(), format="%(message)s", handlers=[handler], force=True)


def fail(message: str) -> NoReturn:
    """Print one line and end with exit code 1."""
    line = " ".join(message.split())
    console.print(Text.assemble(("error:", "bold red"), f" {line}"), soft_wrap=True, highlight=False)
    sys.exit(1)


def stop(message: str) -> NoReturn:
    """Print one line and end with the exit code of Ctrl-C."""
    console.print(f"Stopped. {message}", soft_wrap=True, highlight=False, markup=False)
    sys.exit(130)


def make_callable(module: str, function: Callable[..., Any]) -> None:
    """Let a module be the function of its own name too: `anomalymatch.run(...)` works whichever was imported."""

    class CallableModule(ModuleType):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return function(*args, **kwargs)

    sys.modules[module].__class__ = CallableModule
