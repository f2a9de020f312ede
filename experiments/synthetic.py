"""Archives of any size that are nowhere."""

from collections.abc import Iterator, Sequence

import numpy as np

from anomalymatch.data.source import ImageSource
from anomalymatch.types import Pixels


class Ids(Sequence[str]):
    """Ten million ids that nobody has to keep."""

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


class Synthetic(ImageSource):
    """Images that cost next to nothing, as many as one likes."""

    def __init__(self, count: int, size: int) -> None:
        super().__init__(name="synthetic", ids=Ids(count), bands=["red", "green", "blue"], fingerprint=str(count))
        self.image = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)

    def load(self, position: int) -> Pixels:
        """See `ImageSource.load`."""
        return self.image
