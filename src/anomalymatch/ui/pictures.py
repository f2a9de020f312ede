"""The pictures of the page: thumbnails, and the large view at any stretch and in any channel."""

import logging
import math
import sqlite3
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import simplejpeg
from jaxtyping import Shaped, UInt8
from PIL import Image as PillowImage

from anomalymatch.data.rendering import Rendering
from anomalymatch.data.source import ImageSource
from anomalymatch.errors import ConfigError, UnreadableImageError
from anomalymatch.evaluation.contact_sheet import as_rgb
from anomalymatch.types import Image, Pixels
from anomalymatch.ui.metadata import Metadata
from anomalymatch.ui.originals import guarded, original

logger = logging.getLogger(__name__)

SIDES = (64, 96, 128, 192, 256, 384, 512)
"""Sides in pixels that are made; a few, so that most sizes of the page find what others have asked for."""
MEMORY_BYTES = 2**26
DISK_BYTES = 2**30
QUALITY = 92
PNG_LEVEL = 2
"""Of zlib: three times as fast as its usual level, and hardly larger."""

Key = tuple[str, str, int]
"""Fingerprint of the source, id, side."""

_SCHEMA = """
CREATE TABLE IF NOT EXISTS thumbnails (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    source TEXT NOT NULL,
    image TEXT NOT NULL,
    side INTEGER NOT NULL,
    data BLOB NOT NULL,
    UNIQUE (source, image, side)
)
"""


def step(side: int) -> int:
    """The side that is made for `side`: the next larger one of `SIDES`, or the largest."""
    return next((made for made in SIDES if made >= side), SIDES[-1])


def fitted(image: Image, side: int) -> UInt8[np.ndarray, "y x 3"]:
    """Scale an image to `side` pixels along its longer axis, in colours as `as_rgb` shows its channels.

    Larger images are averaged over areas, so that no star falls between pixels; smaller ones are enlarged bicubically.
    """
    rgb = as_rgb(image)
    height, width = rgb.shape[:2]
    scale = side / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    if size == (width, height):
        return np.ascontiguousarray(rgb)
    if scale < 1:
        return cv2.resize(rgb, size, interpolation=cv2.INTER_AREA)
    # OpenCV's bicubic overshoots more than Pillow's: it would draw rings around stars.
    return np.asarray(PillowImage.fromarray(rgb).resize(size, PillowImage.Resampling.BICUBIC))


def averaged(pixels: Pixels, size: tuple[int, int]) -> Shaped[np.ndarray, "y x b"]:
    """Shrink an image of any depth and number of bands to a width and a height, averaging over areas."""
    known = pixels.dtype in (np.uint8, np.uint16, np.int16, np.float32, np.float64)
    planes = (pixels[..., k] if known else pixels[..., k].astype(np.float64) for k in range(pixels.shape[2]))
    return np.stack([cv2.resize(plane, size, interpolation=cv2.INTER_AREA) for plane in planes], axis=2)


def jpeg(rgb: UInt8[np.ndarray, "h w 3"]) -> bytes:
    """Encode with full colour resolution: small red and blue things are what one looks for."""
    return simplejpeg.encode_jpeg(np.ascontiguousarray(rgb), quality=QUALITY, colorspace="RGB", colorsubsampling="444")


def png(rgb: UInt8[np.ndarray, "h w 3"]) -> bytes:
    """Encode without any loss."""
    _, data = cv2.imencode(".png", rgb[..., ::-1], [cv2.IMWRITE_PNG_COMPRESSION, PNG_LEVEL])
    return data.tobytes()


