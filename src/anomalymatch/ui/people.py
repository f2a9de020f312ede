"""People who have the page open: whether another browser is there, so that a name is needed."""

import threading
from collections.abc import Callable

DEFAULT_NAME = "me"
"""Name of a person who has not given one."""


class People:
    """Browsers in which the page is open. Several pages of one browser count once. Thread-safe.

    Args:
        on_change: called when a browser comes or goes.
    """

    def __init__(self, on_change: Callable[[], None]) -> None:
        self._on_change, self._lock = on_change, threading.Lock()
        self._browsers: dict[object, str] = {}

    def join(self, page: object, browser: str) -> None:
        """Note that a page is open in a browser, which is known by a random name."""
        self._set(page, browser)

    def leave(self, page: object) -> None:
        """Note that a page was closed."""
        self._set(page, None)

    def others(self, page: object) -> int:
        """Count the other browsers that have the page open."""
        with self._lock:
            return len(set(self._browsers.values()) - {self._browsers.get(page)}) if page in self._browsers else 0

    def _set(self, page: object, browser: str | None) -> None:
        with self._lock:
            before = set(self._browsers.values())
            self._browsers.pop(page, None)
            self._browsers |= {} if browser is None else {page: browser}
            is_changed = set(self._browsers.values()) != before
        if is_changed:
            self._on_change()


def needs_name(name: str, others: int) -> bool:
    """Return True if a person should give a name: labels of several people must be told apart."""
    return others > 0 and name == DEFAULT_NAME
