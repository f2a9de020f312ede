"""The page: header, toolbar, gallery, large view and side panel."""

import hashlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from nicegui import background_tasks, run, ui
from nicegui.elements.mixins.text_element import TextElement

from anomalymatch.errors import LabelError
from anomalymatch.types import Label
from anomalymatch.ui.keys import KEYS
from anomalymatch.ui.labels import MAX_NAME, clean_annotator
from anomalymatch.ui.people import DEFAULT_NAME
from anomalymatch.ui.service import LabelService
from anomalymatch.ui.sky_map import SkyMap
from anomalymatch.ui.views import MAX_TILES, MIN_TILES, UNFILTERED, Page, Query, Show, Sort, Summary, Tile
from anomalymatch.ui.web.address import read_address
from anomalymatch.ui.web.gallery import GalleryElement
from anomalymatch.ui.web.goto import GoTo
from anomalymatch.ui.web.light import LightControls
from anomalymatch.ui.web.map import MapPanel
from anomalymatch.ui.web.panel import Panel
from anomalymatch.ui.web.people import NameRequest, share_text
from anomalymatch.ui.web.preparation import PreparationLine
from anomalymatch.ui.web.ranges import RangeFilters, sorts
from anomalymatch.ui.web.routes import version
from anomalymatch.ui.web.saved_views import SavedViewsMenu
from anomalymatch.ui.web.security import Passes
from anomalymatch.ui.web.sending import Sending
from anomalymatch.ui.web.session import Session
from anomalymatch.ui.web.status import StatusBar
from anomalymatch.ui.web.survey import SurveyPicture
from anomalymatch.ui.web.theme import ACCENT, drop_down, heat_colours, kind_colours, label_colours, many
from anomalymatch.ui.web.training import TrainingProgress, TrainingQuestion
from anomalymatch.ui.web.viewer import Viewer

TOUCH = (
    "On a touch screen: tap to select, press long to add to the selection, double tap to open, and label with the "
    "buttons below."
)


def help_dialog(kinds: Mapping[str, str]) -> ui.dialog:
    """Create the dialog with the table of keys; `kinds` are the keys of groups by name."""
    own = {"Kinds": {key: f"anomaly, {name}" for name, key in kinds.items()}} if kinds else {}
    with ui.dialog().props("aria-label='Keys'") as dialog, ui.card().classes("am-help") as card:
        card.props("data-testid=help tabindex=0")  # arrow keys scroll it
        for section, keys in (own | KEYS).items():
            ui.label(section).classes("am-heading")
            with ui.element("dl").classes("am-table"):
                for key, meaning in keys.items():
                    TextElement(tag="dt", text=key).classes("am-kbd")
                    TextElement(tag="dd", text=meaning)
        ui.label(TOUCH).classes("am-hint")
    return dialog


