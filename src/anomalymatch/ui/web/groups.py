"""Section of the side panel for groups of images, which are kinds of anomaly."""

from collections.abc import Callable
from typing import Any

from nicegui import ui
from nicegui.elements.mixins.text_element import TextElement

from anomalymatch.ui.groups import MAX_NAME, SELECTIONS, Group
from anomalymatch.ui.web.routes import thumbnail_address, version
from anomalymatch.ui.web.session import Session
from anomalymatch.ui.web.theme import KIND_COLOURS, drop_down, many

THUMBNAIL = 96
AUTO = "auto"
COUNTS = (AUTO, *(str(count) for count in range(2, 21)))
HINT = "Kinds of anomaly: group similar ones, or name a kind and give it images with its key."
GROUPS_HINT = (
    "1 to 9 label images anomaly and put them into a group; the lens ranks all images for a group. g shows the next "
    "group; Shift with a, n, u or x labels a whole one. Named groups stay when you group again."
)


class GroupsPanel:
    """Form that makes groups, and the list of groups."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self._rows: list[_GroupRow] = []
        self._shown: tuple[Any, ...] = ()
        self._hint = ui.label(HINT).classes("am-hint")
        with ui.row().classes("am-line"):
            self._selection = drop_down(SELECTIONS, SELECTIONS[0], "images to group", "groups-selection")
            ui.label("into").classes("am-hint")
            self._count = drop_down(COUNTS, AUTO, "number of groups", "groups-count")
            self._make = ui.button("Group", on_click=self._group).props(
                "dense unelevated no-caps size=sm data-testid=groups-make"
            )
        self._list = ui.column().classes("am-stack").props("data-testid=groups")
        groups = session.service.groups
        self._merge = ui.button("Merge selected", on_click=lambda: self.change(groups.merge, self._ticked()))
        self._merge.props("dense outline no-caps size=sm data-testid=groups-merge")
        with ui.row().classes("am-line"):
            self._name = ui.input(placeholder="new kind").props(f"dense borderless maxlength={MAX_NAME}")
            self._name.classes("am-grow").props("aria-label='name of a new kind' data-testid=kind-name")
            self._name.on("keydown.enter", self._add)
            add = ui.button("Add", on_click=self._add)
            add.props("dense outline no-caps size=sm data-testid=kind-add")
        session.watchers.append(lambda kinds, _: self.refresh() if "groups" in kinds else None)
        session.on_query.append(self.refresh)
        self.refresh()

    async def _add(self) -> None:
        if (self._name.value or "").strip():
            await self.session.call(self.session.service.groups.add, self._name.value)
            self._name.value = ""

    def refresh(self) -> None:
        """Show the current groups, each in its row: a click on a row that was built again would be lost."""
        groups, query = tuple(self.session.service.groups.all()), self.session.query
        if (groups, query.group, query.kind) == self._shown:
            return
        is_regrouped = bool(self._shown) and [each.name for each in groups] != [each.name for each in self._shown[0]]
        self._shown = (groups, query.group, query.kind)
        self._hint.text = GROUPS_HINT if groups else HINT
        self.session.gallery.set_option("groups", len(groups))
        keys = self.session.service.groups.keys
        found = {keys[group.name]: number for number, group in enumerate(groups) if group.name in keys}
        self.session.gallery.set_option("kinds", found)
        self._merge.set_visibility(len(groups) > 1)
        while len(self._rows) > len(groups):
            self._rows.pop().delete()
        with self._list:
            self._rows += [_GroupRow(self, number) for number in range(len(self._rows), len(groups))]
        for number, (row, group) in enumerate(zip(self._rows, groups, strict=True)):
            row.show(group, is_shown=number in (query.group, query.kind), key=keys.get(group.name, ""))
            row.is_ticked &= not is_regrouped

    async def _group(self) -> None:
        count = None if self._count.value == AUTO else int(self._count.value)
        self._make.props("loading")
        try:
            await self.change(self.session.service.groups.make, self._selection.value, count)
        finally:
            self._make.props(remove="loading")

    async def change(self, act: Callable[..., None], *args: Any) -> None:
        """Change groups; if they have changed, the group on display is left."""
        before, shown = self.session.service.groups.all(), self.session.query.group
        await self.session.call(act, *args)
        if shown is not None and self.session.service.groups.all() != before:
            await self.session.leave_group()

    def _ticked(self) -> set[int]:
        return {number for number, row in enumerate(self._rows) if row.is_ticked}


class _GroupRow:
    """Row of one group: tick, picture, name, size, and what can be done with the group."""

    def __init__(self, panel: GroupsPanel, number: int) -> None:
        self._panel, self._number = panel, number
        self._name = ""
        session = panel.session
        with ui.row().classes("am-line am-group").props(f"data-testid=group-{number}") as self._row:
            self._tick = ui.checkbox().props("dense size=xs")
            self._look = ui.element("button").classes("am-example").on("click", lambda: session.show_group(number))
            self._look.props["data-testid"] = f"group-show-{number}"
            with self._look:
                self._picture = ui.element("img")
                self._picture.props["alt"] = ""
                if number < len(KIND_COLOURS):
                    TextElement(tag="span", text=str(number + 1)).classes(f"am-kind am-kind-{number}")
            with ui.element("div").classes("am-grow"):
                self._field = ui.input().props(f"dense borderless maxlength={MAX_NAME}")
                self._field.props["data-testid"] = f"group-name-{number}"
                for event in ("blur", "keydown.enter"):
                    self._field.on(event, self._rename)
                self._size = ui.label().classes("am-hint")
            self._find = ui.button(icon="search", on_click=lambda: session.show_kind(number), color=None)
            self._find.props(f"flat dense size=sm data-testid=group-find-{number}")
            self._find.tooltip("Rank all images for this kind")
            divide = session.service.groups.split
            self._split = ui.button(icon="call_split", on_click=lambda: panel.change(divide, number), color=None)
            self._split.props(f"flat dense size=sm data-testid=group-split-{number}")
            self._split.tooltip("Split in two")

    @property
    def is_ticked(self) -> bool:
        """True if the group is selected for a merge."""
        return bool(self._tick.value)

    @is_ticked.setter
    def is_ticked(self, is_on: bool) -> None:
        self._tick.value = is_on

    def show(self, group: Group, *, is_shown: bool, key: str) -> None:
        """Show a group, with its own key if there is one; `is_shown` marks the one in the gallery."""
        self._row.classes(**{"add" if is_shown else "remove": "am-on"})
        self._picture.set_visibility(bool(group.ids))
        if group.ids:
            known_as = version(self._panel.session.service.source)
            self._picture.props["src"] = thumbnail_address(group.ids[0], THUMBNAIL, known_as)
        self._picture.update()
        self._size.text = many(len(group.ids), "image") + f" · key {key}" * bool(key)
        if group.name != self._name:  # otherwise a person may be writing
            self._name = self._field.value = group.name
            words = {self._tick: "tick", self._look: "show", self._field: "name of"}
            words |= {self._find: "rank all images for", self._split: "split"}
            for element, word in words.items():
                element.props["aria-label"] = f"{word} {group.name}"
                element.update()

    def delete(self) -> None:
        """Remove the row."""
        self._row.delete()

    async def _rename(self) -> None:
        name = self._field.value or ""
        if name.strip() != self._name:
            await self._panel.session.call(self._panel.session.service.groups.rename, self._number, name)
