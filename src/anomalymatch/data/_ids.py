"""Where an id stands, in little memory: ten million ids take 160 MB here and 1.5 GB in a dictionary."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int64

from anomalymatch.errors import DataError


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
