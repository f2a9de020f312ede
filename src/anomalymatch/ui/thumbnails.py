"""Small pictures: made sharp, encoded, and kept in memory and on disk so that a page is shown at once."""

import logging
import sqlite3
import threading
from collections import OrderedDict
from pathlib import Path

import cv2
import numpy as np
import simplejpeg
from jaxtyping import Shaped, UInt8
from PIL import Image as PillowImage

from anomalymatch.evaluation.contact_sheet import as_rgb
from anomalymatch.types import Image, Pixels

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
