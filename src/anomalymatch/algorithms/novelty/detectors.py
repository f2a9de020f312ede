"""Novelty detectors, which are fitted on normal images alone and score by the distance in feature space."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Float32, Float64, Int64
from torch import Tensor

from anomalymatch.algorithms.novelty import distances as maths
from anomalymatch.backbones.neighbours import build_index, import_faiss, sample_step
from anomalymatch.checks import check_range
from anomalymatch.errors import DataError

EXACT_ROWS = 1_000_000
"""Number of rows up to which the search is exact; beyond, that takes hours."""

CELLS = 4.0
"""Cells of the index, in units of the root of its rows: many, because every image of an archive is searched."""
PROBES = 32
"""Number of cells that are searched for each query."""

FeatureRows = Float32[np.ndarray, "n d"]
Own = Int64[np.ndarray, " n"]
KEY = "algorithm.learner.detector"
SCALE_ROWS = 4096
"""Approximate number of training images whose distances set the scale of the scores."""


@runtime_checkable
class Detector(Protocol):
    """Protocol of a distance with its hyper-parameters; `fit` returns its state as named tensors."""

    @property
    def least(self) -> int:
        """Smallest number of training images."""
        ...

    def fit(self, rows: FeatureRows) -> dict[str, Tensor]:
        """Fit on the features of normal images.

        Raises:
            ValueError: if the features do not suffice.
        """
        ...

    def distances(
        self, learnt: Mapping[str, Tensor], rows: FeatureRows, own: Own, device: torch.device
    ) -> Float64[np.ndarray, " n"]:
        """Compute the distance of each of `rows` from the training images.

        Args:
            learnt: result of `fit`.
            rows: features.
            own: position of each of `rows` among the training images, -1 for none: no image is its own neighbour.
            device: device that computes.
        """
        ...


@dataclass(frozen=True)
class Neighbours:
    """Mean distance to so many nearest training features."""

    neighbours: int

    def __post_init__(self) -> None:
        check_range(f"{KEY}.neighbours", self.neighbours, low=1)

    @property
    def least(self) -> int:
        """See `Detector.least`: the neighbours and the image itself."""
        return self.neighbours + 1

    def fit(self, rows: FeatureRows) -> dict[str, Tensor]:
        """Keep the features, in half precision."""
        return {"bank": torch.from_numpy(rows).half()}

    def distances(
        self, learnt: Mapping[str, Tensor], rows: FeatureRows, own: Own, device: torch.device
    ) -> Float64[np.ndarray, " n"]:
        """See `Detector.distances`."""
        # In half precision, as the reference features, so that equal features have distance 0.
        queries = torch.from_numpy(rows).half()
        found = nearest_distances(queries, learnt["bank"], self.neighbours, torch.from_numpy(own), device=device)
        return found.double().mean(dim=1).numpy()


def nearest_distances(
    queries: Float[Tensor, "n d"],
    bank: Float[Tensor, "m d"],
    k: int,
    own: Int64[Tensor, " n"],
    *,
    device: torch.device,
    exact_rows: int = EXACT_ROWS,
) -> Float[Tensor, "n k"]:
    """Compute `neighbour_distances` on a device; the result is on the CPU.

    A bank of more than `exact_rows` is searched by an index of faiss, which may miss a neighbour.

    Raises:
        ConfigError: if the bank is that large and faiss is not installed.
        ValueError: if the bank is too small.
    """
    if len(bank) > exact_rows:
        return _by_index(queries, bank, k, own)
    return maths.neighbour_distances(queries.to(device), bank.to(device), k, own.to(device)).cpu()


def _by_index(
    queries: Float[Tensor, "n d"], bank: Float[Tensor, "m d"], k: int, own: Int64[Tensor, " n"]
) -> Float[Tensor, "n k"]:
    squared, rows = _index_of(bank).search(queries.float().numpy(), k + 1)
    squared[(rows == own.numpy()[:, None]) | (rows < 0)] = np.inf
    return torch.from_numpy(np.sqrt(np.maximum(np.sort(squared, axis=1)[:, :k], 0.0)))


@lru_cache(maxsize=1)
def _index_of(bank: Tensor) -> Any:
    """Build the index of a tensor, which takes minutes; a ranking asks for the same one for each chunk."""
    import_faiss(len(bank), f"or set al.pool_size to at most {EXACT_ROWS:,}")
    cells = max(1, round(CELLS * math.sqrt(len(bank))))
    sample = bank[:: sample_step(len(bank), cells)].float().numpy()
    index = build_index(sample, (part.float().numpy() for part in bank.split(65536)), cells)
    index.nprobe = min(PROBES, cells)
    return index


@dataclass(frozen=True)
class Mahalanobis:
    """Mahalanobis distance: from a trimmed mean, in units of the spread in each direction."""

    shrinkage: float | None
    """Shrinkage of the covariance towards a sphere, 0 to 1; None chooses it by Ledoit and Wolf (2004)."""
    trim: float
    """See `trimmed_mean`."""
    least: ClassVar[int] = 3  # two images spread along one line only

    def __post_init__(self) -> None:
        check_range(f"{KEY}.shrinkage", self.shrinkage, low=0, high=1, null=True)
        check_range(f"{KEY}.trim", self.trim, low=0, below=1)

    def fit(self, rows: FeatureRows) -> dict[str, Tensor]:
        """Compute mean and whitening matrix."""
        # Imported here, because the other detectors do not use it.
        from sklearn.covariance import empirical_covariance, ledoit_wolf, shrunk_covariance

        features = rows.astype(np.float64)
        mean = maths.trimmed_mean(features, self.trim)
        centred = features - mean
        if self.shrinkage is None:
            covariance, _ = ledoit_wolf(centred, assume_centered=True)
        else:
            covariance = shrunk_covariance(empirical_covariance(centred, assume_centered=True), self.shrinkage)
        return {"mean": torch.from_numpy(mean), "whitening": torch.from_numpy(maths.whitening_of(covariance))}

    def distances(
        self, learnt: Mapping[str, Tensor], rows: FeatureRows, own: Own, device: torch.device
    ) -> Float64[np.ndarray, " n"]:
        """See `Detector.distances`."""
        return maths.mahalanobis(rows.astype(np.float64), learnt["mean"].numpy(), learnt["whitening"].numpy())


@dataclass(frozen=True)
class PrincipalResidual:
    """Residual of a projection on the principal components of normal images around their trimmed mean."""

    variance: float
    """Share of the variance that the components explain."""
    trim: float
    """See `trimmed_mean`."""
    least: ClassVar[int] = 3

    def __post_init__(self) -> None:
        check_range(f"{KEY}.variance", self.variance, above=0, below=1)
        check_range(f"{KEY}.trim", self.trim, low=0, below=1)

    def fit(self, rows: FeatureRows) -> dict[str, Tensor]:
        """Compute mean and principal components."""
        features = rows.astype(np.float64)
        mean = maths.trimmed_mean(features, self.trim)
        components = maths.principal_components(features, mean, self.variance)
        return {"mean": torch.from_numpy(mean), "components": torch.from_numpy(np.ascontiguousarray(components))}

    def distances(
        self, learnt: Mapping[str, Tensor], rows: FeatureRows, own: Own, device: torch.device
    ) -> Float64[np.ndarray, " n"]:
        """See `Detector.distances`."""
        mean, components = learnt["mean"].numpy(), learnt["components"].numpy()
        return maths.principal_residual(rows.astype(np.float64), mean, components)


@dataclass(frozen=True)
class FittedDetector:
    """Fitted detector with the scale of its scores: median and spread of the training images' own distances."""

    detector: Detector
    learnt: Mapping[str, Tensor]
    """Result of `Detector.fit`."""
    place: Own
    """For each training image its position among the fitted ones, -1 if it was dropped."""
    median: float
    spread: float

    def logits(self, rows: FeatureRows, trained: Own, device: torch.device) -> Float64[np.ndarray, " n"]:
        """Score images on a scale like that of log-odds, see `distance_logits`.

        `trained` is the position of each image among the training images, -1 for none.
        """
        own = np.where(trained >= 0, self.place[trained], -1)
        return maths.distance_logits(self.detector.distances(self.learnt, rows, own, device), self.median, self.spread)

    def tensors(self) -> dict[str, Tensor]:
        """Return the state as named tensors."""
        scale = torch.tensor([self.median, self.spread], dtype=torch.float64)
        learnt = {f"learnt.{name}": tensor for name, tensor in self.learnt.items()}
        return learnt | {"place": torch.from_numpy(self.place), "scale": scale}

    @classmethod
    def from_tensors(cls, detector: Detector, tensors: Mapping[str, Tensor]) -> "FittedDetector":
        """Rebuild a fitted detector from the result of `tensors`."""
        learnt = {k.removeprefix("learnt."): v for k, v in tensors.items() if k.startswith("learnt.")}
        median, spread = tensors["scale"].tolist()
        return cls(detector, learnt, tensors["place"].numpy(), median, spread)


def fit_detector(detector: Detector, rows: FeatureRows, *, drop: float, device: torch.device) -> FittedDetector:
    """Fit a detector on normal images, drop the share that scores highest, and fit again.

    Images taken as normal may include a few anomalies; most of these are among the dropped.

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
        raise DataError(f"{type(detector).__name__} cannot be fitted on {count} images: {error}") from error
    place = np.full(len(rows), -1, dtype=np.int64)
    place[kept] = np.arange(count)
    return FittedDetector(detector, learnt, place, median, spread)
