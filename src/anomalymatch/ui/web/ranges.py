"""Orders by columns of the metadata, and the filters by their ranges in the toolbar."""

import math
from functools import partial

from nicegui import ui

from anomalymatch.ui.columns import Columns, Kind
from anomalymatch.ui.views import ColumnOrder, ColumnRange, Sort
from anomalymatch.ui.web.session import Session
from anomalymatch.ui.web.theme import drop_down


def sorts(columns: Columns) -> dict[str, Sort | ColumnOrder]:
    """Return all orders that the page offers by their texts."""
    orders: dict[str, Sort | ColumnOrder] = {str(sort): sort for sort in Sort}
    for name, kind in columns.kinds.items():
        words = ("earliest", "latest") if kind is Kind.DATE else ("lowest", "highest")
        for descending, word in enumerate(words):
            orders[f"{word} {name}"] = ColumnOrder(name, bool(descending))
    return orders


def range_text(limits: ColumnRange) -> str:
    """Describe a range: "magnitude 17 to 20", "magnitude from 17", or "magnitude to 20"."""
    low, high = f"{limits.low:.6g}", f"{limits.high:.6g}"
    if math.isinf(limits.high):
        return f"{limits.column} from {low}"
    return f"{limits.column} to {high}" if math.isinf(limits.low) else f"{limits.column} {low} to {high}"


class RangeFilters:
    """Button with a form that sets the range of a column, and a chip for each range of the query."""

    def __init__(self, session: Session) -> None:
        self.session, self._columns = session, session.service.columns
        self._shown: tuple[ColumnRange, ...] = ()
        names = [name for name, kind in self._columns.kinds.items() if kind is not Kind.DATE]
        if not names:
            return
        with ui.button("range", icon="filter_alt", color=None) as button:
            button.props("flat dense no-caps size=sm aria-label='filter by a column' data-testid=range")
            with ui.menu().props("no-refocus role=dialog aria-label=Ranges").classes("am-popup") as self._menu:
                self._menu.on("before-show", self._show_column)
                self._menu.on("before-hide", js_handler="() => document.activeElement?.blur()")  # returns the keys
                with ui.element("div").classes("am-look"):
                    ui.label("column")
                    self._column = drop_down(names, names[0], "column", "range-column", self._show_column)
                    self._low, self._high = self._number("from", "range-low"), self._number("to", "range-high")
                    ui.label("values")
                    self._limits = ui.label().classes("am-figures").props("data-testid=range-limits")
                    ui.element("div")
                    ui.button("Filter", on_click=self._set).props(
                        "dense unelevated no-caps size=sm data-testid=range-set"
                    )
        self._chips = ui.element("div").classes("am-contents").props("data-testid=ranges")
        session.on_query.append(self._show_chips)
        self._show_chips()

    def _number(self, text: str, name: str) -> ui.number:
        ui.label(text)
        field = ui.number(placeholder="any").props(f"dense borderless step=any aria-label='{text}' data-testid={name}")
        return field.classes("am-number-field").on("keydown.enter", self._set)

    async def _show_column(self) -> None:
        """Show the range of the chosen column, and its smallest and largest value."""
        name = str(self._column.value)
        chosen = next((one for one in self._shown if one.column == name), ColumnRange(name))
        self._low.value, self._high.value = (None if math.isinf(value) else value for value in chosen[1:])
        limits = await self.session.call(self._columns.limits, name)
        if limits is not None and name == self._column.value:
            self._limits.text = f"{limits[0]:.6g} to {limits[1]:.6g}"

    async def _set(self) -> None:
        name = str(self._column.value)
        low, high = self._low.value, self._high.value
        limits = ColumnRange(name, -math.inf if low is None else float(low), math.inf if high is None else float(high))
        self._menu.close()
        await self._change(name, () if limits == ColumnRange(name) else (limits,))

    async def _change(self, name: str, new: tuple[ColumnRange, ...] = ()) -> None:
        others = tuple(one for one in self.session.query.ranges if one.column != name)
        if others + new != self.session.query.ranges:
            await self.session.change(ranges=others + new)

    def _show_chips(self) -> None:
        ranges = self.session.query.ranges
        if ranges == self._shown:
            return
        self._shown = ranges
        self._chips.clear()
        with self._chips:
            for limits in ranges:
                chip = ui.button(range_text(limits), color=None, on_click=partial(self._change, limits.column))
                chip.props("dense flat no-caps size=sm icon-right=close data-testid=range-off")
                chip.props["aria-label"] = f"remove the filter {range_text(limits)}"
