"""The pictures of the page: thumbnails, and the large view at any stretch and in any channel."""

import math
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from jaxtyping import Shaped, UInt8

from anomalymatch.data.rendering import Rendering
from anomalymatch.data.source import EIGHT_BITS, BaseSource, ImageSource
from anomalymatch.errors import ConfigError, UnreadableImageError
from anomalymatch.evaluation.contact_sheet import as_rgb
from anomalymatch.types import Image, Pixels, Reject
from anomalymatch.ui import thumbnails
from anomalymatch.ui.metadata import Metadata
from anomalymatch.ui.originals import guarded, original
from anomalymatch.ui.thumbnails import ThumbnailCache, averaged, fitted, jpeg, png

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
        self._cache = ThumbnailCache(cache / "thumbnails.sqlite")
        self._slots = threading.BoundedSemaphore(max(1, workers))
        self._kept: OrderedDict[str, Pixels] = OrderedDict()
        self._reading = threading.Lock()

    @property
    def channels(self) -> Sequence[str]:
        """What `full` can show alone: the channels as they are trained on, then the archive's other bands."""
        trained = self.source.rendering.channels(self.source.bands)
        if not isinstance(self.source, BaseSource):
            return trained
        return (*trained, *(band for band in self.source.bands if band not in trained))

    def thumbnail(self, id_: str, side: int) -> bytes:
        """JPEG of an image as it is trained on, scaled to `side` pixels along its longer axis, rounded up to a step.

        Raises:
            UnreadableImageError: with the reason, if the image cannot be read.
            DataError: if the id is not in the source.
        """
        key = (self.source.fingerprint, id_, thumbnails.step(side))
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
            if isinstance(self.source, BaseSource):
                pixels = self.source.pixels(id_)
            else:
                image = self.source.read([id_])[0]
                if isinstance(image, Reject):
                    raise UnreadableImageError(image.reason)
                pixels = image
        if not pixels.size:
            raise UnreadableImageError("it has no pixels")
        return pixels

    def _rendered(self, pixels: Pixels, stretch: str, channel: str | None) -> UInt8[np.ndarray, "y x c"]:
        source = self.source
        trained = source.rendering.channels(source.bands)
        rendering, bands = source.rendering, tuple(source.bands)
        if not isinstance(source, BaseSource):  # what it gives is rendered already
            rendering, bands = EIGHT_BITS, trained
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
