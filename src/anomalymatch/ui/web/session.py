"""What one open page is about: its query, its annotator, and the labels that go to and come from the service."""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, Literal, TypeVar

from nicegui import Client, background_tasks, run, ui

from anomalymatch.errors import AnomalyMatchError
from anomalymatch.types import Label
from anomalymatch.ui.labels import Change
from anomalymatch.ui.views import Page, Query, Show, Sort, Summary
from anomalymatch.ui.web.gallery import GalleryElement
from anomalymatch.ui.web.theme import many

T = TypeVar("T")
COALESCE_S = 0.05
"""How long changes are gathered before the page follows: an import must not redraw it a thousand times."""

HINT = (
    "Press a on what is rare and n on a few that are not, and the ranking follows; "
    "or drop images of what you look for anywhere on this page."
)
ALONE = {
    Show.UNLABELLED: "Every image has a label.",
    Show.ALL: "The archive is empty.",
    Show.LABELLED: "Nothing has a label yet: show the unlabelled ones and press a, n, u or x.",
    Show.CONFLICTS: "No conflicts: nobody disagrees with anybody.",
}


class Session:
    """One open page.

    Attributes:
        query: what the gallery shows.
        annotator: who labels here.
        follow: whether the order follows each label.
        summary: the last one that was fetched; None before.
        on_query: called when the query changes, before its page is there.
        on_page: called with each page that is shown.
        on_summary: called with each summary that is fetched.
        watchers: called after changes with their kinds and images; without kinds after labels from here.
    """

    def __init__(self, service: Any, gallery: GalleryElement, client: Client) -> None:
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
        unsubscribe = service.subscribe(lambda change: _hand_over(loop, self._note, change))
        client.on_delete(unsubscribe)

    def say(self, text: str, kind: Literal["info", "positive", "negative"] = "info") -> None:
        """Show a notification."""
        if not self.client.is_deleted:
            with self.client:
                look: dict[str, Any] = {"color": "grey-9"} if kind == "info" else {"type": kind}
                ui.notify(text, position="bottom-left", multi_line=len(text) > 80, **look)

    async def call(self, function: Callable[..., T], *words: Any) -> T | None:
        """Call the service in a thread; an error that is meant for people becomes a notification, and None."""
        try:
            return await run.io_bound(function, *words)
        except AnomalyMatchError as error:
            self.say(str(error), "negative")
            return None

    async def load(self, *, keep: bool = False, at: str = "first") -> None:
        """Fetch the page of `query`; of several calls the last one counts."""
        self._load += 1
        mine = self._load
        page = await self.call(self.service.page, self.query)
        if page is None or mine != self._load or self.client.is_deleted:
            return
        self.query = replace(self.query, page=page.page)
        if self.query.group is not None:
            page = replace(page, note=self._group_note())
        elif page.total and await self._needs_hint():
            page = replace(page, note=f"{page.note or 'No labels yet.'} {HINT}")
        self.gallery.show(page, empty=self._why_empty(), filtered=self.is_filtered, keep=keep, at=at)
        for listener in self.on_page:
            listener(page)

    async def change(self, at: str = "first", page: int = 0, **parts: Any) -> None:
        """Change parts of the query, and show its first page or the one asked for."""
        if parts.get("like"):
            parts["group"] = None
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
        await self.change(group=number, show=Show.ALL, low=0.0, high=1.0, text="", like=None)

    async def next_group(self) -> None:
        """Show the group after the one that is shown, or the first."""
        groups = self.service.groups.all()
        if not groups:
            self.say("There are no groups yet: make some in the side panel.")
            return
        await self.show_group(0 if self.query.group is None else (self.query.group + 1) % len(groups))

    async def leave_group(self) -> None:
        """Show the archive again."""
        await self.change(group=None, show=Show.UNLABELLED)

    async def label_group(self, label: Label | None) -> None:
        """Label all images of the group that is shown, on whatever page."""
        if self.query.group is not None:
            group = await self.call(self.service.groups.members, self.query.group)
            if group is not None:
                await self.label(group.ids, label)
                self.say(f"{group.name}: labelled {many(len(group.ids), 'image')} {label}.")

    @property
    def is_filtered(self) -> bool:
        """Whether the query leaves out anything but labelled images."""
        query = self.query
        instead = query.text or query.like or query.group is not None
        return bool(instead) or (query.low, query.high) != (0, 1) or query.show != Show.UNLABELLED

    async def label(self, ids: Sequence[str], label: Label | None) -> None:
        """Label images; their tiles change colour once it is on disk."""
        async with self._lock:
            try:
                await self.call(self.service.label, list(ids), label, self.annotator)
            finally:
                await self._patch(ids)  # also ends their waiting if it failed
        self._tell(set(), set(ids))

    async def undo(self) -> None:
        """Take back the last action of this annotator."""
        async with self._lock:
            ids = await self.call(self.service.undo, self.annotator)
            if ids is None:
                return
            await self._patch([id_ for id_ in self.gallery.ids if id_ in set(ids)])
        what = ids[0] if len(ids) == 1 else f"{len(ids):,} images"
        self.say(f"Took back the label of {what}." if ids else f"Nothing to undo for {self.annotator}.")
        self._tell(set(), set(ids))

    async def rerank(self) -> None:
        """Rank anew now, and show the new order."""
        seconds = await self.call(self.service.rerank)
        await self.load(keep=True)
        if seconds is not None:
            self.say(f"Ranked {self.service.total:,} images in {seconds:.2f} s.")

    async def train(self) -> None:
        """Start the training in the background."""
        await self.call(self.service.training.start)
        self._tell({"training"}, set())

    def _note(self, change: Change) -> None:
        self._kinds.add(change.kind)
        self._ids.update(change.ids)
        if not self._is_following and not self.client.is_deleted:
            self._is_following = True
            background_tasks.create(self._follow_changes(), name="changes of the service")

    async def _follow_changes(self) -> None:
        try:
            while self._kinds and not self.client.is_deleted:
                await asyncio.sleep(COALESCE_S)
                kinds, ids, self._kinds, self._ids = self._kinds, self._ids, set(), set()
                regrouped = "groups" in kinds and self.query.group is not None
                if regrouped or ("ranking" in kinds and self.follow):
                    await self.load(keep=True)
                elif "ranking" in kinds:
                    await self._patch(self.gallery.ids)
                elif "labels" in kinds:
                    await self._patch([id_ for id_ in self.gallery.ids if id_ in ids])
                self._tell(kinds, ids)
        finally:
            self._is_following = False

    def _tell(self, kinds: set[str], ids: set[str]) -> None:
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
        text = f"{groups[number].name}, group {number + 1} of {len(groups)}: the most typical image first."
        return f"{text} Shift with a, n, u or x labels all of it; g shows the next group."

    async def _needs_hint(self) -> bool:
        if self.query.sort is not Sort.SCORE or self.query.show is not Show.UNLABELLED or self.query.like:
            return False
        summary = self.summary or await self.fetch_summary()
        return summary is not None and not any(summary.counts.values())

    async def fetch_summary(self) -> Summary | None:
        """Fetch the state of the whole search, and keep it in `summary`."""
        summary = await self.call(self.service.summary)
        if summary is not None and not self.client.is_deleted:
            self.summary = summary
            for listener in self.on_summary:
                listener(summary)
        return self.summary

    def _why_empty(self) -> str:
        query = self.query
        if query.text or query.like or query.group is not None or (query.low, query.high) != (0, 1):
            return "Nothing matches these filters."
        return ALONE.get(query.show, f"Nothing is labelled {query.show} yet.")


def _hand_over(loop: asyncio.AbstractEventLoop, note: Callable[[Change], None], change: Change) -> None:
    """Bring a change from whatever thread it happened in to the page's own."""
    with suppress(RuntimeError):  # the server has ended meanwhile
        loop.call_soon_threadsafe(note, change)
