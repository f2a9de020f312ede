"""A service in memory, for tests of the page: real images, but scores that follow from a hash and the labels."""

import hashlib
import io
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as PillowImage


@dataclass
class TrainingStatus:
    state: str = "idle"
    cycle: int = 0
    step: int = 0
    steps: int = 0
    seconds: float = 0.0
    losses: dict[str, list[float]] = field(default_factory=dict)
    message: str = ""
    log: list[str] = field(default_factory=list)


class FakeTraining:
    def __init__(self, service: "FakeService") -> None:
        self.service, self.now = service, TrainingStatus()

    def start(self) -> None:
        steps = np.arange(1, 201)
        losses = {
            "loss": list(2.0 * steps**-0.4 + 0.05 * np.sin(steps)),
            "pass_rate": list(1 - steps**-0.3),
        }
        log = ["loaded 61,578 features", "step 100: loss 0.31", "step 200: loss 0.24"]
        self.now = TrainingStatus("running", 1, 200, 1000, 83.0, losses, "", log)
        self.service.tell("training")

    def stop(self) -> None:
        self.now = replace(self.now, state="finished")
        self.service.tell("training")

    def fail(self, message: str) -> None:
        self.now = replace(self.now, state="failed", message=message)
        self.service.tell("training")

    def status(self) -> TrainingStatus:
        return self.now


class FakePictures:
    def __init__(self, source: Any) -> None:
        self.source = source

    def thumbnail(self, id_: str, side: int) -> bytes:
        image = PillowImage.fromarray(self._read(id_))
        image.thumbnail((side, side))
        return _encoded(image)

    def full(self, id_: str, *, stretch: str = "as trained", channel: str | None = None) -> bytes:
        pixels = self._read(id_)
        if channel is not None:
            pixels = np.repeat(pixels[..., "RGB".index(channel), None], 3, axis=2)
        powers = {"sqrt": 0.5, "log": 0.3, "asinh": 0.4, "zscale": 0.7}
        scaled = 255 * (pixels / 255) ** powers.get(stretch, 1)
        return _encoded(PillowImage.fromarray(scaled.astype(np.uint8)))

    def _read(self, id_: str) -> np.ndarray:
        from anomalymatch.errors import UnreadableImageError
        from anomalymatch.types import Reject

        (image,) = self.source.read([id_])
        if isinstance(image, Reject):
            raise UnreadableImageError(image.reason)
        return image if image.shape[2] == 3 else np.repeat(image[..., :1], 3, axis=2)


