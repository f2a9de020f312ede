"""Template of a plug-in: a query strategy, and a source of images."""

import numpy as np

import anomalymatch as am


class Lottery:
    """Query strategy that draws images with chances that fall with their rank.

    Args:
        half: rank at which the chance is half of that of the first image.
    """

    def __init__(self, half: float) -> None:
        self.half = half

    def __call__(self, ranking: am.Ranking, count: int, *, rng: np.random.Generator, **_: object) -> list[str]:
        """Choose `count` images to label."""
        chances = 0.5 ** ((ranking.ranks - 1) / self.half)
        drawn = rng.choice(len(ranking), min(count, len(ranking)), replace=False, p=chances / chances.sum())
        return [ranking.ids[i] for i in drawn]


class Noise(am.ImageSource):
    """Source of grey noise, in which the images of the class `bright` have a bright square.

    Args:
        count: number of images; every tenth is bright.
        size: side of the images in pixels.
    """

    def __init__(self, count: int, size: int) -> None:
        ids = [f"noise-{number}" for number in range(count)]
        truth = {id_: "bright" if number % 10 == 0 else "dark" for number, id_ in enumerate(ids)}
        super().__init__(name="noise", ids=ids, fingerprint=f"noise {count} {size}", truth=truth)
        self.size = size

    def load(self, position: int) -> np.ndarray:
        """Return one image: an array (height, width, bands)."""
        image = np.random.default_rng(position).integers(0, 120, (self.size, self.size, 3), dtype=np.uint8)
        if position % 10 == 0:
            image[: self.size // 2, : self.size // 2] = 250
        return image
