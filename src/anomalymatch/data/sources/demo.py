"""Demo galaxies as a source: the default data set, rendered in seconds, so that nothing has to be downloaded.

Four common morphologies and a rare class, as a survey would show them in 64-pixel colour cutouts. Image `i` depends on
the seed, `i`, the size and its class alone, never on the number of images.
"""

import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import Float, Float32, UInt8
from scipy.ndimage import gaussian_filter
from scipy.special import gamma, gammaincinv

from anomalymatch.cache import Cache
from anomalymatch.checks import check_choice, check_range
from anomalymatch.data.source import ImageSource
from anomalymatch.progress import progress
from anomalymatch.types import Image

logger = logging.getLogger(__name__)

VERSION = 1
"""Part of the fingerprint; raise it whenever the same arguments would give other pixels."""
MIN_SIZE = 16
BLOCK = 100
"""Classes are assigned in blocks of this many images, so that every prefix of the set has the right shares."""

# Independent streams of random numbers have the keys (seed, purpose, number).
_CLASSES, _PIXELS = 0, 1

# Sky noise of the bands in a survey of average depth; brightness at which a source's own noise equals one.
_DEPTH = np.array([1.0, 0.85, 1.15], dtype=np.float32)[:, None, None]
_GAIN = 5.0
# Q of the stretch (higher compresses bright parts more) and the brightness up to which it is about linear.
_SOFTENING, _LINEAR = 4.0, 80.0

FRAME = 64.0
"""Side of the image in the length unit of the models."""
_YOUNG = np.array([0.80, 0.96, 1.25])
_OLD = np.array([1.30, 1.01, 0.66])
# Dust takes more of the blue light than of the red.
_EXTINCTION = np.array([0.75, 1.0, 1.35])
# A Sérsic cusp is finer than a pixel: within this radius it is constant, so that its brightness does not depend on
# where the centre falls in the pixel.
_CUSP = 0.5

Plane = Float[np.ndarray, "h w"]
Scene = Float[np.ndarray, "3 h w"]
Colour = Float[np.ndarray, "3"]
Exposure = Float32[np.ndarray, "3 h w"]
RenderedImages = UInt8[np.ndarray, "n size size 3"]


class DemoSource(ImageSource):
    """Rendered galaxies in memory: rendered at first, later read from a cache; ids are `demo-000000` and so on.

    Args:
        cache_dir: folder of the cache (49 MB for the defaults).
        count: number of images.
        size: side of an image in pixels, at least 16.
        rare: the rare class, `lens_arc` or `merger`.
        rare_fraction: its share of the images; the four common classes are equally frequent.
        seed: another seed gives other galaxies.

    Raises:
        ConfigError: if an argument is out of range.
        StorageError: if `cache_dir` cannot be written.
    """

    def __init__(
        self,
        *,
        cache_dir: Path | str,
        count: int = 4000,
        size: int = 64,
        rare: str = "lens_arc",
        rare_fraction: float = 0.01,
        seed: int = 0,
    ) -> None:
        check_range("dataset.source.count", count, low=1)
        check_range("dataset.source.size", size, low=MIN_SIZE)
        check_choice("dataset.source.rare", rare, RARE)
        check_range("dataset.source.rare_fraction", rare_fraction, above=0, below=1)
        check_range("dataset.source.seed", seed, low=0)
        key = (
            f"version={VERSION} seed={seed} count={count} size={size} rare={rare} "
            f"rare_fraction={float(rare_fraction)!r}"
        )
        fingerprint = f"demo-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
        classes = _assign_classes(count, rare, rare_fraction, seed)
        if rare not in classes:
            logger.warning("none of the %d demo images is a %s: raise count or rare_fraction", count, rare)
        cache = Cache(Path(cache_dir).expanduser())
        entry = cache.get(fingerprint, lambda: ({"images": _render_all(classes, size, seed)}, {}))
        self._images: RenderedImages = np.array(entry.arrays["images"])
        ids = [f"demo-{i:06d}" for i in range(count)]
        super().__init__(name="demo", ids=ids, fingerprint=fingerprint, truth=dict(zip(ids, classes, strict=True)))

    def load(self, position: int) -> Image:
        """See `ImageSource.load`."""
        return self._images[position].copy()


