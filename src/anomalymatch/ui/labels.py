"""Label index: the label log in memory, with current labels, annotators and conflicts."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations

from anomalymatch.data.label_log import AUTOMATIC, LabelEvent, LabelLog
from anomalymatch.errors import LabelError
from anomalymatch.text import printable
from anomalymatch.types import Label
from anomalymatch.ui.views import Agreement

MAX_NAME = 64
"""Longest name of an annotator."""


class LabelIndex:
    """Index of a `LabelLog` in memory. Events are on disk before they are in the index.

    It is not thread-safe; `SearchState` has the lock.
    """

    def __init__(self, log: LabelLog) -> None:
        self._log = log
        self._last = 0
        self._events: dict[str, list[LabelEvent]] = {}
        """The events of each image that were not undone, oldest first."""
        self._undone: dict[int, LabelEvent] = {}
        """The event that each undo has reverted."""
        self._newest: list[LabelEvent] = []
        """All labels, oldest first, including undone ones."""
        self.refresh()

    def refresh(self) -> set[str]:
        """Read new events from the log, also those of other processes; return their images."""
        new = self._log.events(after=self._last)
        for event in new:
            events = self._events.setdefault(event.id, [])
            if event.undoes is None:
                events.append(event)
                self._newest.append(event)
            elif event.undoes in self._undone:  # a redo
                events.append(self._undone.pop(event.undoes))
                events.sort(key=lambda one: one.sequence)
            else:
                for reverted in [earlier for earlier in events if earlier.sequence == event.undoes]:
                    events.remove(reverted)
                    self._undone[event.sequence] = reverted
            self._last = event.sequence
        return {event.id for event in new}

    def recent(self, annotator: str, count: int) -> dict[str, Label]:
        """Return the annotator's last `count` labels of different images, newest first."""
        found: dict[str, Label] = {}
        for event in reversed(self._newest):
            if len(found) == count:
                break
            if event.annotator != annotator or event.id in found:
                continue
            label = self._opinions(self._events[event.id]).get(annotator)
            if label is not None:
                found[event.id] = label
        return found

    def history(self, id_: str) -> list[LabelEvent]:
        """Return all events of an image, including undone ones, oldest first."""
        return [event for event in self._log.events() if event.id == id_]

    def current(self, id_: str) -> LabelEvent | None:
        """Return the event of an image's current label; None without a label."""
        events = self._events.get(id_)
        return events[-1] if events and events[-1].label is not None else None

    def labels(self) -> dict[str, Label]:
        """Return the label of each image as `LabelLog.current` does; the newest label comes last."""
        return {event.id: event.label for event in self.current_events() if event.label is not None}

    def current_events(self) -> list[LabelEvent]:
        """Return the event of each image's current label, oldest first."""
        last = (events[-1] for events in self._events.values() if events and events[-1].label is not None)
        return sorted(last, key=lambda event: event.sequence)

    def annotators(self) -> dict[str, int]:
        """Count the images that each annotator has labelled."""
        return dict(Counter(name for opinions in self._all_opinions() for name in opinions))

    def people(self, id_: str) -> list[str]:
        """Return who has labelled an image, without labels files and oracles."""
        return [name for name in self._opinions(self._events.get(id_, ())) if name not in AUTOMATIC]

    def second_opinions(self, annotator: str) -> list[str]:
        """Return the images that exactly one other person has labelled, longest ago first."""
        found = []
        for id_, events in self._events.items():
            people = self.people(id_) if self.current(id_) else ()
            if len(people) == 1 and annotator not in people:
                found.append((events[-1].sequence, id_))
        return [id_ for _, id_ in sorted(found)]

    def discovery(self) -> list[int]:
        """Count the anomalies among the first 1, 2, 3, … images, in the order of their first labels."""
        first = sorted(
            (events[0].sequence, events[-1].label) for events in self._events.values() if events and events[-1].label
        )
        found, total = [], 0
        for _, label in first:
            total += label is Label.ANOMALY
            found.append(total)
        return found

    def has_conflict(self, id_: str) -> bool:
        """Return True if annotators disagree about an image. The next label, by anyone, settles a conflict."""
        opinions: dict[str, Label | None] = {}
        for event in self._events.get(id_, []):
            if _disagree(opinions):
                opinions.clear()
            opinions[event.annotator] = event.label
        return _disagree(opinions)

    def conflicts(self) -> list[str]:
        """Return the images on which annotators disagree, newest first."""
        found = [(events[-1].sequence, id_) for id_, events in self._events.items() if self.has_conflict(id_)]
        return [id_ for _, id_ in sorted(found, reverse=True)]

    def agreements(self) -> list[Agreement]:
        """Compute the agreement of each pair of annotators; the pair with most common images comes first."""
        pairs: dict[tuple[str, str], list[tuple[Label, Label]]] = {}
        for opinions in self._all_opinions():
            for first, second in combinations(sorted(opinions), 2):
                pairs.setdefault((first, second), []).append((opinions[first], opinions[second]))
        return sorted((_agreement(*names, both) for names, both in pairs.items()), key=lambda one: -one.images)

    def _all_opinions(self) -> Iterator[dict[str, Label]]:
        return (self._opinions(events) for events in self._events.values())

    @staticmethod
    def _opinions(events: Sequence[LabelEvent]) -> dict[str, Label]:
        """Return the last label of each annotator."""
        last = {event.annotator: event.label for event in events}
        return {name: label for name, label in last.items() if label is not None}


def _disagree(opinions: Mapping[str, Label | None]) -> bool:
    return len({label for label in opinions.values() if label is not None}) > 1


def _agreement(first: str, second: str, both: Sequence[tuple[Label, Label]]) -> Agreement:
    """Compute the share of equal labels and Cohen's kappa (1960), which corrects it for chance."""
    n = len(both)
    share = sum(a == b for a, b in both) / n
    one, other = Counter(a for a, _ in both), Counter(b for _, b in both)
    chance = sum(one[label] * other[label] for label in Label) / n**2
    return Agreement(first, second, n, share, (share - chance) / (1 - chance) if chance < 1 else math.nan)


def clean_annotator(annotator: str) -> str:
    """Return an annotator's name without control characters, of at most `MAX_NAME` characters.

    Raises:
        LabelError: if nothing is left of it.
    """
    name = printable(annotator, "").strip()[:MAX_NAME]
    if not name:
        raise LabelError(f"the annotator's name is {annotator!r}: labels need a name with visible characters")
    return name


def history_row(event: LabelEvent, history: Sequence[LabelEvent]) -> tuple[str, str]:
    """Return time and description of an event of the label history of an image."""
    undos = {one.sequence for one in history if one.undoes is not None}
    what = "redo" if event.undoes in undos else "undo" if event.undoes else str(event.label or "label removed")
    score = "" if event.score is None else f" at {event.score:.3f}"
    return f"{event.at:%Y-%m-%d %H:%M:%S}", f"{what} by {event.annotator}{score}"
