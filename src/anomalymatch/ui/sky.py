"""Positions on the sky as text, links to atlases that show them, and addresses of survey pictures."""

import math
import re
from urllib.parse import urlencode, urlsplit

from anomalymatch.errors import ConfigError
from anomalymatch.types import Orientation

Coordinates = tuple[float, float]
"""Right ascension and declination in degrees (ICRS)."""
FIELD_DEGREES = 0.05
"""Field of view of an atlas for an image of unknown scale."""
_SURROUNDINGS = 3.0  # the field of view, in sides of the image


def decimal(coordinates: Coordinates) -> str:
    """Write coordinates in degrees, to the nearest 4 milliarcseconds: "10.684708 +41.268750"."""
    return f"{coordinates[0]:.6f} {coordinates[1]:+.6f}"


def sexagesimal(coordinates: Coordinates) -> str:
    """Write coordinates in hours and degrees with minutes and seconds: "00:42:44.330 +41:16:07.50"."""
    ra, dec = coordinates
    hours = round(ra / 15 * 3600 * 1000) % (24 * 3600 * 1000)
    degrees = round(abs(dec) * 3600 * 100)
    return f"{_parts(hours, 1000, 3)} {'-' if dec < 0 else '+'}{_parts(degrees, 100, 2)}"


def _parts(number: int, per_second: int, digits: int) -> str:
    """Write a number of fractions of a second, counted as integers so that no second is rounded to 60."""
    seconds, fraction = divmod(number, per_second)
    minutes, seconds = divmod(seconds, 60)
    return f"{minutes // 60:02d}:{minutes % 60:02d}:{seconds:02d}.{fraction:0{digits}d}"


def field_of_view(
    orientation: Orientation | None, size: tuple[int, int] | None, *, sides: float = _SURROUNDINGS
) -> float:
    """Return the field of view in degrees of `sides` of an image of a size in pixels, by default with surroundings."""
    if orientation is None or size is None:
        return FIELD_DEGREES
    return min(sides * orientation.scale * max(size) / 3600, 180.0)


def sky_links(coordinates: Coordinates | None, field: float = FIELD_DEGREES) -> dict[str, str]:
    """Return links to sky atlases by name, for a field of view in degrees; none without coordinates."""
    if coordinates is None:
        return {}
    target = decimal(coordinates)
    esasky = urlencode({"target": target, "fov": f"{field:.4g}", "cooframe": "J2000", "sci": "true"})
    aladin = urlencode({"target": target, "fov": f"{field:.4g}"})
    return {
        "ESASky": f"https://sky.esa.int/esasky/?{esasky}",
        "Aladin Lite": f"https://aladin.cds.unistra.fr/AladinLite/?{aladin}",
    }


SURVEYS = {
    "DSS2": "CDS/P/DSS2/color",
    "Pan-STARRS DR1": "CDS/P/PanSTARRS/DR1/color-i-r-g",
    "DESI Legacy DR10": "CDS/P/DESI-Legacy-Surveys/DR10/color",
    "SDSS DR9": "CDS/P/SDSS9/color",
    "2MASS": "CDS/P/2MASS/color",
    "unWISE": "CDS/P/unWISE/color-W2-W1W2-W1",
    "GALEX GR6+7": "CDS/P/GALEXGR6_7/color",
}
"""HiPS identifiers of surveys in colour, by name."""
SURVEY_SIDE = 768
"""Side of a survey picture in pixels."""
SURVEY_MARGIN = math.sqrt(2)
"""Side of a survey picture, in sides of the square that shows it: its corners stay filled at any rotation."""
_SERVICE = re.compile(r"https?://[a-z0-9.:\[\]-]+(/[\w.~/%-]*)?", re.ASCII | re.IGNORECASE)


def check_survey(service: str) -> str:
    """Check the address of a HiPS cut-out service and return it.

    Raises:
        ConfigError: if it is not an address that starts with http:// or https://, without a query.
    """
    if not _SERVICE.fullmatch(service):
        raise ConfigError(f"ui.survey is {service}: it needs an address such as https://example.org/hips2fits, or null")
    return service


def origin_of(address: str) -> str:
    """Return scheme and host of an address: "https://example.org"."""
    parts = urlsplit(address)
    return f"{parts.scheme}://{parts.netloc}".lower()


def survey_picture(service: str, survey: str, coordinates: Coordinates, field: float) -> str:
    """Return the address of a picture of one of `SURVEYS`, with north up and east to the left.

    Args:
        service: address of a HiPS cut-out service (hips2fits of the CDS).
        survey: name of the survey.
        coordinates: centre.
        field: field of view in degrees of the square that shows the picture; the picture is larger, see
            `SURVEY_MARGIN`.
    """
    words = {
        "hips": SURVEYS[survey],
        "ra": f"{coordinates[0]:.6f}",
        "dec": f"{coordinates[1]:.6f}",
        "fov": f"{min(field * SURVEY_MARGIN, 180.0):.6g}",
        "width": SURVEY_SIDE,
        "height": SURVEY_SIDE,
        "projection": "TAN",
        "format": "jpg",
    }
    return f"{service}?{urlencode(words)}"


def is_mirrored(orientation: Orientation) -> bool:
    """Return True if east is to the right of an image that is turned until north is up."""
    return (orientation.east - orientation.north) % 360 < 180
