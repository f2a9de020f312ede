"""Positions on the sky as text, and links to atlases that show them."""

from urllib.parse import urlencode

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


def field_of_view(orientation: Orientation | None, size: tuple[int, int] | None) -> float:
    """Return the field of view in degrees that shows an image of a size in pixels with its surroundings."""
    if orientation is None or size is None:
        return FIELD_DEGREES
    return min(_SURROUNDINGS * orientation.scale * max(size) / 3600, 180.0)


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
