"""Map of an archive in two dimensions, computed in the background from its features."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float32, Int64

from anomalymatch.cache import Cache, cache_key
from anomalymatch.clustering.umap import umap
from anomalymatch.errors import AnomalyMatchError, DataError
from anomalymatch.progress import CancelledError
from anomalymatch.ui.features import FeatureStore, principal_directions
from anomalymatch.ui.training import BackgroundTask
from anomalymatch.ui.views import Area

logger = logging.getLogger(__name__)
MAPPED = 100_000
"""Largest number of images on a map; of a larger archive, a random sample is mapped."""
COMPONENTS = 50
"""Principal components of the features in which neighbours are searched."""
COMPUTING = "The map is being computed …"
WAITING = "The map needs the features of the images, which are being computed."
_SAMPLE = 20_000
_KEY_SAMPLE = 4096
_BLOCK = 8192


@dataclass(frozen=True)
class MapPoints:
    """Images on a map.

    Attributes:
        positions: of the images in the archive, in increasing order.
        places: between -1 and 1.
        version: differs between different maps.
    """

    positions: Int64[np.ndarray, " m"]
    places: Float32[np.ndarray, "m 2"]
    version: str

    def find(self, positions: Int64[np.ndarray, " k"]) -> Int64[np.ndarray, " k"]:
        """Return the index in `positions` of each image; -1 for images that are not on the map."""
        at = np.searchsorted(self.positions, positions)
        found = self.positions[np.minimum(at, len(self.positions) - 1)] == positions
        return np.where(found, at, -1)


class ArchiveMap:
    """Map of an archive on which similar images lie close together.

    It is computed when it is first requested, and kept in the cache.

    Args:
        store: returns the features of the archive; None while they are not there.
        folder: folder of the cache.
        seed: seed of the sample and of the map.
        on_change: called from another thread when the map is ready or has failed.

    Attributes:
        points: the map; None before it is ready.
        message: why there is no map.
    """

    def __init__(
        self, store: Callable[[], FeatureStore | None], folder: Path, *, seed: int, on_change: Callable[[], None]
    ) -> None:
        self._store, self._cache, self._seed, self._on_change = store, Cache(folder), seed, on_change
        self.points: MapPoints | None = None
        self.message, self._is_wanted, self._is_closed = "", False, False
        self._task = BackgroundTask(self._work, "computation of the map")

    def request(self) -> None:
        """Compute the map in the background, as soon as there are features."""
        if self.points is None:
            self._is_wanted = True
            self.resume()

    def resume(self) -> None:
        """Compute a map that was requested, if the features are there now."""
        if self._is_wanted:
            is_ready = self._store() is not None
            self.message = COMPUTING if is_ready else WAITING
            if is_ready:
                self._is_wanted = False
                self._task.request()

    def within(self, area: Area) -> Int64[np.ndarray, " k"]:
        """Return the positions of the images in an area; none before the map is ready."""
        if self.points is None:
            return np.array([], dtype=np.int64)
        return self.points.positions[inside(self.points.places, area)]

    @property
    def positions(self) -> Int64[np.ndarray, " m"]:
        """Positions of the images on the map in the archive; none before it is ready."""
        return np.array([], dtype=np.int64) if self.points is None else self.points.positions

    def position(self, number: int, version: str) -> int | None:
        """Return the position of the image with a number on the map of a version; None if there is none."""
        points = self.points
        is_there = points is not None and points.version == version and 0 <= number < len(points.positions)
        return int(points.positions[number]) if points is not None and is_there else None

    def numbers(self, positions: Int64[np.ndarray, " k"]) -> Int64[np.ndarray, " k"]:
        """Return the number on the map of each image; -1 for images that are not on it, and before it is ready."""
        return np.full(len(positions), -1) if self.points is None else self.points.find(positions)

    def close(self) -> None:
        """Stop the computation."""
        self._is_closed = True
        self._task.close()

    def _work(self) -> None:
        store = self._store()
        if store is None:
            return
        try:
            self.points = self._compute(store.last_layer)
            self.message = ""
        except CancelledError:
            return
        except AnomalyMatchError as error:
            self.message = f"There is no map: {error}"
        except Exception as error:
            logger.exception("The map cannot be computed")
            self.message = f"There is no map: {error}"
        self._on_change()

    def _compute(self, store: FeatureStore) -> MapPoints:
        rng = np.random.default_rng(self._seed)
        count = len(store.positions)
        if count < 3:
            raise DataError(f"it needs at least 3 readable images, and there are {count}")
        positions = store.positions[np.sort(rng.choice(count, min(MAPPED, count), replace=False))]
        checked = store.rows(positions[:: max(1, len(positions) // _KEY_SAMPLE)])
        key = cache_key({"positions": positions, "rows": checked, "components": COMPONENTS, "seed": self._seed})

        def compute() -> tuple[dict[str, np.ndarray], dict[str, object]]:
            places = umap(self._components(store, positions, rng), seed=self._seed, advance=self._check_open)
            return {"places": _scaled(places)}, {}

        return MapPoints(positions, np.array(self._cache.get(key, compute).arrays["places"]), key)

    def _components(
        self, store: FeatureStore, positions: Int64[np.ndarray, " m"], rng: np.random.Generator
    ) -> Float32[np.ndarray, "m c"]:
        """Return the principal components of features, block by block: a copy of all could fill the memory."""
        sample = store.rows(np.sort(rng.choice(positions, min(_SAMPLE, len(positions)), replace=False)))
        mean = sample.mean(axis=0)
        directions = principal_directions(sample - mean, COMPONENTS)
        blocks = []
        for start in range(0, len(positions), _BLOCK):
            self._check_open()
            blocks.append((store.rows(positions[start : start + _BLOCK]) - mean) @ directions)
        return np.concatenate(blocks)

    def _check_open(self) -> None:
        if self._is_closed:
            raise CancelledError


def _scaled(places: Float32[np.ndarray, "m 2"]) -> Float32[np.ndarray, "m 2"]:
    """Move and scale places so that the longer side of the map reaches from -1 to 1."""
    low, high = places.min(axis=0), places.max(axis=0)
    return ((places - (low + high) / 2) / max(float((high - low).max()) / 2, 1e-12)).astype(np.float32)


def inside(places: Float32[np.ndarray, "m 2"], corners: Area) -> Bool[np.ndarray, " m"]:
    """Return True for each place inside a polygon, which may cross itself (even-odd rule)."""
    x, y = places.T.astype(np.float64)
    is_inside = np.zeros(len(places), dtype=bool)
    for (x1, y1), (x2, y2) in zip(corners, [*corners[1:], corners[0]], strict=True):
        if y1 != y2:  # a ray to the right crosses the edge
            is_inside ^= ((y1 > y) != (y2 > y)) & (x < x1 + (y - y1) * (x2 - x1) / (y2 - y1))
    return is_inside
