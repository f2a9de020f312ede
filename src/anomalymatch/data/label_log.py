"""Labels as an append-only log: who said what of which image, when, and with which score. Undo is another event."""

import csv
import io
import sqlite3
import time
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from anomalymatch.data.labels import read_labels_csv
from anomalymatch.errors import LabelError, StorageError
from anomalymatch.files import make_folder, storage_errors, write_text
from anomalymatch.types import Label

_SCHEMA = """
CREATE TABLE IF NOT EXISTS events (
    sequence INTEGER PRIMARY KEY AUTOINCREMENT,
    image TEXT NOT NULL,
    label TEXT,              -- NULL takes the label away
    annotator TEXT NOT NULL,
    at TEXT NOT NULL,        -- UTC, ISO 8601
    cycle INTEGER NOT NULL,  -- training whose ranking was on screen; 0 before the first
    score REAL,              -- score at that moment, where there was one
    undoes INTEGER           -- sequence of the event that this one takes back, in an undo
)
"""

LABELS_FILE = "labels file"
NOT_PERSONS = ("start", "oracle", LABELS_FILE)
"""Annotators of the labels that a run starts from, that its oracle gives, and that lie beside the images."""

_PATIENCE_S = 30  # how long a writer waits for another one


class LabelEvent(NamedTuple):
    """One line of the log. `label` is None where a label was taken away; `undoes` is the event that an undo undoes."""

    sequence: int
    id: str
    label: Label | None
    annotator: str
    at: datetime
    cycle: int
    score: float | None
    undoes: int | None = None


class LabelLog:
    """The labels of one run, in one SQLite file (write-ahead log, synced at every commit).

    A batch of labels is one transaction: after a kill all of it is there, or none.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        make_folder(path.parent)
        with self._errors(), ExitStack() as on_error:
            self._connection = sqlite3.connect(path, timeout=_PATIENCE_S, check_same_thread=False)
            on_error.callback(self._connection.close)
            _write_ahead(self._connection)
            self._connection.execute("PRAGMA synchronous=FULL")
            self._connection.execute(_SCHEMA)
            self._connection.commit()
            on_error.pop_all()

    def append(
        self,
        labels: Mapping[str, Label | None],
        *,
        annotator: str,
        cycle: int,
        scores: Mapping[str, float] | None = None,
    ) -> None:
        """Add one event for each of `labels`, all or none; None takes a label away."""
        now = datetime.now(UTC).isoformat()
        self._insert(
            (id_, None if label is None else str(Label(label)), annotator, now, cycle, (scores or {}).get(id_), None)
            for id_, label in labels.items()
        )

    def current(self, *, until_cycle: int | None = None) -> dict[str, Label]:
        """The label of each image: its last event that stands; with `until_cycle`, as it was in that cycle."""
        labels: dict[str, Label] = {}
        for event in self._standing():
            if until_cycle is not None and event.cycle > until_cycle:
                continue
            labels.pop(event.id, None)
            if event.label is not None:
                labels[event.id] = event.label
        return labels

    def events(self, *, after: int = 0) -> list[LabelEvent]:
        """The log, oldest first: all of it, or what came after the event of that number."""
        with self._errors():
            rows = self._connection.execute(
                "SELECT * FROM events WHERE sequence > ? ORDER BY sequence", (after,)
            ).fetchall()
        return [
            LabelEvent(n, id_, Label(label) if label else None, who, datetime.fromisoformat(at), cycle, score, undoes)
            for n, id_, label, who, at, cycle, score, undoes in rows
        ]

    def undo(self, *, annotator: str) -> list[str]:
        """Take back what the annotator did last and still stands, by other events; return its images, if any.

        All that one call of `append` said goes at once. It is then as if it had never been said: an earlier label of an
        image counts again.
        """
        mine = [event for event in self._standing() if event.annotator == annotator]
        last = [event for event in mine if event.at == mine[-1].at]
        now = datetime.now(UTC).isoformat()
        self._insert([(event.id, None, annotator, now, event.cycle, None, event.sequence) for event in last])
        return [event.id for event in last]

    def _standing(self) -> list[LabelEvent]:
        """The events that nobody took back, without the undos themselves."""
        events = self.events()
        undone = {event.undoes for event in events}
        return [event for event in events if event.undoes is None and event.sequence not in undone]

    def _insert(self, rows: Iterable[tuple[object, ...]]) -> None:
        with self._errors(), self._connection:
            self._connection.executemany(
                "INSERT INTO events (image, label, annotator, at, cycle, score, undoes) VALUES (?, ?, ?, ?, ?, ?, ?)",
                rows,
            )

    def last_cycle(self) -> int | None:
        """The cycle of the newest event; None for an empty log."""
        with self._errors():
            return self._connection.execute("SELECT MAX(cycle) FROM events").fetchone()[0]

    def unsaid(self, given: Mapping[str, Label]) -> dict[str, Label]:
        """Those of `given`, the labels of a file, that the file had not said when it was last read.

        What a person has said since of an image then stays.
        """
        said = {event.id: event.label for event in self.events() if event.annotator in NOT_PERSONS}
        return {id_: label for id_, label in given.items() if said.get(id_) != label}

    def close(self) -> None:
        """Close the file."""
        self._connection.close()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            with storage_errors(self.path):
                yield
        except sqlite3.DatabaseError as error:
            raise StorageError(
                f"the label log {self.path} cannot be used ({error}): restore it from labels.csv"
            ) from error


def _write_ahead(connection: sqlite3.Connection) -> None:
    """Switch the log to write-ahead. SQLite refuses it at once, without its timeout, while another one does so too."""
    give_up = time.monotonic() + _PATIENCE_S
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > give_up:
                raise
            time.sleep(0.01)


def import_csv(path: Path, known_ids: Container[str]) -> dict[str, Label]:
    """Read a CSV `filename,label` with the labels anomaly, normal, unsure and artefact.

    Raises:
        LabelError: if it names unknown images or labels, or an image twice; the first offending lines are quoted.
    """
    labels = read_labels_csv(path, known_ids)
    wrong = [f"{id_},{label}" for id_, label in labels.items() if label not in set(Label)]
    if wrong:
        raise LabelError(
            f"{path}: {len(wrong)} labels are none of {', '.join(Label)}; the first: {'; '.join(wrong[:5])}"
        )
    return {id_: Label(label) for id_, label in labels.items()}


def export_csv(labels: Mapping[str, Label], path: Path) -> None:
    """Write the CSV `filename,label` that AnomalyMatch and `import_csv` read, atomically."""
    write_text(path, csv_text(labels))


def csv_text(labels: Mapping[str, Label]) -> str:
    """What `export_csv` writes."""
    text = io.StringIO()
    # Before Python 3.13 a carriage return is not reason enough for the writer to quote a name.
    hard = any("\r" in id_ for id_ in labels)
    writer = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_ALL if hard else csv.QUOTE_MINIMAL)
    writer.writerow(("filename", "label"))
    writer.writerows((id_, str(label)) for id_, label in labels.items())
    return text.getvalue()
