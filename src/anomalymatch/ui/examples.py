"""Examples: images from outside the archive that a person adds as anomalies to train the probe."""

import hashlib
import io
import logging
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from jaxtyping import Float32, Shaped
from PIL import Image as PillowImage
from PIL import PngImagePlugin

from anomalymatch.data.codecs import FORMATS, MODES, decode
from anomalymatch.data.source import ImageSource
from anomalymatch.data.tiff import MAGIC
from anomalymatch.errors import DataError, UnreadableImageError
from anomalymatch.files import atomic_file, make_folder, remove_leftovers, storage_errors
from anomalymatch.text import printable
from anomalymatch.types import Image, Pixels
from anomalymatch.ui.originals import suffix_of
from anomalymatch.ui.pictures import averaged, fitted, jpeg, step

logger = logging.getLogger(__name__)

MAX_BYTES = 20 * 2**20
MAX_PIXELS = 2**26
MAX_EXAMPLES = 200
MAX_SIDE = 1024
"""Larger examples are reduced to this side; the input of the network is smaller still."""
MAX_NAME = 80
_TITLE = "Title"
_TRIED = 5
_COMPRESSED = b"ZIMAGE  ="

FeatureVector = Float32[np.ndarray, " d"]
EncodeImage = Callable[[Image], FeatureVector]


@dataclass(frozen=True, eq=False)
class Example:
    """Example image; its id is a hash of its pixels, so that the same image is stored once."""

    id: str
    features: FeatureVector
    name: str = ""


class Examples:
    """Examples of a run, each stored as a PNG in a folder; `restore` loads them after a restart.

    Methods raise a `DataError` for an example that does not exist.

    Args:
        folder: the folder.
        encode: computes pooled features of an 8-bit image with the channels of the source.
        source: the archive; examples are rendered like its images.
    """

    def __init__(self, folder: Path, encode: EncodeImage, source: ImageSource) -> None:
        self.folder, self.encode, self.source = make_folder(folder), encode, source
        remove_leftovers(folder)
        self._lock = threading.RLock()
        self._images: dict[str, Image] = {}
        self._examples: dict[str, Example] = {}

    def restore(self) -> None:
        """Load the stored examples and compute their features; files that do not fit are ignored and left in place."""
        with self._lock:
            for path in sorted(self.folder.glob("*.png"), key=lambda path: (path.stat().st_mtime_ns, path.name)):
                self._restore(path)

    def add(self, name: str, data: bytes) -> Example:
        """Decode an image file (JPEG, PNG, TIFF, WebP, ... or FITS), store it, and compute its features.

        Args:
            name: name of the file for display; the path of the stored image does not depend on it.
            data: its bytes, at most `MAX_BYTES`.

        Raises:
            DataError: if it is too large, damaged, not an image, or has other bands than the archive, or if there
                are `MAX_EXAMPLES` already.
            StorageError: if it cannot be stored.
        """
        shown = _display_name(name)
        try:
            image = self._decoded(data)
        except UnreadableImageError as error:
            raise DataError(f"{shown} cannot be an example: {error}") from None
        id_ = hashlib.sha256(str(image.shape).encode() + image.tobytes()).hexdigest()[:20]
        with self._lock:
            if id_ in self._examples:
                return self._examples[id_]
            if len(self._examples) >= MAX_EXAMPLES:
                raise DataError(f"there are {MAX_EXAMPLES} examples already: remove some before you add {shown}")
            example = Example(id_, np.asarray(self.encode(image), np.float32), shown)
            _write(self._path(id_), image, shown)
            self._examples[id_], self._images[id_] = example, image
            return example

    def remove(self, id_: str) -> None:
        """Remove an example."""
        with self._lock:
            self._check_known(id_)
            self._path(id_).unlink(missing_ok=True)
            del self._examples[id_], self._images[id_]

    def all(self) -> Sequence[Example]:
        """Return the examples, oldest first."""
        with self._lock:
            return list(self._examples.values())

    def features(self) -> Float32[np.ndarray, "e d"]:
        """Return the pooled features of the examples in the order of `all`; (0, 0) without examples."""
        rows = [example.features for example in self.all()]
        return np.stack(rows) if rows else np.zeros((0, 0), np.float32)

    def thumbnail(self, id_: str, side: int) -> bytes:
        """Return the JPEG of an example; see `Pictures.thumbnail`."""
        with self._lock:
            self._check_known(id_)
            image = self._images[id_]
        return jpeg(fitted(image, step(side)))

    def _check_known(self, id_: str) -> None:
        if id_ not in self._examples:
            raise DataError(f"there is no example {printable(id_, limit=MAX_NAME)!r}: it was removed")

    def _path(self, id_: str) -> Path:
        return self.folder / f"{id_}.png"

    def _restore(self, path: Path) -> None:
        try:
            if path.is_symlink() or path.stat().st_size > 4 * MAX_SIDE**2 * max(4, self.source.channels):
                raise UnreadableImageError("it was not stored here")
            image, name = _stored(path.read_bytes(), self.source.channels)
            example = Example(path.stem, np.asarray(self.encode(image), np.float32), name)
            self._examples[path.stem], self._images[path.stem] = example, image
        except (DataError, OSError) as error:
            logger.warning("The example %s is ignored: %s", path, error)

    def _decoded(self, data: bytes) -> Image:
        """Decode an uploaded file and render it like the images of the archive."""
        if len(data) > MAX_BYTES:
            raise UnreadableImageError(f"it has {len(data):,} bytes, which is more than {MAX_BYTES:,}")
        source = self.source
        if data.startswith(b"SIMPLE"):
            return self._decoded_fits(data)
        is_tiff = data.startswith(MAGIC)
        if not is_tiff:
            _check_header(data)
        bands = len(source.bands)
        if bands in MODES or (is_tiff and source.encoded):
            named = source.bands if bands not in MODES else None
            pixels = decode(data, bands, bands=named, max_pixels=MAX_PIXELS)
            if pixels.dtype != np.uint8 or self._has_eight_bits():
                return source.rendering(_smaller(pixels), source.bands)
        # An 8-bit picture for an archive of deeper pixels is stretched already.
        channels = source.channels
        pixels = decode(data, channels, max_pixels=MAX_PIXELS) if channels in MODES else np.zeros((0, 0, 0))
        if pixels.dtype != np.uint8:
            raise UnreadableImageError(
                f"the images of this archive have the bands {', '.join(source.bands)}: drop a FITS file that has them"
            )
        return _smaller(pixels)

    def _decoded_fits(self, data: bytes) -> Image:
        from anomalymatch.data.sources.fits import FitsImages  # late: the page starts without the wait for astropy

        if _COMPRESSED in data:  # the size of an unpacked tile has no limit
            raise UnreadableImageError("it is a compressed FITS file: unpack it by funpack")
        extensions = self.source.extensions
        with tempfile.TemporaryDirectory(prefix="anomalymatch-") as folder:
            path = Path(folder) / "upload.fits"
            with storage_errors(path):
                path.write_bytes(data)
            with FitsImages(path, extensions, layout=self.source.cube_layout) as images:
                height, width = images.shape
                if height * width * images.bands > MAX_PIXELS:
                    raise UnreadableImageError(_too_large(width, height))
                if images.bands != len(self.source.bands):
                    raise UnreadableImageError(
                        f"it has {images.bands} bands instead of {len(self.source.bands)}: "
                        f"{', '.join(self.source.bands)}"
                    )
                return self.source.rendering(_smaller(images.cut()), self.source.bands)

    def _has_eight_bits(self) -> bool:
        """Return True if the first readable image of the archive has 8 bits."""
        if self.source.encoded:
            return True
        for id_ in self.source.ids[:_TRIED]:
            try:
                return self.source.pixels(id_).dtype == np.uint8
            except UnreadableImageError:
                continue
        return False


