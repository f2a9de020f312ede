"""Folders of configurations: that of the package, of installed plug-ins, and of the user."""

from functools import cache
from importlib import resources
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

from hydra.core.override_parser.types import Quote, QuotedString

from anomalymatch.errors import ConfigError

GROUP = "anomalymatch.plugins"
"""Group of the entry points of plug-ins: NAME = "PACKAGE", whose folder `conf` is laid out like that of this one."""


def config_folder() -> Path:
    """Return the folder `conf`: in an installed package, or at the top of a checkout."""
    installed = Path(str(resources.files("anomalymatch"))) / "conf"
    return installed if installed.is_dir() else Path(__file__).resolve().parents[2] / "conf"


@cache
def plugin_folders() -> tuple[Path, ...]:
    """Return the folders of the installed plug-ins, by name; none of their code is run.

    Raises:
        ConfigError: if a plug-in has no such folder.
    """
    folders = []
    for point in sorted(entry_points(group=GROUP), key=lambda point: point.name):
        spec = find_spec(point.value) if point.value.isidentifier() else None
        places = list(spec.submodule_search_locations or []) if spec else []
        folder = Path(places[0]) / "conf" if places else None
        if folder is None or not folder.is_dir():
            raise ConfigError(
                f"the plug-in {point.name} names the package {point.value}, which has no folder conf: install it again "
                f"or remove it"
            )
        folders.append(folder)
    return tuple(folders)


def config_folders(own: Path | None) -> list[Path]:
    """Return the folders of configurations: of the package, of plug-ins and, if there is one, of the user."""
    return [config_folder(), *plugin_folders(), *([own] if own else [])]


def search_path(folders: list[Path]) -> list[str]:
    """Return the words by which Hydra searches further folders."""
    paths = [QuotedString(f"file://{folder.resolve()}", Quote.single).with_quotes() for folder in folders]
    return [f"hydra.searchpath=[{','.join(paths)}]"] if paths else []
