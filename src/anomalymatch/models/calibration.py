"""Calibration: scores that say how probable an anomaly is, where training weighs both classes the same."""

import numpy as np
from jaxtyping import Bool, Float64
from sklearn.linear_model import LogisticRegression


def platt(logits: Float64[np.ndarray, " n"], targets: Bool[np.ndarray, " n"]) -> tuple[float, float]:
    """Slope and offset by which log-odds become those of the labels (Platt, 1999).

    The maximum-likelihood fit of a sigmoid, with his targets, which are short of certain by one image of each class:
    scores that separate the labels do not become infinitely steep.

    Args:
        logits: of images that were not learnt from.
        targets: which of them are anomalies; both classes must be there.
    """
    positive, negative = int(targets.sum()), int((~targets).sum())
    certain = np.where(targets, (positive + 1) / (positive + 2), 1 / (negative + 2))
    middle, spread = float(np.mean(logits)), max(float(np.std(logits)), 1e-12)
    both = np.tile((logits - middle) / spread, 2)[:, None]  # the solver wants numbers around one
    sides = np.repeat([1, 0], len(logits))
    weights = np.concatenate([certain, 1 - certain])
    model = LogisticRegression(C=np.inf, max_iter=1000, tol=1e-8).fit(both, sides, sample_weight=weights)
    slope = float(model.coef_[0, 0]) / spread
    return slope, float(model.intercept_[0]) - slope * middle
