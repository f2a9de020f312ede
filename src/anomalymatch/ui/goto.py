"""Reading of what a person types to go somewhere: a page, a rank, or an image."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from anomalymatch.errors import DataError
from anomalymatch.text import printable
from anomalymatch.ui.service import LabelService
from anomalymatch.ui.views import Query

SHOWN = 60
"""How much of a text a message quotes, in characters."""


class Target(NamedTuple):
    """Page to go to, from 0, or an image; the other one is None."""

    page: int | None = None
    image: str | None = None


def find_target(service: LabelService, query: Query, text: str) -> Target:
    """Return where a text leads: `12` to page 12, `#1234` to rank 1234 in the order of a query, others to an image.

    The end of an id is enough if no other id ends so, with or without the file's extension, in any case. A number that
    is not a page may be the end of an id, too.

    Raises:
        DataError: if there is no such page, rank or image, or several images.
    """
    text = text.strip()
    rank, page = _number(text.removeprefix("#")) if text.startswith("#") else None, _number(text)
    if rank is not None:
        place = rank - 1
        found = service.page(replace(query, page=place // query.size, shift=0))
        if place >= found.total:
            raise DataError(f"there is no rank {rank:,}: {found.total:,} images are shown")
        return Target(image=found.tiles[place % query.size].id)
    ids, pages = service.source.ids, 0
    if page is not None:
        pages = service.page(replace(query, page=0, shift=0)).pages
        if page <= pages:
            return Target(page=page - 1)
    images = [text] if text in ids else ends_with(ids, text)
    if len(images) == 1:
        return Target(image=images[0])
    start, end = f"there are {pages:,} pages, and " if pages else "", repr(printable(text, limit=SHOWN))
    if images:
        raise DataError(f"{start}{len(images):,} ids end in {end}: type more of the one you want, as {images[0]}")
    raise DataError(f"{start}no id ends in {end}")


def ends_with(ids: Sequence[str], text: str) -> list[str]:
    """Return the ids that end in a text, ignoring case.

    If there is none, the file extension is left out: "123" finds "galaxy_123.jpg".
    """
    end = text.lower()
    return [id_ for id_ in ids if id_.lower().endswith(end)] or [
        id_ for id_ in ids if id_.lower().rpartition(".")[0].endswith(end)
    ]


def _number(text: str) -> int | None:
    """Return a number from 1; None for other texts, also for numbers with leading zeros, as ids have."""
    is_number = text.isascii() and text.isdecimal() and len(text) < 10 and not text.startswith("0")
    return int(text) if is_number else None
