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


def image_ids(count: int) -> list[str]:
    """Make ids that look like the file names of an archive."""
    return [f"field_{i // 1000:05d}/cutout_{i:08d}.fits" for i in range(count)]


class PlantedFeatures:
    """Features of an archive with common kinds of image and, planted at random, a few rare kinds.

    A row is the centre of its kind plus noise of the same length, normalised. The centre of a rare kind is that of a
    common one, moved by `DISTANCE` in a direction of its own: a rare image resembles many common ones. The columns
    after the last layer are noise.

    Args:
        images: number of images.
        width: number of columns.
        last: number of columns of the last layer.
        seed: seed of all numbers.
    """

    COMMON, RARE, DISTANCE, SHARD = 100, 10, 1.0, 4096

    def __init__(self, images: int, width: int, last: int, *, share: float = 0.001, seed: int = 0) -> None:
        self.images, self.width, self.last, self.seed = images, width, last, seed
        rng = np.random.default_rng([seed, 0])
        common = _unit(rng.standard_normal((self.COMMON, last), dtype=np.float32))
        own = _unit(rng.standard_normal((self.RARE, last), dtype=np.float32))
        self.centres = np.concatenate([common, _unit(common[: self.RARE] + self.DISTANCE * own)])
        self.kinds = rng.integers(0, self.COMMON, images, dtype=np.int16)
        self.rare = np.sort(rng.choice(images, round(share * images), replace=False))
        self.kinds[self.rare] = self.COMMON + np.arange(len(self.rare)) % self.RARE

    def shards(self) -> Iterator[np.ndarray]:
        """Make the rows, up to `SHARD` at a time, in half precision."""
        for start in range(0, self.images, self.SHARD):
            kinds = self.kinds[start : start + self.SHARD]
            rng = np.random.default_rng([self.seed, 1, start])
            rows = rng.standard_normal((len(kinds), self.width), dtype=np.float32)
            rows *= self.last**-0.5
            rows[:, : self.last] = _unit(self.centres[kinds] + rows[:, : self.last])
            yield rows.astype(np.float16)


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)
