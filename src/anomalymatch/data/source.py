"""Base class of all image sources: stable string ids, batches of images, and what else is known of each image."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow as pa
from jaxtyping import Int64

from anomalymatch.data.labels import as_labels
from anomalymatch.data.rendering import Rendering
from anomalymatch.errors import DataError, UnreadableImageError
from anomalymatch.types import Image, Label, Orientation, Pixels, Reject


class IdIndex:
    """Index from ids to positions that stores one sorted hash for each id.

    Args:
        ids: all ids; any sequence, also one that computes them on access.
        name: name of the source, for messages.

    Raises:
        DataError: if there is no id, or one occurs more than once.
    """

    def __init__(self, ids: Sequence[str], name: str) -> None:
        if not len(ids):
            raise DataError(f"{name}: there are no images in it")
        self.ids, self.name = ids, name
        self._build()

    def _build(self) -> None:
        hashes = np.fromiter(map(hash, self.ids), dtype=np.int64, count=len(self.ids))
        self._order: Int64[np.ndarray, " n"] = np.argsort(hashes, kind="stable")
        self._sorted = hashes[self._order]
        same = self._sorted[1:] == self._sorted[:-1]
        # Different ids rarely have the same hash, so only ids with equal hashes are compared.
        suspects = np.union1d(np.flatnonzero(same), np.flatnonzero(same) + 1)
        seen: set[str] = set()
        for position in self._order[suspects].tolist():
            if self.ids[position] in seen:
                raise DataError(f"{self.name}: ids must be unique, but {self.ids[position]!r} occurs more than once")
            seen.add(self.ids[position])

    def __getstate__(self) -> dict[str, object]:
        # String hashes differ between processes.
        return {"ids": self.ids, "name": self.name}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._build()

    def __contains__(self, id_: object) -> bool:
        return isinstance(id_, str) and self._find(id_) is not None

    def __getitem__(self, id_: str) -> int:
        """Return the position of `id_`.

        Raises:
            DataError: if there is no such id.
        """
        found = self._find(id_)
        if found is None:
            raise DataError(f"{self.name} has no image {id_!r}")
        return found

    def _find(self, id_: str) -> int | None:
        wanted = hash(id_)
        at = int(np.searchsorted(self._sorted, wanted))
        while at < len(self._sorted) and self._sorted[at] == wanted:
            position = int(self._order[at])
            if self.ids[position] == id_:
                return position
            at += 1
        return None


EIGHT_BITS = Rendering()
RGB = ("red", "green", "blue")


class ImageSource(ABC):
    """Set of images, each known by a stable string id, never by a position.

    A source of your own calls this constructor and implements `load`. It may override whatever else it knows:
    `coordinates`, `orientation`, `metadata`, `header`. Override `read` only to read a batch faster. Every method that
    takes an id raises `DataError` if there is no such image.

    Args:
        name: short name for logs and folders.
        ids: all ids, in a fixed order.
        fingerprint: text that changes whenever ids or pixels change; it keys the feature cache.
        bands: names of the bands of the archive, in their order.
        units: unit of the pixels ("nJy"); None if it is unknown.
        rendering: conversion of the bands to 8-bit channels.
        labels: labels by a person, by id, see `as_labels`; a subset of the images.
        truth: class of each image in a benchmark, else None.
        holdout: ids of an official test split; empty if there is none.
        folder: folder of the image files where each image is one file and its id is the path below the folder.

    Attributes:
        channels: number of channels of every image that `read` returns.
        encoded: whether each image is a whole JPEG, PNG or similar file that `raw_bytes` returns.
        extensions: FITS extensions that hold the bands of an image, see `FitsSource`; None takes the first image.
        cube_layout: order of the axes of FITS cubes, see `FitsSource`.

    Example:
        >>> class Noise(am.ImageSource):
        ...     def __init__(self, count):
        ...         ids = [f"image-{number}" for number in range(count)]
        ...         super().__init__(name="noise", ids=ids, fingerprint=f"noise {count}")
        ...
        ...     def load(self, position):
        ...         return np.random.default_rng(position).integers(0, 255, (32, 32, 3), dtype=np.uint8)
        >>> am.make_task(Noise(100))
        <Task noise: 100 images in the pool>
    """

    encoded: ClassVar[bool] = False
    extensions: int | str | Sequence[int | str] | None = None
    cube_layout: str = "auto"

    def __init__(
        self,
        *,
        name: str,
        ids: Sequence[str],
        fingerprint: str,
        bands: Sequence[str] = RGB,
        units: str | None = None,
        rendering: Rendering = EIGHT_BITS,
        labels: Mapping[str, str] | None = None,
        truth: Mapping[str, str] | None = None,
        holdout: frozenset[str] = frozenset(),
        folder: Path | None = None,
    ) -> None:
        self._position = IdIndex(ids, name)
        self.name = name
        self.ids = ids
        self.bands = tuple(bands)
        self.units = units
        self.rendering = rendering
        self.channels = len(rendering.channels(self.bands))
        # The rendering changes the pixels.
        key = f"{fingerprint} {rendering.as_dict()} {self.bands}"
        self.fingerprint = fingerprint if rendering == EIGHT_BITS else hash_rows(key, ())
        self.labels: Mapping[str, Label] = as_labels(labels or {})
        self.truth = truth
        self.holdout = holdout
        self.folder = folder

    @abstractmethod
    def load(self, position: int) -> Pixels:
        """Return the pixels of the image at `position` of `ids`, (h, w, band), as the archive holds them.

        Many threads may call it at once.

        Raises:
            UnreadableImageError: with the reason, if the image cannot be read.
        """

    def read(self, ids: Sequence[str]) -> list[Image | Reject]:
        """Read and render images; an unreadable one becomes a `Reject`.

        Images are read in their order in the archive, and returned in the order of `ids`.
        """
        return self._map(self._read, ids)

    def read_for(self, ids: Sequence[str], size: int) -> list[Image | Reject]:
        """Read images that are to be resized to `size` pixels, as `read` does.

        Training, features and scoring read with this method, so that all see the same pixels. A source may deliver
        larger images at a reduced size, of at least twice `size` pixels on each side; by default none does.
        """
        return self.read(ids)

    def storage_order(self, position: int) -> int:
        """Return a number that sorts images by their place in the archive; by default `position`."""
        return position

    def pixels(self, id_: str) -> Pixels:
        """Return an image before it is rendered: (h, w, band), in the number type and `units` of the archive.

        Raises:
            UnreadableImageError: with the reason, if it cannot be read.
        """
        return self.load(self._position[id_])

    def raw_bytes(self, id_: str) -> bytes:
        """Return the image file, not decoded; only where `encoded` is true.

        Raises:
            UnreadableImageError: if it cannot be read.
            DataError: if the source holds no image files.
        """
        raise DataError(f"{self.name} holds no encoded image files, so {id_!r} has no raw bytes")

    def file(self, id_: str) -> Path | None:
        """Return the path of the image's own file; None if images have no files of their own."""
        position = self._position[id_]
        return None if self.folder is None else self.folder / self.ids[position]

    def header(self, id_: str) -> dict[str, str]:
        """Return the keywords that the image's own file holds, a FITS header for example; empty by default.

        Raises:
            UnreadableImageError: if the file cannot be read.
        """
        self._position[id_]
        return {}

    def coordinates(self, id_: str) -> tuple[float, float] | None:
        """Return right ascension and declination (ICRS, degrees) of an image; None if unknown, the default."""
        self._position[id_]
        return None

    def orientation(self, id_: str) -> Orientation | None:
        """Return the scale of an image of the sky and the directions on it; None if unknown, the default."""
        self._position[id_]
        return None

    def metadata(self) -> pa.Table | None:
        """Return further columns of the archive as text, with a row for each of `ids`; None by default.

        Raises:
            DataError: if they cannot be read.
        """
        return None

    def position(self, id_: str) -> int:
        """Return the position of an image in `ids`."""
        return self._position[id_]

    def __len__(self) -> int:
        return len(self.ids)

    def _map(self, read: Callable[[str], Image | Reject], ids: Sequence[str]) -> list[Image | Reject]:
        """Call `read` for each id, in the order of the archive; return the results in the order of `ids`."""
        places = [self.storage_order(self._position[id_]) for id_ in ids]
        images = {i: read(ids[i]) for i in sorted(range(len(ids)), key=places.__getitem__)}
        return [images[i] for i in range(len(ids))]

    def _read(self, id_: str, load: Callable[[int], Pixels] | None = None) -> Image | Reject:
        position = self._position[id_]
        try:
            return self.rendering((load or self.load)(position), self.bands)
        except UnreadableImageError as error:
            return Reject(id_, str(error), error.temporary)
        except MemoryError:
            return Reject(id_, "it needs more memory than there is", temporary=True)


def hash_rows(salt: str, rows: Iterable[Iterable[object]]) -> str:
    """Hash a text and rows of values, names and sizes of files for example, as a fingerprint."""
    digest = hashlib.sha256(salt.encode())
    for row in rows:
        digest.update(("\n" + "\0".join(map(str, row))).encode(errors="surrogatepass"))
    return digest.hexdigest()
