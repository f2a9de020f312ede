"""Notes and stars that people give to images, stored in one file."""

import json
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from anomalymatch.errors import StorageError
from anomalymatch.files import write_text
from anomalymatch.text import printable

MAX_NOTE = 2000
"""Most characters of a note."""


class Note(NamedTuple):
    """Note on an image; an image without one has the empty note."""

    text: str = ""
    star: bool = False


class Notes:
    """Notes of a search. Methods are thread-safe.

    Args:
        path: the file.
        on_change: called with the image after each change.

    Raises:
        StorageError: if the file is corrupt.
    """

    def __init__(self, path: Path, on_change: Callable[[str], None]) -> None:
        self.path, self._on_change = path, on_change
        self._lock = threading.Lock()
        self._notes = _read(path)

    def all(self) -> Mapping[str, Note]:
        """Return the note of each image that has one, the oldest first."""
        return self._notes

    def get(self, id_: str) -> Note:
        """Return the note of an image."""
        return self._notes.get(id_, Note())

    def write(self, id_: str, text: str) -> None:
        """Replace the text of a note; control characters become spaces, and the text is cut to `MAX_NOTE`."""
        clean = " ".join(printable(text, " ").split())[:MAX_NOTE]
        self._change(id_, lambda note: note._replace(text=clean))

    def toggle_star(self, id_: str) -> bool:
        """Give an image a star or take it away; return True if it has one now."""
        return self._change(id_, lambda note: note._replace(star=not note.star)).star

    def _change(self, id_: str, change: Callable[[Note], Note]) -> Note:
        with self._lock:
            old = self.get(id_)
            new = change(old)
            if new == old:
                return old
            notes = {key: note for key, note in {**self._notes, id_: new}.items() if note != Note()}
            plain = {key: note._asdict() for key, note in notes.items()}
            write_text(self.path, json.dumps(plain, indent=1, ensure_ascii=False))
            self._notes = notes
        self._on_change(id_)
        return new


def _read(path: Path) -> dict[str, Note]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {str(id_): Note(str(note["text"]), bool(note["star"])) for id_, note in found.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StorageError(f"the notes in {path} are corrupt ({error}): delete that file to start over") from error
