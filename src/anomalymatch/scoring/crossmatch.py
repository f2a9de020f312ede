"""What is known at the places of the top of the list: `python -m anomalymatch.scoring.crossmatch OUTPUT_FOLDER`.

SIMBAD or NED is asked for the nearest object within a radius. Where nothing is known, it is worth a look.
"""

import argparse
import csv
import io
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rich.box import SIMPLE
from rich.table import Table as Screen
from rich.text import Text

from anomalymatch.cli import fail, set_up_logging, stop
from anomalymatch.errors import AnomalyMatchError, ConfigError, DataError
from anomalymatch.files import atomic_file, write_text
from anomalymatch.progress import console
from anomalymatch.scoring.services import SERVICES, Candidate, Place, quiet, reason

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
