"""Pictures of the page: thumbnails, and the large view in any stretch and channel."""

import logging
import math
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cached_property, partial
from operator import attrgetter
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import simplejpeg
from jaxtyping import Shaped, UInt8
from PIL import Image as PillowImage

from anomalymatch.checks import check_choice
from anomalymatch.data.rendering import Rendering
from anomalymatch.data.source import ImageSource
from anomalymatch.errors import UnreadableImageError
from anomalymatch.evaluation.contact_sheet import as_rgb
from anomalymatch.lru import LRU
from anomalymatch.types import Image, Orientation, Pixels, Reject
from anomalymatch.ui.originals import Metadata, guarded, original

logger = logging.getLogger(__name__)

SIDES = (64, 96, 128, 192, 256, 384, 512)
"""Sides of thumbnails in pixels; few, so that pages of most tile sizes share them."""
MEMORY_BYTES = 2**26
DISK_BYTES = 2**30
QUALITY = 92
PNG_LEVEL = 2
"""Compression level of zlib: three times as fast as its default and hardly larger."""

Key = tuple[str, str, int]
"""Fingerprint of the source with the rendering, id, side."""

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
    """Round a side up to the next of `SIDES`, or down to the largest."""
    return next((made for made in SIDES if made >= side), SIDES[-1])


def fitted(image: Image, side: int) -> UInt8[np.ndarray, "y x 3"]:
    """Scale an image to `side` pixels along its longer axis, with its channels as colours by `as_rgb`.

    Larger images are averaged over areas, so that no star is lost between pixels; smaller ones are
    enlarged bicubically.
    """
    rgb = as_rgb(image)
    height, width = rgb.shape[:2]
    scale = side / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    if size == (width, height):
        return np.ascontiguousarray(rgb)
    if scale < 1:
        return cv2.resize(rgb, size, interpolation=cv2.INTER_AREA)
    # OpenCV's bicubic filter overshoots more than Pillow's and draws rings around stars.
    return np.asarray(PillowImage.fromarray(rgb).resize(size, PillowImage.Resampling.BICUBIC))


def averaged(pixels: Pixels, size: tuple[int, int]) -> Shaped[np.ndarray, "y x b"]:
    """Shrink an image of any depth and number of bands to a width and a height, averaging over areas."""
    known = pixels.dtype in (np.uint8, np.uint16, np.int16, np.float32, np.float64)
    planes = (pixels[..., k] if known else pixels[..., k].astype(np.float64) for k in range(pixels.shape[2]))
    return np.stack([cv2.resize(plane, size, interpolation=cv2.INTER_AREA) for plane in planes], axis=2)


def jpeg(rgb: UInt8[np.ndarray, "h w 3"]) -> bytes:
    """Encode as JPEG with full colour resolution, which small red and blue objects need."""
    return simplejpeg.encode_jpeg(np.ascontiguousarray(rgb), quality=QUALITY, colorspace="RGB", colorsubsampling="444")


def png(rgb: UInt8[np.ndarray, "h w 3"]) -> bytes:
    """Encode as PNG, without loss."""
    _, data = cv2.imencode(".png", rgb[..., ::-1], [cv2.IMWRITE_PNG_COMPRESSION, PNG_LEVEL])
    return data.tobytes()


class ThumbnailCache:
    """Cache of encoded thumbnails in memory and in one SQLite file, which several programs may share.

    If anything is wrong with the file, such as a full disk, thumbnails are only cached in memory.

    Args:
        path: the file.
        memory_bytes: bytes that are kept in memory.
        disk_bytes: size of the file at which the oldest fifth is removed.
    """

    def __init__(self, path: Path, *, memory_bytes: int = MEMORY_BYTES, disk_bytes: int = DISK_BYTES) -> None:
        self.path, self.disk_bytes = path, disk_bytes
        self._lock = threading.Lock()
        self._memory: LRU[Key, bytes] = LRU(memory_bytes, cost=len)
        self._connection = self._open() or self._open(replace_file=True)

    def get(self, key: Key) -> bytes | None:
        """Return the thumbnail of a key; None if it is not cached."""
        data = self._memory.find(key)
        if data is None:
            query = "SELECT data FROM thumbnails WHERE source = ? AND image = ? AND side = ?"
            with self._lock, self._connected() as connection:
                row = connection.execute(query, key).fetchone() if connection else None
                if row and isinstance(row[0], bytes):
                    data = row[0]
                    self._memory.put(key, data)
        return data

    def put(self, key: Key, data: bytes) -> None:
        """Store a thumbnail."""
        self._memory.put(key, data)
        insert = "INSERT OR REPLACE INTO thumbnails (source, image, side, data) VALUES (?, ?, ?, ?)"
        with self._lock, self._connected() as connection:
            if connection:
                with connection:
                    connection.execute(insert, (*key, data))
                    self._make_room(connection)

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            if self._connection is not None:
                self._connection.close()
                self._connection = None

    def _open(self, *, replace_file: bool = False) -> sqlite3.Connection | None:
        connection = None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if replace_file:
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
            if replace_file:
                logger.warning("Thumbnails are not stored, because %s cannot be used: %s", self.path, error)
            return None

    def _make_room(self, connection: sqlite3.Connection) -> None:
        pages, free, size = (
            connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "freelist_count", "page_size")
        )
        if (pages - free) * size > self.disk_bytes:
            connection.execute(
                "DELETE FROM thumbnails WHERE number IN (SELECT number FROM thumbnails ORDER BY number "
                "LIMIT (SELECT 1 + COUNT(*) / 5 FROM thumbnails))"
            )

    @contextmanager
    def _connected(self) -> Iterator[sqlite3.Connection | None]:
        """Yield the connection; after an error, stop using the file, unless another program is only writing to it."""
        try:
            yield self._connection
        except sqlite3.Error as error:
            if getattr(error, "sqlite_errorcode", 0) & 0xFF != sqlite3.SQLITE_BUSY:
                logger.warning("Thumbnails are no longer stored, because %s cannot be used: %s", self.path, error)
                if self._connection is not None:
                    self._connection.close()
                self._connection = None


