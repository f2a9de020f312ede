"""Address of a view: the query, the image under the cursor, the selection and the large view as words of a URL."""

import math
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple
from urllib.parse import urlencode

from anomalymatch.errors import AnomalyMatchError
from anomalymatch.text import printable
from anomalymatch.ui.views import ColumnOrder, ColumnRange, Query, Show, Sort

PLAIN = Query()
LARGE, COMPARE = "large", "compare"
SHOWN_WORDS, SHOWN_CHARACTERS = 3, 40
"""How much a message quotes of words that are not understood."""


class Address(NamedTuple):
    """View that an address names.

    Attributes:
        query: the query.
        image: the image under the cursor; empty for the first one.
        is_large: True if it is in the large view.
        is_compared: True if the selected images are side by side there.
        selected: the selected images.
        has_page: True if the address names the page, and not only an image.
        refused: the words that were not understood.
    """

    query: Query
    image: str
    is_large: bool
    is_compared: bool
    selected: Sequence[str]
    has_page: bool
    refused: Sequence[str]

    @property
    def complaint(self) -> str:
        """A sentence about the words that were not understood; empty if there are none."""
        if not self.refused:
            return ""
        words = ", ".join(printable(word)[:SHOWN_CHARACTERS] for word in self.refused[:SHOWN_WORDS])
        return f"The address has words that this page does not know, and they are ignored: {words}"


def write_address(query: Query) -> str:
    """Return the words of a query as the query string of a URL, without what is as on a new page."""
    words: dict[str, str] = {}
    if isinstance(query.sort, ColumnOrder):
        words[_DIRECTIONS[query.sort.descending]] = query.sort.column
    elif query.sort is not PLAIN.sort:
        words["order"] = _word(query.sort)
    if query.show is not PLAIN.show:
        words["show"] = _word(query.show)
    if (query.low, query.high) != (PLAIN.low, PLAIN.high):
        words["score"] = f"{query.low:g}-{query.high:g}"
    words |= {"text": query.text} if query.text else {}
    words |= {"like": query.like} if query.like is not None else {}
    words |= {"area": "_".join(f"{x:.4g},{y:.4g}" for x, y in query.area)} if query.area else {}
    for name in ("group", "kind", "page"):
        number = getattr(query, name)
        if number != getattr(PLAIN, name):
            words[name] = str(number + 1)
    words |= {"share": "{}of{}".format(*query.share)} if query.share != PLAIN.share else {}
    for name in ("audit", "shift", "size"):
        if getattr(query, name) != getattr(PLAIN, name):
            words[name] = str(getattr(query, name))
    ranges = [("range", f"{column}:{_limit(low)}..{_limit(high)}") for column, low, high in query.ranges]
    return urlencode([*words.items(), *ranges])


def read_address(words: Iterable[tuple[str, str]], columns: Container[str] = ()) -> Address:
    """Read the words of an address; words that are not understood are left out, as are columns not in `columns`."""
    parts: dict[str, Any] = {}
    refused, image, view, selected = [], "", "", []
    for name, value in words:
        if name == "image":
            image = value
        elif name == "select":
            selected.append(value)
        elif name == "view" and value in (LARGE, COMPARE):
            view = value
        elif name != "token":  # the server has checked it
            try:
                new = _READ[name](value)
                if not all(one.column in columns for one in _of_columns(new)):
                    raise ValueError(value)
                parts |= new | ({"ranges": parts.get("ranges", ()) + new["ranges"]} if "ranges" in new else {})
            except (KeyError, ValueError):
                refused.append(f"{name}={value}")
    query = PLAIN
    together = ({"size", "page", "shift"}, {"low", "high"})
    checked = (*together, {"area"}, {"ranges"}, {"audit"}, {"share"})
    for names in (*checked, set(parts).difference(*checked)):
        try:
            query = replace(query, **{name: value for name, value in parts.items() if name in names})
        except AnomalyMatchError as error:
            refused.append(str(error))
    is_large, is_compared = bool(view and image), view == COMPARE and len(selected) > 1
    return Address(query, image, is_large, is_compared, selected, "page" in parts, refused)


def _word(value: Sort | Show) -> str:
    return value.replace(" ", "-")


def _range(value: str) -> dict[str, Any]:
    low, high = value.split("-")
    return {"low": float(low), "high": float(high)}


def _column_range(value: str) -> dict[str, Any]:
    column, limits = value.rsplit(":", 1)
    low, high = limits.split("..")
    return {"ranges": (ColumnRange(column, float(low or -math.inf), float(high or math.inf)),)}


def _limit(value: float) -> str:
    return "" if math.isinf(value) else repr(value)


def _of_columns(parts: dict[str, Any]) -> tuple[ColumnOrder | ColumnRange, ...]:
    """Return what names a column in parts of a query."""
    sort = parts.get("sort")
    return (*parts.get("ranges", ()), *([sort] if isinstance(sort, ColumnOrder) else []))


def _area(value: str) -> dict[str, Any]:
    corners = [tuple(map(float, corner.split(","))) for corner in value.split("_")]
    if any(len(corner) != 2 or not all(map(math.isfinite, corner)) for corner in corners):
        raise ValueError(value)
    return {"area": tuple(corners)}


def _share(value: str) -> tuple[int, int]:
    part, parts = value.split("of")
    return _number(part), _number(parts)


_DIRECTIONS = ("ascending", "descending")
_SORTS, _SHOWS = {_word(sort): sort for sort in Sort}, {_word(show): show for show in Show}
_READ: dict[str, Callable[[str], dict[str, Any]]] = {
    "order": lambda value: {"sort": _SORTS[value]},
    "ascending": lambda value: {"sort": ColumnOrder(value)},
    "descending": lambda value: {"sort": ColumnOrder(value, descending=True)},
    "show": lambda value: {"show": _SHOWS[value]},
    "score": _range,
    "text": lambda value: {"text": value},
    "like": lambda value: {"like": value},
    "area": _area,
    "range": _column_range,
    "group": lambda value: {"group": _number(value, 1)},
    "kind": lambda value: {"kind": _number(value, 1)},
    "page": lambda value: {"page": _number(value, 1)},
    "audit": lambda value: {"audit": _number(value)},
    "share": lambda value: {"share": _share(value)},
    "shift": lambda value: {"shift": _number(value)},
    "size": lambda value: {"size": _number(value)},
}


def _number(value: str, first: int = 0) -> int:
    """Read a number that is counted from `first`, and return it counted from 0."""
    if not (value.isascii() and value.isdecimal() and len(value) < 10 and int(value) >= first):
        raise ValueError(value)
    return int(value) - first
