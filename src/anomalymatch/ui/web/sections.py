"""Sections of the side panel, which fold: empty ones by themselves, others as a person chooses."""

import json
from collections.abc import Mapping
from functools import partial
from typing import Any

from nicegui import ui

from anomalymatch.ui.web.session import Session

CLOSED = "closed"
"""Setting of the browser with the sections that a person has closed."""


class Sections:
    """Sections of the side panel.

    A section is open while it has something to show. What a person opens or closes stays as it is, and the browser
    remembers what was closed.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._all: dict[str, ui.expansion] = {}
        self._empty: set[str] = set()
        self._opened: set[str] = set()
        self._closed: set[str] = set()
        self._is_showing = False

    def add(self, title: str, name: str) -> ui.expansion:
        """Create a section."""
        section = ui.expansion(title, value=True, on_value_change=partial(self._chosen, name)).classes("am-section")
        self._all[name] = section
        return section.props(f"dense dense-toggle switch-toggle-side data-testid=section-{name}")

    def fill(self, name: str, has_content: bool) -> None:
        """Say whether a section has something to show."""
        (self._empty.discard if has_content else self._empty.add)(name)
        self._show(name)

    def restore(self, kept: Mapping[str, Any]) -> None:
        """Close the sections that were closed at the last visit."""
        try:
            names = json.loads(str(kept.get(CLOSED, "[]")))
        except ValueError:
            return
        self._closed = {name for name in self._all if isinstance(names, list) and name in names}
        for name in self._all:
            self._show(name)

    def _show(self, name: str) -> None:
        self._is_showing = True
        self._all[name].value = name not in self._closed and (name not in self._empty or name in self._opened)
        self._is_showing = False

    def _chosen(self, name: str) -> None:
        if self._is_showing:
            return
        chosen, other = (self._opened, self._closed) if self._all[name].value else (self._closed, self._opened)
        chosen.add(name)
        other.discard(name)
        self._session.gallery.remember(CLOSED, json.dumps(sorted(self._closed)))
