"""What is known at the places of the top of the list: `python -m anomalymatch.scoring.crossmatch OUTPUT_FOLDER`.

SIMBAD or NED is asked for the nearest object within a radius. Where nothing is known, it is worth a look.
"""

import argparse
import csv
import io
import math
import re
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from rich.box import SIMPLE
from rich.table import Table as Screen
from rich.text import Text

from anomalymatch.errors import AnomalyMatchError, ConfigError, DataError, DownloadError
from anomalymatch.files import atomic_file, write_text
from anomalymatch.progress import progress
from anomalymatch.terminal import console, fail, set_up_logging, stop

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


SHOWN = 20
COLUMNS = ("id", "ra", "dec", "score", "name", "type", "separation")


class Known(NamedTuple):
    """An object that a service knows.

    Attributes:
        name: the main one of the service.
        type: its code of the service for what it is.
        separation: distance from the place, in arcseconds.
    """

    name: str
    type: str
    separation: float


def crossmatch(
    output: Path, *, radius: float = 5.0, service: str = "simbad", top: int = 100, timeout: float = 60.0
) -> list[tuple[Place, Known | None]]:
    """Ask for the nearest known object of each image in OUTPUT/top.vot; write crossmatch.csv and crossmatch.vot there.

    Args:
        output: folder of the scores.
        radius: how far from an image an object may be, in arcseconds.
        service: `simbad` or `ned`.
        top: so many images of the top of the list.
        timeout: seconds that one question may take.

    Returns:
        The images in the order of the list, and what is known there; None for nothing.

    Raises:
        ConfigError: if a value is out of range.
        DataError: if there is no top.vot, it is damaged, or astroquery is not installed.
        DownloadError: if the service gives no answer.
    """
    if service not in SERVICES:
        raise ConfigError(f"--service is {service!r}: choose one of {', '.join(SERVICES)}")
    for option, value in {"--radius": radius, "--top": top, "--timeout": timeout}.items():
        if not (value > 0 and math.isfinite(value)):
            raise ConfigError(f"{option} is {value}: it must be positive")
    places = read_places(output / "top.vot")[:top]
    found = nearest(places, SERVICES[service](places, radius, timeout), radius)
    matches = list(zip(places, found, strict=True))
    _write_csv(output / "crossmatch.csv", matches)
    _write_votable(output / "crossmatch.vot", matches)
    return matches


def read_places(path: Path) -> list[Place]:
    """The images of a top.vot, best first.

    Raises:
        DataError: if it is missing, damaged, or has places that are not on the sky.
    """
    from astropy.table import Table

    if not path.is_file():
        raise DataError(
            f"{path} is missing: scoring writes it when it is done, for archives with coordinates (FITS, catalogues)"
        )
    try:
        with quiet():
            table = Table.read(path, format="votable")
            columns = [table[name].tolist() for name in ("id", "ra", "dec", "score")]
            places = [Place(str(i), float(ra), float(dec), float(score)) for i, ra, dec, score in zip(*columns)]  # noqa: B905
    except Exception as error:  # the parser of VOTables has errors of many kinds
        raise DataError(f"{path} is no VOTable with id, ra, dec and score ({reason(error)})") from error
    for place in places:
        if not (math.isfinite(place.ra) and abs(place.dec) <= 90):
            raise DataError(f"{path}: {place.id} lies at {place.ra}, {place.dec}, which is not on the sky")
    return places


def nearest(places: Sequence[Place], candidates: Sequence[Candidate], radius: float) -> list[Known | None]:
    """For each place the nearest of its candidates within `radius` arcseconds, by the great circle between them."""
    found: list[Known | None] = [None] * len(places)
    for candidate in candidates:
        place = places[candidate.place]
        known = Known(candidate.name, candidate.type, separation(place.ra, place.dec, candidate.ra, candidate.dec))
        best = found[candidate.place]
        if known.separation <= radius and (best is None or (known.separation, known.name) < (best[2], best[0])):
            found[candidate.place] = known
    return found