class ThumbnailCache:
    """Encoded thumbnails by key: the latest in memory, many more in one SQLite file, which several programs may share.

    It is only a cache: whatever is wrong with the file, a full disk for example, thumbnails are made anew.

    Args:
        path: the file.
        memory_bytes: how much is kept in memory.
        disk_bytes: how large the file may become; then the oldest fifth is removed.
    """

    def __init__(self, path: Path, *, memory_bytes: int = MEMORY_BYTES, disk_bytes: int = DISK_BYTES) -> None:
        self.path, self.memory_bytes, self.disk_bytes = path, memory_bytes, disk_bytes
        self._lock = threading.Lock()
        self._latest: OrderedDict[Key, bytes] = OrderedDict()
        self._n_bytes = 0
        self._connection = self._open() or self._open(anew=True)

    def get(self, key: Key) -> bytes | None:
        """The thumbnail of a key, None if it is not there."""
        with self._lock:
            if key in self._latest:
                self._latest.move_to_end(key)
                return self._latest[key]
            data = self._fetch(key)
            if data is not None:
                self._remember(key, data)
            return data

    def put(self, key: Key, data: bytes) -> None:
        """Keep a thumbnail."""
        with self._lock:
            self._remember(key, data)
            if self._connection is None:
                return
            try:
                with self._connection:
                    self._connection.execute(
                        "INSERT OR REPLACE INTO thumbnails (source, image, side, data) VALUES (?, ?, ?, ?)",
                        (*key, data),
                    )
                    self._make_room(self._connection)
            except sqlite3.Error as error:
                self._give_up(error)

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            if self._connection is not None:
                self._connection.close()
                self._connection = None

    def _open(self, *, anew: bool = False) -> sqlite3.Connection | None:
        connection = None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if anew:
                for end in ("", "-wal", "-shm"):
                    self.path.with_name(self.path.name + end).unlink(missing_ok=True)
            connection = sqlite3.connect(self.path, timeout=2, check_same_thread=False)
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=OFF")
            connection.execute(_SCHEMA)
            connection.commit()
            connection.execute("SELECT source, image, side, data FROM thumbnails LIMIT 1").fetchone()
            return connection
        except (OSError, sqlite3.Error) as error:
            if connection is not None:
                connection.close()
            if anew:
                logger.warning("Thumbnails are not kept, because %s cannot be used: %s", self.path, error)
            return None

    def _fetch(self, key: Key) -> bytes | None:
        if self._connection is None:
            return None
        try:
            row = self._connection.execute(
                "SELECT data FROM thumbnails WHERE source = ? AND image = ? AND side = ?", key
            ).fetchone()
        except sqlite3.Error as error:
            self._give_up(error)
            return None
        return row[0] if row and isinstance(row[0], bytes) else None

    def _remember(self, key: Key, data: bytes) -> None:
        self._n_bytes += len(data) - len(self._latest.pop(key, b""))
        self._latest[key] = data
        while self._n_bytes > self.memory_bytes and len(self._latest) > 1:
            self._n_bytes -= len(self._latest.popitem(last=False)[1])

    def _make_room(self, connection: sqlite3.Connection) -> None:
        pages, free, size = (
            connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "freelist_count", "page_size")
        )
        if (pages - free) * size > self.disk_bytes:
            connection.execute(
                "DELETE FROM thumbnails WHERE number IN (SELECT number FROM thumbnails ORDER BY number "
                "LIMIT (SELECT 1 + COUNT(*) / 5 FROM thumbnails))"
            )

    def _give_up(self, error: sqlite3.Error) -> None:
        """Another program that is writing passes; anything else stays wrong."""
        if isinstance(error, sqlite3.OperationalError) and error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_BUSY:
            return
        logger.warning("Thumbnails are no longer kept, because %s cannot be used: %s", self.path, error)
        if self._connection is not None:
            self._connection.close()
            self._connection = None


AS_TRAINED = "as trained"
STRETCHES = (AS_TRAINED, "linear", "sqrt", "log", "asinh", "zscale")
_CURVES = {"sqrt": "sqrt", "log": "log", "asinh": "asinh"}
THUMBNAIL_TYPE, FULL_TYPE = "image/jpeg", "image/png"
MAX_VALUES, MAX_BYTES = 2**24, 2**27
"""Numbers in an image that is rendered, which takes some 40 bytes each, and bytes of one that is shown as it is.

Larger images are shown reduced by a whole number.
"""
KEPT_BYTES = 2**27
"""Of decoded images that are kept, so that one image at six stretches is read once."""