DENSITIES = ("comfortable", "dense")
STEP_TILES = 12
MAX_STOP = -(-MAX_TILES // STEP_TILES) * STEP_TILES  # a slider ends at a whole step
TYPING_MS = 300  # the text filter waits for a pause in typing
TWO_SLIDERS = """(node) => node.el.querySelectorAll('.q-slider__thumb').forEach((thumb, place) => {
  const now = node.component.props.modelValue;
  const words = { role: 'slider', 'aria-label': ['lowest score', 'highest score'][place], 'aria-valuemin': 0,
    'aria-valuemax': 1, 'aria-valuenow': [now.min, now.max][place] };
  for (const [name, value] of Object.entries(words)) thumb.setAttribute(name, value);
})"""
"""Tell screen readers of the two thumbs of a range; Quasar describes them as one slider with the value `0|1`."""


class Toolbar:
    """Controls of the query; they also show changes made elsewhere."""

    def __init__(self, session: Session, version: str) -> None:
        self.session = session
        with ui.element("div").classes("am-toolbar").props("role=toolbar aria-label='Order and filters'"):
            self._sorts = sorts(session.service.columns)
            self.sort = drop_down(list(self._sorts), Sort.SCORE, "order", "sort", self._chosen)
            self.show = drop_down(list(Show), Show.UNLABELLED, "labels", "show", self._chosen)
            with ui.element("label").classes("am-field am-range") as self.range:
                self._range = ui.label().classes("am-figures")
                self.scores = ui.range(min=0, max=1, step=0.01, value={"min": 0, "max": 1}, on_change=self._tell_range)
                self.scores.props("dense role=group aria-label='score range' data-testid=scores")
                for attribute in ("aria-valuenow", "aria-valuemin", "aria-valuemax", "aria-orientation"):
                    self.scores.props[attribute] = None
                for event in ("vnodeMounted", "vnodeUpdated"):
                    self.scores.on(event, js_handler=TWO_SLIDERS)
                self.scores.on("change", self._chosen)
            self.text = ui.input(placeholder="id or metadata  ( / )", on_change=self._chosen)
            self.text.props(
                f"dense borderless clearable debounce={TYPING_MS} aria-label='text filter' data-testid=filter-text"
            ).classes("am-text")
            with ui.button("View", icon="tune", color=None) as view:
                view.props("flat dense no-caps size=sm aria-label='light and size of the tiles' data-testid=look")
                with ui.menu().props("no-refocus anchor='bottom right' self='top right'").classes("am-popup") as menu:
                    menu.props("role=dialog aria-label=View")
                    menu.on("before-hide", js_handler="() => document.activeElement?.blur()")  # returns the keys
                    self.light = LightControls(session, version)
                    with ui.element("div").classes("am-look"):
                        self._many = ui.label()
                        self.count = ui.slider(min=MIN_TILES, max=MAX_STOP, step=STEP_TILES, value=48)
                        self.count.props("dense aria-label='images per page' data-testid=per-page")
                        self.count.on("change", self._count_chosen)
                        ui.label("tiles")
                        self.density = drop_down(DENSITIES, DENSITIES[0], "tiles", "density", self._density_chosen)
                        self.density.tooltip("Dense tiles are closer together, without rank and score.")
            self.follow = ui.switch("follow", value=False, on_change=self._follow_chosen).props(
                "dense data-testid=follow"
            )
            self.follow.tooltip("Reorder after each label. If off, images stay until you press r or turn the page.")
            self.advance = ui.switch("advance", value=True, on_change=self._advance_chosen).props(
                "dense data-testid=advance"
            )
            self.advance.tooltip("Move to the next image after each label.")
        # A row of its own: a filter that appears here moves no tile.
        with ui.element("div").classes("am-filters").props("data-testid=filters"):
            self.found = ui.label().classes("am-hint").props("data-testid=found aria-live=polite")
            SavedViewsMenu(session)
            RangeFilters(session)
            self.elsewhere = ui.button(on_click=self._show_elsewhere, color=None).props(
                "dense flat no-caps size=sm data-testid=elsewhere"
            )
            self.elsewhere.set_visibility(False)
            self.like = ui.button(on_click=lambda: session.change(like=None), color=None).props(
                "dense flat no-caps size=sm icon-right=close data-testid=like-off"
            )
            self.group = ui.button(on_click=session.leave_group, color=None).props(
                "dense flat no-caps size=sm icon-right=close data-testid=group-off"
            )
            self.kind = ui.button(on_click=lambda: session.change(kind=None), color=None).props(
                "dense flat no-caps size=sm icon-right=close data-testid=kind-off"
            )
            self.area = ui.button("map area", on_click=lambda: session.change(area=()), color=None).props(
                "dense flat no-caps size=sm icon-right=close data-testid=area-off"
            )
            self.audit = ui.button("random audit", on_click=lambda: session.change(audit=0), color=None).props(
                "dense flat no-caps size=sm icon-right=close data-testid=audit-off"
            )
            self.part = ui.button(on_click=lambda: session.change(share=(1, 1)), color=None).props(
                "dense flat no-caps size=sm icon-right=close data-testid=part-off"
            )
        self.update()
        session.on_query.append(self.update)
        session.on_page.append(self._count_found)

    def update(self) -> None:
        """Show the current query."""
        query = self.session.query
        self.sort.value = next(text for text, sort in self._sorts.items() if sort == query.sort)
        self.show.value = str(query.show)
        self.scores.value = {"min": query.low, "max": query.high}
        self._tell_range()
        if (self.text.value or "").strip() != query.text:
            self.text.value = query.text
        self.count.value = query.size
        self._many.text = f"{query.size} per page"
        self.session.gallery.set_option("count", query.size)
        self.like.set_visibility(query.like is not None)
        self.area.set_visibility(bool(query.area))
        self.group.set_visibility(query.group is not None)
        self.group.text = f"group {(query.group or 0) + 1}"
        self.kind.set_visibility(query.kind is not None)
        self.kind.text = f"ranked for group {(query.kind or 0) + 1}"
        self.like.text = f"like {shorten(query.like or '')}"
        self.audit.set_visibility(bool(query.audit))
        self.part.set_visibility(query.share != (1, 1))
        self.part.text = share_text(query.share)
        for element in (self.sort, self.range, self.text):
            element.set_visibility(not query.audit)  # nothing tells the score of an image

    def _count_found(self, page: Page) -> None:
        unread, query = self.session.service.unread_headers, self.session.query
        waits = bool(query.text and unread)
        words = f"{many(page.total, 'image')} · headers of {unread:,} more are still being read" if waits else ""
        self.found.text = words or many(page.total, "image")
        self.elsewhere.set_visibility(False)
        if query.text and not page.total:
            background_tasks.create(self._look_elsewhere(query), name="elsewhere")

    async def _look_elsewhere(self, query: Query) -> None:
        """Say where the images are that the text finds, but the other filters hide."""
        found = await self.session.call(self.session.service.page, Query(show=Show.ALL, text=query.text))
        if found is not None and found.total and query == self.session.query:
            self.elsewhere.text = elsewhere_text(self.session.veil.tiles(found.tiles), found.total)
            self.elsewhere.set_visibility(True)

    async def _show_elsewhere(self) -> None:
        """Show what the text finds, whatever its labels and scores."""
        await self.session.change(**UNFILTERED | {"show": Show.ALL, "text": self.session.query.text})

    def _tell_range(self) -> None:
        self._range.text = f"score {self.scores.value['min']:.2f} to {self.scores.value['max']:.2f}"

    def restore(self, kept: dict[str, Any]) -> dict[str, Any]:
        """Restore settings from the browser; return the parts of the query that change."""
        self.follow.value = kept.get("follow") == "true"
        self.advance.value = kept.get("advance", "true") == "true"
        if kept.get("density") in DENSITIES:
            self.density.value = kept["density"]
        self.light.restore(kept)
        count = _number(kept.get("count"), (MIN_TILES, MAX_TILES))
        return {} if count is None or count == self.session.query.size else {"size": count}

    async def clear(self) -> None:
        """Clear all filters."""
        await self.session.change(**UNFILTERED | {"show": Show.UNLABELLED})

    async def _chosen(self) -> None:
        scores = self.scores.value
        parts: dict[str, Any] = {
            "sort": self._sorts[str(self.sort.value)],
            "show": Show(self.show.value),
            "low": float(scores["min"]),
            "high": float(scores["max"]),
            "text": (self.text.value or "").strip(),
        }
        if any(getattr(self.session.query, name) != value for name, value in parts.items()):
            await self.session.change(**parts)

    async def _count_chosen(self) -> None:
        count = min(int(self.count.value), MAX_TILES)
        if count != self.session.query.size:
            self.session.gallery.remember("count", str(count))
            await self.session.change(size=count)

    def _density_chosen(self) -> None:
        self.session.gallery.set_option("dense", self.density.value == DENSITIES[1])
        self.session.gallery.remember("density", str(self.density.value))

    async def _follow_chosen(self) -> None:
        self.session.follow = bool(self.follow.value)
        self.session.gallery.remember("follow", str(self.session.follow).lower())

    def _advance_chosen(self) -> None:
        self.session.gallery.set_option("advance", bool(self.advance.value))
        self.session.gallery.remember("advance", str(bool(self.advance.value)).lower())


def elsewhere_text(tiles: Sequence[Tile], total: int) -> str:
    """Say where the images are that a text finds, although no image is shown."""
    if total > 1:
        return f"{total:,} images with this text are hidden by the other filters: show them"
    (tile,) = tiles
    return f"{shorten(tile.id)} is {f'labelled {tile.label}' if tile.label else 'hidden by the other filters'}: show it"


def shorten(text: str, most: int = 24) -> str:
    """Shorten a long id to its end, where ids differ most."""
    return text if len(text) <= most else f"…{text[len(text) - most + 1 :]}"


def _number(text: str | None, limits: tuple[int, int]) -> int | None:
    if text is None or not text.isdecimal() or not limits[0] <= int(text) <= limits[1]:
        return None
    return int(text)


STYLE = Path(__file__).parent / "style.css"
MAX_KEY = 64
NARROW = 900  # CSS pixels; on narrower screens the panel covers the gallery
THEMES: dict[str, tuple[bool | None, str]] = {
    "auto": (None, "brightness_auto"),
    "dark": (True, "dark_mode"),
    "light": (False, "light_mode"),
}
"""Value and icon of each theme, in the order of the button."""


def search_name(service: LabelService) -> str:
    """Return a name of the search by its run folder and its images, under which the browser keeps keys for it."""
    return hashlib.sha256(f"{service.run.resolve()}\n{service.source.fingerprint}".encode()).hexdigest()[:16]


def build_page(service: LabelService, *, survey: str | None = None, passes: Passes | None = None) -> None:
    """Register the page `/` of a service. Each visit creates a page of its own.

    Args:
        service: what the page shows.
        survey: address of a HiPS cut-out service for survey pictures; None offers none.
        passes: signs the addresses that other applications download.
    """
    passes = passes or Passes()
    sky = SkyMap(service.source.ids, service.pictures.coordinates, lambda: service.labels)

    @ui.page("/", response_timeout=30)
    async def index() -> None:
        await run.io_bound(lambda: (service.stretches, service.columns.kinds))  # they read images and columns once
        _Page(service, survey, passes, sky)


class _Page:
    def __init__(self, service: LabelService, survey: str | None, passes: Passes, sky: SkyMap) -> None:
        ui.add_css(f":root {{{label_colours()}{heat_colours()}}}")
        ui.add_css(kind_colours())
        ui.add_css(STYLE)
        ui.colors(primary=ACCENT)
        self.dark = ui.dark_mode(None)
        self.theme = "auto"
        known_as = version(service.source)
        with ui.element("div").classes("am-main"):
            bar = ui.element("div")
            with ui.element("div").classes("am-split") as split:
                gallery = GalleryElement(version=known_as, search=search_name(service))
        self.session = Session(service, gallery, ui.context.client)
        sending = Sending(self.session, passes)
        with gallery:
            StatusBar(self.session, known_as)
        with split:
            self.map = MapPanel(self.session, known_as)
        with bar:
            self.toolbar = Toolbar(self.session, known_as)
        # Not value=None: NiceGUI would ask the browser and time out after a second, too early for a slow one.
        drawer = ui.right_drawer(value=False, bordered=True).props(f"width=340 breakpoint={NARROW} show-if-above")
        with drawer as self.drawer:
            self.panel = Panel(self.session, sending, sky)
        self.drawer.classes("am-panel").props("data-testid=panel aria-label='State of the search'")
        picture = SurveyPicture(self.session, survey)
        self.viewer = Viewer(self.session, known_as, self.toolbar.light, picture, sending)
        self.session.view = lambda id_: self.viewer.open(id_) if id_ else self.viewer.close()
        self.session.viewed = lambda: self.viewer.id
        self.session.compare = self.viewer.compare
        self.map.element.on("look", lambda event: self.viewer.open(event.args["id"]))
        self.help = help_dialog(service.groups.keys)
        self.goto = GoTo(self.session)
        self.session.ask_training = TrainingQuestion(self.session).ask
        self._header(service.name)
        self._wire(gallery)
        ui.timer(0, self._start, once=True)

    def _header(self, name: str) -> None:
        with ui.header().classes("am-header"):
            ui.label(name).classes("am-name").props("role=heading aria-level=1 data-testid=name")
            progress = TrainingProgress()
            self.panel.training.on_status.append(progress.show)
            self.panel.training.refresh()
            self.standing = ui.label().classes("am-hint am-grow am-standing").props("data-testid=standing")
            PreparationLine(self.session)
            for text, key, icon, act in (
                ("Map", "m", "scatter_plot", lambda: self.map.toggle()),
                ("Undo", "z", "undo", self.session.undo),
                ("Re-rank", "r", "sort", self.session.rerank),
                ("Train", "t", "model_training", lambda: self.session.ask_training()),
            ):
                button = ui.button(text, icon=icon, on_click=act, color=None).classes("am-command")
                button.props(f"flat dense no-caps size=sm data-testid={text.lower()} aria-label='{text} ({key})'")
                button.tooltip(f"{text} ({key})")
            self.request = NameRequest(self.session)
            self.name = ui.input(value=DEFAULT_NAME, on_change=self._name_chosen).classes("am-name-field")
            self.name.props(
                f"dense borderless maxlength={MAX_NAME} debounce=400 aria-label='your name' data-testid=annotator"
            )
            self.name.tooltip("Your name, stored with each of your labels")
            self.request.field = self.name
            self.theme_button = _icon("brightness_auto", "theme", "theme: auto", self._next_theme)
            _icon("keyboard", "help-button", "keys (?)", lambda: self.help.open())
            _icon("view_sidebar", "panel-button", "side panel", self.drawer.toggle)

    def _wire(self, gallery: GalleryElement) -> None:
        session = self.session
        gallery.on_event("hello", self._hello)
        gallery.on_event("address", self._travel)
        kept = {"label": self._label, "whole": self._label_whole, "undo": self._undo, "redo": self._redo}
        for name, act in kept.items():
            gallery.on_event(name, partial(self._answer, act))
        gallery.on_event("look", lambda words: self.viewer.open(words["id"]))
        gallery.on_event("compare", lambda words: self.viewer.compare(words["ids"], words["at"]))
        gallery.on_event("pane", lambda words: self.viewer.choose(words["id"]))
        gallery.on_event("shut", lambda _: self.viewer.close())
        gallery.on_event("turn", lambda words: session.turn(int(words["to"]), words["at"]))
        gallery.on_event("end", lambda _: session.tell_end())
        gallery.on_event("group", lambda _: session.next_group())
        gallery.on_event("heat", lambda _: self.viewer.toggle_heat())
        gallery.on_event("survey", lambda _: self.viewer.toggle_survey())
        gallery.on_event("map", lambda _: self.map.toggle())
        gallery.on_event("star", lambda words: session.toggle_stars(words["ids"]))
        gallery.on_event("rerank", lambda _: session.rerank())
        gallery.on_event("review", lambda _: session.review())
        gallery.on_event("train", lambda _: session.ask_training())
        gallery.on_event("goto", lambda _: self.goto.open())
        gallery.on_event("help", lambda _: self.help.open())
        gallery.on_event("clear", lambda _: self.toolbar.clear())
        session.client.on_connect(gallery.resume)
        session.on_summary.append(self._show_standing)

    async def _answer(self, act: Callable[[dict[str, Any], str], Awaitable[object]], words: dict[str, Any]) -> None:
        """Do what a key in the browser asks for, and acknowledge it, whether it succeeds or is refused."""
        key = str(words.get("key", ""))[:MAX_KEY]
        try:
            await act(words, key)
        finally:
            if key and not self.session.client.is_deleted:
                self.session.gallery.acknowledge(key)

    async def _label(self, words: dict[str, Any], key: str) -> None:
        if words.get("group") is None:
            await self.session.label(words["ids"], words["label"] and Label(words["label"]), key)
        else:
            await self.session.label_kind(words["ids"], int(words["group"]), key)

    async def _label_whole(self, words: dict[str, Any], key: str) -> None:
        await self.session.label_group(Label(words["label"]), key)

    async def _undo(self, _: dict[str, Any], key: str) -> None:
        await self.session.undo(key)

    async def _redo(self, _: dict[str, Any], key: str) -> None:
        await self.session.redo(key)

    async def _start(self) -> None:
        words = self.session.client.request.query_params.multi_items()
        await self.session.open_address(read_address(words, self.session.service.columns.kinds))
        await self.session.fetch_recent()
        await self.panel.refresh()

    async def _hello(self, kept: dict[str, Any]) -> None:
        """Restore the settings of the last visit, and the view before a reload."""
        if kept.get("annotator"):
            self.name.value = kept["annotator"][:MAX_NAME]
        if kept.get("theme") in THEMES:
            self._set_theme(kept["theme"])
        self.panel.people.restore(kept)
        self.request.join(kept.get("browser", ""))
        if kept.get("map") == "true" and not self.map.element.visible:
            self.map.toggle()
        self.viewer.survey.restore(kept)
        self.panel.sections.restore(kept)
        parts = self.toolbar.restore(kept)
        if kept.get("ids"):
            await self._travel(kept)
        elif parts and not kept.get("address"):
            await self.session.change(push=False, **parts)
        self.session.gallery.restored()

    async def _travel(self, words: dict[str, Any]) -> None:
        """Show the view of an address, with the images that it had."""
        pairs = parse_qsl(words["address"].removeprefix("?"), keep_blank_values=True)
        address = read_address(pairs, self.session.service.columns.kinds)
        await self.session.open_address(address, words["ids"])
        self.session.gallery.restored()

    def _show_standing(self, summary: Summary) -> None:
        labelled, found = sum(summary.counts.values()), summary.counts.get(Label.ANOMALY, 0)
        self.standing.text = f"{many(summary.images, 'image')} · {labelled:,} labelled · {found:,} found"

    def _name_chosen(self) -> None:
        try:
            name = clean_annotator(self.name.value or "")
        except LabelError:
            name = DEFAULT_NAME
        self.session.annotator = name
        self.panel.set_annotator(name)
        self.session.gallery.remember("annotator", name)
        self.request.refresh()
        if self.session.veil.blind:
            background_tasks.create(self.session.look_again(), name="labels of others")
        background_tasks.create(self.session.fetch_recent(), name="last labels")

    def _next_theme(self) -> None:
        names = list(THEMES)
        self._set_theme(names[(names.index(self.theme) + 1) % len(names)])
        self.session.gallery.remember("theme", self.theme)

    def _set_theme(self, theme: str) -> None:
        self.theme = theme
        self.dark.value, icon = THEMES[theme]
        self.theme_button.props(f"icon={icon} aria-label='theme: {theme}'")


def _icon(icon: str, name: str, text: str, act: Any) -> ui.button:
    button = ui.button(icon=icon, on_click=act, color=None).props(f"flat dense size=sm data-testid={name}")
    button.props["aria-label"] = text
    return button.tooltip(text)
