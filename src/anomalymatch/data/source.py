"""The one protocol through which images come in: stable string ids, and a read of a batch of ids."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

from anomalymatch.data._ids import IdIndex
from anomalymatch.data.rendering import Rendering
from anomalymatch.errors import UnreadableImageError
from anomalymatch.types import Image, Pixels, Reject

EIGHT_BITS = Rendering()


@runtime_checkable
class ImageSource(Protocol):
    """A set of images, each known by a stable string id, never by a position.

    Attributes:
        name: short name for logs and folders.
        ids: all ids, in a fixed order.
        channels: channels of every image that `read` returns.
        bands: names of what the archive holds, in its order.
        units: what its pixels measure ("nJy"), None where that is unknown.
        rendering: how they become the channels.
        fingerprint: changes whenever ids or pixels change; keys the feature cache.
        truth: class name per id where a benchmark knows it, else None.
        holdout: ids of an official test split, where the set has one, else empty.
    """

    name: str
    ids: Sequence[str]
    channels: int
    bands: Sequence[str]
    units: str | None
    rendering: Rendering
    fingerprint: str
    truth: Mapping[str, str] | None
    holdout: frozenset[str]

    def read(self, ids: Sequence[str]) -> list[Image | Reject]:
        """Decode `ids`, in that order; an unreadable one comes back as a `Reject`. Safe to call from many threads.

        Raises:
            DataError: if an id is not in the source.
        """
        ...


class BaseSource(ABC):
    """What the implementations share: bookkeeping, rendering, and unreadable images turned into rejects.

    Subclasses set the attributes of `ImageSource` by calling this constructor and implement `_load`.
    """

    def __init__(
        self,
        *,
        name: str,
        ids: Sequence[str],
        bands: Sequence[str],
        fingerprint: str,
        units: str | None = None,
        rendering: Rendering = EIGHT_BITS,
        truth: Mapping[str, str] | None = None,
        holdout: frozenset[str] = frozenset(),
    ) -> None:
        self._position = IdIndex(ids, name)
        self.name = name
        self.ids = ids
        self.bands = tuple(bands)
        self.units = units
        self.rendering = rendering
        self.channels = len(rendering.channels(self.bands))
        self.fingerprint = _with_rendering(fingerprint, rendering, self.bands)
        self.truth = truth
        self.holdout = holdout

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, ids: Sequence[str]) -> list[Image | Reject]:
        """See `ImageSource.read`."""
        return [self._read(id_) for id_ in ids]

    def position(self, id_: str) -> int:
        """Where an image stands in `ids`.

        Raises:
            DataError: if the id is not in the source.
        """
        return self._position[id_]

    def pixels(self, id_: str) -> Pixels:
        """The image as the archive holds it, before it is rendered: (h, w, band), of its own depth, in `units`.

        Raises:
            UnreadableImageError: with the reason, if it cannot be read.
            DataError: if the id is not in the source.
        """
        return self._load(self._position[id_])

    def _read(self, id_: str) -> Image | Reject:
        position = self._position[id_]
        try:
            return self.rendering(self._load(position), self.bands)
        except UnreadableImageError as error:
            return Reject(id_, str(error))

    @abstractmethod
    def _load(self, position: int) -> Pixels:
        """Pixels of the image at `position` of `ids`; raise `UnreadableImageError` with the reason if that fails."""


def _with_rendering(fingerprint: str, rendering: Rendering, bands: Sequence[str]) -> str:
    """Other pixels, other features: another rendering is another fingerprint."""
    if rendering == EIGHT_BITS:
        return fingerprint
    return hashlib.sha256(f"{fingerprint} {rendering.as_dict()} {bands}".encode()).hexdigest()
