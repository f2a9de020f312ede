"""How many anomalies are left, from the scores that images had when somebody looked at them."""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Float64
from scipy.optimize import minimize
from scipy.special import expit, log_expit

from anomalymatch.ui.summary import Estimate

WANTED = 5
"""Anomalies and others, each, that were labelled with a score, before anything can be said."""
DRAWS = 400
BINS = 400
PRIOR_SD = (10.0, 2.5)
"""Standard deviations of the normal prior of intercept and slope; weak, it only keeps separable labels finite."""


def estimate_left(
    logits: Sequence[float] | Float64[np.ndarray, " n"],
    anomalous: Sequence[bool] | Bool[np.ndarray, " n"],
    unlabelled: Float[np.ndarray, " m"],
    *,
    seed: int,
) -> Estimate:
    """Estimate the anomalies among the unlabelled images.

    A logistic regression (Platt 1999) of what was said on the logit that the image had at that moment, so before it
    could be learned, gives each unlabelled image a probability; their sum is the estimate. It does not matter that
    people look at high scores first, because they choose by the score, but far below all that was looked at it is an
    extrapolation: a random audit narrows it. The interval comes from draws of Laplace's approximation to the
    posterior.

    Args:
        logits: of the labelled images, when they were labelled.
        anomalous: what was said of them.
        unlabelled: logits of the others now; NaN for unreadable ones.
        seed: of the draws.
    """
    x, y = np.asarray(logits, dtype=np.float64), np.asarray(anomalous, dtype=bool)
    rare, others = int(y.sum()), int((~y).sum())
    if rare < WANTED or others < WANTED:
        return Estimate(
            math.nan,
            math.nan,
            math.nan,
            f"needs {WANTED} anomalies and {WANTED} others labelled after the first ranking, has {rare} and {others}",
        )
    weights, covariance = _posterior(x, y)
    draws = np.random.default_rng(seed).multivariate_normal(weights, covariance, size=DRAWS)
    counts, edges = np.histogram(unlabelled[np.isfinite(unlabelled)], bins=BINS)
    centres = (edges[1:] + edges[:-1]) / 2
    expected = expit(draws[:, :1] + draws[:, 1:] * centres) @ counts
    left = float(expit(weights[0] + weights[1] * centres) @ counts)
    low, high = np.quantile(expected, [0.05, 0.95])
    return Estimate(left, min(float(low), left), max(float(high), left), "")


def _posterior(
    x: Float64[np.ndarray, " n"], y: Bool[np.ndarray, " n"]
) -> tuple[Float64[np.ndarray, " 2"], Float64[np.ndarray, "2 2"]]:
    """Mode and covariance (Laplace's approximation) of intercept and slope; the slope is not negative."""
    precision = 1 / np.square(PRIOR_SD)
    sign = np.where(y, 1.0, -1.0)
    design = np.stack([np.ones_like(x), x], axis=1)

    def loss(w: Float64[np.ndarray, " 2"]) -> float:
        return float(-log_expit(sign * (design @ w)).sum() + 0.5 * (precision * w**2).sum())

    def gradient(w: Float64[np.ndarray, " 2"]) -> Float64[np.ndarray, " 2"]:
        return -design.T @ (sign * expit(-sign * (design @ w))) + precision * w

    mode = minimize(loss, np.array([0.0, 0.5]), jac=gradient, method="L-BFGS-B", bounds=[(None, None), (0, None)]).x
    p = expit(design @ mode)
    return mode, np.linalg.inv((design * (p * (1 - p))[:, None]).T @ design + np.diag(precision))
