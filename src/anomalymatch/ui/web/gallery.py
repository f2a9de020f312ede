"""Gallery element with the tiles, and the drop zone for files; `gallery.js` and `drop.js` are their browser side."""

import json
from collections.abc import Callable, Sequence
from typing import Any

from nicegui import ui
from nicegui.events import GenericEventArguments

from anomalymatch.ui.people import DEFAULT_NAME
from anomalymatch.ui.views import Page, Tile
from anomalymatch.ui.web.theme import SHAPES, many


class GalleryElement(ui.element, component="gallery.js"):
    """Tiles of one page.

    It emits `hello` (stored settings, and the view before a reload, once), `address` (of the browser's history),
    `label` (ids, label, and number of a group or None), `look` (id for the large view), `shut`, `turn` (page, and
    whether the cursor goes to its first or last tile), `whole` (label for the whole current group), `group` (show the
    next), `map`, `heat` and `survey` (show or hide the map, heat maps, the survey picture), `star` (ids), `review`
    (show or leave what is to review), `undo`, `redo`, `rerank`, `train`, `help`, `goto` (ask where to go), `compare`
    (ids, and the one under the cursor), `pane` (id of the chosen one of several images in the large view), `clear`
    (the filters) and `end` (a label key after the last tile has its label). `label`, `whole`, `undo` and `redo` have a
    `key`, and are sent again until `acknowledge`.
    """

    def __init__(self, *, version: str, search: str) -> None:
        super().__init__()
        self._serial = 0
        self._props["shapes"] = {str(label): shape for label, shape in SHAPES.items()}
        self._props["page"] = {"tiles": None, "total": 0, "page": 0, "pages": 1, "note": "", "empty": "", "serial": -1}
        self._props.update({"count": 48, "dense": False, "light": {}, "version": version})
        self._props.update({"advance": True, "viewing": "", "grouped": False, "groups": 0})
        self._props["kinds"] = {}
        self._props["panes"] = {"ids": [], "pinned": False}

    @property
    def tiles(self) -> Sequence[dict[str, Any]]:
        """The tiles on the page as dictionaries, see `Tile`.

        They are a tuple, since NiceGUI would wrap each value of a list to observe it, which takes most of the time of
        an update when many pages are open.
        """
        return self._props["page"]["tiles"] or ()

    @property
    def ids(self) -> list[str]:
        """The ids of the images on the page."""
        return [tile["id"] for tile in self.tiles]

    def show(
        self,
        page: Page,
        *,
        empty: str,
        filtered: bool,
        keep: bool,
        at: str = "first",
        address: str = "",
        push: bool = False,
        selected: Sequence[str] = (),
        start: int = 0,
    ) -> None:
        """Replace the tiles.

        Args:
            page: the tiles.
            empty: text to show if there are none.
            filtered: True adds a button that clears the filters to that text.
            keep: keep cursor, selection and scroll position.
            at: otherwise the cursor goes to the "first" or the "last" tile, or to the one with this id.
            address: words of the query for the URL.
            push: add the page to the browser's history; otherwise it replaces the last one.
            selected: otherwise the selected images.
            start: place of the first tile among all that the query finds, from 0.
        """
        self._serial += 1
        extra = {"empty": empty, "filtered": filtered, "serial": self._serial, "keep": keep, "at": at}
        extra |= {"address": address, "push": push, "selected": list(selected), "start": start}
        self._props["page"] = vars(page) | {"tiles": tuple(dict(vars(tile)) for tile in page.tiles)} | extra
        self.update()

    def patch(self, tiles: Sequence[Tile]) -> None:
        """Update score, rank and label of tiles where they are."""
        fresh = {tile.id: dict(vars(tile)) for tile in tiles}
        # Stored here as well, for browsers that reconnect.
        self._props["page"]["tiles"] = tuple(fresh.get(tile["id"], tile) for tile in self.tiles)
        self.run_method("patch", list(fresh.values()))

    def acknowledge(self, key: str) -> None:
        """Tell the browser that an event with a key has had its effect, so that it does not send it again."""
        self.run_method("acknowledge", key)

    def resume(self) -> None:
        """Tell the browser to send the events that were not acknowledged."""
        self.run_method("resume")

    def restored(self) -> None:
        """Tell the browser that it shows the view of its address, which follows the view from now on."""
        self.run_method("restored")

    def point(self, id_: str, selected: Sequence[str] = ()) -> None:
        """Move the cursor to a tile and select others."""
        self.run_method("point", id_, list(selected))

    def choose(self, id_: str) -> None:
        """Choose one of several images in the large view."""
        self.run_method("mark", id_)

    def set_note(self, note: str) -> None:
        """Change the sentence above the tiles; its row stays as it is until the next page, so that no tile moves."""
        if self._props["page"]["note"] != note:
            self._props["page"]["note"] = note
            self.run_method("renote", note)

    def remember(self, key: str, value: str) -> None:
        """Store a setting in the browser; `hello` returns it on the next visit."""
        self.run_method("remember", key, value)

    def set_option(self, name: str, value: int | bool | str | dict[str, Any]) -> None:
        """Set a property of the browser side.

        They are `count` (tiles of a full page), `dense`, `light` (see `LightControls.set`), `advance`, `viewing` (id in
        the large view, or empty), `panes`, `grouped`, `groups` and `kinds` (see
        `gallery.js`).
        """
        if self._props[name] != value:
            self._props[name] = value
            self.update()

    def on_event(self, name: str, handler: Callable[[dict[str, Any]], Any]) -> None:
        """Call `handler` with the arguments of an event."""

        def handle(event: GenericEventArguments) -> Any:
            return handler(event.args if isinstance(event.args, dict) else {})

        self.on(name, handle)


class DropZone(ui.element, component="drop.js"):
    """Drop zone that uploads files to a route, which limits their size during the upload.

    Args:
        name: its route, and the prefix of its test ids, `NAME-drop` and `NAME-file`.
        text: its caption.
        accept: file types, as in HTML.
        many: accept several files at once, dropped anywhere on the page.
        on_sent: called with success and a message.
    """

    def __init__(self, name: str, text: str, *, accept: str, many: bool, on_sent: Callable[[bool, str], Any]) -> None:
        super().__init__()
        self._props.update({"name": name, "url": f"/{name}", "text": text, "accept": accept})
        self._props.update({"annotator": DEFAULT_NAME, "multiple": many, "everywhere": many})
        self.on("sent", lambda event: on_sent(*_outcome(event)))

    def set_annotator(self, name: str) -> None:
        """Set the annotator of the uploads."""
        self._props["annotator"] = name
        self.update()


def _outcome(event: GenericEventArguments) -> tuple[bool, str]:
    went_well, text = bool(event.args["ok"]), str(event.args["message"])
    try:
        answer = json.loads(text)
    except ValueError:
        return went_well, text
    if "labels" in answer:
        return True, f"{many(answer['labels'], 'label')} imported."
    added, refused = len(answer.get("added", ())), answer.get("refused", ())
    words = [f"{many(added, 'example')} added."] if added else []
    words += [f"{item['name']}: {item['reason']}" for item in refused[:3]]
    words += [f"… and {len(refused) - 3} more refused."] * (len(refused) > 3)
    return not refused, " ".join(words)
