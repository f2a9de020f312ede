"""Large view: one image in full resolution, with metadata, history and neighbours; or several side by side."""

import asyncio
from collections.abc import Sequence
from urllib.parse import urlencode

from nicegui import background_tasks, ui
from nicegui.elements.mixins.text_element import TextElement

from anomalymatch.types import Label, Orientation
from anomalymatch.ui.labels import history_row
from anomalymatch.ui.notes import MAX_NOTE
from anomalymatch.ui.sky import decimal, field_of_view, sexagesimal, sky_links
from anomalymatch.ui.views import Details, Tile
from anomalymatch.ui.web.light import ALL_CHANNELS, Light, LightControls
from anomalymatch.ui.web.routes import thumbnail_address
from anomalymatch.ui.web.sending import TARGETS, Sending
from anomalymatch.ui.web.session import Session
from anomalymatch.ui.web.status import StatusBar
from anomalymatch.ui.web.survey import SurveyPicture
from anomalymatch.ui.web.theme import SHAPES, drop_down

NEIGHBOURS, NEIGHBOUR_SIDE = 12, 96
MOST = 4
"""Largest number of images side by side."""
COPY = """event => {
  const button = event.currentTarget, field = document.createElement("textarea");
  field.value = button.dataset.text;
  button.parentElement.append(field); // in the dialog, which keeps the focus
  field.select();
  document.execCommand("copy"); // unlike navigator.clipboard, it works on pages of other machines without HTTPS
  field.remove();
  button.focus();
  button.querySelector("i").textContent = "check";
}"""
REST_S = 0.12
"""Delay before neighbours and the survey picture are fetched: a held arrow key passes many images."""


class Zoom(ui.element, component="zoom.js"):
    """Images with a common zoom; `panes` are described in `zoom.js`, `ahead` are addresses to prefetch."""

    def __init__(self) -> None:
        super().__init__()
        self._props.update({"panes": [], "chosen": "", "ahead": [], "sky": None})
        self._props["light"] = {"brightness": 1, "contrast": 1, "serial": 0}

    def show(self, panes: Sequence[dict[str, str]], ahead: Sequence[str], chosen: str) -> None:
        """Replace the images; the keys concern the `chosen` one of several, until the browser chooses another."""
        self._props.update({"panes": list(panes), "ahead": list(ahead), "chosen": chosen})
        self.update()

    def show_sky(self, orientation: Orientation | None, size: tuple[int, int] | None) -> None:
        """Show the scale of an image with a size in pixels, and the directions on the sky; None hides them."""
        self._props["sky"] = {**orientation._asdict(), "width": size[0]} if orientation and size else None
        self.update()

    def use(self, light: Light) -> None:
        """Take over brightness and contrast."""
        serial = self._props["light"]["serial"] + 1
        self._props["light"] = {"brightness": light.brightness, "contrast": light.contrast, "serial": serial}
        self.update()


