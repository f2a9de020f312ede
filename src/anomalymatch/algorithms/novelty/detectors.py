"""Detectors that learn from normal images alone: what lies far from them in feature space is novel."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float32, Float64, Int64
from sklearn.covariance import empirical_covariance, ledoit_wolf, shrunk_covariance
from torch import Tensor

from anomalymatch.algorithms.novelty import distances as maths
from anomalymatch.algorithms.novelty.distances import nearest_distances
from anomalymatch.errors import ConfigError, DataError

Rows = Float32[np.ndarray, "n d"]
Own = Int64[np.ndarray, " n"]
SCALE_ROWS = 4096
"""Training images, about, whose distances set the scale of the scores."""


@runtime_checkable
class Detector(Protocol):
    """A kind of distance, with its hyper-parameters. What it has learnt is a few named tensors."""

    @property
    def least(self) -> int:
        """Images that it needs at least."""
        ...

    def fit(self, rows: Rows) -> dict[str, Tensor]:
        """Learn from the features of normal images.

        Raises:
            ValueError: if they do not suffice.
        """
        ...

    def distances(
        self, learnt: Mapping[str, Tensor], rows: Rows, own: Own, device: torch.device
    ) -> Float64[np.ndarray, " n"]:
        """Distance of each of `rows` from what was learnt.

        Args:
            learnt: what `fit` gave.
            rows: features.
            own: which of the rows that were learnt from each of them is, -1 for none: no image is its own neighbour.
            device: that computes.
        """
        ...


@dataclass(frozen=True)
class Neighbours:
    """Mean distance to the nearest training features.

    Attributes:
        neighbours: how many.
    """

    neighbours: int

    def __post_init__(self) -> None:
        if self.neighbours < 1:
            raise ConfigError(f"algorithm.learner.detector.neighbours is {self.neighbours}: it must be at least 1")

    @property
    def least(self) -> int:
        """The neighbours, and the image itself."""
        return self.neighbours + 1

    def fit(self, rows: Rows) -> dict[str, Tensor]:
        """Keep them, in half precision."""
        return {"bank": torch.from_numpy(rows).half()}

    def distances(
        self, learnt: Mapping[str, Tensor], rows: Rows, own: Own, device: torch.device
    ) -> Float64[np.ndarray, " n"]:
        """See `Detector.distances`."""
        # In half precision, too: a feature and its copy in the bank are the same numbers.
        queries = torch.from_numpy(rows).half()
        found = nearest_distances(queries, learnt["bank"], self.neighbours, torch.from_numpy(own), device=device)
        return found.double().mean(dim=1).numpy()


@dataclass(frozen=True)
class Mahalanobis:
    """Distance from the mean in units of the spread in each direction.

    Attributes:
        shrinkage: how far the covariance is drawn towards a sphere, 0 to 1; None chooses it by Ledoit and Wolf (2004).
        trim: share of the images farthest from the median that the mean leaves out.
    """

    shrinkage: float | None
    trim: float

    def __post_init__(self) -> None:
        if self.shrinkage is not None and not 0.0 <= self.shrinkage <= 1.0:
            raise ConfigError(f"algorithm.learner.detector.shrinkage is {self.shrinkage}: it must lie in [0, 1]")
        _check_trim(self.trim)

    @property
    def least(self) -> int:
        """Two images spread along one line only."""
        return 3

    def fit(self, rows: Rows) -> dict[str, Tensor]:
        """Mean and whitening; see `functional.novelty.whitening_of`."""
        features = rows.astype(np.float64)
        mean = maths.trimmed_mean(features, self.trim)
        centred = features - mean
        if self.shrinkage is None:
            covariance, _ = ledoit_wolf(centred, assume_centered=True)
        else:
            covariance = shrunk_covariance(empirical_covariance(centred, assume_centered=True), self.shrinkage)
        return {"mean": torch.from_numpy(mean), "whitening": torch.from_numpy(maths.whitening_of(covariance))}

    def distances(
        self, learnt: Mapping[str, Tensor], rows: Rows, own: Own, device: torch.device
    ) -> Float64[np.ndarray, " n"]:
        """See `Detector.distances`."""
        return maths.mahalanobis(rows.astype(np.float64), learnt["mean"].numpy(), learnt["whitening"].numpy())


@dataclass(frozen=True)
class PrincipalResidual:
    """What the principal components of normal images cannot express.

    Attributes:
        variance: share of the spread that the components hold.
        trim: share of the images farthest from the median that the mean leaves out.
    """

    variance: float
    trim: float

    def __post_init__(self) -> None:
        if not 0.0 < self.variance < 1.0:
            raise ConfigError(
                f"algorithm.learner.detector.variance is {self.variance}: it must lie between 0 and 1, "
                f"for all of it leaves no residual"
            )
        _check_trim(self.trim)

    @property
    def least(self) -> int:
        """Two images spread along one line only."""
        return 3

    def fit(self, rows: Rows) -> dict[str, Tensor]:
        """Mean and components."""
        features = rows.astype(np.float64)
        mean = maths.trimmed_mean(features, self.trim)
        components = maths.principal_components(features, mean, self.variance)
        return {"mean": torch.from_numpy(mean), "components": torch.from_numpy(np.ascontiguousarray(components))}

    def distances(
        self, learnt: Mapping[str, Tensor], rows: Rows, own: Own, device: torch.device
    ) -> Float64[np.ndarray, " n"]:
        """See `Detector.distances`."""
        mean, components = learnt["mean"].numpy(), learnt["components"].numpy()
        return maths.principal_residual(rows.astype(np.float64), mean, components)


@dataclass(frozen=True)
class FittedDetector:
    """A fitted detector, and the scale of its scores.

    Attributes:
        detector: the kind of distance.
        learnt: what it has learnt.
        place: for each training image its row among those that were learnt from, -1 if it was dropped.
        median: of the training images' own distances.
        spread: their robust standard deviation.
    """

    detector: Detector
    learnt: Mapping[str, Tensor]
    place: Own
    median: float
    spread: float

    def logits(self, rows: Rows, trained: Own, device: torch.device) -> Float64[np.ndarray, " n"]:
        """Scores on a scale like that of log-odds; see `functional.novelty.surprise`.

        Args:
            rows: features.
            trained: which training image each of them is, -1 for none.
            device: that computes.
        """
        own = np.where(trained >= 0, self.place[trained], -1)
        return maths.surprise(self.detector.distances(self.learnt, rows, own, device), self.median, self.spread)

    def tensors(self) -> dict[str, Tensor]:
        """All of it, for a file."""
        scale = torch.tensor([self.median, self.spread], dtype=torch.float64)
        return {f"learnt.{k}": v for k, v in self.learnt.items()} | {
            "place": torch.from_numpy(self.place),
            "scale": scale,
        }

    @classmethod
    def of(cls, detector: Detector, tensors: Mapping[str, Tensor]) -> "FittedDetector":
        """What `tensors` gave, again."""
        learnt = {k.removeprefix("learnt."): v for k, v in tensors.items() if k.startswith("learnt.")}
        median, spread = tensors["scale"].tolist()
        return cls(detector, learnt, tensors["place"].numpy(), median, spread)


def fit_detector(detector: Detector, rows: Rows, *, drop: float, device: torch.device) -> FittedDetector:
    """Fit `detector` on the features of normal images, leave out the share `drop` that scores highest, and fit again.

    The images that are taken for normal may hide a few anomalies; most of these are among the dropped.

    Args:
        detector: the kind of distance.
        rows: features of the training images.
        drop: in [0, 1); 0 keeps all.
        device: that computes.

    Raises:
        DataError: if there are too few images, or their features are all equal.
    """
    kept = np.arange(len(rows))
    count = len(rows) - int(drop * len(rows))
    if count < detector.least:
        raise DataError(
            f"{type(detector).__name__} needs at least {detector.least} normal images to learn from, "
            f"and {count} are left: label more, or take a larger pool"
        )
    try:
        if not np.isfinite(rows).all():
            raise ValueError("some features are not finite")
        if (rows == rows[0]).all():
            raise ValueError("their features are all equal")
        if count < len(rows):
            learnt = detector.fit(rows)
            kept = np.sort(np.argsort(detector.distances(learnt, rows, kept, device), kind="stable")[:count])
        learnt = detector.fit(rows[kept])
        some = np.arange(0, count, max(1, count // SCALE_ROWS))
        median, spread = maths.spread_of(detector.distances(learnt, rows[kept[some]], some, device))
    except ValueError as error:
        raise DataError(
            f"{type(detector).__name__} cannot learn what is normal from {count} images: {error}"
        ) from error
    place = np.full(len(rows), -1, dtype=np.int64)
    place[kept] = np.arange(count)
    return FittedDetector(detector, learnt, place, median, spread)


def _check_trim(trim: float) -> None:
    if not 0.0 <= trim < 1.0:
        raise ConfigError(f"algorithm.learner.detector.trim is {trim}: it must lie in [0, 1)")
