"""Append-only log of labels in SQLite: who gave which image which label, when, and at which score."""

import csv
import io
import sqlite3
import threading
import time
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from anomalymatch.data.labels import as_labels, read_labels_csv
from anomalymatch.errors import LabelError, StorageError
from anomalymatch.files import make_folder, storage_errors, write_text
from anomalymatch.text import csv_cell, printable
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
    undoes INTEGER,          -- sequence of the event that this one undoes: a label, or an undo (which is a redo)
    action INTEGER NOT NULL  -- sequence of the first event of the same call, which one undo reverts
)
"""
_KEYS = "CREATE TABLE IF NOT EXISTS keys (key TEXT PRIMARY KEY)"
FILE = "labels.sqlite"
_TIMEOUT_S = 30
"""Longest wait for another writer."""
_OBSTACLES = {
    sqlite3.SQLITE_FULL: "the disk is full: free some space",
    sqlite3.SQLITE_READONLY: "it may not be written: check its permissions and those of its folder",
    sqlite3.SQLITE_CANTOPEN: "it cannot be opened: check its permissions and those of its folder",
    sqlite3.SQLITE_PERM: "it cannot be opened: check its permissions and those of its folder",
    sqlite3.SQLITE_IOERR: "the disk refuses it: check its free space, your quota and its state",
    sqlite3.SQLITE_BUSY: f"another program has been writing to it for {_TIMEOUT_S} s: try again",
    sqlite3.SQLITE_LOCKED: "another program is writing to it: try again",
}
"""Errors of SQLite that say nothing about the log itself."""
_TYPES = (int, str, str | None, str, str, int, float | None, int | None, int)
"""Type of each column of an event."""


class LabelEvent(NamedTuple):
    """Event of the log. `label` is None if the label was removed; `undoes` is the event that an undo reverts.

    An undo that reverts an undo is a redo.
    """

    sequence: int
    id: str
    label: Label | None
    annotator: str
    at: datetime
    cycle: int
    score: float | None
    undoes: int | None = None
    action: int = 0


class LabelLog:
    """Label log of one run, in one SQLite file (write-ahead log, synced at every commit).

    Undo and redo are events, too: nothing is deleted. A batch of labels is one transaction, of which a kill leaves all
    or nothing. Until `close`, the newest labels lie in a second file, `labels.sqlite-wal`: a copy needs both.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._lock = path, threading.RLock()
        make_folder(path.parent)
        with self._errors(), ExitStack() as on_error:
            self._connection = sqlite3.connect(path, timeout=_TIMEOUT_S, check_same_thread=False)
            on_error.callback(self._connection.close)
            _enable_write_ahead(self._connection)
            self._connection.execute("PRAGMA synchronous=FULL")
            self._connection.execute(_SCHEMA)
            self._connection.execute(_KEYS)
            self._connection.commit()
            on_error.pop_all()

    @classmethod
    def of_run(cls, run: Path) -> "LabelLog":
        """Open the log of a run folder, or start one if the run has no labels yet.

        Raises:
            StorageError: if the log is missing or empty, but labels files of the run have labels.
        """
        path = run / FILE
        is_new = not path.exists() or not path.stat().st_size
        log = None if is_new else cls(path)
        if log is None or not log.events():
            found = labels_files(run)
            if found:
                if log is not None:
                    log.close()
                fault = "missing or empty" if is_new else "without labels"
                raise StorageError(f"the label log {path} is {fault}, but {found[-1]} has labels: {_restore(run)}")
        return log or cls(path)

    def append(
        self,
        labels: Mapping[str, str | None],
        *,
        annotator: str,
        cycle: int,
        scores: Mapping[str, float] | None = None,
        key: str = "",
    ) -> int | None:
        """Append one event for each of `labels`, all or none, and return their `action`; None removes a label.

        A call with the same `key` as an earlier call of this method, `undo` or `redo` does nothing: a sender that got
        no answer can repeat it, and then None is returned. Without a key, nothing is known of earlier calls.
        """
        now, known = datetime.now(UTC).isoformat(), scores or {}
        meant = as_labels({id_: label for id_, label in labels.items() if label is not None})
        return self._insert([(id_, meant.get(id_), annotator, now, cycle, known.get(id_), None) for id_ in labels], key)

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
        """Return the events whose sequence number is larger than `after`, oldest first.

        Raises:
            StorageError: if the log is damaged.
        """
        with self._errors():
            rows = self._connection.execute(
                "SELECT * FROM events WHERE sequence > ? ORDER BY sequence", (after,)
            ).fetchall()
        return [self._event(row) for row in rows]

    def valid_actions(self) -> set[int]:
        """Return the actions of all labels that are not undone."""
        return {event.action for event in valid_events(self.events())}

    def undo(self, *, annotator: str, key: str = "") -> dict[str, Label | None]:
        """Undo the annotator's last call of `append` that was not undone; return the labels that it gave, if any.

        The earlier labels of these images are valid again. See `append` for the `key`.
        """
        own = [event for event in valid_events(self.events()) if event.annotator == annotator]
        last = [event for event in own if event.action == own[-1].action]
        return self._revert(last, [event.label for event in last], key)

    def redo(self, *, annotator: str, key: str = "") -> dict[str, Label | None]:
        """Revert the annotator's last undo that was not redone; return the labels that are valid again, if any.

        A later call of `append` by the same annotator leaves nothing to redo. See `append` for the `key`.
        """
        events = {event.sequence: event for event in self.events() if event.annotator == annotator}
        redone = {event.undoes for event in events.values()}
        undos: list[LabelEvent] = []
        for event in reversed(events.values()):
            if event.undoes is None:
                break
            is_undo = events[event.undoes].undoes is None
            if is_undo and event.sequence not in redone and event.action == (undos or [event])[0].action:
                undos.append(event)
        undos.reverse()
        return self._revert(undos, [events[event.undoes].label for event in undos if event.undoes], key)

    def _revert(
        self, reverted: Sequence[LabelEvent], labels: Sequence[Label | None], key: str
    ) -> dict[str, Label | None]:
        """Append an undo of each of the events of one annotator; return `labels` by image."""
        now = datetime.now(UTC).isoformat()
        rows = [(event.id, None, event.annotator, now, event.cycle, None, event.sequence) for event in reverted]
        action = self._insert(rows, key)
        return {} if action is None else {event.id: label for event, label in zip(reverted, labels, strict=True)}

    def last_cycle(self) -> int | None:
        """Return the cycle of the newest event; None if the log is empty."""
        with self._errors():
            return self._connection.execute("SELECT MAX(cycle) FROM events").fetchone()[0]

    def new_labels(self, given: Mapping[str, Label]) -> dict[str, Label]:
        """Return the labels of a labels file that are new or have changed since the file was last read.

        Unchanged ones would override what a person has said of the image since.
        """
        known = {event.id: event.label for event in self.events() if event.annotator in AUTOMATIC}
        return {id_: label for id_, label in given.items() if known.get(id_) != label}

    def close(self) -> None:
        """Close the log, with all labels in one file; the second file stays while another program has the log open."""
        with suppress(sqlite3.Error):  # the labels are safe in the second file, and it may be closed already
            self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        with self._lock:
            self._connection.close()

    def _insert(self, rows: Sequence[tuple[object, ...]], key: str) -> int | None:
        """Append events unless there was a call with the same key; return their action, None if there was one."""
        with self._errors(), self._connection:
            self._connection.execute("BEGIN IMMEDIATE")
            if key and not self._connection.execute("INSERT OR IGNORE INTO keys VALUES (?)", (key,)).rowcount:
                return None
            (action,) = self._connection.execute("SELECT COALESCE(MAX(sequence), 0) + 1 FROM events").fetchone()
            self._connection.executemany(
                "INSERT INTO events (image, label, annotator, at, cycle, score, undoes, action) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                [(*row, action) for row in rows],
            )
        return int(action)

    def _event(self, row: tuple[Any, ...]) -> LabelEvent:
        try:
            if not all(map(isinstance, row, _TYPES)):
                raise ValueError(f"a value has the wrong type: {row[:6]}")
            n, id_, label, who, at, cycle, score, undoes, action = row
            known = None if label is None else Label(label)
            return LabelEvent(n, id_, known, who, datetime.fromisoformat(at), cycle, score, undoes, action)
        except ValueError as error:
            raise self._damaged(f"event {row[0]}: {printable(str(error), limit=200)}") from None

    def _damaged(self, reason: str) -> StorageError:
        return StorageError(f"the label log {self.path} is damaged ({reason}): {_restore(self.path.parent)}")

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            with self._lock, storage_errors(self.path):
                yield
        except sqlite3.Error as error:
            obstacle = _OBSTACLES.get(getattr(error, "sqlite_errorcode", 0) & 0xFF)
            if obstacle is None:
                raise self._damaged(str(error)) from error
            raise StorageError(
                f"the label log {self.path} cannot be used, because {obstacle}. All earlier labels are safe."
            ) from error


