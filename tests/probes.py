"""Settings of the probe that several tests share."""

from anomalymatch.algorithms.probe.regression import ProbeSpec

SELF_TRAINING = ProbeSpec(
    inverse_regularisation=10.0,
    rounds=3,
    confidence=0.8,
    weight=0.25,
    limit=200,
    orientations=1,
    calibration="none",
    folds=5,
    pool_images=10_000,
    fit_gap=None,
)
