"""Models of galaxies for the demo images: light in three bands, before noise."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from astropy.modeling.models import Sersic2D
from jaxtyping import Float
from scipy.special import gamma, gammaincinv

FRAME = 64.0
"""Side of the image in the length unit of this module."""

Plane = Float[np.ndarray, "h w"]
Scene = Float[np.ndarray, "3 h w"]
Colour = Float[np.ndarray, "3"]

_YOUNG = np.array([0.80, 0.96, 1.25])
_OLD = np.array([1.30, 1.01, 0.66])
# Dust takes more of the blue light than of the red.
_EXTINCTION = np.array([0.75, 1.0, 1.35])
# A Sérsic cusp is finer than a pixel: within this radius it is constant, so that its brightness does not depend on
# where the centre falls in the pixel.
_CUSP = 0.5


@dataclass(frozen=True, slots=True)
class Grid:
    """Coordinates of the pixel centres; zero is the centre of the image."""

    x: Plane
    y: Plane

    @classmethod
    def of(cls, size: int) -> "Grid":
        """Return the grid of a square image with a side of `size` pixels."""
        axis = (np.arange(size) + 0.5) * (FRAME / size) - FRAME / 2
        x, y = np.meshgrid(axis, axis)
        return cls(x, y)


@dataclass(frozen=True, slots=True)
class Shape:
    """Shape of a Sérsic profile: half-light radius, index, axis ratio (minor/major), position angle, centre."""

    radius: float
    index: float
    ratio: float = 1.0
    angle: float = 0.0
    x: float = 0.0
    y: float = 0.0


def colour(rng: np.random.Generator, age: float) -> Colour:
    """Draw the brightness in red, green and blue (mean near 1) of stars of `age`, 0 (young, blue) to 1 (old, red)."""
    return np.exp((1 - age) * np.log(_YOUNG) + age * np.log(_OLD) + rng.normal(0, 0.03, 3))


def profile(grid: Grid, shape: Shape, brightness: float) -> Plane:
    """Return a Sérsic profile whose mean surface brightness within the half-light radius is `brightness`.

    Source: Graham & Driver 2005, PASA 22, 118, equations 1 (profile), 4 and 9 (mean over effective brightness).
    """
    n = shape.index
    b = gammaincinv(2 * n, 0.5)
    effective = brightness / (n * np.exp(b) * b ** (-2 * n) * gamma(2 * n))
    light = Sersic2D.evaluate(
        grid.x, grid.y, effective, shape.radius, n, shape.x, shape.y, 1 - shape.ratio, shape.angle
    )
    return np.minimum(light, effective * np.exp(-b * ((_CUSP / shape.radius) ** (1 / n) - 1)))


def blobs(
    grid: Grid, x: Float[np.ndarray, " k"], y: Float[np.ndarray, " k"], width: float, peak: Float[np.ndarray, " k"]
) -> Plane:
    """Sum `k` round Gaussians: centres `x`, `y`, standard deviation `width`, central brightness `peak`."""
    along_x = np.exp(-0.5 * ((grid.x[0, :, None] - x) / width) ** 2)
    along_y = np.exp(-0.5 * ((grid.y[:, 0, None] - y) / width) ** 2)
    return (along_y * peak) @ along_x.T


def _paint(light: Plane, tint: Colour) -> Scene:
    return tint[:, None, None] * light


def _log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def _placed(rng: np.random.Generator, radius: float, index: float, ratio: float) -> Shape:
    """Draw a random angle and a centre slightly off the middle, as catalogue positions are."""
    x, y = rng.normal(0, 0.6, 2)
    return Shape(radius, index, ratio, rng.uniform(0, np.pi), float(x), float(y))


def _own_axes(grid: Grid, shape: Shape) -> tuple[Plane, Plane]:
    """Return coordinates along the major and the minor axis of `shape`."""
    x, y = grid.x - shape.x, grid.y - shape.y
    cos, sin = np.cos(shape.angle), np.sin(shape.angle)
    return x * cos + y * sin, y * cos - x * sin


def _smooth(rng: np.random.Generator, grid: Grid, shape: Shape) -> Scene:
    """Draw an early-type galaxy; some are young, some have a small blue satellite that is not an arc."""
    age = rng.uniform(0.3, 0.7) if rng.random() < 0.12 else rng.uniform(0.75, 1.1)
    scene = _paint(profile(grid, shape, _log_uniform(rng, 18.0, 130.0)), colour(rng, age))
    if rng.random() < 0.12:
        distance, around = rng.uniform(6, 13), rng.uniform(0, 2 * np.pi)
        satellite = Shape(
            rng.uniform(1, 2.2),
            1.0,
            rng.uniform(0.3, 0.9),
            rng.uniform(0, np.pi),
            shape.x + distance * np.cos(around),
            shape.y + distance * np.sin(around),
        )
        scene += _paint(profile(grid, satellite, _log_uniform(rng, 12.0, 60.0)), colour(rng, rng.uniform(0, 0.3)))
    return scene


def smooth_round(rng: np.random.Generator, grid: Grid) -> Scene:
    """Draw an elliptical galaxy that looks nearly round."""
    return _smooth(rng, grid, _placed(rng, _log_uniform(rng, 3.5, 9.0), rng.uniform(1.8, 4.5), rng.uniform(0.78, 1)))


def smooth_cigar(rng: np.random.Generator, grid: Grid) -> Scene:
    """Draw a featureless, elongated galaxy: a flattened elliptical or a lenticular."""
    shape = _placed(rng, _log_uniform(rng, 5.0, 10.0), rng.uniform(1.2, 3.5), rng.uniform(0.28, 0.48))
    return _smooth(rng, grid, shape)


def edge_on_disk(rng: np.random.Generator, grid: Grid) -> Scene:
    """Draw a thin disk seen from the side, most with a bulge, about half with a dust lane."""
    shape = _placed(rng, _log_uniform(rng, 8.0, 14.0), rng.uniform(0.7, 1.2), rng.uniform(0.09, 0.19))
    brightness = _log_uniform(rng, 25.0, 110.0)
    age = rng.uniform(0.15, 0.9)
    scene = _paint(profile(grid, shape, brightness), colour(rng, age))
    if rng.random() < 0.75:
        bulge = replace(shape, radius=rng.uniform(1.3, 3.0), index=rng.uniform(1, 3), ratio=rng.uniform(0.55, 0.9))
        scene += _paint(profile(grid, bulge, brightness * rng.uniform(0.4, 1.6)), colour(rng, max(age, 0.8)))
    if rng.random() < 0.5:
        along, across = _own_axes(grid, shape)
        lane = np.exp(-0.5 * ((across - rng.uniform(-0.5, 0.5)) / rng.uniform(0.5, 1.0)) ** 2)
        lane *= np.exp(-0.5 * (along / shape.radius) ** 2)
        scene *= np.exp(-rng.uniform(1.2, 3.5) * _paint(lane, _EXTINCTION))
    return scene


def unbarred_spiral(rng: np.random.Generator, grid: Grid) -> Scene:
    """Draw a disk with arms (one in ten has a ring instead) and young knots on them, around an older bulge."""
    shape = _placed(rng, _log_uniform(rng, 8.0, 14.0), 1.0, rng.uniform(0.4, 1))
    brightness = _log_uniform(rng, 15.0, 50.0)
    age = rng.uniform(0.2, 0.65)
    along, across = _own_axes(grid, shape)
    rho, phi = np.hypot(along, across / shape.ratio), np.arctan2(across / shape.ratio, along)
    disk = profile(grid, shape, brightness)
    if rng.random() < 0.1:
        radius = rng.uniform(0.7, 1.3) * shape.radius
        pattern = 1.5 * np.exp(-0.5 * ((rho - radius) / rng.uniform(1.2, 2.8)) ** 2)
        knots = np.zeros_like(disk)
    else:
        pattern, knots = _arms(rng, grid, shape, rho, phi)
    bulge = replace(shape, radius=rng.uniform(1.0, 2.6), index=rng.uniform(1.2, 3.5), ratio=0.5 + shape.ratio / 2)
    scene = _paint(
        disk * (1 - 0.3 * pattern / pattern.max()) * rng.uniform(0.35, 0.75), colour(rng, min(age + 0.25, 1.0))
    )
    scene += _paint(disk * pattern * rng.uniform(1.0, 2.6) + knots * brightness, colour(rng, age - 0.2))
    return scene + _paint(profile(grid, bulge, brightness * _log_uniform(rng, 0.8, 6.0)), colour(rng, max(age, 0.75)))


def _arms(rng: np.random.Generator, grid: Grid, shape: Shape, rho: Plane, phi: Plane) -> tuple[Plane, Plane]:
    """Draw logarithmic spiral arms (contrast, 0 to about 1) and knots of star formation along them.

    Args:
        rng: random numbers.
        grid: the pixels.
        shape: the disk as seen on the sky.
        rho: radius in the plane of the disk.
        phi: azimuth in the plane of the disk.
    """
    number = int(rng.choice([2, 3, 4], p=[0.7, 0.18, 0.12]))
    winding = rng.choice([-1.0, 1.0]) / np.tan(np.deg2rad(rng.uniform(13, 32)))
    start, wobble, beat = rng.uniform(0, 2 * np.pi, 3)

    def turn(radius: Plane | Float[np.ndarray, " k"]) -> Plane | Float[np.ndarray, " k"]:
        return winding * np.log(radius / shape.radius + 0.08)

    phase = number * (phi - turn(rho)) - start + rng.uniform(0, 0.6) * np.sin(phi + wobble)
    ramp = rho**2 / (rho**2 + (0.4 * shape.radius) ** 2)
    pattern = ramp * np.exp(rng.uniform(1.5, 4.0) * (np.cos(phase) - 1))
    pattern *= 1 + rng.uniform(0, 0.45) * np.sin(2.3 * rho + 3 * phi + beat)

    count = int(rng.integers(3, 15))
    radius = shape.radius * rng.uniform(0.5, 1.9, count)
    azimuth = turn(radius) + (start + 2 * np.pi * rng.integers(0, number, count)) / number + rng.normal(0, 0.12, count)
    u, v = radius * np.cos(azimuth), radius * np.sin(azimuth) * shape.ratio
    cos, sin = np.cos(shape.angle), np.sin(shape.angle)
    peak = rng.uniform(0.2, 1.6, count) * np.exp(-radius / shape.radius)
    return pattern, blobs(grid, u * cos - v * sin + shape.x, u * sin + v * cos + shape.y, 0.8, peak)


def lens_arc(rng: np.random.Generator, grid: Grid) -> Scene:
    """Draw a red elliptical that bends the light of a distant blue galaxy into arcs, images or a ring."""
    shape = _placed(rng, _log_uniform(rng, 2.6, 5.5), rng.uniform(3, 5), rng.uniform(0.7, 1))
    scene = _paint(profile(grid, shape, _log_uniform(rng, 40.0, 130.0)), colour(rng, rng.uniform(0.85, 1.15)))
    einstein = rng.uniform(6.0, 13.0)
    behind = _deflected(rng, grid, shape, einstein)
    age = rng.uniform(0.35, 0.6) if rng.random() < 0.15 else rng.uniform(-0.3, 0.2)
    tint = colour(rng, age)
    for _ in range(2 if rng.random() < 0.15 else 1):
        offset, around = einstein * 0.65 * np.sqrt(rng.random()), rng.uniform(0, 2 * np.pi)
        x, y = offset * np.cos(around), offset * np.sin(around)
        form = Shape(_log_uniform(rng, 0.9, 2.0), 1.0, rng.uniform(0.4, 1), rng.uniform(0, np.pi), x, y)
        scene += _paint(profile(behind, form, _log_uniform(rng, 25.0, 75.0)), tint)
    return scene


def _deflected(rng: np.random.Generator, grid: Grid, shape: Shape, einstein: float) -> Grid:
    """Return the source-plane grid of an isothermal lens at the centre of `shape` with external shear.

    Lensing keeps the surface brightness, so the profile of a source on this grid is its image.
    Source: Schneider, Kochanek & Wambsganss 2006, Gravitational Lensing: Strong, Weak and Micro, part 2, section 3.
    """
    x, y = grid.x - shape.x, grid.y - shape.y
    distance = np.maximum(np.hypot(x, y), 1e-6)
    strength, axis = rng.uniform(0, 0.15), rng.uniform(0, 2 * np.pi)
    cos, sin = strength * np.cos(axis), strength * np.sin(axis)
    return Grid(
        x - einstein * x / distance - cos * x - sin * y,
        y - einstein * y / distance - sin * x + cos * y,
    )


def merger(rng: np.random.Generator, grid: Grid) -> Scene:
    """Draw two interacting galaxies: bent disks, overlapping light, tidal tails."""
    half, around = rng.uniform(2.2, 6.5), rng.uniform(0, 2 * np.pi)
    age = rng.uniform(0.2, 1)
    brightness = _log_uniform(rng, 30.0, 120.0)
    scene = np.zeros((3, *grid.x.shape))
    for side, share in ((1, 1.0), (-1, rng.uniform(0.3, 1))):
        x, y = side * half * np.cos(around), side * half * np.sin(around)
        shape = Shape(rng.uniform(3.3, 7.5), rng.uniform(1.2, 4), rng.uniform(0.45, 0.95), rng.uniform(0, np.pi), x, y)
        tint = colour(rng, float(np.clip(age + rng.normal(0, 0.2), 0, 1)))
        scene += _paint(profile(_bent(rng, grid, shape), shape, brightness * share), tint)
        if side == 1 or rng.random() < 0.6:
            light = _tail(rng, grid, shape, outwards=around + (np.pi if side < 0 else 0.0))
            scene += _paint(light * brightness * share, colour(rng, max(age - 0.3, 0.0)))
    return scene


def _bent(rng: np.random.Generator, grid: Grid, shape: Shape) -> Grid:
    """Warp the grid about the centre of `shape`: a disk drawn on it is curved and lopsided."""
    x, y = grid.x - shape.x, grid.y - shape.y
    bend, skew = rng.normal(0, 0.012, 2)
    return Grid(grid.x + bend * y * np.abs(y) + skew * y**2, grid.y + bend * x**2)


def _tail(rng: np.random.Generator, grid: Grid, shape: Shape, outwards: float) -> Plane:
    """Draw a curved, fading tail that leaves `shape` in the direction `outwards`, relative to the galaxy."""
    t = np.linspace(0.2, 1, 28)
    azimuth = outwards + rng.normal(0, 0.5) + rng.choice([-1, 1]) * rng.uniform(0.8, 2.4) * t
    distance = rng.uniform(11, 24) * t
    fade = rng.uniform(0.03, 0.09) * (1.1 - t)
    x, y = shape.x + distance * np.cos(azimuth), shape.y + distance * np.sin(azimuth)
    return blobs(grid, x, y, rng.uniform(0.9, 2.0), fade)


COMMON: dict[str, Callable[[np.random.Generator, Grid], Scene]] = {
    "smooth_round": smooth_round,
    "smooth_cigar": smooth_cigar,
    "edge_on_disk": edge_on_disk,
    "unbarred_spiral": unbarred_spiral,
}
RARE: dict[str, Callable[[np.random.Generator, Grid], Scene]] = {"lens_arc": lens_arc, "merger": merger}
