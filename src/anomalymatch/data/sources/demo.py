"""Demo galaxies as a source: the default data set, rendered in seconds, so that nothing has to be downloaded.

Four common morphologies and a rare class, as a survey would show them in 64-pixel colour cutouts. Image `i` depends on
the seed, `i`, the size and its class alone, never on the number of images.
"""

import hashlib
import logging
from pathlib import Path

import numpy as np
from jaxtyping import Float32, UInt8
from scipy.ndimage import gaussian_filter

from anomalymatch.cache import Cache
from anomalymatch.checks import check_choice, check_range
from anomalymatch.data.source import ImageSource
from anomalymatch.data.sources.demo_galaxies import COMMON, FRAME, RARE, Grid, Scene, Shape, blobs, colour, profile
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

Exposure = Float32[np.ndarray, "3 h w"]
Images = UInt8[np.ndarray, "n size size 3"]


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
        self._images: Images = np.array(entry.arrays["images"])
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


def _render_all(classes: list[str], size: int, seed: int) -> Images:
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
