"""Mathematics of a cascade: a linear student of the full scores, and the threshold from which images are passed on."""

import math
from typing import NamedTuple

import numpy as np
import scipy  # which imports `scipy.linalg` at its first use
from jaxtyping import Float, Float64

from anomalymatch.evaluation.confidence import proportion_interval

KEPT = 0.99
"""Share of the top of the full ranking that a first look must pass on, on average over images that were not seen."""
MIN_TOP = math.ceil(1 / (1 - KEPT) - 1e-9) - 1
"""Fewest images of the top from which `choose_threshold` can promise this: with 99, the next one is lower than all of
them once in a hundred times."""
PENALTIES = np.logspace(-4, 2, 13)
"""Penalties of the regression, as multiples of the mean eigenvalue."""


class Student(NamedTuple):
    """Linear regression from features of a first look to full scores."""

    coefficients: Float64[np.ndarray, " d"]
    intercept: float

    def predict(self, features: Float[np.ndarray, "n d"]) -> Float64[np.ndarray, " n"]:
        """Predict full scores."""
        return features.astype(np.float64) @ self.coefficients + self.intercept


def fit_student(
    features: Float[np.ndarray, "n d"], scores: Float[np.ndarray, " n"]
) -> tuple[Student, Float64[np.ndarray, " n"]]:
    """Fit a ridge regression whose penalty has the smallest squared error of rows left out, one at a time.

    Each column is centred and divided by the root of its standard deviation: halfway to columns of equal variance, in
    which the noise of those that hardly vary would count as much as the rest.

    Returns:
        The regression, and what the regression to all other rows predicts for each row: for rows that were not seen.
    """
    mean, spread = features.mean(axis=0, dtype=np.float64), features.std(axis=0, dtype=np.float64)
    scale = np.sqrt(spread) + 1e-3
    x, offset = (features - mean) / scale, float(scores.mean(dtype=np.float64))
    y = scores.astype(np.float64) - offset
    if x.shape[0] > x.shape[1]:
        values, vectors = scipy.linalg.eigh(x.T @ x)
    else:  # as many eigenvalues as rows are not zero
        values, sides = scipy.linalg.eigh(x @ x.T)
        held = values > values[-1] * 1e-12
        values, vectors = values[held], x.T @ (sides[:, held] / np.sqrt(values[held]))
    rotated = x @ vectors
    products, squares = rotated.T @ y, np.square(rotated)
    best: tuple[float, np.ndarray, np.ndarray] | None = None
    for penalty in PENALTIES * values.mean():
        weights = products / (values + penalty)
        leverage = squares @ (1 / (values + penalty)) + 1 / len(y)  # that of the intercept, too
        errors = (y - rotated @ weights) / (1 - leverage)
        if best is None or np.mean(errors**2) < best[0]:
            best = float(np.mean(errors**2)), weights, errors
    assert best is not None
    coefficients = (vectors @ best[1]) / scale
    return Student(coefficients, offset - float(mean @ coefficients)), y - best[2] + offset


class Threshold(NamedTuple):
    """Threshold of a first look, and what it passes on, in a sample.

    Attributes:
        value: lowest score of the first look that is passed on.
        share: share of all images that are passed on.
        kept: number of images of the top that are passed on.
        top: number of images of the top.
    """

    value: float
    share: float
    kept: int
    top: int

    @property
    def interval(self) -> tuple[float, float]:
        """Exact 95 % interval of the share of the top that is passed on."""
        return proportion_interval(self.kept / self.top, self.top)


def choose_threshold(first: Float[np.ndarray, " n"], full: Float[np.ndarray, " n"], top: int) -> Threshold:
    """Choose the highest threshold that keeps `KEPT` of the top of the full ranking among images that were not seen.

    Of the top's n images, ordered by the first look, it is the one at place (1 - KEPT)(n + 1) from below: a further
    image of the top is lower with a probability of at most 1 - KEPT, whatever the distribution (split conformal
    prediction, Lei et al., JASA 113, 2018). It is at most the lowest full score of the top, so that what is not passed
    on is not ranked into the top by its first look.

    Args:
        first: scores of the first look for images that it was not fitted on, on the scale of `full`.
        full: full scores of the same images.
        top: number of images with the highest full scores that count.

    Raises:
        ValueError: if the top has fewer than `MIN_TOP` images, or more than there are.
    """
    if not MIN_TOP <= top <= len(full):
        raise ValueError(f"expected a top of {MIN_TOP} to {len(full)} images, got {top}")
    best = np.argsort(-full, kind="stable")[:top]
    place = int((1 - KEPT) * (top + 1) + 1e-9)
    value = min(float(np.sort(first[best])[place - 1]), float(full[best[-1]]))
    return Threshold(value, float(np.mean(first >= value)), int(np.sum(first[best] >= value)), top)
