"""The one protocol through which images come in: stable string ids, and a read of a batch of ids."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int64

from anomalymatch.data.rendering import Rendering
from anomalymatch.errors import DataError, UnreadableImageError
from anomalymatch.types import Image, Pixels, Reject


class IdIndex:
    """Positions of ids, found through their sorted hashes.

    Args:
        ids: all ids; any sequence, also one that makes them when asked.
        name: of the source, for messages.

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
        # Two hashes can be the same by chance, but almost never are: only such ids are compared.
        suspects = np.union1d(np.flatnonzero(same), np.flatnonzero(same) + 1)
        seen: set[str] = set()
        for position in self._order[suspects].tolist():
            if self.ids[position] in seen:
                raise DataError(f"{self.name}: ids must be unique, but {self.ids[position]!r} occurs more than once")
            seen.add(self.ids[position])

    def __getstate__(self) -> dict[str, object]:
        # Another process hashes strings differently.
        return {"ids": self.ids, "name": self.name}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._build()

    def __contains__(self, id_: object) -> bool:
        return isinstance(id_, str) and self._find(id_) is not None

    def __getitem__(self, id_: str) -> int:
        """Position of `id_`.

        Raises:
            DataError: if it is not there.
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
