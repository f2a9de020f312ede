"""The grid of tiles, a custom element: see `gallery.js` for what it does without the server."""

import json
from collections.abc import Callable, Sequence
from typing import Any

from nicegui import ui
from nicegui.events import GenericEventArguments

from anomalymatch.types import Label
from anomalymatch.ui.views import Page, Tile
from anomalymatch.ui.web.theme import SHAPES, many

TILE_SIDES = (64, 320)
"""Smallest and largest side of a tile in CSS pixels."""


class GalleryElement(ui.element, component="gallery.js"):
    """Tiles of one page.

    It emits `hello` (what the browser remembers, once), `label` (ids, label), `look` (id for the large view), `shut`,
    `turn` (page to go to, and whether the cursor comes to its first or last tile), `whole` (label of all images of the
    group that is shown), `group` (show the next), `undo`, `rerank`, `train`, `help` and `clear` (the filters).
    """

    def __init__(self, *, version: str, tile: int = 128) -> None:
        super().__init__()
        self._serial = 0
        self._props["shapes"] = {str(label): shape for label, shape in SHAPES.items()}
        self._props["page"] = {"tiles": None, "total": 0, "page": 0, "pages": 1, "note": "", "empty": "", "serial": -1}
        self._props.update({"tile": tile, "advance": True, "viewing": "", "grouped": False, "version": version})

    @property
    def tiles(self) -> list[dict[str, Any]]:
        """What is on the page, in the form of `tile_values`."""
        return self._props["page"]["tiles"] or []

    @property
    def ids(self) -> list[str]:
        """Ids of the images on the page."""
        return [tile["id"] for tile in self.tiles]

    def show(self, page: Page, *, empty: str, filtered: bool, keep: bool, at: str = "first") -> None:
        """Show other tiles.

        Args:
            page: the tiles.
            empty: what to say if there are none.
            filtered: whether a button that clears the filters is of use then.
            keep: leave cursor, selection and scrolling where they are.
            at: where the cursor goes otherwise, to the "first" or the "last" tile.
        """
        self._serial += 1
        self._props["page"] = {
            "tiles": [tile_values(tile) for tile in page.tiles],
            "total": page.total,
            "page": page.page,
            "pages": page.pages,
            "note": page.note,
            "empty": empty,
            "filtered": filtered,
            "serial": self._serial,
            "keep": keep,
            "at": at,
        }
        self.update()

    def patch(self, tiles: Sequence[Tile]) -> None:
        """Update score, rank and label of tiles where they are."""
        fresh = {tile.id: tile_values(tile) for tile in tiles}
        # Kept here as well: whoever reconnects gets the page anew.
        self._props["page"]["tiles"] = [fresh.get(tile["id"], tile) for tile in self.tiles]
        self.run_method("patch", list(fresh.values()))

    def remember(self, key: str, value: str) -> None:
        """Keep a setting in the browser; `hello` brings it back on the next visit."""
        self.run_method("remember", key, value)

    def set_option(self, name: str, value: int | bool | str) -> None:
        """Set `tile` (side in CSS pixels), `advance`, `viewing` (id in the large view, or empty) or `grouped`."""
        self._props[name] = value
        self.update()

    def on_event(self, name: str, handler: Callable[[dict[str, Any]], Any]) -> None:
        """Call `handler` with the values that come with an event."""

        def handle(event: GenericEventArguments) -> Any:
            return handler(event.args if isinstance(event.args, dict) else {})

        self.on(name, handle)


def tile_values(tile: Tile) -> dict[str, Any]:
    """A tile as the browser gets it."""
    return {
        "id": tile.id,
        "score": tile.score,
        "rank": tile.rank,
        "label": None if tile.label is None else str(tile.label),
        "annotator": tile.annotator,
        "conflict": tile.conflict,
    }


def label_of(value: str | None) -> Label | None:
    """A label as the browser sends it."""
    return None if value is None else Label(value)


class DropZone(ui.element, component="drop.js"):
    """Sends files to a route of the server, which limits their size while they come in.

    Args:
        name: of its test ids, `NAME-drop` and `NAME-file`.
        url: of the route.
        text: what it says.
        accept: file types, as in HTML.
        multiple: whether several files are taken at once.
        everywhere: whether files may be dropped anywhere on the page.
        on_sent: called with whether it went well, and what to tell.
    """

    def __init__(
        self,
        *,
        name: str,
        url: str,
        text: str,
        accept: str,
        multiple: bool,
        everywhere: bool,
        on_sent: Callable[[bool, str], Any],
    ) -> None:
        super().__init__()
        self._props.update({"name": name, "url": url, "text": text, "accept": accept, "annotator": "me"})
        self._props.update({"multiple": multiple, "everywhere": everywhere})
        self.on("sent", lambda event: on_sent(*_outcome(event)))

    def set_annotator(self, name: str) -> None:
        """Say who sends the files."""
        self._props["annotator"] = name
        self.update()


def _outcome(event: GenericEventArguments) -> tuple[bool, str]:
    went_well, text = bool(event.args["ok"]), str(event.args["message"])
    try:
        answer = json.loads(text)
    except ValueError:
        return went_well, text
    if "labels" in answer:
        return True, f"{many(answer['labels'], 'label')} came in."
    added, refused = len(answer.get("added", ())), answer.get("refused", ())
    words = [f"{many(added, 'example')} came in."] if added else []
    words += [f"{item['name']}: {item['reason']}" for item in refused[:3]]
    words += [f"… and {len(refused) - 3} more were refused."] * (len(refused) > 3)
    return not refused, " ".join(words)
