"""Novelty detectors on frozen features: nearest neighbours, Mahalanobis distance and PCA residual."""

from anomalymatch.algorithms.novelty.detectors import (
    Detector,
    FittedDetector,
    Mahalanobis,
    Neighbours,
    PrincipalResidual,
    fit_detector,
)
from anomalymatch.algorithms.novelty.learner import DistanceLearner, NoveltyLearner

__all__ = [
    "Detector",
    "DistanceLearner",
    "FittedDetector",
    "Mahalanobis",
    "Neighbours",
    "NoveltyLearner",
    "PrincipalResidual",
    "fit_detector",
]
