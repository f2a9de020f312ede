"""Define image sources of any size whose images are all the same."""

from collections.abc import Iterator, Sequence

import numpy as np

from anomalymatch.data.source import ImageSource
from anomalymatch.types import Pixels


class NumberedIds(Sequence[str]):
    """Ids of nine digits that are formatted on demand, so that ten million take no memory."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, at: int | slice) -> "str | list[str]":  # type: ignore[override]
        if isinstance(at, slice):
            return [f"{i:09d}" for i in range(*at.indices(self.count))]
        if not -self.count <= at < self.count:
            raise IndexError(at)
        return f"{at % self.count:09d}"

    def __iter__(self) -> Iterator[str]:
        return (f"{i:09d}" for i in range(self.count))


class SyntheticSource(ImageSource):
    """Source with the same random image under every id."""

    def __init__(self, ids: Sequence[str], size: int) -> None:
        super().__init__(name="synthetic", ids=ids, bands=["red", "green", "blue"], fingerprint=str(len(ids)))
        self.image = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)

    def load(self, position: int) -> Pixels:
        """See `ImageSource.load`."""
        return self.image
