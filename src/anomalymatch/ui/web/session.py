"""Session of one open page: its query, its annotator, and the changes it exchanges with the service."""

import asyncio
import random
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, TypeVar

from nicegui import Client, background_tasks, run

from anomalymatch.errors import AnomalyMatchError
from anomalymatch.types import Label
from anomalymatch.ui.audit import AuditProgress
from anomalymatch.ui.people import DEFAULT_NAME
from anomalymatch.ui.service import CROWD, LabelService
from anomalymatch.ui.veil import Veil
from anomalymatch.ui.views import QUEUES, UNFILTERED, Change, Page, Query, Show, Sort, Summary
from anomalymatch.ui.web import hints
from anomalymatch.ui.web.address import Address, write_address
from anomalymatch.ui.web.gallery import GalleryElement
from anomalymatch.ui.web.theme import many

T = TypeVar("T")
PAGE_END = "That was the last image of this page: press → to turn to the next page."
END = "That was the last image: press r to see what is left, or change the filters."
RECENT = 8  # labels that the status line shows
COALESCE_S = 0.05  # shortest time between two updates: a burst of changes must not redraw the page a thousand times
_WRITER = ThreadPoolExecutor(1, thread_name_prefix="labels")  # the log takes one label at a time

RANKED = {Sort.SCORE, Sort.LOWEST, Sort.UNCERTAIN, Sort.MEDIAN, Sort.NOVELTY, Sort.DIVERSE, Sort.DESCRIPTION}
"""Orders that a new ranking changes."""


class Status(NamedTuple):
    """Last event, as one sentence, with the image that it concerns and its label, if any."""

    text: str = ""
    is_error: bool = False
    image: str = ""
    label: str = ""


