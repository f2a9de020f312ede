"""The probe: a logistic regression on frozen features. Cheap, and the bar for everything that trains."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Float64
from sklearn.linear_model import LogisticRegression

from anomalymatch.errors import ConfigError


@dataclass(frozen=True)
class Probe:
    """A fitted logistic regression: logit = features . coefficients + intercept."""

    coefficients: Float64[np.ndarray, " d"]
    intercept: float


def fit_probe(
    anomalies: Float32[np.ndarray, "a d"], normals: Float32[np.ndarray, "n d"], *, inverse_regularisation: float
) -> Probe:
    """Fit the probe on L2-normalised features, both classes weighing the same in total.

    Args:
        anomalies: features of the labelled anomalies.
        normals: features of the labelled normals.
        inverse_regularisation: scikit-learn's C; larger fits the labels more closely.

    Raises:
        ConfigError: if `inverse_regularisation` is not positive.
    """
    if not inverse_regularisation > 0:
        raise ConfigError(f"the probe's inverse_regularisation is {inverse_regularisation}: it must be positive")
    features = np.concatenate([anomalies, normals]).astype(np.float64)
    targets = np.r_[np.ones(len(anomalies)), np.zeros(len(normals))]
    model = LogisticRegression(C=inverse_regularisation, class_weight="balanced", max_iter=2000, tol=1e-6)
    model.fit(features, targets)
    return Probe(model.coef_[0].astype(np.float64), float(model.intercept_[0]))
