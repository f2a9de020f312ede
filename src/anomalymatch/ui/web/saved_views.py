"""Menu of the views that the people of a run have saved."""

from dataclasses import fields
from functools import partial
from typing import Any
from urllib.parse import parse_qsl

from nicegui import ui

from anomalymatch.ui.groups import MAX_NAME
from anomalymatch.ui.views import Query
from anomalymatch.ui.web.address import read_address, write_address
from anomalymatch.ui.web.session import Session

OWN = ("annotator", "page", "share", "shift", "size")
"""Parts of a query that each person has for themselves."""


def parts_to_share(query: Query) -> dict[str, Any]:
    """Return the parts of a query that a saved view consists of."""
    return {field.name: getattr(query, field.name) for field in fields(query) if field.name not in OWN}


class SavedViewsMenu:
    """Button with the saved views: open or remove one, or save the current view."""

    def __init__(self, session: Session) -> None:
        self.session, self._views = session, session.service.views
        self._shown: dict[str, str] | None = None
        with ui.button("views", icon="bookmark_border", color=None) as button:
            button.props("flat dense no-caps size=sm aria-label='saved views' data-testid=views")
            with ui.menu().props("no-refocus role=dialog aria-label='Saved views'").classes("am-popup") as self._menu:
                self._menu.on("before-hide", js_handler="() => document.activeElement?.blur()")  # returns the keys
                self._list = ui.element("div").classes("am-views")
                with ui.row().classes("am-line"):
                    self._name = ui.input(placeholder="name of this view").classes("am-number-field am-grow")
                    self._name.props(f"dense borderless maxlength={MAX_NAME} aria-label='name of this view'")
                    self._name.props("data-testid=view-name").on("keydown.enter", self._save)
                    save = ui.button("Save", on_click=self._save)
                    save.props("dense unelevated no-caps size=sm data-testid=view-save")
        session.watchers.append(lambda kinds, _: self._refresh() if "views" in kinds else None)
        self._refresh()

    def _refresh(self) -> None:
        views = dict(self._views.all())
        if views == self._shown:
            return
        self._shown = views
        self._list.clear()
        with self._list:
            if not views:
                ui.label("Order and filters under a name, for everybody at this run.").classes("am-hint")
            for name, address in views.items():
                with ui.row().classes("am-line"):
                    look = ui.button(name, on_click=partial(self._open, address), color=None)
                    look.props("flat dense no-caps align=left data-testid=view-show").classes("am-grow")
                    gone = ui.button(icon="close", on_click=partial(self._remove, name), color=None)
                    gone.props("flat dense size=sm data-testid=view-remove").props["aria-label"] = f"remove {name}"

    async def _open(self, address: str) -> None:
        self._menu.close()
        view = read_address(parse_qsl(address, keep_blank_values=True), self.session.service.columns.kinds)
        await self.session.change(**parts_to_share(view.query))
        if view.complaint:
            self.session.say(view.complaint)

    async def _save(self) -> None:
        address = write_address(Query(**parts_to_share(self.session.query)))
        await self.session.call(self._views.save, self._name.value or "", address)
        self._name.value = ""

    async def _remove(self, name: str) -> None:
        await self.session.call(self._views.remove, name)
