"""SIMBAD and NED: which objects do they know near some places on the sky? They are asked through astroquery."""

import re
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np

from anomalymatch.errors import ConfigError, DataError, DownloadError
from anomalymatch.progress import progress

T = TypeVar("T")
BATCH = 500
"""Places in one question to SIMBAD."""
MOST_ROWS = 100_000
"""Rows of one answer of SIMBAD."""
LONGEST = 150
"""Characters of another program's reason in a message of ours."""
NOTHING = re.compile(r"\bno \w+ (was |were )?found\b", re.IGNORECASE)
"""How NED says that there is nothing: by a RemoteServiceError."""


class Place(NamedTuple):
    """One of the most anomalous images, and where it is.

    Attributes:
        id: of the image.
        ra: right ascension in degrees.
        dec: declination in degrees.
        score: of the image.
    """

    id: str
    ra: float
    dec: float
    score: float


class Candidate(NamedTuple):
    """An object of an answer: the number of the place it was found near, and what the service says of it."""

    place: int
    name: str
    type: str
    ra: float
    dec: float


Service = Callable[[Sequence[Place], float, float], list[Candidate]]


def _simbad(places: Sequence[Place], radius: float, timeout: float) -> list[Candidate]:
    from astropy.table import Table

    with _installed():
        from astroquery.simbad import Simbad
    query = (
        "SELECT wanted.place, basic.main_id, basic.otype, basic.ra, basic.dec "
        "FROM TAP_UPLOAD.wanted AS wanted JOIN basic ON CONTAINS(POINT('ICRS', basic.ra, basic.dec), "
        f"CIRCLE('ICRS', wanted.ra, wanted.dec, {radius / 3600:.9f})) = 1"
    )
    candidates = []
    with progress("Asking SIMBAD", len(places), "places") as advance:
        for start in range(0, len(places), BATCH):
            batch = places[start : start + BATCH]
            wanted = Table(
                {
                    "place": list(range(start, start + len(batch))),
                    "ra": [place.ra % 360 for place in batch],
                    "dec": [place.dec for place in batch],
                }
            )
            answer = _asked("SIMBAD", partial(Simbad.query_tap, query, maxrec=MOST_ROWS, wanted=wanted), timeout)
            if answer is not None and len(answer) >= MOST_ROWS:
                raise ConfigError(f"--radius is {radius}: there are too many known objects so near, take a smaller one")
            candidates += _candidates("SIMBAD", answer, ("main_id", "otype", "ra", "dec"), None)
            advance(len(batch))
    return candidates


def _ned(places: Sequence[Place], radius: float, timeout: float) -> list[Candidate]:
    from astropy import units
    from astropy.coordinates import SkyCoord

    with _installed():
        from astroquery.ipac.ned import Ned
    candidates = []
    with progress("Asking NED", len(places), "places") as advance:
        for number, place in enumerate(places):
            centre = SkyCoord(place.ra, place.dec, unit="deg")
            answer = _asked("NED", partial(Ned.query_region, centre, radius=radius * units.arcsec), timeout)
            long = answer is not None and "RA(deg)" in answer.colnames  # so it was called until 2020
            ra, dec = ("RA(deg)", "DEC(deg)") if long else ("RA", "DEC")
            candidates += _candidates("NED", answer, ("Object Name", "Type", ra, dec), number)
            advance()
    return candidates


SERVICES: dict[str, Service] = {"simbad": _simbad, "ned": _ned}


def _candidates(service: str, answer: Any, columns: Sequence[str], place: int | None) -> list[Candidate]:
    """The rows of an answer; `place` is None where a column says which place a row belongs to."""
    if answer is None or not len(answer):
        return []
    absent = {*columns, *(["place"] if place is None else [])} - set(answer.colnames)
    if absent:
        raise DownloadError(
            f"{service} gave no columns {', '.join(sorted(absent))}, but {', '.join(answer.colnames)}: "
            f"try another version of astroquery"
        )
    rows = zip(*(_plain(answer[name]) for name in columns), strict=True)
    numbers = [place] * len(answer) if place is not None else [int(number) for number in answer["place"]]
    return [
        Candidate(number, str(name or "").strip(), str(kind or "").strip(), float(ra), float(dec))
        for number, (name, kind, ra, dec) in zip(numbers, rows, strict=True)
        if ra is not None and dec is not None
    ]


def _plain(column: Any) -> list[Any]:
    """Values of a column, None where there is none."""
    return np.ma.asarray(column).tolist()


def _asked(service: str, question: Callable[[], T], timeout: float) -> T | None:
    """What `question` returns, None if it says that there is nothing.

    It runs in a thread of its own, because not every client of these services gives up by itself.
    """
    answers: list[T] = []
    errors: list[BaseException] = []

    def ask() -> None:
        try:
            answers.append(question())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=ask, name=service, daemon=True)
    with quiet():
        thread.start()
        thread.join(timeout)
    if thread.is_alive():
        raise DownloadError(f"{service} gave no answer within {timeout:g} s: try again later, or with --timeout")
    if not errors:
        return answers[0]
    if type(errors[0]).__name__ == "RemoteServiceError" and NOTHING.search(str(errors[0])):
        return None
    raise DownloadError(f"{service} gave no answer ({reason(errors[0])}): is there a network?") from errors[0]


@contextmanager
def _installed() -> Iterator[None]:
    try:
        with quiet():
            yield
    except ImportError as error:
        raise DataError('the cross-match needs: pip install "anomalymatch[astroquery]"') from error


@contextmanager
def quiet() -> Iterator[None]:
    """No warnings: these services and their tables give warnings that nobody can do anything about."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def reason(error: BaseException) -> str:
    """What `error` says, on one line, and its kind."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:LONGEST]}" if text else type(error).__name__
