"""Map beside the gallery: points of similar images, a lasso that selects them; `map.js` is its browser side."""

from typing import Any
from urllib.parse import urlencode

from nicegui import ui

from anomalymatch.ui.views import Page
from anomalymatch.ui.web.session import Session
from anomalymatch.ui.web.theme import SHAPES


class MapElement(ui.element, component="map.js"):
    """Points of a map.

    It emits `area` (corners of the selection, none to remove it), `look` (id for the large view) and `shut`.
    """

    def __init__(self, thumbs: str) -> None:
        super().__init__()
        self._props["shapes"] = {str(label): shape for label, shape in SHAPES.items()}
        self._props.update({"points": None, "message": "", "serial": 0, "area": [], "page": {}})
        self._props.update({"thumbs": thumbs, "veil": ""})

    def set(self, **values: Any) -> None:
        """Set properties, see `map.js`."""
        if any(self._props[name] != value for name, value in values.items()):
            self._props.update(values)
            self.update()

    def recolour(self) -> None:
        """Load scores and labels again."""
        self.set(serial=self._props["serial"] + 1)


class MapPanel:
    """Map of a session; it is computed when it is opened for the first time.

    Attributes:
        element: the map; hidden while it is closed.
    """

    def __init__(self, session: Session, thumbs: str) -> None:
        self.session = session
        self.element = MapElement(thumbs)
        self.element.set_visibility(False)
        self.element.on("area", lambda event: self._select(event.args["corners"]))
        self.element.on("shut", self.toggle)
        session.watchers.append(self._watch)
        session.on_query.append(self._show_query)
        session.on_page.append(self._show_page)

    def toggle(self) -> None:
        """Open or close the map."""
        self.element.set_visibility(not self.element.visible)
        self.session.gallery.remember("map", str(self.element.visible).lower())
        if self.element.visible:
            self.session.service.map.request()
            self._refresh()

    def _refresh(self) -> None:
        service = self.session.service
        points = service.map.points
        if points is None:
            self.element.set(message=service.map.message)
            return
        self.element.set(points={"version": points.version, "total": service.total})
        self._mark(self.session.gallery.ids)
        self._show_query()

    async def _select(self, corners: list[tuple[float, float]]) -> None:
        area = tuple((float(x), float(y)) for x, y in corners)
        elsewhere: dict[str, Any] = {"like": None, "group": None} if area else {}
        await self.session.change(area=area, **elsewhere)

    def _watch(self, kinds: set[str], ids: set[str]) -> None:
        if self.element.visible:
            self._refresh()
            self._show_veil()
            if kinds & {"labels", "ranking"}:
                self.element.recolour()

    def _show_query(self) -> None:
        self._show_veil()
        self.element.set(area=[list(corner) for corner in self.session.query.area])

    def _show_veil(self) -> None:
        veil = self.session.veil
        words = {"veiled": "1"} if veil.scores else {}
        self.element.set(veil=urlencode(words | ({"blind": veil.blind} if veil.blind else {})))

    def _show_page(self, page: Page) -> None:
        if self.element.visible:
            self._mark([tile.id for tile in page.tiles])

    def _mark(self, ids: list[str]) -> None:
        self.element.set(page=self.session.service.map_numbers(ids))