AS_TRAINED = "as trained"
STRETCHES = (AS_TRAINED, "linear", "sqrt", "log", "asinh", "zscale")
EIGHT_BIT_STRETCHES = (AS_TRAINED, "linear", "sqrt", "asinh")
"""Stretches of images of 8 bits, which have no sky to cut off (zscale) and no range for a logarithm."""
_CURVES = {"sqrt": "sqrt", "log": "log", "asinh": "asinh"}
THUMBNAIL_TYPE, FULL_TYPE = "image/jpeg", "image/png"
MAX_VALUES, MAX_BYTES = 2**24, 2**27
"""Largest image to render, in numbers (some 40 bytes of memory each), and to show unchanged, in bytes.

Larger images are reduced by a whole factor.
"""
KEPT_BYTES = 2**27
"""Bytes of decoded images in memory, so that an image in six stretches is read once."""


class Pictures:
    """Encoded pictures of the images of a source; every method may be called from any thread.

    All that take an id raise a `DataError` if it is not in the source, and all that return bytes an
    `UnreadableImageError` with the reason if the image cannot be read.

    Args:
        source: the images.
        cache: folder for thumbnails; several sources and programs may share it.
        workers: images that are decoded at the same time; more take memory and are not faster.
        scores: further columns of the metadata, see `read_scores`.
    """

    def __init__(self, source: ImageSource, cache: Path, *, workers: int, scores: pa.Table | None = None) -> None:
        self.source = source
        self.metadata_of = Metadata(source, scores)
        self._has_coordinates: dict[str, bool] = {}
        self._cache = ThumbnailCache(cache / "sqlite")
        self._slots = threading.BoundedSemaphore(max(1, workers))
        self._decoded: LRU[str, Pixels] = LRU(KEPT_BYTES, cost=attrgetter("nbytes"))

    @property
    def channels(self) -> Sequence[str]:
        """Channels that `full` can show alone: those of the training, then the other bands of the archive."""
        trained = self.source.rendering.channels(self.source.bands)
        return (*trained, *(band for band in self.source.bands if band not in trained))

    @cached_property
    def stretches(self) -> Sequence[str]:
        """Stretches that make sense for these images, by the type of the first, middle and last one."""
        ids = self.source.ids
        kinds = set()
        for position in sorted({0, len(ids) // 2, len(ids) - 1} if len(ids) else ()):
            with suppress(UnreadableImageError):
                kinds.add(self._native(ids[position]).dtype)
        if kinds != {np.dtype(np.uint8)}:
            return STRETCHES
        same = ("linear",) if self.source.rendering.keeps_eight_bits else ()
        return tuple(name for name in EIGHT_BIT_STRETCHES if name not in same)

    def thumbnail(self, id_: str, side: int, *, stretch: str = AS_TRAINED, channel: str | None = None) -> bytes:
        """Return the JPEG of an image whose longer axis has `side` pixels, rounded up to `SIDES`.

        Args and errors are those of `full`.
        """
        look = "" if (stretch, channel) == (AS_TRAINED, None) else f"\n{stretch}\n{channel or ''}"
        key = (self.source.fingerprint + look, id_, step(side))
        data = self._cache.get(key)
        if data is None:
            self._check(stretch, channel)
            with self._slots:
                data = jpeg(fitted(self._small(id_, key[2]) if not look else self._look(id_, stretch, channel), key[2]))
            self._cache.put(key, data)
        return data

    def full(self, id_: str, *, stretch: str = AS_TRAINED, channel: str | None = None) -> bytes:
        """Return the PNG of an image in full resolution, or in a half, a third, … of it if the image is very large.

        Args:
            id_: the image.
            stretch: one of `STRETCHES`; all but the first depend on the values of the image.
            channel: one of `channels`, shown in grey; None shows all in colour.

        Raises:
            ConfigError: if there is no such stretch or channel.
        """
        return png(as_rgb(self.image(id_, stretch=stretch, channel=channel)))

    def image(self, id_: str, *, stretch: str = AS_TRAINED, channel: str | None = None) -> Image:
        """Return the pixels of `full`."""
        self._check(stretch, channel)
        pixels = self._native(id_)
        with self._slots:
            return self._rendered(pixels, stretch, channel)

    def original(self, id_: str) -> tuple[bytes, str]:
        """Return the original file of an image and its suffix; a PNG as trained on if the archive has no such files."""
        found = original(self.source, id_)
        return (png(as_rgb(self._trained(id_))), ".png") if found is None else found

    def metadata(self, id_: str) -> dict[str, str]:
        """Return all metadata of an image by name: its size first; for an unreadable image the reason."""
        try:
            pixels = self._native(id_)
        except UnreadableImageError as error:
            own = {"unreadable": str(error)}
        else:
            height, width = pixels.shape[:2]
            own = {"size": f"{width} x {height} pixels", "values": _describe(pixels, self.source)}
        return own | self.metadata_of(id_)

    def coordinates(self, id_: str) -> tuple[float, float] | None:
        """Return right ascension and declination in degrees (ICRS); None if unknown."""
        return self.metadata_of.coordinates(id_)

    def has_coordinates(self, id_: str) -> bool:
        """Return True if the coordinates of an image are known; the answer is kept."""
        if id_ not in self._has_coordinates:
            self._has_coordinates[id_] = self.coordinates(id_) is not None
        return self._has_coordinates[id_]

    def orientation(self, id_: str) -> Orientation | None:
        """Return scale and directions of an image of the sky; None if unknown."""
        with suppress(UnreadableImageError), guarded(self.source, id_):
            return self.source.orientation(id_)
        return None

    def size(self, id_: str) -> tuple[int, int] | None:
        """Return width and height of an image in pixels; None if it cannot be read."""
        with suppress(UnreadableImageError):
            height, width = self._native(id_).shape[:2]
            return width, height
        return None

    def values(self, id_: str, across: float, down: float) -> tuple[tuple[int, int], dict[str, float]]:
        """Return a pixel (x, y) and its values in the archive by band, given shares of the width and the height."""
        pixels = self._native(id_)
        height, width = pixels.shape[:2]
        x, y = (min(int(share * side), side - 1) for share, side in ((across, width), (down, height)))
        return (x, y), dict(zip(self.source.bands, pixels[y, x].astype(float).tolist(), strict=True))

    def close(self) -> None:
        """Close the thumbnail cache."""
        self._cache.close()

    def _check(self, stretch: str, channel: str | None) -> None:
        check_choice("stretch", stretch, STRETCHES)
        check_choice("channel", channel, self.channels, null=True)

    def _trained(self, id_: str) -> Image:
        return self._look(id_, AS_TRAINED, None)

    def _look(self, id_: str, stretch: str, channel: str | None) -> Image:
        return self._rendered(self._read(id_), stretch, channel)

    def _small(self, id_: str, side: int) -> Image:
        """Return an image as trained on, a large JPEG at the scale that a thumbnail needs."""
        if not self.source.encoded:
            return self._trained(id_)
        with guarded(self.source, id_):
            image = self.source.read_for([id_], side)[0]
        if isinstance(image, Reject):
            raise UnreadableImageError(image.reason, temporary=image.temporary)
        return _reduced(image, self.source.rendering)

    def _native(self, id_: str) -> Pixels:
        """Return the original pixels; several threads that ask for the same image read it once."""
        with self._decoded.use(id_, partial(self._read, id_)) as pixels:
            return pixels

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
    """Return a rendering of the same bands and colours with another curve and other limits."""
    if stretch == AS_TRAINED:
        return rendering
    interval = "zscale" if stretch == "zscale" else "auto" if eight_bits else "percentile"
    return replace(
        rendering,
        interval=interval,
        curve=_CURVES.get(stretch, "linear"),
        # 256 values have no range of 1,000: a stronger stretch would show the blocks of a JPEG.
        parameter=100 if stretch == "log" and eight_bits else None,
        # A logarithm leaves room for the brightest star; the other curves show the faint parts.
        percentiles=(0.5, 99.9) if stretch == "log" else (0.5, 99.5),
        limits=None,
    )


def _reduced(pixels: Pixels, rendering: Rendering) -> Shaped[np.ndarray, "y x b"]:
    """Average squares of pixels if the image is too large to show."""
    plain = pixels.dtype == np.uint8 and rendering.keeps_eight_bits
    factor = math.ceil((pixels.size / (MAX_BYTES if plain else MAX_VALUES)) ** 0.5)
    height, width = pixels.shape[:2]
    return pixels if factor <= 1 else averaged(pixels, (max(1, width // factor), max(1, height // factor)))


def _describe(pixels: Pixels, source: ImageSource) -> str:
    """Describe the pixel values: type, range, units and bands."""
    finite = pixels if pixels.dtype.kind != "f" else pixels[np.isfinite(pixels)]
    span = f", {finite.min():g} to {finite.max():g}" if finite.size else ""
    units = f" {source.units}" if source.units else ""
    return f"{pixels.dtype}{span}{units} in {', '.join(source.bands)}"
