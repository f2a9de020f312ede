"""World coordinates of images in ICRS degrees, and assignment of positions to tiles."""

from collections.abc import Callable, Sequence

import numpy as np
from astropy.coordinates import FK5, ICRS, BaseCoordinateFrame, SkyCoord
from astropy.wcs import WCS
from astropy.wcs.utils import proj_plane_pixel_area, wcs_to_celestial_frame
from jaxtyping import Float64, Int64
from scipy.spatial import cKDTree

from anomalymatch.data.warning_filter import ASTROPY, ignore_warnings
from anomalymatch.types import Orientation

Degrees = Float64[np.ndarray, " n"]
CHUNK = 2**20


class Sky:
    """Celestial coordinates, on two axes, of one image of the shape (h, w).

    Attributes:
        scale: side of a pixel in arcsec: the square root of its area at the reference point.

    Raises:
        ValueError: if the celestial frame is unknown.
    """

    @ignore_warnings(ASTROPY)
    def __init__(self, wcs: WCS, shape: tuple[int, int]) -> None:
        self.wcs, self.shape = wcs, shape
        frame = wcs_to_celestial_frame(wcs)
        # FK5 of J2000 equals ICRS within 0.03 arcsec, and catalogues use both names.
        near = isinstance(frame, ICRS) or (isinstance(frame, FK5) and frame.equinox.jyear == 2000)
        self._frame: BaseCoordinateFrame | None = None if near else frame
        self._longitude_first = wcs.wcs.lng == 0
        self.scale = float(np.sqrt(proj_plane_pixel_area(wcs))) * 3600

    @ignore_warnings(ASTROPY)
    def to_pixels(self, ra: Degrees, dec: Degrees) -> tuple[Degrees, Degrees]:
        """Return the 0-based x and y of positions in degrees; NaN where the projection has none."""
        lon, lat = ra, dec
        if self._frame is not None:
            there = SkyCoord(ra, dec, unit="deg").transform_to(self._frame)
            lon, lat = there.spherical.lon.deg, there.spherical.lat.deg
        world = (lon, lat) if self._longitude_first else (lat, lon)
        x, y = (np.array(axis, np.float64) for axis in self.wcs.all_world2pix(*world, 0, quiet=True))
        # The inversion of distortions is iterative and may diverge far outside the image.
        with np.errstate(invalid="ignore"):
            back = np.linalg.norm(unit_vectors(*self.to_world(x, y)) - unit_vectors(ra, dec), axis=1)
            wrong = ~(np.degrees(back) * 3600 < self.scale / 2)
        x[wrong] = y[wrong] = np.nan
        return x, y

    @ignore_warnings(ASTROPY)
    def to_world(self, x: Degrees, y: Degrees) -> tuple[Degrees, Degrees]:
        """Return right ascension (0 to 360) and declination in degrees of 0-based pixels."""
        world = self.wcs.all_pix2world(x, y, 0)
        lon, lat = world if self._longitude_first else reversed(world)
        if self._frame is not None:
            there = SkyCoord(lon, lat, unit="deg", frame=self._frame).icrs
            lon, lat = there.ra.deg, there.dec.deg
        return np.mod(np.asarray(lon, np.float64), 360.0), np.asarray(lat, np.float64)

    def at(self, x: float, y: float) -> tuple[float, float] | None:
        """Return right ascension and declination of one 0-based pixel in degrees; None where it has none."""
        try:
            ra, dec = self.to_world(np.array([x], np.float64), np.array([y], np.float64))
        except Exception:  # a strange projection can raise anything
            return None
        return (float(ra[0]), float(dec[0])) if np.isfinite([ra[0], dec[0]]).all() else None

    def centre(self) -> tuple[float, float] | None:
        """Return right ascension and declination of the centre of the image in degrees."""
        return self.at((self.shape[1] - 1) / 2, (self.shape[0] - 1) / 2)

    def orientation(self, x: float, y: float) -> Orientation | None:
        """Return the scale, and the directions of north and east at a 0-based pixel; None where they are unknown."""
        step = self.scale / 3600
        centre = self.at(x, y)
        if centre is None or abs(centre[1]) + step >= 90:
            return None
        ra, dec = centre
        try:
            beside = np.array([ra, ra + step / np.cos(np.radians(dec))])
            to_x, to_y = self.to_pixels(beside, np.array([dec + step, dec]))
        except Exception:  # as in `at`
            return None
        north, east = np.degrees(np.arctan2(to_x - x, y - to_y)).tolist()
        return Orientation(self.scale, north, east) if np.isfinite([north, east]).all() else None

    def contains(self, ra: Degrees, dec: Degrees) -> np.ndarray:
        """Return whether each position lies on a pixel of the image."""
        x, y = self.to_pixels(ra, dec)
        height, width = self.shape
        return (x >= -0.5) & (x < width - 0.5) & (y >= -0.5) & (y < height - 0.5)

    def circle(self) -> tuple[np.ndarray, float] | None:
        """Return the unit vector to the centre and the chord to the farthest edge point; None without a centre."""
        height, width = self.shape
        across, up = np.linspace(-0.5, width - 0.5, 9), np.linspace(-0.5, height - 0.5, 9)
        x = np.concatenate([[(width - 1) / 2], across, across, np.full(9, -0.5), np.full(9, width - 0.5)])
        y = np.concatenate([[(height - 1) / 2], np.full(9, -0.5), np.full(9, height - 0.5), up, up])
        try:
            vectors = unit_vectors(*self.to_world(x, y))
        except Exception:  # as in `at`
            return None
        chords = np.linalg.norm(vectors[1:] - vectors[0], axis=1)
        # If a corner has no place on the sky, as in all-sky maps, any position may lie in the image.
        radius = float(chords.max()) * 1.01 if np.isfinite(chords).all() else 2.0
        return (vectors[0], radius) if np.isfinite(vectors[0]).all() else None


