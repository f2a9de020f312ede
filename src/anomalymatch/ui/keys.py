"""Keys of the page, and keys of a team's own for kinds of anomaly."""

import re
from collections.abc import Mapping
from string import ascii_lowercase

from anomalymatch.errors import ConfigError
from anomalymatch.text import listed
from anomalymatch.ui.groups import clean_name

KEYS = {
    "Label": {
        "a": "anomaly",
        "n": "normal",
        "u": "unsure",
        "x": "artefact",
        "1 to 9": "anomaly, of that group",
        "Shift + a, n, u, x": "label the whole group, or all images found in an area of the map",
        "Backspace, Delete": "remove the label",
        "z, Ctrl + z": "undo, any number of times",
        "Shift + z, Ctrl + y": "redo",
        "s": "star, on or off",
    },
    "Move and select": {
        "← → ↑ ↓": "move; at the end, go to the next page",
        "Home, End, Page Up, Page Down": "first, last, a screen up, a screen down",
        "Shift + arrows, Shift + click": "select a range, which one key labels",
        "Ctrl + click, Ctrl + a": "add one, select all",
        "Esc": "clear the selection, close, leave a field",
    },
    "Large view": {
        "Space, Enter, double click": "open, close",
        "+ - wheel, pinch": "zoom; drag to move",
        "o, 0": "original size: one image pixel for each screen pixel; fit",
        "← →": "next and previous image",
        "h": "heat map: what made the score high",
        "v": "picture of a sky survey beside the image, on or off",
        "b, Shift + b": "next and previous stretch; hold to blink",
        "w, Shift + w": "next and previous channel",
        "c": "compare the selected images, two to four, side by side; a, n, u, x label the marked one",
        "arrows, pointer": "of several images, mark one",
    },
    "Search": {
        "/": "filter by text",
        "r": "re-rank now",
        "t": "train in the background",
        "g": "next group",
        "q": "queue of images in conflict and unsure ones: open, leave",
        "m": "map: show or hide",
        ":, Ctrl + g": "go to a page (12), to a rank (#1234), or to an id or its end",
        "drag over the scores": "filter by score, in the panel; a double click shows all",
        "?": "show the keys",
    },
}
"""Sections of keys with what they do."""


def read_kinds(given: object) -> dict[str, str]:
    """Read names of kinds and their keys, `ui.kinds`; None has none.

    Raises:
        ConfigError: if a name is empty or too long, or a key is no lower-case letter or has another meaning.
    """
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise ConfigError(f"ui.kinds is {given!r}: give names with their keys, like {{lens: l, merger: e}}")
    kinds: dict[str, str] = {}
    taken: dict[str, str] = {}
    for keys, meaning in (item for section in KEYS.values() for item in section.items()):
        for word in re.split(r"[ ,]+", keys):
            taken.setdefault(word, meaning)
    for name, key in given.items():
        where = f"ui.kinds: the key of {name!r} is {key!r}"
        if not isinstance(name, str) or clean_name(name) != name or not name:
            instead = clean_name(str(name)) or "lens"
            raise ConfigError(f"ui.kinds: {name!r} is no name of a kind, take {instead!r} instead")
        if key in taken:
            free = [letter for letter in ascii_lowercase if letter not in taken]
            raise ConfigError(f"{where}, which means {taken[key]!r} already: choose one of {listed(free, most=26)}")
        if not isinstance(key, str) or key not in set(ascii_lowercase):
            raise ConfigError(f"{where}: it must be one lower-case letter")
        kinds[name], taken[key] = key, name
    return kinds