def valid_events(events: Sequence[LabelEvent]) -> list[LabelEvent]:
    """Return the labels that were not undone, or were redone, without undos and redos."""
    undone: set[int] = set()
    for event in reversed(events):  # an event comes before those that revert it
        if event.undoes is not None and event.sequence not in undone:
            undone.add(event.undoes)
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


def labels_files(run: Path) -> list[Path]:
    """Return the labels files that a run has written and that have labels, oldest first."""
    files = [*sorted(run.glob("cycles/[0-9]*/labels.csv")), run / "labels.csv"]
    return [path for path in files if path.is_file() and len(path.read_bytes().splitlines()) > 1]


def _restore(run: Path) -> str:
    return (
        f"put back a copy of it, or restore it from labels.csv and cycles/*/labels.csv by "
        f"python -m anomalymatch.data.restore {run}"
    )


def import_csv(path: Path, known_ids: Container[str]) -> dict[str, Label]:
    """Read a CSV `filename,label` whose labels are those of `Label`.

    Raises:
        LabelError: if it names unknown images or labels, or an image twice; the message quotes the first such lines.
    """
    labels = read_labels_csv(path, known_ids)
    try:
        return as_labels(labels)
    except LabelError as error:
        raise LabelError(f"{path}: {error}") from None


def export_csv(labels: Mapping[str, Label], path: Path) -> None:
    """Write labels atomically as the CSV `filename,label` that `import_csv` and ESA's AnomalyMatch read."""
    write_text(path, csv_text(labels))


def csv_text(labels: Mapping[str, Label]) -> str:
    """Format labels as the CSV of `export_csv`; see `csv_cell` for ids that look like formulas."""
    text = io.StringIO()
    # Before Python 3.13 the writer does not quote a name because of a carriage return.
    quote_all = any("\r" in id_ for id_ in labels)
    writer = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_ALL if quote_all else csv.QUOTE_MINIMAL)
    writer.writerow(("filename", "label"))
    writer.writerows((csv_cell(id_), str(label)) for id_, label in labels.items())
    return text.getvalue()