def _assign_classes(count: int, rare: str, rare_fraction: float, seed: int) -> list[str]:
    """Return class names in shuffled order; that of image `i` does not depend on `count`."""
    common = list(COMMON)
    classes: list[str] = []
    for block in range(-(-count // BLOCK)):
        # Shares hold over all blocks so far, so they are exact even if a block would hold half an anomaly.
        before, after = (round(n * BLOCK * rare_fraction) for n in (block, block + 1))
        first = block * BLOCK - before
        ordinary = BLOCK - (after - before)
        names = [rare] * (after - before) + [common[(first + k) % len(common)] for k in range(ordinary)]
        order = np.random.default_rng([seed, _CLASSES, block]).permutation(BLOCK)
        classes += [names[k] for k in order]
    return classes[:count]


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


def _render_all(classes: list[str], size: int, seed: int) -> RenderedImages:
    grid = Grid.of(size)
    images = np.empty((len(classes), size, size, 3), dtype=np.uint8)
    with progress("Rendering demo galaxies", len(classes)) as advance:
        for i, name in enumerate(classes):
            images[i] = _render(np.random.default_rng([seed, _PIXELS, i]), grid, name)
            advance()
    return images


def _render(rng: np.random.Generator, grid: Grid, name: str) -> Image:
    """Render one cutout: the galaxy, its neighbours, the camera and the stretch."""
    scene = (COMMON | RARE)[name](rng, grid)
    _add_neighbours(rng, grid, scene)
    return _stretch(_expose(rng, scene))


def _add_neighbours(rng: np.random.Generator, grid: Grid, scene: Scene) -> None:
    """Add stars and small galaxies of all colours, few of them close to the middle, to `scene` in place."""
    for _ in range(rng.poisson(1.6)):
        distance = rng.uniform(9, 40)
        around = rng.uniform(0, 2 * np.pi)
        x, y = distance * np.cos(around), distance * np.sin(around)
        tint = colour(rng, rng.uniform(-0.1, 1.3))
        if rng.random() < 0.5:
            peak = np.exp(rng.uniform(np.log(15), np.log(1500), 1))
            light = blobs(grid, np.array([x]), np.array([y]), 0.6, peak)
        else:
            shape = Shape(rng.uniform(0.8, 2.4), 1.0, rng.uniform(0.25, 1), rng.uniform(0, np.pi), x, y)
            light = profile(grid, shape, np.exp(rng.uniform(np.log(8), np.log(70))))
        scene += tint[:, None, None] * light


def _expose(rng: np.random.Generator, scene: Scene) -> Exposure:
    """Add the blur of the atmosphere, some sky, and noise with the grain of resampled cutouts."""
    size = scene.shape[-1]
    seeing = rng.uniform(1.9, 3.0) / 2.355 * size / FRAME
    blurred = gaussian_filter(scene.astype(np.float32), (0, seeing, seeing), mode="nearest", truncate=3)
    depth = np.float32(rng.uniform(0.6, 1.5)) * _DEPTH
    sky = np.float32(rng.uniform(0.5, 2.0))
    white = rng.standard_normal((3, size + 1, size + 1), dtype=np.float32)
    # The mean of 2 x 2 neighbours has half the spread; doubled, it has unit variance and a grain of two pixels.
    pairs = white[:, 1:] + white[:, :-1]
    grain = (pairs[:, :, 1:] + pairs[:, :, :-1]) / 2
    return blurred + sky + grain * np.sqrt(depth**2 + blurred / _GAIN)


def _stretch(exposure: Exposure) -> Image:
    """Compress the range by an inverse hyperbolic sine that keeps colours.

    Source: Lupton et al. 2004, PASP 116, 133.
    """
    mean = np.maximum(exposure.mean(axis=0), 1e-3)
    rgb = exposure * (np.arcsinh(mean * (_SOFTENING / _LINEAR)) / (_SOFTENING * mean))
    rgb *= 255 / np.maximum(rgb.max(axis=0), 1)
    rgb = np.clip(rgb + 0.5, 0, 255).astype(np.uint8)
    return np.ascontiguousarray(rgb.transpose(1, 2, 0))


def colour(rng: np.random.Generator, age: float) -> Colour:
    """Draw the brightness in red, green and blue (mean near 1) of stars of `age`, 0 (young, blue) to 1 (old, red)."""
    return np.exp((1 - age) * np.log(_YOUNG) + age * np.log(_OLD) + rng.normal(0, 0.03, 3))


def profile(grid: Grid, shape: Shape, brightness: float) -> Plane:
    """Return a Sérsic profile whose mean surface brightness within the half-light radius is `brightness`.

    Source: Graham & Driver 2005, PASA 22, 118, equations 1 (profile), 4 and 9 (mean over effective brightness).
    """
    from astropy.modeling.models import Sersic2D  # late: rendered images are read from the cache without it

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

    `rho` and `phi` are radius and azimuth in the plane of the disk.
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
