"""Append-only log of labels in SQLite: who gave which image which label, when, and at which score."""

import csv
import io
import sqlite3
import time
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from anomalymatch.data.labels import in_lower_case, read_labels_csv
from anomalymatch.errors import LabelError, StorageError
from anomalymatch.files import make_folder, storage_errors, write_text
from anomalymatch.types import Label

FROM_FILE = "labels file"
AUTOMATIC = ("start", "oracle", FROM_FILE)
"""Annotators of labels that no person gave in this run: its start, its oracle and the labels file of the images."""

_SCHEMA = """
CREATE TABLE IF NOT EXISTS events (
    sequence INTEGER PRIMARY KEY AUTOINCREMENT,
    image TEXT NOT NULL,
    label TEXT,              -- NULL removes the label
    annotator TEXT NOT NULL,
    at TEXT NOT NULL,        -- UTC, ISO 8601
    cycle INTEGER NOT NULL,  -- training whose ranking was on screen; 0 before the first
    score REAL,              -- score at that moment, if there was one
    undoes INTEGER           -- sequence of the event that this one undoes
)
"""
_TIMEOUT_S = 30
"""Longest wait for another writer."""


class LabelEvent(NamedTuple):
    """Event of the log. `label` is None if the label was removed; `undoes` is the event that an undo reverts."""

    sequence: int
    id: str
    label: Label | None
    annotator: str
    at: datetime
    cycle: int
    score: float | None
    undoes: int | None = None


class LabelLog:
    """Label log of one run, in one SQLite file (write-ahead log, synced at every commit).

    An undo is an event, too: nothing is deleted. A batch of labels is one transaction, of which a kill leaves all or
    nothing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        make_folder(path.parent)
        with self._errors(), ExitStack() as on_error:
            self._connection = sqlite3.connect(path, timeout=_TIMEOUT_S, check_same_thread=False)
            on_error.callback(self._connection.close)
            _enable_write_ahead(self._connection)
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
        """Append one event for each of `labels`, all or none; None removes a label."""
        now = datetime.now(UTC).isoformat()
        self._insert(
            (id_, None if label is None else str(Label(label)), annotator, now, cycle, (scores or {}).get(id_), None)
            for id_, label in labels.items()
        )

    def current(self, *, until_cycle: int | None = None) -> dict[str, Label]:
        """Return the label of each image, by its last event up to `until_cycle` that was not undone."""
        labels: dict[str, Label] = {}
        for event in valid_events(self.events()):
            if until_cycle is not None and event.cycle > until_cycle:
                continue
            labels.pop(event.id, None)
            if event.label is not None:
                labels[event.id] = event.label
        return labels

    def events(self, *, after: int = 0) -> list[LabelEvent]:
        """Return the events whose sequence number is larger than `after`, oldest first."""
        with self._errors():
            rows = self._connection.execute(
                "SELECT * FROM events WHERE sequence > ? ORDER BY sequence", (after,)
            ).fetchall()
        return [
            LabelEvent(n, id_, Label(label) if label else None, who, datetime.fromisoformat(at), cycle, score, undoes)
            for n, id_, label, who, at, cycle, score, undoes in rows
        ]

    def undo(self, *, annotator: str) -> list[str]:
        """Undo the annotator's last call of `append` that was not undone; return its images, if any.

        The earlier labels of these images are valid again.
        """
        own = [event for event in valid_events(self.events()) if event.annotator == annotator]
        last = [event for event in own if event.at == own[-1].at]
        now = datetime.now(UTC).isoformat()
        self._insert([(event.id, None, annotator, now, event.cycle, None, event.sequence) for event in last])
        return [event.id for event in last]

    def last_cycle(self) -> int | None:
        """Return the cycle of the newest event; None if the log is empty."""
        with self._errors():
            return self._connection.execute("SELECT MAX(cycle) FROM events").fetchone()[0]

    def new_labels(self, given: Mapping[str, Label]) -> dict[str, Label]:
        """Return the labels `given` by a labels file that differ from those that it gave when it was last read.

        Unchanged ones are left out, so that they do not override what a person has said of the image since.
        """
        known = {event.id: event.label for event in self.events() if event.annotator in AUTOMATIC}
        return {id_: label for id_, label in given.items() if known.get(id_) != label}

    def close(self) -> None:
        """Close the file."""
        self._connection.close()

    def _insert(self, rows: Iterable[tuple[object, ...]]) -> None:
        with self._errors(), self._connection:
            self._connection.executemany(
                "INSERT INTO events (image, label, annotator, at, cycle, score, undoes) VALUES (?, ?, ?, ?, ?, ?, ?)",
                rows,
            )

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            with storage_errors(self.path):
                yield
        except sqlite3.DatabaseError as error:
            raise StorageError(
                f"the label log {self.path} cannot be used ({error}): restore it from labels.csv"
            ) from error


def valid_events(events: Sequence[LabelEvent]) -> list[LabelEvent]:
    """Return the events that were not undone, without the undos."""
    undone = {event.undoes for event in events}
    return [event for event in events if event.undoes is None and event.sequence not in undone]


def _enable_write_ahead(connection: sqlite3.Connection) -> None:
    # SQLite does not apply its timeout to this statement.
    end = time.monotonic() + _TIMEOUT_S
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > end:
                raise
            time.sleep(0.01)


def import_csv(path: Path, known_ids: Container[str]) -> dict[str, Label]:
    """Read a CSV `filename,label` with the labels anomaly, normal, unsure and artefact.

    Raises:
        LabelError: if it names unknown images or labels, or an image twice; the message quotes the first such lines.
    """
    labels = in_lower_case(read_labels_csv(path, known_ids))
    wrong = [f"{id_},{label}" for id_, label in labels.items() if label not in set(Label)]
    if wrong:
        raise LabelError(
            f"{path}: {len(wrong)} labels are none of {', '.join(Label)}; the first: {'; '.join(wrong[:5])}"
        )
    return {id_: Label(label) for id_, label in labels.items()}


def export_csv(labels: Mapping[str, Label], path: Path) -> None:
    """Write labels atomically as the CSV `filename,label` that `import_csv` and ESA's AnomalyMatch read."""
    write_text(path, csv_text(labels))


def csv_text(labels: Mapping[str, Label]) -> str:
    """Format labels as the CSV of `export_csv`."""
    text = io.StringIO()
    # Before Python 3.13 the writer does not quote a name because of a carriage return.
    quote_all = any("\r" in id_ for id_ in labels)
    writer = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_ALL if quote_all else csv.QUOTE_MINIMAL)
    writer.writerow(("filename", "label"))
    writer.writerows((id_, str(label)) for id_, label in labels.items())
    return text.getvalue()
