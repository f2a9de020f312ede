import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from anomalymatch.errors import StorageError
from anomalymatch.ui.notes import MAX_NOTE, Note, Notes


@pytest.fixture
def changes():
    return []


@pytest.fixture
def notes(tmp_path, changes):
    return Notes(tmp_path / "notes.json", changes.append)


def test_notes_and_stars_are_stored(notes, changes):
    assert notes.get("a") == Note("", False)
    notes.write("a", "  two\n nuclei\x00! ")
    assert notes.toggle_star("a")
    assert notes.toggle_star("ü/b.png")
    notes.write("a", "two nuclei !")  # as it is
    assert changes == ["a", "a", "ü/b.png"]
    assert notes.all() == {"a": Note("two nuclei !", True), "ü/b.png": Note("", True)}
    assert Notes(notes.path, changes.append).all() == notes.all()
    notes.write("a", "x" * 3000)
    assert len(notes.get("a").text) == MAX_NOTE
    assert not notes.toggle_star("a")
    notes.write("a", " ")
    assert json.loads(notes.path.read_text()) == {"ü/b.png": {"text": "", "star": True}}


def test_many_threads_lose_no_note(notes):
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda k: notes.write(f"i{k}", f"note {k}"), range(40)))
    assert Notes(notes.path, print).all() == {f"i{k}": Note(f"note {k}") for k in range(40)} == dict(notes.all())


@pytest.mark.parametrize("text", ["{", "[]", '{"a": 1}', '{"a": {"text": "x"}}'])
def test_corrupt_file(notes, text):
    notes.path.write_text(text)
    with pytest.raises(StorageError, match="corrupt"):
        Notes(notes.path, print)
