"""Map of the sky in the side panel: what was found, over the archive; a click on a point opens its image."""

import asyncio

from nicegui import background_tasks, ui
from nicegui.element import Element

from anomalymatch.ui.sky_map import SkyMap, SkyView
from anomalymatch.ui.web import charts
from anomalymatch.ui.web.session import Session

START_S = 2.0
"""Delay of the first map, which reads headers of files: the first images come first."""
HINT = "A click on an orange point opens its image. Drag to zoom in, double-click to zoom out."


class SkyPanel:
    """Plot of the map; its section is hidden unless images have coordinates."""

    def __init__(self, session: Session, sky: SkyMap, section: Element) -> None:
        self.session, self._sky, self._section = session, sky, section
        self._chart: ui.plotly | None = None
        self._is_busy = self._is_stale = self._is_off = False
        self._ids: list[str] | None = None
        self._place = ui.element("div")
        ui.label(HINT).classes("am-hint")
        section.set_visibility(False)
        session.on_summary.append(lambda _: self._update())
        session.on_page.append(lambda _: self._update())  # the labels of others may be hidden now

    def _update(self) -> None:
        """Draw what was found, if that has changed."""
        self._is_stale = True
        if not self._is_busy and not self._is_off:
            self._is_busy = True
            background_tasks.create(self._draw(), name="map of the sky")

    async def _draw(self) -> None:
        try:
            while self._is_stale and not self.session.client.is_deleted:
                self._is_stale = False
                if self._ids is None:
                    await asyncio.sleep(START_S)
                async with self._sky.turn:
                    view = await self.session.call(self._view)
                self._is_off = view is None  # no image has a position
                if view is None or self.session.client.is_deleted or list(view.ids) == self._ids:
                    continue
                self._ids = list(view.ids)
                self._show(charts.sky(view))
        finally:
            self._is_busy = False

    def _view(self) -> SkyView | None:
        view, veil = self._sky.view(), self.session.veil
        if view is None or not veil.blind:
            return view
        return view.without({tile.id for tile in self.session.service.tiles(view.ids) if veil.hides_label(tile)})

    def _show(self, figure: dict[str, object]) -> None:
        if self._chart is not None:
            self._chart.update_figure(figure)
            return
        with self._place:
            self._chart = ui.plotly(figure).classes("am-chart am-sky").props("data-testid=sky-map")
        chosen = "(event) => emit(event.points.at(-1).customdata ?? null)"
        self._chart.on("plotly_click", lambda event: self._open(event.args), js_handler=chosen)
        self._section.set_visibility(True)

    def _open(self, id_: object) -> None:
        if isinstance(id_, str):
            self.session.view(id_)