class FakeService:
    """See `ui.service.LabelService`; `reranks` counts, `waits` holds each re-ranking up while it is set."""

    def __init__(self, source: Any, run: Path, *, sky: bool = False) -> None:
        self.name, self.source, self.run, self.sky = source.name, source, run, sky
        self.stretches = ("as trained", "linear", "sqrt", "log", "asinh", "zscale")
        self.channels = ("R", "G", "B")
        self.pictures, self.training = FakePictures(source), FakeTraining(self)
        self.total = len(source.ids)
        self.mode, self.reranks, self.round = "live", 0, 0
        self.events: list[Any] = []
        self.undone: set[int] = set()
        self.listeners: list[Callable[[Any], None]] = []
        self.kept_examples: dict[str, bytes] = {}
        self._lock = threading.RLock()
        self._scores = np.array([_chance(id_) ** 4 for id_ in source.ids])
        self.groups = make_groups(self)
        self._position = {id_: place for place, id_ in enumerate(source.ids)}

    def subscribe(self, listener: Callable[[Any], None]) -> Callable[[], None]:
        self.listeners.append(listener)
        return lambda: self.listeners.remove(listener) if listener in self.listeners else None

    def tell(self, kind: str, ids: Sequence[str] = (), annotator: str = "") -> None:
        from anomalymatch.ui.labels import Change

        for listener in list(self.listeners):
            listener(Change(kind, tuple(ids), annotator))

    def _standing(self) -> dict[str, dict[str, Any]]:
        said: dict[str, dict[str, Any]] = {}
        for event in self.events:
            if event.undoes is None and event.sequence not in self.undone:
                said.setdefault(event.id, {}).pop(event.annotator, None)
                said[event.id][event.annotator] = event.label
        return said

    @property
    def labels(self) -> dict[str, Any]:
        last = {id_: list(by.values())[-1] for id_, by in self._standing().items()}
        return {id_: label for id_, label in last.items() if label is not None}

    def _conflicts(self) -> list[str]:
        return [id_ for id_, by in self._standing().items() if len({label for label in by.values() if label}) > 1]

    def label(self, ids: Sequence[str], label: Any, annotator: str) -> None:
        from anomalymatch.data.label_log import LabelEvent

        with self._lock:
            for id_ in ids:
                score = float(self._scores[self._position[id_]])
                event = LabelEvent(len(self.events) + 1, id_, label, annotator, datetime.now(UTC), 0, score)
                self.events.append(event)
        self.tell("labels", ids, annotator)
        self._rank_later()

    def undo(self, annotator: str) -> list[str]:
        with self._lock:
            mine = [
                event
                for event in self.events
                if event.annotator == annotator and event.undoes is None and event.sequence not in self.undone
            ]
            if not mine:
                return []
            self.undone.add(mine[-1].sequence)
            undo = mine[-1]._replace(sequence=len(self.events) + 1, label=None, undoes=mine[-1].sequence)
            self.events.append(undo)
        self.tell("labels", [mine[-1].id], annotator)
        self._rank_later()
        return [mine[-1].id]

    def _rank_later(self) -> None:
        threading.Thread(target=self.rerank, daemon=True).start()

    def rerank(self) -> float:
        with self._lock:
            self.reranks += 1
            noise = np.array([_chance(f"{id_}{self.reranks}") for id_ in self.source.ids])
            self._scores = np.clip(self._scores + 0.02 * (noise - 0.5), 0, 1)
        self.tell("ranking")
        return 0.12

    def rank_by(self, mode: str) -> None:
        self.mode = mode
        self.rerank()

    def tiles(self, ids: Sequence[str]) -> list[Any]:
        return [self._tile(id_, self._ranks(), self.labels, set(self._conflicts())) for id_ in ids]

    def _ranks(self) -> np.ndarray:
        ranks = np.empty(self.total, dtype=np.int64)
        ranks[np.argsort(-self._scores, kind="stable")] = np.arange(1, self.total + 1)
        return ranks

    def _tile(self, id_: str, ranks: np.ndarray, labels: dict[str, Any], conflicts: set[str]) -> Any:
        from anomalymatch.ui.views import Tile

        place = self._position[id_]
        label = labels.get(id_)
        who = next((e.annotator for e in reversed(self.events) if e.id == id_), None) if label else None
        return Tile(id_, float(self._scores[place]), int(ranks[place]), label, who, id_ in conflicts)

    def page(self, query: Any) -> Any:
        from anomalymatch.ui.views import Page, Sort

        labels, conflicts, ranks = self.labels, set(self._conflicts()), self._ranks()
        ids = [id_ for id_ in self.source.ids if self._is_shown(id_, query, labels, conflicts)]
        order = -1 if query.sort is Sort.LOWEST else 1
        ids.sort(key=lambda id_: order * ranks[self._position[id_]])
        if query.like:
            ids.sort(key=lambda id_: abs(_chance(id_) - _chance(query.like)))
        if query.group is not None:
            ids = [id_ for id_ in self.groups.members(query.group).ids if id_ in ids]
        pages = max(1, -(-len(ids) // query.size))
        page = min(query.page, pages - 1)
        shown = ids[page * query.size : (page + 1) * query.size]
        tiles = [self._tile(id_, ranks, labels, conflicts) for id_ in shown]
        return Page(tiles, len(ids), page, pages)

    def _is_shown(self, id_: str, query: Any, labels: dict[str, Any], conflicts: set[str]) -> bool:
        from anomalymatch.ui.views import Show

        kinds = {Show.ALL: True, Show.UNLABELLED: id_ not in labels, Show.LABELLED: id_ in labels}
        kinds[Show.CONFLICTS] = id_ in conflicts
        fits = kinds.get(query.show, labels.get(id_) == str(query.show))
        return (
            fits and query.text.lower() in id_.lower() and query.low <= self._scores[self._position[id_]] <= query.high
        )

    def neighbours(self, id_: str, count: int) -> list[Any]:
        near = sorted(self.source.ids, key=lambda other: abs(_chance(other) - _chance(id_)))
        return self.tiles(near[1 : count + 1])

    def details(self, id_: str) -> Any:
        from anomalymatch.ui.views import Details

        metadata = {"file": id_, "class": (self.source.truth or {}).get(id_, ""), "redshift": "0.0812"}
        place = (210.802429, 54.348750) if self.sky else None
        history = [event for event in self.events if event.id == id_]
        return Details(self.tiles([id_])[0], (424, 424), metadata, place, history)

    def summary(self) -> Any:
        from anomalymatch.types import Label
        from anomalymatch.ui.views import Agreement, Estimate, Histogram, Summary

        labels = self.labels
        of = {label: [self._position[id_] for id_, given in labels.items() if given == label] for label in Label}
        counts, edges = np.histogram(self._scores, 50, (0, 1))
        histogram = Histogram(edges, counts, {label: self._scores[places] for label, places in of.items()})
        given = [event for event in self.events if event.undoes is None and event.sequence not in self.undone]
        people = {name: sum(event.annotator == name for event in given) for name in {e.annotator for e in given}}
        names = sorted(people)
        agreements = [Agreement(names[0], names[1], 12, 0.83, 0.61)] if len(names) > 1 else []
        enough = len(labels) >= 5
        advice = "about 120 are left (90 %: 80 to 190); going on at the present rate finds one in 6 labels"
        nothing = Estimate(*[float("nan")] * 3, "label 5 images first", "")
        estimate = Estimate(120.0, 80.0, 190.0, "", advice) if enough else nothing
        return Summary(
            images=self.total,
            unreadable=0,
            counts={label: len(places) for label, places in of.items()},
            spent=list(range(1, len(given) + 1)),
            found=np.cumsum([event.label == Label.ANOMALY for event in given]).tolist(),
            histogram=histogram,
            estimate=estimate,
            agreements=agreements,
            conflicts=self._conflicts(),
            annotators=people,
            mode=self.mode,
            modes=("live", "trained", "both"),
            cycle=0,
            seconds=0.12,
        )

    def add_example(self, name: str, data: bytes, annotator: str) -> str:
        id_ = hashlib.sha256(data).hexdigest()[:12]
        self.kept_examples[id_] = data
        self.tell("examples", (), annotator)
        return id_

    def remove_example(self, id_: str) -> None:
        del self.kept_examples[id_]
        self.tell("examples")

    def example_ids(self) -> list[str]:
        return list(self.kept_examples)

    def example_thumbnail(self, id_: str, side: int) -> bytes:
        image = PillowImage.open(io.BytesIO(self.kept_examples[id_])).convert("RGB")
        image.thumbnail((side, side))
        return _encoded(image)

    def import_csv(self, text: str, annotator: str) -> int:
        from anomalymatch.types import Label

        rows = [line.split(",") for line in text.splitlines()[1:]]
        for id_, label in rows:
            self.label([id_], Label(label), annotator)
        return len(rows)

    def close(self) -> None:
        pass


def make_groups(service: FakeService) -> Any:
    """The real groups; two images are alike if the hashes of their ids begin alike."""
    from anomalymatch.ranking import Ranking
    from anomalymatch.ui.groups import Groups

    def divide(ids: Sequence[str], normals: Any, count: int | None) -> list[list[str]]:
        parts = [[id_ for id_ in ids if int(_chance(id_) * (count or 3)) == part] for part in range(count or 3)]
        return sorted((part for part in parts if part), key=len, reverse=True)

    def state() -> Any:
        return service.labels, Ranking(list(service.source.ids), service._scores)

    return Groups(service.run / "groups.json", divide, state, lambda: service.tell("groups"))


def _chance(text: str) -> float:
    return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) / 2**32


def _encoded(image: PillowImage.Image) -> bytes:
    data = io.BytesIO()
    image.save(data, "PNG")
    return data.getvalue()