def _check_header(data: bytes) -> None:
    """Check size and format before any pixel is decoded."""
    if not data:
        raise UnreadableImageError("it is empty (0 bytes)")
    try:
        with PillowImage.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
    except PillowImage.DecompressionBombError:
        raise UnreadableImageError(f"its header claims far more than {MAX_PIXELS:,} pixels") from None
    except Exception:  # a malicious header can raise any error
        raise UnreadableImageError(f"it is not an image in one of the formats {', '.join(FORMATS)}, FITS") from None
    if width * height > MAX_PIXELS:
        raise UnreadableImageError(_too_large(width, height))


def _too_large(width: int, height: int) -> str:
    return f"{width} x {height} pixels is more than {MAX_PIXELS:,}"


def _smaller(pixels: Pixels) -> Shaped[np.ndarray, "y x b"]:
    """Reduce a large image before rendering, which takes forty bytes for each number."""
    height, width = pixels.shape[:2]
    scale = MAX_SIDE / max(height, width, 1)
    return pixels if scale >= 1 else averaged(pixels, (max(1, round(width * scale)), max(1, round(height * scale))))


def _write(path: Path, image: Image, name: str) -> None:
    """Write any number of channels as a grey PNG, one below the other."""
    notes = PngImagePlugin.PngInfo()
    notes.add_itxt(_TITLE, name)
    planes = np.ascontiguousarray(image.transpose(2, 0, 1)).reshape(-1, image.shape[1])
    with atomic_file(path) as temporary:
        PillowImage.fromarray(planes).save(temporary, "PNG", pnginfo=notes)


def _stored(data: bytes, channels: int) -> tuple[Image, str]:
    _check_header(data)
    planes = decode(data, 1)
    if suffix_of(data) != ".png" or planes.dtype != np.uint8 or planes.shape[0] % channels:
        raise UnreadableImageError(f"it does not have {channels} channels, as the images of the archive have")
    with PillowImage.open(io.BytesIO(data), formats=("PNG",)) as file:
        name = _display_name(str(file.info.get(_TITLE, "")))
    image = planes.reshape(channels, -1, planes.shape[1]).transpose(1, 2, 0)
    return np.ascontiguousarray(image), name


def _display_name(name: str) -> str:
    return printable(PurePosixPath(name.replace("\\", "/")).name, limit=MAX_NAME) or "the image"
