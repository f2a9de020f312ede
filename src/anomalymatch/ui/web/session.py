"""Session of one open page: its query, its annotator, and the changes it exchanges with the service."""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, Literal, TypeVar

from nicegui import Client, background_tasks, run, ui

from anomalymatch.errors import AnomalyMatchError
from anomalymatch.types import Label
from anomalymatch.ui.service import LabelService
from anomalymatch.ui.views import Change, Page, Query, Show, Sort, Summary
from anomalymatch.ui.web.gallery import GalleryElement
from anomalymatch.ui.web.theme import many

T = TypeVar("T")
COALESCE_S = 0.05
"""Shortest time between two updates: a burst of changes must not redraw the page a thousand times."""

HINT = (
    "Press a on rare images and n on a few normal ones, and the ranking follows; "
    "or drop images of what you look for anywhere on this page."
)
EMPTY = {
    Show.UNLABELLED: "Every image has a label.",
    Show.ALL: "The archive is empty.",
    Show.LABELLED: "No image has a label yet: show the unlabelled ones and press a, n, u or x.",
    Show.CONFLICTS: "There are no conflicts: all annotators agree.",
}


class Session:
    """Session of one open page.

    Attributes:
        query: the query of the gallery.
        annotator: name of the person at this page.
        follow: True if the order follows each label.
        summary: the last summary; None before the first.
        on_query: called when the query changes, before its page is loaded.
        on_page: called with each page that is shown.
        on_summary: called with each summary.
        watchers: called with the kinds and images of changes.
    """

    def __init__(self, service: LabelService, gallery: GalleryElement, client: Client) -> None:
        self.service, self.gallery, self.client = service, gallery, client
        self.query = Query()
        self.annotator = "me"
        self.follow = True
        self.summary: Summary | None = None
        self.on_query: list[Callable[[], None]] = []
        self.on_page: list[Callable[[Page], None]] = []
        self.on_summary: list[Callable[[Summary], None]] = []
        self.watchers: list[Callable[[set[str], set[str]], None]] = []
        self._lock = asyncio.Lock()  # labels and undos reach the log in the order of the keys
        self._load = 0
        self._kinds: set[str] = set()
        self._ids: set[str] = set()
        self._is_following = False
        loop = asyncio.get_running_loop()
        unsubscribe = service.subscribe(lambda change: _call_in_loop(loop, self._note, change))
        client.on_delete(unsubscribe)

    def say(self, text: str, kind: Literal["info", "positive", "negative"] = "info") -> None:
        """Show a notification."""
        if not self.client.is_deleted:
            with self.client:
                look: dict[str, Any] = {"color": "grey-9"} if kind == "info" else {"type": kind}
                ui.notify(text, position="bottom-left", multi_line=len(text) > 80, **look)

    async def call(self, function: Callable[..., T], *args: Any) -> T | None:
        """Call the service in a thread; an `AnomalyMatchError` becomes a notification and None is returned."""
        try:
            return await run.io_bound(function, *args)
        except AnomalyMatchError as error:
            self.say(str(error), "negative")
            return None

    async def load(self, *, keep: bool = False, at: str = "first") -> None:
        """Load and show the page of `query`; of several calls at once, the last one is shown."""
        self._load += 1
        mine = self._load
        page = await self.call(self.service.page, self.query)
        if page is None or mine != self._load or self.client.is_deleted:
            return
        self.query = replace(self.query, page=page.page)
        if self.query.group is not None:
            page = replace(page, note=self._group_note())
        elif page.total and await self._needs_hint():
            page = replace(page, note=f"{page.note or 'There are no labels yet.'} {HINT}")
        self.gallery.show(page, empty=self._empty_text(), filtered=self.is_filtered, keep=keep, at=at)
        for listener in self.on_page:
            listener(page)

    async def change(self, at: str = "first", page: int = 0, **parts: Any) -> None:
        """Change parts of the query and show its first page, or `page`."""
        if parts.get("like"):
            parts |= {"group": None, "kind": None}
        try:
            self.query = replace(self.query, page=page, **parts)
        except AnomalyMatchError as error:
            self.say(str(error), "negative")
            return
        self.gallery.set_option("grouped", self.query.group is not None)
        for listener in self.on_query:
            listener()
        await self.load(at=at)

    async def show_group(self, number: int) -> None:
        """Show all images of a group."""
        await self.change(group=number, kind=None, show=Show.ALL, low=0.0, high=1.0, text="", like=None)

    async def show_kind(self, number: int) -> None:
        """Show the unlabelled images, ranked for a group."""
        await self.change(kind=number, group=None, show=Show.UNLABELLED, low=0.0, high=1.0, text="", like=None)

    async def label_kind(self, ids: Sequence[str], number: int) -> None:
        """Label images anomaly and put them into a group, see `LabelService.label_kind`."""
        async with self._lock:
            is_done = await self.call(self.service.label_kind, list(ids), number, self.annotator) is not None
        if not is_done:
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

    async def label_group(self, label: Label) -> None:
        """Label all images of the current group, on all its pages."""
        if self.query.group is not None:
            group = await self.call(self.service.groups.get, self.query.group)
            if group is not None and await self.label(group.ids, label):
                self.say(f"{group.name}: labelled {many(len(group.ids), 'image')} {label}.")

    @property
    def is_filtered(self) -> bool:
        """True if the query leaves out more than the labelled images."""
        return self._is_narrowed or self.query.show != Show.UNLABELLED

    @property
    def _is_narrowed(self) -> bool:
        """True if a filter other than that of the labels is set."""
        query = self.query
        instead = query.text or query.like or query.group is not None or query.kind is not None
        return bool(instead) or (query.low, query.high) != (0, 1)

    async def label(self, ids: Sequence[str], label: Label | None) -> bool:
        """Label images and return True on success; the change that the service announces updates their tiles."""
        async with self._lock:
            is_done = await self.call(self.service.label, list(ids), label, self.annotator) is not None
        if not is_done:
            await self._patch(ids)  # the browser waits for their state
        return is_done

    async def undo(self) -> None:
        """Undo the last action of this annotator."""
        async with self._lock:
            ids = await self.call(self.service.undo, self.annotator)
        if ids is not None:
            what = ids[0] if len(ids) == 1 else f"{len(ids):,} images"
            self.say(f"Undid the label of {what}." if ids else f"Nothing to undo for {self.annotator}.")

    async def rerank(self) -> None:
        """Re-rank now and show the new order."""
        seconds = await self.call(self.service.rerank)
        await self.load(keep=True)
        if seconds is not None:
            self.say(f"Ranked {self.service.total:,} images in {seconds:.2f} s.")

    async def train(self) -> None:
        """Start a training in the background."""
        await self.call(self.service.training.start)
        self._notify_watchers({"training"}, set())

    def _note(self, change: Change) -> None:
        self._kinds.add(change.kind)
        self._ids.update(change.ids)
        if not self._is_following and not self.client.is_deleted:
            self._is_following = True
            background_tasks.create(self._follow_changes(), name="changes of the service")

    async def _follow_changes(self) -> None:
        """Update the page: a label patches its tiles once, a new ranking loads the page again."""
        try:
            while self._kinds and not self.client.is_deleted:
                kinds, ids, self._kinds, self._ids = self._kinds, self._ids, set(), set()
                regrouped = "groups" in kinds and self.query.group is not None
                if regrouped or ("ranking" in kinds and self.follow):
                    await self.load(keep=True)
                elif kinds & {"ranking", "groups"}:
                    await self._patch(self.gallery.ids)
                elif "labels" in kinds:
                    await self._patch([id_ for id_ in self.gallery.ids if id_ in ids])
                self._notify_watchers(kinds, ids)
                await asyncio.sleep(COALESCE_S)
        finally:
            self._is_following = False

    def _notify_watchers(self, kinds: set[str], ids: set[str]) -> None:
        if not self.client.is_deleted:
            for watcher in self.watchers:
                watcher(kinds, ids)

    async def _patch(self, ids: Sequence[str]) -> None:
        tiles = await self.call(self.service.tiles, list(ids)) if ids else None
        if tiles and not self.client.is_deleted:
            self.gallery.patch(tiles)

    def _group_note(self) -> str:
        groups, number = self.service.groups.all(), self.query.group or 0
        if number >= len(groups):
            return ""
        text = f"{groups[number].name}, group {number + 1} of {len(groups)}: the most typical images come first."
        return f"{text} Shift with a, n, u or x labels the whole group; g shows the next one."

    async def _needs_hint(self) -> bool:
        if self.query.sort is not Sort.SCORE or self.query.show is not Show.UNLABELLED or self.query.like:
            return False
        summary = self.summary or await self.fetch_summary()
        return summary is not None and not any(summary.counts.values())

    async def fetch_summary(self) -> Summary | None:
        """Fetch the summary of the search and store it in `summary`."""
        summary = await self.call(self.service.summary)
        if summary is not None and not self.client.is_deleted:
            self.summary = summary
            for listener in self.on_summary:
                listener(summary)
        return self.summary

    def _empty_text(self) -> str:
        if self._is_narrowed:
            return "No image matches these filters."
        return EMPTY.get(self.query.show, f"No image is labelled {self.query.show} yet.")


def _call_in_loop(loop: asyncio.AbstractEventLoop, note: Callable[[Change], None], change: Change) -> None:
    """Pass a change from any thread to the event loop of the page."""
    with suppress(RuntimeError):  # the server has ended
        loop.call_soon_threadsafe(note, change)
