"""Cross-match of the most anomalous images with SIMBAD or NED.

Command: `python -m anomalymatch.scoring.crossmatch OUTPUT_FOLDER`. Images without a known object come first.
"""

import argparse
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

from anomalymatch.checks import check_choice, check_range
from anomalymatch.errors import ConfigError, DataError, DownloadError
from anomalymatch.files import write_csv
from anomalymatch.progress import progress
from anomalymatch.terminal import console, errors_in_a_line, print_table, set_up_logging
from anomalymatch.votable import write_votable

T = TypeVar("T")
SIMBAD_POSITIONS = 500
"""Positions in one query to SIMBAD."""
SIMBAD_ROWS = 100_000
"""Largest number of rows in an answer of SIMBAD."""
MAX_REASON = 150
"""Characters of a foreign error that are quoted."""
NOT_FOUND = re.compile(r"\bno \w+ (was |were )?found\b", re.IGNORECASE)
"""Text of the RemoteServiceError with which NED reports that there is no object."""
SHOWN = 20
COLUMNS = {"id": str, "ra": float, "dec": float, "score": float, "name": str, "type": str, "separation": float}


class Position(NamedTuple):
    """Position of one of the most anomalous images, in degrees."""

    id: str
    ra: float
    dec: float
    score: float


class Candidate(NamedTuple):
    """Object in an answer, with the number of the position that it was found near."""

    position: int
    name: str
    type: str
    ra: float
    dec: float


class KnownObject(NamedTuple):
    """Object that a service knows: its main name and type there, and its distance from the image in arcseconds."""

    name: str
    type: str
    separation: float


Service = Callable[[Sequence[Position], float, float], list[Candidate]]
Match = tuple[Position, KnownObject | None]


def crossmatch(
    output: Path,
    *,
    radius: float | int = 5.0,
    service: str = "simbad",
    top: int = 100,
    timeout: float | int = 60.0,
) -> list[Match]:
    """Find the nearest known object of each image in OUTPUT/top.vot; write crossmatch.csv and crossmatch.vot there.

    Args:
        output: folder of the scores.
        radius: largest distance between image and object, in arcseconds.
        service: `simbad` or `ned`.
        top: number of images, from the top of the list.
        timeout: seconds that one query may take.

    Returns:
        The images in the order of the list, each with its object or None.

    Raises:
        ConfigError: if a value is out of range.
        DataError: if top.vot is missing or damaged, or astroquery is not installed.
        DownloadError: if the service does not answer.
    """
    check_choice("--service", service, SERVICES)
    for option, value in {"--radius": radius, "--top": top, "--timeout": timeout}.items():
        check_range(option, value, above=0, below=math.inf)
    positions = read_positions(output / "top.vot")[:top]
    objects = nearest_objects(positions, SERVICES[service](positions, float(radius), float(timeout)), float(radius))
    matches = list(zip(positions, objects, strict=True))
    rows = [(*position, *(known or (None, None, None))) for position, known in matches]
    texts = [(*row[:3], f"{row[3]:.6g}", *row[4:6], None if row[6] is None else f"{row[6]:.3f}") for row in rows]
    write_csv(output / "crossmatch.csv", list(COLUMNS), texts)
    write_votable(output / "crossmatch.vot", COLUMNS, rows)
    return matches


def _simbad(positions: Sequence[Position], radius: float, timeout: float) -> list[Candidate]:
    from astropy.table import Table

    with _installed():
        from astroquery.simbad import Simbad
    query = (
        "SELECT wanted.place, basic.main_id, basic.otype, basic.ra, basic.dec "
        "FROM TAP_UPLOAD.wanted AS wanted JOIN basic ON CONTAINS(POINT('ICRS', basic.ra, basic.dec), "
        f"CIRCLE('ICRS', wanted.ra, wanted.dec, {radius / 3600:.9f})) = 1"
    )
    candidates = []
    with progress("Asking SIMBAD", len(positions), "positions") as advance:
        for start in range(0, len(positions), SIMBAD_POSITIONS):
            batch = positions[start : start + SIMBAD_POSITIONS]
            wanted = Table(
                {
                    "place": list(range(start, start + len(batch))),
                    "ra": [position.ra % 360 for position in batch],
                    "dec": [position.dec for position in batch],
                }
            )
            answer = _ask("SIMBAD", partial(Simbad.query_tap, query, maxrec=SIMBAD_ROWS, wanted=wanted), timeout)
            if answer is not None and len(answer) >= SIMBAD_ROWS:
                raise ConfigError(f"--radius is {radius}: there are too many known objects, set it smaller")
            candidates += _candidates("SIMBAD", answer, ("main_id", "otype", "ra", "dec"), None)
            advance(len(batch))
    return candidates


def _ned(positions: Sequence[Position], radius: float, timeout: float) -> list[Candidate]:
    from astropy import units
    from astropy.coordinates import SkyCoord

    with _installed():
        from astroquery.ipac.ned import Ned
    candidates = []
    with progress("Asking NED", len(positions), "positions") as advance:
        for number, position in enumerate(positions):
            centre = SkyCoord(position.ra, position.dec, unit="deg")
            answer = _ask("NED", partial(Ned.query_region, centre, radius=radius * units.arcsec), timeout)
            long = answer is not None and "RA(deg)" in answer.colnames  # the column names until 2020
            ra, dec = ("RA(deg)", "DEC(deg)") if long else ("RA", "DEC")
            candidates += _candidates("NED", answer, ("Object Name", "Type", ra, dec), number)
            advance()
    return candidates


SERVICES: dict[str, Service] = {"simbad": _simbad, "ned": _ned}