class Viewer:
    """Dialog over the whole page. It takes over the light of the gallery whenever that changes.

    Attributes:
        id: the image on display, or the chosen one of several; empty while the dialog is closed.
        survey: the survey picture beside it.
    """

    def __init__(
        self, session: Session, version: str, light: LightControls, survey: SurveyPicture, sending: Sending
    ) -> None:
        self.session, self._version, self._light = session, version, light
        self.id = self._noted = ""
        self.survey = survey
        self._rankings = 0
        self._images: tuple[str, ...] = ()
        self._tiles: dict[str, Tile] = {}  # of the images, if there are several
        self._blinking: tuple[str, int] | None = None
        service = session.service
        self.dialog = ui.dialog().props("maximized aria-label='Large view'")
        self.dialog.on_value_change(self._closed)
        with self.dialog, ui.element("div").classes("am-viewer").props("data-testid=viewer"):
            with ui.element("div").classes("am-view-bar"):
                stretches, channels = service.stretches, [ALL_CHANNELS, *service.channels]
                self._stretch = drop_down(stretches, stretches[0], "stretch", "stretch", self._draw)
                self._channel = drop_down(channels, ALL_CHANNELS, "channel", "channel", self._draw)
                self._channel.set_visibility(len(service.channels) > 1)
                self._all_stretches = ui.switch("all stretches", on_change=self._draw).props(
                    "dense data-testid=compare"
                )
                self._pin = ui.switch("pinned image", value=True, on_change=self._pin_chosen)
                self._pin.props("dense data-testid=pin").tooltip("The image whose neighbours these are stays in sight")
                self._heat = ui.switch("heat map", on_change=self._draw).props("dense data-testid=heat")
                self._heat.tooltip("What made the score high (h). A place also sees its surroundings.")
                with ui.element("div").classes("am-heat-legend").props("data-testid=heat-legend") as self._legend:
                    ui.label("against an anomaly")
                    ui.element("div").classes("am-heat-colours")
                    ui.label("for an anomaly")
                survey.add_switch()
                ui.element("div").classes("am-grow")
                for icon, key, step in (("chevron_left", "←", -1), ("chevron_right", "→", 1)):
                    word = "previous" if step < 0 else "next"
                    button = ui.button(icon=icon, on_click=lambda _, step=step: self._step(step), color=None)
                    button.props(f"flat dense aria-label='{word} image ({key})' data-testid=view-{word}")
                close = ui.button(icon="close", on_click=self.close, color=None)
                close.props("flat dense aria-label='close (Esc)' data-testid=view-close")
            with ui.element("div").classes("am-view-image"):
                self._zoom = Zoom()
                survey.add_pane()
            self._zoom.on("pick", lambda event: self._pick(str(event.args)))
            self._zoom.on("blink", lambda event: self._blink(str(event.args["of"]), int(event.args["step"])))
            with ui.element("aside").classes("am-view-side").props("aria-label='Details of the image'"):
                self._title = ui.label().classes("am-title am-id").props("data-testid=view-id")
                self._state = ui.label().classes("am-hint").props("data-testid=view-state aria-live=polite")
                with ui.row().classes("am-view-labels"):
                    self._buttons = {}
                    for label in Label:
                        self._buttons[label] = button = ui.button(
                            SHAPES[label], on_click=lambda _, label=label: self._label(label), color=None
                        )
                        button.classes(f"am-key am-{label}").props(
                            f"unelevated dense no-caps aria-label='{label} ({SHAPES[label][-1].lower()})'"
                            f" data-testid=view-{label}"
                        )
                    button = ui.button("⌫", on_click=lambda: self._label(None), color=None).classes("am-key")
                    button.props("unelevated dense aria-label='remove the label' data-testid=view-clear")
                    self._star = ui.button(on_click=self._toggle_star, color=None).classes("am-key")
                    self._star.props("unelevated dense aria-label='star (s)' data-testid=view-star")
                self._note = ui.textarea(placeholder="note").props(f"dense autogrow borderless maxlength={MAX_NOTE}")
                self._note.classes("am-note-field").props("aria-label=note data-testid=view-note")
                self._note.on("blur", self._write_note)
                self._position = ui.element("div").classes("am-position").props("data-testid=position")
                self._links = ui.row().classes("am-line").props("data-testid=links")
                self._send = ui.button("Send to Aladin, DS9 …", on_click=lambda: sending.send_image(self.id))
                self._send.props("dense flat no-caps size=sm data-testid=send-image").tooltip(TARGETS)
                self._send.set_visibility(False)
                ui.label("More like this").classes("am-heading")
                self._near = ui.element("div").classes("am-near").props("data-testid=neighbours")
                button = ui.button("Show all neighbours in the gallery", on_click=self._show_like)
                button.props("dense flat no-caps size=sm data-testid=like")
                ui.label("History").classes("am-heading")
                self._history = ui.element("dl").classes("am-table").props("data-testid=history")
                ui.label("Metadata").classes("am-heading")
                self._metadata = ui.element("dl").classes("am-table").props("data-testid=metadata")
            StatusBar(session, version)
        session.watchers.append(self._watch)
        session.on_query.append(self._hide_scores)
        light.on_change.append(self._use)

    def open(self, id_: str) -> None:
        """Show an image, beside the pinned one in its neighbours; or choose it if it is on display."""
        if len(self._images) > 1 and id_ in self._images:
            self.choose(id_)
            self.session.gallery.choose(id_)
            return
        pinned = self.session.query.like if self._pin.value else None
        self._show((pinned, id_) if pinned and pinned != id_ else (id_,), id_)

    def compare(self, ids: Sequence[str], at: str = "") -> None:
        """Show two to four images side by side; of more, the first ones. The keys concern `at`, or the first one."""
        if len(ids) < 2:
            self.session.say("Select two to four images (Shift or Ctrl + click), and c compares them side by side.")
            return
        if len(ids) > MOST:
            self.session.say(f"{len(ids)} images are selected: the first {MOST} are side by side.")
        self._show(tuple(ids[:MOST]), at if at in ids[:MOST] else ids[0])

    def choose(self, id_: str) -> None:
        """Make one of several images the one that the side panel shows and the buttons label."""
        if id_ in self._images and id_ != self.id:
            self._go_to(id_)

    def _show(self, images: tuple[str, ...], id_: str) -> None:
        if self.session.client.is_deleted:
            return
        self._images, self._tiles, self._blinking = images, {}, None
        is_pinned = len(images) > 1 and images[0] == self.session.query.like
        several = list(images) if len(images) > 1 else []
        self.session.gallery.set_option("panes", {"ids": several, "pinned": is_pinned})
        self._all_stretches.set_visibility(not several)
        self._pin.set_visibility(self.session.query.like is not None)
        self._go_to(id_)
        self._draw()
        self.dialog.open()
        if several:
            background_tasks.create(self._fill_captions(), name="captions")

    def _go_to(self, id_: str) -> None:
        self.id = id_
        self._title.text = id_
        self._state.text = ""
        self._note.value = self._noted = ""
        self._zoom.show_sky(None, None)
        self.survey.show(None, None, None)
        self.session.gallery.set_option("viewing", id_)
        background_tasks.create(self._fill(id_, with_neighbours=True), name="large view")

    def _pin_chosen(self) -> None:
        if self._images:
            last = self._images[-1]
            self._images = ()
            self.open(last)

    async def _fill_captions(self) -> None:
        images = self._images
        tiles = await self.session.call(self.session.service.tiles, list(images))
        if tiles is not None and images == self._images and not self.session.client.is_deleted:
            self._tiles = {tile.id: tile for tile in self.session.veil.tiles(tiles)}
            self._draw()

    def _hide_scores(self) -> None:
        """Hide the heat maps during a random audit: they would tell the score."""
        is_audit = bool(self.session.query.audit)
        self._heat.set_visibility(not is_audit)
        if is_audit:
            self._heat.value = False

    def toggle_heat(self) -> None:
        """Show or hide heat maps; nothing happens while the view is closed."""
        if self.id and not self.session.query.audit:  # it would tell the score
            self._heat.value = not self._heat.value

    def toggle_survey(self) -> None:
        """Show or hide the survey picture; nothing happens while the view is closed."""
        if self.id:
            self.survey.toggle()

    def close(self) -> None:
        """Return to the gallery."""
        self.dialog.close()

    def _closed(self) -> None:
        if not self.dialog.value:
            self.id, self._images = "", ()
            self.survey.show(None, None, None)
            self.session.gallery.set_option("viewing", "")
            self.session.gallery.set_option("panes", {"ids": [], "pinned": False})

    def _use(self, light: Light) -> None:
        self._stretch.value, self._channel.value = light.stretch, light.channel
        self._zoom.use(light)

    def _draw(self) -> None:
        self._legend.set_visibility(self._heat.value)
        if not self.id:
            return
        chosen, is_one = str(self._stretch.value), len(self._images) == 1
        stretches = list(self.session.service.stretches) if self._all_stretches.value and is_one else [chosen]
        panes = [
            {"name": name if is_one else id_, "src": self._address(id_, name), "alt": id_} | self._caption(id_)
            for id_ in self._images
            for name in stretches
        ]
        ids, id_ = self.session.gallery.ids, self._images[-1]
        place = ids.index(id_) if id_ in ids else len(ids)
        beside = ids[place + 1 : place + 2] + ids[max(0, place - 1) : place]
        ahead = [] if len(panes) > 1 or self._heat.value else [self._address(id_, chosen) for id_ in beside]
        if self._blinking is not None:
            of, step = self._blinking
            control = self._stretch if of == "stretch" else self._channel
            ahead.append(self._address(id_, **{"stretch": chosen, of: _after(control, step)}))
        self._zoom.show(panes, ahead, self.id)

    def _caption(self, id_: str) -> dict[str, str]:
        tile = self._tiles.get(id_)
        return {} if tile is None else {"text": caption(tile), "label": str(tile.label or "")}

    def _blink(self, of: str, step: int) -> None:
        """Show the next stretch or channel; the zoom stays."""
        control = self._stretch if of == "stretch" else self._channel
        if len(control.options) < 2:
            self.session.say(f"There is only one {of} to show.")
            return
        self._all_stretches.value, self._blinking = False, (of, step)
        control.value = _after(control, step)

    def _address(self, id_: str, stretch: str, channel: str | None = None) -> str:
        words = {"id": id_, "stretch": stretch, "v": self._version}
        channel = str(self._channel.value) if channel is None else channel
        if channel != ALL_CHANNELS:
            words["channel"] = channel
        if self._heat.value:  # the browser asks again after each ranking
            return "/heat?" + urlencode(words | {"v": str(self._rankings)})
        return "/full?" + urlencode(words)

    def _pick(self, name: str) -> None:
        """Show one pane alone: an image, or a stretch of it."""
        if len(self._images) > 1:
            self._show((name,), name)
        else:
            self._all_stretches.value = False
            self._stretch.value = name

    def _step(self, step: int) -> None:
        is_comparing = len(self._images) > 1 and self._images[0] != self.session.query.like
        ids = list(self._images) if is_comparing else self.session.gallery.ids
        now = self.id if is_comparing else self._images[-1]
        if now in ids and 0 <= ids.index(now) + step < len(ids):
            self.open(ids[ids.index(now) + step])
            self.session.gallery.point(self.id)

    async def _label(self, label: Label | None) -> None:
        await self.session.label([self.id], label)

    async def _toggle_star(self) -> None:
        await self.session.toggle_stars([self.id])

    async def _write_note(self) -> None:
        if self.id and (self._note.value or "") != self._noted:
            self._noted = self._note.value or ""
            await self.session.call(self.session.service.note, self.id, self._noted)

    async def _show_like(self) -> None:
        like = self.id
        self.close()
        await self.session.change(like=like)

    def _watch(self, kinds: set[str], ids: set[str]) -> None:
        if "ranking" in kinds:
            self._rankings += 1
            if self._heat.value:
                self._draw()
        if len(self._images) > 1 and (ids & set(self._images) or "ranking" in kinds):
            background_tasks.create(self._fill_captions(), name="captions")
        if self.id and (self.id in ids or kinds & {"ranking", "features"}):
            task = self._fill(self.id, with_neighbours="features" in kinds)
            background_tasks.create(task, name="large view")

    async def _fill(self, id_: str, *, with_neighbours: bool) -> None:
        details = await self.session.call(self.session.service.details, id_)
        if details is None or not self._is_at(id_):
            return
        self._show_details(self.session.veil.details(details))
        if not with_neighbours:
            return
        self._near.clear()
        await asyncio.sleep(REST_S)
        if not self._is_at(id_):
            return
        self.survey.show(details.coordinates, details.orientation, details.size)
        tiles = await self.session.call(self.session.service.neighbours, id_, NEIGHBOURS)
        if tiles is not None and self._is_at(id_):
            self._show_neighbours(self.session.veil.tiles(tiles))

    def _is_at(self, id_: str) -> bool:
        return self.id == id_ and not self.session.client.is_deleted

    def _show_details(self, details: Details) -> None:
        text = state_text(details.tile, is_audit=self.session.veil.scores)
        self._state.text = text + self._ordering_value(details.tile.id)
        self._star.text = "★" if details.tile.star else "☆"
        self._star.props(f"aria-pressed={'true' if details.tile.star else 'false'}")
        if details.tile.note != self._noted:  # otherwise a person may be writing
            self._note.value = self._noted = details.tile.note
        for label, button in self._buttons.items():
            button.classes(**{"add" if label == details.tile.label else "remove": "am-on"})
            button.props(f"aria-pressed={'true' if label == details.tile.label else 'false'}")
        self._links.clear()
        with self._links:
            field = field_of_view(details.orientation, details.size)
            for name, address in sky_links(details.coordinates, field).items():
                link = TextElement(tag="a", text=f"{name} ↗").classes("am-link")
                link.props.update({"href": address, "target": "_blank", "rel": "noopener noreferrer"})
                link.props["data-testid"] = f"link-{name.split()[0].lower()}"
        self._links.set_visibility(details.coordinates is not None)
        has_headers = self.session.service.pictures.metadata_of.has_headers
        self._send.set_visibility(details.coordinates is not None or has_headers)
        self._zoom.show_sky(details.orientation, details.size)
        self._position.clear()
        with self._position:
            if details.coordinates:
                _copied(decimal(details.coordinates))
                _copied(sexagesimal(details.coordinates))
        events = [history_row(event, details.history) for event in reversed(details.history)]
        _rows(self._history, events or [("", "no label yet")])
        _rows(self._metadata, list(details.metadata.items()))

    def _ordering_value(self, id_: str) -> str:
        """Return the value of the column that orders the gallery; empty if no column does."""
        query = self.session.query
        values = self.session.service.values(query, [id_])
        return f" · {query.column} {values[id_] or 'missing'}" if values else ""

    def _show_neighbours(self, tiles: Sequence[Tile]) -> None:
        self._near.clear()
        obstacle = self.session.service.preparation.obstacle
        with self._near:
            if not tiles and obstacle:
                ui.label(f"{obstacle[:1].upper()}{obstacle[1:]}.").classes("am-hint am-wrap")
            for tile in tiles:
                button = ui.element("button").classes(f"am-neighbour am-{tile.label or 'none'}")
                button.props.update({"title": tile.id, "data-id": tile.id, "data-testid": "neighbour"})
                button.props["aria-label"] = f"show {tile.id}, {tile.label or 'no label'}"
                button.on("click", lambda _, id_=tile.id: self.open(id_))
                with button:
                    picture = ui.element("img")
                    light = self._light.light.parameters
                    address = thumbnail_address(tile.id, NEIGHBOUR_SIDE, self._version, **light)
                    picture.props.update({"src": address, "alt": "", "loading": "lazy"})