class Pictures:
    """Encoded pictures of the images of a source; every method may be called from any thread.

    Args:
        source: the images.
        cache: folder in which thumbnails are kept; several sources and programs may share it.
        workers: images that are decoded at the same time; more would take memory without being faster.

    Attributes:
        metadata_of: what is known of the images beside their pixels.
    """

    def __init__(self, source: ImageSource, cache: Path, *, workers: int) -> None:
        self.source = source
        self.metadata_of = Metadata(source)
        self._cache = ThumbnailCache(cache / "sqlite")
        self._slots = threading.BoundedSemaphore(max(1, workers))
        self._kept: OrderedDict[str, Pixels] = OrderedDict()
        self._reading = threading.Lock()

    @property
    def channels(self) -> Sequence[str]:
        """What `full` can show alone: the channels as they are trained on, then the archive's other bands."""
        trained = self.source.rendering.channels(self.source.bands)
        return (*trained, *(band for band in self.source.bands if band not in trained))

    def thumbnail(self, id_: str, side: int) -> bytes:
        """JPEG of an image as it is trained on, scaled to `side` pixels along its longer axis, rounded up to a step.

        Raises:
            UnreadableImageError: with the reason, if the image cannot be read.
            DataError: if the id is not in the source.
        """
        key = (self.source.fingerprint, id_, step(side))
        data = self._cache.get(key)
        if data is None:
            with self._slots:
                data = jpeg(fitted(self._trained(id_), key[2]))
            self._cache.put(key, data)
        return data

    def full(self, id_: str, *, stretch: str = AS_TRAINED, channel: str | None = None) -> bytes:
        """PNG of an image at its full resolution, or at a half, a third, ... of it if the image is very large.

        Args:
            id_: the image.
            stretch: one of `STRETCHES`; all but the first stretch the image by its own range of values.
            channel: one of `channels`, shown in grey; None shows all in colour.

        Raises:
            UnreadableImageError: with the reason, if the image cannot be read.
            DataError: if the id is not in the source.
            ConfigError: if there is no such stretch or channel.
        """
        if stretch not in STRETCHES:
            raise ConfigError(f"there is no stretch {stretch!r}: choose one of {', '.join(STRETCHES)}")
        if channel is not None and channel not in self.channels:
            raise ConfigError(f"there is no channel {channel!r}: choose one of {', '.join(self.channels)}")
        pixels = self._native(id_)
        with self._slots:
            return png(as_rgb(self._rendered(pixels, stretch, channel)))

    def size(self, id_: str) -> tuple[int, int]:
        """Width and height in pixels. Errors are those of `thumbnail`."""
        height, width = self._native(id_).shape[:2]
        return width, height

    def original(self, id_: str) -> tuple[bytes, str]:
        """The file of an image as it is, and its suffix; a PNG as trained if the archive holds no such files.

        Errors are those of `thumbnail`.
        """
        found = original(self.source, id_)
        return (png(as_rgb(self._trained(id_))), ".png") if found is None else found

    def metadata(self, id_: str) -> dict[str, str]:
        """Everything that is known of an image, by name: its size first; for an unreadable one the reason.

        Raises:
            DataError: if the id is not in the source.
        """
        try:
            pixels = self._native(id_)
        except UnreadableImageError as error:
            own = {"unreadable": str(error)}
        else:
            height, width = pixels.shape[:2]
            own = {"size": f"{width} x {height} pixels", "values": _describe(pixels, self.source)}
        return own | self.metadata_of(id_)

    def coordinates(self, id_: str) -> tuple[float, float] | None:
        """Right ascension and declination in degrees (ICRS); None where they are not known.

        Raises:
            DataError: if the id is not in the source.
        """
        return self.metadata_of.coordinates(id_)

    def close(self) -> None:
        """Close the file of thumbnails."""
        self._cache.close()

    def _trained(self, id_: str) -> Image:
        return self._rendered(self._read(id_), AS_TRAINED, None)

    def _native(self, id_: str) -> Pixels:
        """The pixels as the archive holds them; the last few are kept."""
        with self._reading:
            if id_ not in self._kept:
                self._kept[id_] = self._read(id_)
            self._kept.move_to_end(id_)
            while len(self._kept) > 1 and sum(pixels.nbytes for pixels in self._kept.values()) > KEPT_BYTES:
                self._kept.popitem(last=False)
            return self._kept[id_]

    def _read(self, id_: str) -> Pixels:
        with guarded(self.source, id_):
            pixels = self.source.pixels(id_)
        if not pixels.size:
            raise UnreadableImageError("it has no pixels")
        return pixels

    def _rendered(self, pixels: Pixels, stretch: str, channel: str | None) -> UInt8[np.ndarray, "y x c"]:
        source = self.source
        trained = source.rendering.channels(source.bands)
        rendering, bands = source.rendering, tuple(source.bands)
        if channel is not None and channel not in trained:
            at = bands.index(channel)
            pixels, bands = pixels[..., at : at + 1], (channel,)
            rendering = replace(rendering, combine=None, limits=None)
        rendering = _stretched(rendering, stretch, pixels.dtype == np.uint8)
        image = rendering(_reduced(pixels, rendering), bands)
        return image[..., [trained.index(channel)]] if channel in trained else image


def _stretched(rendering: Rendering, stretch: str, eight_bits: bool) -> Rendering:
    """The same bands in the same colours, by another curve between other limits."""
    if stretch == AS_TRAINED:
        return rendering
    interval = "zscale" if stretch == "zscale" else "auto" if eight_bits else "percentile"
    return replace(
        rendering,
        interval=interval,
        curve=_CURVES.get(stretch, "linear"),
        # 256 values have no thousandfold range: more would show nothing but the blocks of a JPEG.
        parameter=100 if stretch == "log" and eight_bits else None,
        # A logarithm has room for the brightest star, and all but what is in its middle shows the faint.
        percentiles=(0.5, 99.9) if stretch == "log" else (0.5, 99.5),
        limits=None,
    )


def _reduced(pixels: Pixels, rendering: Rendering) -> Shaped[np.ndarray, "y x b"]:
    """Average squares of pixels if there are too many to show."""
    plain = pixels.dtype == np.uint8 and rendering.keeps_eight_bits
    factor = math.ceil((pixels.size / (MAX_BYTES if plain else MAX_VALUES)) ** 0.5)
    height, width = pixels.shape[:2]
    return pixels if factor <= 1 else averaged(pixels, (max(1, width // factor), max(1, height // factor)))


def _describe(pixels: Pixels, source: ImageSource) -> str:
    """What the numbers of an image are: their depth, range, units and bands."""
    finite = pixels if pixels.dtype.kind != "f" else pixels[np.isfinite(pixels)]
    span = f", {finite.min():g} to {finite.max():g}" if finite.size else ""
    units = f" {source.units}" if source.units else ""
    return f"{pixels.dtype}{span}{units} in {', '.join(source.bands)}"