def _candidates(service: str, answer: Any, columns: Sequence[str], position: int | None) -> list[Candidate]:
    """Return the rows of an answer; without `position`, the column `place` has its number."""
    if answer is None or not len(answer):
        return []
    absent = {*columns, *(["place"] if position is None else [])} - set(answer.colnames)
    if absent:
        raise DownloadError(
            f"{service} gave no columns {', '.join(sorted(absent))}, but {', '.join(answer.colnames)}: "
            f"install another version of astroquery"
        )
    rows = zip(*(np.ma.asarray(answer[name]).tolist() for name in columns), strict=True)  # None where masked
    numbers = [position] * len(answer) if position is not None else [int(number) for number in answer["place"]]
    return [
        Candidate(number, str(name or "").strip(), str(kind or "").strip(), float(ra), float(dec))
        for number, (name, kind, ra, dec) in zip(numbers, rows, strict=True)
        if ra is not None and dec is not None
    ]


def _ask(service: str, query: Callable[[], T], timeout: float) -> T | None:
    """Return the answer to a query; None if the service reports that there is no object.

    The query runs in its own thread, because not every client of these services has a timeout.
    """
    answers: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            answers.append(query())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name=service, daemon=True)
    with quiet():
        thread.start()
        thread.join(timeout)
    if thread.is_alive():
        raise DownloadError(f"{service} gave no answer within {timeout:g} s: try again later, or with --timeout")
    if not errors:
        return answers[0]
    if type(errors[0]).__name__ == "RemoteServiceError" and NOT_FOUND.search(str(errors[0])):
        return None
    raise DownloadError(f"{service} gave no answer ({describe_error(errors[0])}): is there a network?") from errors[0]


@contextmanager
def _installed() -> Iterator[None]:
    try:
        with quiet():
            yield
    except ImportError as error:
        raise DataError('the cross-match needs: pip install "anomalymatch[astroquery]"') from error


@contextmanager
def quiet() -> Iterator[None]:
    """Hide warnings: the tables of these services give many that a user cannot change."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def describe_error(error: BaseException) -> str:
    """Describe an error by its type and its text, on one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:MAX_REASON]}" if text else type(error).__name__


def read_positions(path: Path) -> list[Position]:
    """Read the positions in a top.vot, best first.

    Raises:
        DataError: if the file is missing or damaged, or has impossible coordinates.
    """
    from astropy.table import Table

    if not path.is_file():
        raise DataError(
            f"{path} is missing: scoring writes it at its end, for archives with coordinates (FITS, catalogues)"
        )
    try:
        with quiet():
            table = Table.read(path, format="votable")
            columns = [table[name].tolist() for name in ("id", "ra", "dec", "score")]
            positions = [Position(str(i), float(ra), float(dec), float(score)) for i, ra, dec, score in zip(*columns)]  # noqa: B905
    except Exception as error:  # the parser of VOTables raises many types of errors
        raise DataError(f"{path} is no VOTable with id, ra, dec and score ({describe_error(error)})") from error
    for position in positions:
        if not (math.isfinite(position.ra) and abs(position.dec) <= 90):
            raise DataError(f"{path}: {position.id} has impossible coordinates: ra={position.ra}, dec={position.dec}")
    return positions


def nearest_objects(
    positions: Sequence[Position], candidates: Sequence[Candidate], radius: float
) -> list[KnownObject | None]:
    """Return the nearest candidate of each position within `radius` arcseconds along the great circle, or None."""
    from astropy.coordinates import angular_separation

    found: list[KnownObject | None] = [None] * len(positions)
    for candidate in candidates:
        position = positions[candidate.position]
        angle = angular_separation(*np.radians([position.ra, position.dec, candidate.ra, candidate.dec]))
        known = KnownObject(candidate.name, candidate.type, math.degrees(angle) * 3600)
        best = found[candidate.position]
        if known.separation <= radius and (best is None or (known.separation, known.name) < (best[2], best[0])):
            found[candidate.position] = known
    return found


def show(matches: Sequence[Match]) -> None:
    """Print the first matches, images without a known object before the others."""
    rows = [
        {
            "id": position.id,
            "ra": f"{position.ra:.5f}",
            "dec": f"{position.dec:+.5f}",
            "score": f"{position.score:.4f}",
            **({} if known is None else {"name": known.name, "type": known.type}),
            "separation": None if known is None else f"{known.separation:.1f}",
        }
        for position, known in sorted(matches, key=lambda match: match[1] is not None)
    ]
    print_table(rows[:SHOWN], {name: name for name in COLUMNS}, left=("id", "name", "type"))
    unknown = sum(known is None for _, known in matches)
    console.print(f"No known object at {unknown} of {len(matches)} images.", highlight=False)


def main() -> None:
    """Run the command: an error is one line and exit code 1, Ctrl-C is exit code 130."""
    parser = argparse.ArgumentParser(
        prog="python -m anomalymatch.scoring.crossmatch",
        description="Find known objects at the positions of the most anomalous images in SIMBAD or NED.",
    )
    parser.add_argument("output", type=Path, help="folder of the scores, with top.vot")
    parser.add_argument("--radius", type=float, default=5.0, help="in arcseconds (default: %(default)s)")
    parser.add_argument("--service", default="simbad", help="simbad or ned (default: %(default)s)")
    parser.add_argument("--top", type=int, default=100, help="number of images (default: %(default)s)")
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds for a query (default: %(default)s)")
    words = parser.parse_args(sys.argv[1:])
    with errors_in_a_line(stopped="Nothing was written."):
        set_up_logging("info")
        folder = words.output.expanduser()
        show(crossmatch(folder, radius=words.radius, service=words.service, top=words.top, timeout=words.timeout))
        console.print(f"Table: {folder / 'crossmatch.csv'}", soft_wrap=True, markup=False, highlight=False)


if __name__ == "__main__":
    main()