class Session:
    """Session of one open page.

    Attributes:
        query: the query of the gallery.
        annotator: name of the person at this page.
        blind: True if the labels of others are hidden until this person has given one.
        progress: of the random audit, while one is on.
        follow: True if the page is loaded again after each ranking; otherwise its images stay where they are.
        has_new_order: True if there is a newer ranking than that of the page.
        summary: the last summary; None before the first.
        on_query: called when the query changes, before its page is loaded.
        on_page: called with each page that is shown.
        on_summary: called with each summary.
        status: the last event.
        recent: the last labels of the annotator, newest first.
        on_status: called when `status`, `recent` or `has_new_order` changes.
        view: shows an image in the large view; an empty one closes it.
        ask_training: asks whether to train.
        viewed: returns the image in the large view, empty while it is closed.
        compare: shows images side by side in the large view, of which the second argument is chosen.
        watchers: called with the kinds and images of changes.
    """

    def __init__(self, service: LabelService, gallery: GalleryElement, client: Client) -> None:
        self.service, self.gallery, self.client = service, gallery, client
        self.query = Query()
        self.annotator = DEFAULT_NAME
        self.blind = False
        self.progress: AuditProgress | None = None
        self.follow = False
        self.has_new_order = False
        self.summary: Summary | None = None
        self.on_query: list[Callable[[], None]] = []
        self.on_page: list[Callable[[Page], None]] = []
        self.on_summary: list[Callable[[Summary], None]] = [lambda _: self.gallery.set_note(self._note())]
        self.status = Status()
        self.recent: dict[str, Label] = {}
        self.on_status: list[Callable[[], None]] = []
        self.view: Callable[[str], None] = lambda id_: None
        self.ask_training: Callable[[], Awaitable[None]] = self.train
        self.viewed: Callable[[], str] = lambda: ""
        self.compare: Callable[[Sequence[str], str], None] = lambda ids, at: None
        self.watchers: list[Callable[[set[str], set[str]], None]] = []
        self._lock = asyncio.Lock()  # labels and undos reach the log in the order of the keys
        self._load = 0
        self._page: Page | None = None
        self._kinds: set[str] = set()
        self._ids: set[str] = set()
        self._is_following = self._is_own = False
        loop = asyncio.get_running_loop()
        unsubscribe = service.subscribe(lambda change: _call_in_loop(loop, self._record, change))
        client.on_delete(unsubscribe)

    def say(
        self,
        text: str,
        *,
        is_error: bool = False,
        image: str = "",
        label: Label | None = None,
    ) -> None:
        """Show a sentence in the status line; an error stays until the next action."""
        self._show_status(Status(text, is_error, image, label or ""))

    def _show_status(self, status: Status | None = None) -> None:
        self.status = status or self.status
        if not self.client.is_deleted:
            for listener in self.on_status:
                listener()

    async def call(self, function: Callable[..., T], *args: Any) -> T | None:
        """Call the service in a thread; an `AnomalyMatchError` is shown as an error and None is returned."""
        return await self._show_error(run.io_bound(function, *args))

    async def _write(self, function: Callable[..., T], *args: Any) -> T | None:
        return await self._show_error(asyncio.get_running_loop().run_in_executor(_WRITER, partial(function, *args)))

    async def _show_error(self, answer: Awaitable[T]) -> T | None:
        try:
            return await answer
        except AnomalyMatchError as error:
            self.say(str(error), is_error=True)
            return None

    async def load(
        self,
        *,
        keep: bool = False,
        at: str = "first",
        push: bool = False,
        ids: Sequence[str] = (),
        selected: Sequence[str] = (),
    ) -> bool:
        """Load and show the page of `query`; of several calls at once, the last one is shown.

        Args:
            keep: see `GalleryElement.show`.
            at: likewise.
            push: likewise.
            ids: the images that the browser has shown on this page, which then stay; empty for the newest order.
            selected: the selected images.

        Returns:
            False if there is no such page.
        """
        self._load = mine = self._load + 1
        page = await self.call(self.service.page, self.query)
        tiles = await self.call(self.service.tiles, list(ids)) if page and ids else None
        if page is None or mine != self._load or self.client.is_deleted:
            return page is not None
        is_older = bool(tiles) and list(ids) != [tile.id for tile in page.tiles]
        if is_older:
            page = replace(page, tiles=tiles or (), note="", values=self.service.values(self.query, list(ids)))
        if page.page != self.query.page:  # fewer images than thought
            self.query = replace(self.query, page=page.page, shift=0)
        self._page = page
        if self.summary is None or self.query.audit:
            await self.fetch_summary()
        page = replace(page, note=self._note(), tiles=self.veil.tiles(page.tiles))
        self.gallery.show(
            page,
            empty=hints.empty_text(self.query, self.progress),
            filtered=self.query.is_filtered,
            keep=keep,
            at=at,
            address=write_address(self.query),
            push=push,
            selected=selected,
            start=self.query.start,
        )
        self._set_new_order(is_older and self._is_ranked)
        for listener in self.on_page:
            listener(page)
        return True

    async def open_address(self, address: Address, ids: Sequence[str] = ()) -> None:
        """Show the view that an address names; `ids` are the images that the browser has shown there, if any."""
        if address.complaint:
            self.say(address.complaint)
        query = address.query
        if address.image and not address.has_page:
            place = await self.call(self.service.place, query, address.image)
            query = query if place is None else query.from_start(place // query.size * query.size)
        if query != self.query or self._page is None or list(ids) != self.gallery.ids:
            self._use(query)
            if not await self.load(at=address.image or "first", ids=ids, selected=address.selected):
                self._use(Query())
                await self.load()
        else:
            self.gallery.point(address.image or next(iter(self.gallery.ids), ""), address.selected)
        known = await self.call(self.service.tiles, [address.image]) if address.is_large else None
        if address.is_compared and known and await self.call(self.service.tiles, address.selected):
            self.compare(address.selected, address.image)
        elif self.viewed() != (address.image if known else ""):
            self.view(address.image if known else "")

    @property
    def veil(self) -> Veil:
        """Veil of this page: over scores during an audit; over others' labels in blind mode and for second opinions."""
        is_blind = self.blind or self.query.show is Show.SECOND
        return Veil(bool(self.query.audit), self.annotator if is_blind else "")

    async def set_blind(self, blind: bool) -> None:
        """Hide or show the labels of others."""
        self.blind = blind
        await self.look_again()

    async def look_again(self) -> None:
        """Show all images again, of which others may be hidden now."""
        if self.query.show is Show.SECOND and self.query.annotator != self.annotator:
            await self.change()
        await self._patch(self.gallery.ids)
        self._notify_watchers({"labels"}, {*self.gallery.ids, self.viewed()})

    async def review(self) -> None:
        """Show the images to review, newest label first; if they are shown, the unlabelled ones."""
        show = Show.UNLABELLED if self.query.show is Show.REVIEW else Show.REVIEW
        await self.change(**UNFILTERED | {"show": show})

    def _use(self, query: Query) -> None:
        self.query = replace(query, annotator=self.annotator if query.show is Show.SECOND else "")
        self.gallery.set_option("grouped", query.group is not None or bool(query.area))
        for listener in self.on_query:
            listener()

    async def turn(self, to: int, at: str = "first") -> None:
        """Show the page `to`, by the newest ranking.

        Labelled images leave the pages that show unlabelled ones. The next page begins with the image that then
        follows the current page, so that none is left out.
        """
        query, step = self.query, to - self.query.page
        async with self._lock:  # after the labels that are on their way to the log
            tiles = await self.call(self.service.tiles, self.gallery.ids) if step > 0 else []
        gone = sum(not query.passes(tile) for tile in tiles or ())
        self.query = query.from_start(max(0, query.start + step * query.size - gone))
        await self.load(at=at, push=True)

    async def change(self, at: str = "first", page: int = 0, *, push: bool = True, **parts: Any) -> None:
        """Change parts of the query and show its first page, or `page`; `push` adds it to the browser's history."""
        try:
            query = self.query.changed(page=page, **parts)
        except AnomalyMatchError as error:
            self.say(str(error), is_error=True)
            return
        self._use(query)
        await self.load(at=at, push=push)

    async def show_group(self, number: int) -> None:
        """Show all images of a group."""
        await self.change(**UNFILTERED | {"group": number, "show": Show.ALL})

    async def show_kind(self, number: int) -> None:
        """Show the unlabelled images, ranked for a group."""
        await self.change(**UNFILTERED | {"kind": number, "show": Show.UNLABELLED, "area": self.query.area})

    async def label_kind(self, ids: Sequence[str], number: int, key: str = "") -> None:
        """Label images anomaly and put them into a group, see `LabelService.label_kind`."""
        async with self._lock:
            is_done = await self._write(self.service.label_kind, list(ids), number, self.annotator, key) is not None
        if is_done:
            self._say_label(f"Group {number + 1},", dict.fromkeys(ids, Label.ANOMALY))
        else:
            await self._patch(ids)

    async def next_group(self) -> None:
        """Show the group after the current one, or the first."""
        groups = self.service.groups.all()
        if not groups:
            self.say("There are no groups yet: make some in the side panel.")
            return
        await self.show_group(0 if self.query.group is None else (self.query.group + 1) % len(groups))

    async def leave_group(self) -> None:
        """Show the archive again."""
        await self.change(group=None, kind=None, show=Show.UNLABELLED)

    async def label_group(self, label: Label, key: str = "") -> None:
        """Label all images of the current group or area of the map, on all its pages."""
        if self.query.area:
            ids = await self.call(self.service.found, self.query)
            if ids and await self.label(ids, label, key):
                self.say(f"Labelled {many(len(ids), 'image')} {label}.")
        elif self.query.group is not None:
            group = await self.call(self.service.groups.get, self.query.group)
            if group is not None and await self.label(group.ids, label, key):
                self.say(f"{group.name}: labelled {many(len(group.ids), 'image')} {label}.")

    async def label(self, ids: Sequence[str], label: Label | None, key: str = "") -> bool:
        """Label images and return True on success; the change that the service announces updates their tiles."""
        async with self._lock:
            is_done = await self._write(self.service.label, list(ids), label, self.annotator, key) is not None
        if is_done:
            if self.service.listeners > CROWD:  # the other updates wait, see `pace`
                self._ids.difference_update(ids)
                await self._patch([id_ for id_ in self.gallery.ids if id_ in set(ids)])
            self._say_label("Labelled", dict.fromkeys(ids, label))
        else:
            await self._patch(ids)  # the browser waits for their state
        return is_done

    async def toggle_stars(self, ids: Sequence[str]) -> None:
        """Give images a star, or take it away."""
        for id_ in ids:
            is_on = await self.call(self.service.toggle_star, id_)
            if is_on is not None and len(ids) == 1:
                self.say(f"{'Starred' if is_on else 'Removed the star of'} {id_}", image=id_)

    async def undo(self, key: str = "") -> None:
        """Undo the last action of this annotator and go to its image."""
        await self._revert(self.service.undo, "Undid", f"Nothing to undo for {self.annotator}.", key)

    async def redo(self, key: str = "") -> None:
        """Redo what this annotator has undone last and go to its image."""
        await self._revert(self.service.redo, "Redid", f"Nothing to redo for {self.annotator}.", key)

    async def _revert(
        self, act: Callable[[str, str], dict[str, Label | None]], verb: str, nothing: str, key: str
    ) -> None:
        async with self._lock:
            labels = await self._write(act, self.annotator, key)
        if labels:
            await self.go_to(next(iter(labels)))
            self._say_label(verb, labels)
        elif labels is not None:
            self.say(nothing)

    def _say_label(self, verb: str, labels: Mapping[str, Label | None]) -> None:
        """Say what happened to the labels of images."""
        id_, label = next(iter(labels.items()))
        is_one = len(labels) == 1
        given = label if is_one or len(set(labels.values())) == 1 else "labels"
        self.say(
            f"{verb} {given or 'label removed'}: {id_ if is_one else many(len(labels), 'image')}",
            image=id_ if is_one else "",
            label=label if is_one else None,
        )

    async def go_to(self, id_: str) -> None:
        """Go to an image: in the large view if it is open, else on its page, else in the large view."""
        if self.viewed():
            self.view(id_)
            self.gallery.point(id_)
        elif id_ in self.gallery.ids:
            self.gallery.point(id_)
        else:
            place = await self.call(self.service.place, self.query, id_)
            if place is None:
                self.view(id_)
            else:
                await self.change(page=place // self.query.size, at=id_)

    async def rerank(self) -> None:
        """Show the newest order; re-rank first if the page shows it already."""
        if self.has_new_order:
            await self.load(keep=True)
            return
        seconds = await self.call(self.service.rerank)
        await self.load(keep=True)
        if seconds is not None:
            self.say(f"Ranked {self.service.total:,} images in {seconds:.2f} s.")

    async def train(self) -> None:
        """Start a training in the background."""
        await self.call(self.service.training.start)
        self._notify_watchers({"training"}, set())

    def tell_end(self) -> None:
        """Say that the image under the cursor, the last one of its page, has its label."""
        is_last = self._page is None or self._page.page + 1 >= self._page.pages
        self.say(END if is_last else PAGE_END)

    def _set_new_order(self, is_there: bool) -> None:
        if is_there != self.has_new_order:
            self.has_new_order = is_there
            self._show_status()

    def _record(self, change: Change) -> None:
        self._kinds.add(change.kind)
        self._ids.update(change.ids)
        self._is_own |= change.annotator == self.annotator
        if not self._is_following and not self.client.is_deleted:
            self._is_following = True
            background_tasks.create(self._follow_changes(), name="changes of the service")

    async def _follow_changes(self) -> None:
        """Update the page: labels and rankings change its tiles in place; with `follow`, a ranking loads it again."""
        try:
            if self.service.listeners > CROWD:
                await asyncio.sleep(random.uniform(0, self.pace(COALESCE_S)))  # not all at once
            while self._kinds and not self.client.is_deleted:
                kinds, ids, self._kinds, self._ids = self._kinds, self._ids, set(), set()
                is_own, self._is_own = self._is_own, False
                if ("ranking" in kinds and self.follow) or ("map" in kinds and self.query.area):
                    await self.load(keep=True)
                elif kinds & {"ranking", "groups"}:
                    await self._patch(self.gallery.ids)
                    self._offer(is_regrouped="groups" in kinds and self.query.group is not None)
                if "labels" in kinds and is_own:
                    await self.fetch_recent()
                if kinds & {"labels", "notes"} and "ranking" not in kinds:
                    await self._patch([id_ for id_ in self.gallery.ids if id_ in ids])
                self._notify_watchers(kinds, ids)
                await asyncio.sleep(self.pace(COALESCE_S))
        finally:
            self._is_following = False

    def pace(self, seconds: float) -> float:
        """Return the time between two updates: the more pages are open, the longer, or no time is left for labels."""
        return seconds * max(1.0, self.service.listeners / CROWD)

    async def fetch_recent(self) -> None:
        """Fetch and show the last labels of the annotator."""
        recent = await self.call(self.service.recent, self.annotator, RECENT)
        if recent is not None and recent != self.recent:
            self.recent = recent
            self._show_status()

    def _notify_watchers(self, kinds: set[str], ids: set[str]) -> None:
        if not self.client.is_deleted:
            for watcher in self.watchers:
                watcher(kinds, ids)

    async def _patch(self, ids: Sequence[str]) -> None:
        tiles = await self.call(self.service.tiles, list(ids)) if ids else None
        if tiles and not self.client.is_deleted:
            self.gallery.patch(self.veil.tiles(tiles))

    def _offer(self, *, is_regrouped: bool) -> None:
        """Note that there is a newer ranking than that of the page, or that its group has changed."""
        page = self._page
        is_newer = page is not None and self._is_ranked and self.service.order != page.order
        is_kept = self.has_new_order and self.query.group is not None
        self._set_new_order(is_newer or is_regrouped or is_kept)

    @property
    def _is_ranked(self) -> bool:
        query = self.query
        is_fixed = query.like is not None or query.group is not None or query.audit or query.show in QUEUES
        return query.sort in RANKED and not is_fixed

    def _note(self) -> str:
        """Return the text above the images."""
        return hints.note(self.service, self.query, self._page, self.summary, self.progress)

    async def fetch_summary(self) -> Summary | None:
        """Fetch the summary of the search and store it in `summary`."""
        summary, goal = await self.call(self.service.summary), self.query.audit
        self.progress = await self.call(self.service.audit_progress, goal) if goal else None
        if summary is not None and not self.client.is_deleted:
            self.summary = summary
            for listener in self.on_summary:
                listener(summary)
        return self.summary


def _call_in_loop(loop: asyncio.AbstractEventLoop, note: Callable[[Change], None], change: Change) -> None:
    """Pass a change from any thread to the event loop of the page."""
    with suppress(RuntimeError):  # the server has ended
        loop.call_soon_threadsafe(note, change)