def unit_vectors(ra: Degrees, dec: Degrees) -> Float64[np.ndarray, "n 3"]:
    """Convert positions in degrees to points on the unit sphere."""
    a, d = np.radians(ra), np.radians(dec)
    return np.stack([np.cos(d) * np.cos(a), np.cos(d) * np.sin(a), np.sin(d)], axis=1)


def assign(
    skies: Sequence[Sky | None],
    ra: Degrees,
    dec: Degrees,
    *,
    on_chunk: Callable[[int], None] = lambda count: None,
) -> Int64[np.ndarray, " n"]:
    """Find the image that contains each position: of several the one with the nearest centre, -1 if there is none.

    `on_chunk` is called with the number of positions of each chunk.
    """
    circles = [(i, sky, circle) for i, sky in enumerate(skies) if sky is not None and (circle := sky.circle())]
    found = np.full(len(ra), -1, np.int64)
    for start in range(0, len(ra), CHUNK):
        part = slice(start, start + CHUNK)
        good = start + np.flatnonzero(np.isfinite(ra[part]) & np.isfinite(dec[part]))
        if good.size:
            found[good] = _assign_some(circles, ra[good], dec[good])
        on_chunk(len(ra[part]))
    return found


def _assign_some(
    circles: Sequence[tuple[int, Sky, tuple[np.ndarray, float]]], ra: Degrees, dec: Degrees
) -> Int64[np.ndarray, " n"]:
    vectors = unit_vectors(ra, dec)
    tree = cKDTree(vectors)
    found, nearest = np.full(len(ra), -1, np.int64), np.full(len(ra), np.inf)
    for image, sky, (centre, radius) in circles:
        near = np.array(tree.query_ball_point(centre, radius), np.int64)
        distance = np.linalg.norm(vectors[near] - centre, axis=1)
        closer = distance < nearest[near]
        near, distance = near[closer], distance[closer]
        if near.size:
            inside = sky.contains(ra[near], dec[near])
            found[near[inside]], nearest[near[inside]] = image, distance[inside]
    return found
