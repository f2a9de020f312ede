"""Novelty detectors on frozen features: nearest neighbours, Mahalanobis distance, PCA residual."""