def separation(ra: float, dec: float, other_ra: float, other_dec: float) -> float:
    """Angle in arcseconds between two places in degrees, by Vincenty's formula: exact near 0 and at the poles."""
    a, b, delta = (math.radians(value) for value in (dec, other_dec, other_ra - ra))
    across = math.hypot(
        math.cos(b) * math.sin(delta), math.cos(a) * math.sin(b) - math.sin(a) * math.cos(b) * math.cos(delta)
    )
    along = math.sin(a) * math.sin(b) + math.cos(a) * math.cos(b) * math.cos(delta)
    return math.degrees(math.atan2(across, along)) * 3600


def _write_csv(path: Path, matches: Sequence[tuple[Place, Known | None]]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for place, known in matches:
        more = ("", "", "") if known is None else (known.name, known.type, f"{known.separation:.3f}")
        writer.writerow([place.id, place.ra, place.dec, f"{place.score:.6g}", *more])
    write_text(path, text.getvalue())


def _write_votable(path: Path, matches: Sequence[tuple[Place, Known | None]]) -> None:
    from astropy import units
    from astropy.table import MaskedColumn, Table

    rows = [(*place, *(known or ("", "", 0.0))) for place, known in matches]
    kinds = ("U", float, float, float, "U", "U", float)
    columns = [[row[k] for row in rows] for k in range(len(COLUMNS))]
    table = Table([MaskedColumn(v, n, dtype=k) for v, n, k in zip(columns, COLUMNS, kinds, strict=True)])
    table["separation"].mask = [known is None for _, known in matches]
    table["ra"].unit = table["dec"].unit = units.deg
    table["separation"].unit = units.arcsec
    with atomic_file(path) as temporary:
        table.write(temporary, format="votable", overwrite=True)


def show(matches: Sequence[tuple[Place, Known | None]]) -> None:
    """Print the first of them, those of which nothing is known before the others."""
    unknown = [match for match in matches if match[1] is None]
    table = Screen(header_style="bold", box=SIMPLE, padding=0)
    for column in COLUMNS:
        table.add_column(column, justify="left" if column in ("id", "name", "type") else "right")
    for place, known in [*unknown, *(match for match in matches if match[1] is not None)][:SHOWN]:
        more = ["", "", ""] if known is None else [known.name, known.type, f"{known.separation:.1f}"]
        cells = [place.id, f"{place.ra:.5f}", f"{place.dec:+.5f}", f"{place.score:.4f}", *more]
        table.add_row(*map(Text, cells))
    console.print(table)
    console.print(f"Nothing is known of {len(unknown)} of {len(matches)}.", highlight=False)


def main() -> None:
    """Entry point of the command: errors that a user can mend are one line, exit code 1; Ctrl-C is 130."""
    parser = argparse.ArgumentParser(
        prog="python -m anomalymatch.scoring.crossmatch",
        description="Ask SIMBAD or NED what is known at the places of the most anomalous images.",
    )
    parser.add_argument("output", type=Path, help="folder of the scores, with top.vot")
    parser.add_argument("--radius", type=float, default=5.0, help="in arcseconds (default: %(default)s)")
    parser.add_argument("--service", default="simbad", help="simbad or ned (default: %(default)s)")
    parser.add_argument("--top", type=int, default=100, help="so many images (default: %(default)s)")
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds for an answer (default: %(default)s)")
    words = parser.parse_args(sys.argv[1:])
    try:
        set_up_logging("info")
        folder = words.output.expanduser()
        show(crossmatch(folder, radius=words.radius, service=words.service, top=words.top, timeout=words.timeout))
        console.print(f"Table: {folder / 'crossmatch.csv'}", soft_wrap=True, markup=False, highlight=False)
    except AnomalyMatchError as error:
        fail(str(error))
    except KeyboardInterrupt:
        stop("Nothing was written.")


if __name__ == "__main__":
    main()
