"""Terminal output of the commands: log lines, errors and the message after Ctrl-C."""

import logging
import sys
from typing import NoReturn

from rich.console import Console
from rich.logging import RichHandler
from rich.text import Text

from anomalymatch.checks import check_choice

console = Console(stderr=True)
LEVELS = ("debug", "info", "warning", "error")
NOISY = ("pytorch_lightning", "httpx", "urllib3", "wandb", "matplotlib", "PIL", "huggingface_hub")


def set_up_logging(level: str) -> None:
    """Send log lines to the terminal; noisy libraries log errors only.

    Raises:
        ConfigError: if `level` is unknown.
    """
    check_choice("log_level", level.lower(), LEVELS)
    handler = RichHandler(console=console, show_path=False, log_time_format="[%X]")
    handler.addFilter(lambda record: record.name.split(".")[0] not in NOISY or record.levelno >= logging.ERROR)
    logging.basicConfig(level=level.upper(), format="%(message)s", handlers=[handler], force=True)


def fail(message: str) -> NoReturn:
    """Print an error line and exit with code 1."""
    line = " ".join(message.split())
    console.print(Text.assemble(("error:", "bold red"), f" {line}"), soft_wrap=True, highlight=False)
    sys.exit(1)


def stop(message: str) -> NoReturn:
    """Print a line and exit with the code of Ctrl-C."""
    console.print(f"Stopped. {message}", soft_wrap=True, highlight=False, markup=False)
    sys.exit(130)
