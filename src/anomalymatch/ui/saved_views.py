"""Views that people keep under a name, stored in one file of the run folder."""

import json
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

from anomalymatch.errors import ConfigError, StorageError
from anomalymatch.files import write_text
from anomalymatch.ui.groups import clean_name

MAX_VIEWS = 50


class SavedViews:
    """Addresses of views by name, in the order in which they were saved. Methods are thread-safe.

    Args:
        path: the file.
        on_change: called after each change.

    Raises:
        StorageError: if the file is corrupt.
    """

    def __init__(self, path: Path, on_change: Callable[[], None]) -> None:
        self.path, self._on_change = path, on_change
        self._lock = threading.Lock()
        self._views = _read(path)

    def all(self) -> Mapping[str, str]:
        """Return the address of each view by name."""
        return self._views

    def save(self, name: str, address: str) -> None:
        """Save a view; it replaces the one of the same name.

        Raises:
            ConfigError: if the name is empty, or there are too many views.
        """
        clean = clean_name(name)
        if not clean:
            raise ConfigError("a view needs a name")
        with self._lock:
            if clean not in self._views and len(self._views) >= MAX_VIEWS:
                raise ConfigError(f"there are {MAX_VIEWS} views already: remove one first")
            self._write({**self._views, clean: address})
        self._on_change()

    def remove(self, name: str) -> None:
        """Remove a view, if it is there."""
        with self._lock:
            self._write({key: address for key, address in self._views.items() if key != name})
        self._on_change()

    def _write(self, views: dict[str, str]) -> None:
        write_text(self.path, json.dumps(views, indent=1, ensure_ascii=False))
        self._views = views


def _read(path: Path) -> dict[str, str]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {str(name): str(address) for name, address in found.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError) as error:
        raise StorageError(f"the views in {path} are corrupt ({error}): delete that file to start over") from error