def _after(control: ui.select, step: int) -> str:
    """Return the choice of a drop-down list that is `step` places after the current one, round and round."""
    names = list(control.options)
    return str(names[(names.index(control.value) + step) % len(names)])


def caption(tile: Tile) -> str:
    """Describe score and label, below the id."""
    words = [] if tile.score is None else [f"{tile.score:.3f}"]
    return " · ".join([*words, f"{SHAPES[tile.label][0]} {tile.label}" if tile.label else "no label"])


def state_text(tile: Tile, *, is_audit: bool = False) -> str:
    """Describe rank, score and label; a random audit hides the score. A tile has its place among what is shown."""
    words = [f"rank {tile.rank:,} of all"] if tile.rank else []
    words += [f"score {tile.score:.4f}"] if tile.score is not None else ["score hidden" if is_audit else "no score"]
    words += [f"{tile.label} (by {tile.annotator})" if tile.label else "no label"]
    return " · ".join(words + ["starred"] * tile.star + ["annotators disagree"] * tile.conflict)


def _copied(text: str) -> None:
    """Show a text with a button that copies it."""
    TextElement(tag="span", text=text).classes("am-figures")
    button = ui.button(icon="content_copy", color=None).props("flat dense size=xs data-testid=copy")
    button.props.update({"data-text": text, "aria-label": f"copy {text}"})
    button.on("click", js_handler=COPY)


def _rows(table: ui.element, rows: Sequence[tuple[str, str]]) -> None:
    table.clear()
    with table:
        for name, value in rows:
            TextElement(tag="dt", text=name)
            TextElement(tag="dd", text=value)
