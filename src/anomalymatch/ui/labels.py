"""The label log with its view in memory: what counts now, who said what, and where people disagree."""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

from anomalymatch.data.label_log import LabelEvent, LabelLog
from anomalymatch.errors import LabelError
from anomalymatch.types import Label
from anomalymatch.ui.views import Agreement

MAX_NAME = 64
"""Characters of an annotator's name."""


class LabelBook:
    """A view of a `LabelLog` that follows it event by event; what it says is on disk before it is in the view.

    Not safe for several threads at once; the service has a lock for that.
    """

    def __init__(self, log: LabelLog) -> None:
        self._log = log
        self._last = 0
        self._events: dict[str, list[LabelEvent]] = {}
        """Of each image, what was said and stands, oldest first."""
        self.refresh()

    def refresh(self) -> set[str]:
        """Read what is new in the log, also from other processes; return the images it is about."""
        new = self._log.events(after=self._last)
        for event in new:
            standing = self._events.setdefault(event.id, [])
            if event.undoes is None:
                standing.append(event)
            else:
                standing[:] = [earlier for earlier in standing if earlier.sequence != event.undoes]
            self._last = event.sequence
        return {event.id for event in new}

    def say(
        self, labels: Mapping[str, Label | None], *, annotator: str, cycle: int, scores: Mapping[str, float]
    ) -> set[str]:
        """Label images, or with None take their labels away; return the images that changed."""
        self._log.append(labels, annotator=annotator, cycle=cycle, scores=scores)
        return self.refresh()

    def undo(self, annotator: str) -> list[str]:
        """Take back the annotator's last action; return its images."""
        images = self._log.undo(annotator=annotator)
        self.refresh()
        return images

    def history(self, id_: str) -> list[LabelEvent]:
        """All that was said of an image, with what was undone, oldest first."""
        return [event for event in self._log.events() if event.id == id_]

    def last(self, id_: str) -> LabelEvent | None:
        """The label that counts, with who gave it; None without one."""
        events = self._events.get(id_)
        return events[-1] if events and events[-1].label is not None else None

    def labels(self) -> dict[str, Label]:
        """The label of each image, as `LabelLog.current`; the one that was given last comes last."""
        return {event.id: event.label for event in self.standing() if event.label is not None}

    def standing(self) -> list[LabelEvent]:
        """The event that counts of each labelled image, in the order in which they were given."""
        last = (events[-1] for events in self._events.values() if events and events[-1].label is not None)
        return sorted(last, key=lambda event: event.sequence)

    def counts(self) -> dict[Label, int]:
        """Images with each label."""
        counted = Counter(self.labels().values())
        return {label: counted[label] for label in Label}

    def annotators(self) -> dict[str, int]:
        """How many images each annotator has labelled."""
        return dict(Counter(who for opinions in self._all_opinions() for who in opinions))

    def discovery(self) -> list[int]:
        """Anomalies found after 1, 2, 3, … labelled images, in the order of their first labels."""
        first = sorted(
            (events[0].sequence, events[-1].label) for events in self._events.values() if events and events[-1].label
        )
        found, total = [], 0
        for _, label in first:
            total += label is Label.ANOMALY
            found.append(total)
        return found

    def conflict(self, id_: str) -> bool:
        """Whether annotators disagree about an image."""
        return len(set(self._opinions(self._events.get(id_, [])).values())) > 1

    def conflicts(self) -> list[str]:
        """The images on which annotators disagree, newest first."""
        found = [(events[-1].sequence, id_) for id_, events in self._events.items() if self.conflict(id_)]
        return [id_ for _, id_ in sorted(found, reverse=True)]

    def agreements(self) -> list[Agreement]:
        """How each pair of annotators agrees on what both have labelled; most images first."""
        pairs: dict[tuple[str, str], list[tuple[Label, Label]]] = {}
        for opinions in self._all_opinions():
            for first, second in combinations(sorted(opinions), 2):
                pairs.setdefault((first, second), []).append((opinions[first], opinions[second]))
        return sorted((_agreement(*who, both) for who, both in pairs.items()), key=lambda one: -one.images)

    def _all_opinions(self) -> Iterator[dict[str, Label]]:
        return (self._opinions(events) for events in self._events.values())

    @staticmethod
    def _opinions(events: Sequence[LabelEvent]) -> dict[str, Label]:
        """What each annotator says last of an image."""
        last = {event.annotator: event.label for event in events}
        return {who: label for who, label in last.items() if label is not None}


def _agreement(first: str, second: str, both: Sequence[tuple[Label, Label]]) -> Agreement:
    """Share of equal labels, and Cohen's kappa (1960): the share above the one expected by chance."""
    n = len(both)
    share = sum(a == b for a, b in both) / n
    one, other = Counter(a for a, _ in both), Counter(b for _, b in both)
    chance = sum(one[label] * other[label] for label in Label) / n**2
    return Agreement(first, second, n, share, (share - chance) / (1 - chance) if chance < 1 else math.nan)


def checked_name(annotator: str) -> str:
    """A name without what would make a mess of a list of names.

    Raises:
        LabelError: if nothing is left of it.
    """
    name = "".join(character for character in annotator if character.isprintable()).strip()[:MAX_NAME]
    if not name:
        raise LabelError("labels need the name of the one who gives them")
    return name


class Change(NamedTuple):
    """What listeners hear of: `kind` is labels, ranking, training, examples or groups."""

    kind: str
    ids: tuple[str, ...] = ()
    annotator: str = ""


Listener = Callable[[Change], None]


class Listeners:
    """Those who want to hear of changes; they may come and go in any thread."""

    def __init__(self) -> None:
        self._listeners: list[Listener] = []

    def add(self, listener: Listener) -> Callable[[], None]:
        """Tell `listener` from now on; returns what ends that."""
        self._listeners.append(listener)

        def remove() -> None:
            if listener in self._listeners:
                self._listeners.remove(listener)

        return remove

    def tell(self, change: Change) -> None:
        """Call all of them, in this thread."""
        for listener in list(self._listeners):
            listener(change)
