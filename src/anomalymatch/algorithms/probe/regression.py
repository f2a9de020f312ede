"""Probe: a logistic regression on frozen features, with self-training and calibration."""

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Float32, Float64
from scipy.special import logit
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score
from sklearn.model_selection import StratifiedKFold

from anomalymatch.backbones.features import Scaling
from anomalymatch.backbones.tta import ORIENTATIONS
from anomalymatch.checks import check_choice, check_range

CALIBRATIONS = ("none", "platt")


@dataclass(frozen=True)
class ProbeSpec:
    """Hyper-parameters of the probe: the keys of `conf/probe/default.yaml`.

    Without calibration the logits are log-odds as if both classes were equally frequent.

    Raises:
        ConfigError: if a value is out of range.
    """

    inverse_regularisation: float
    rounds: int
    confidence: float
    weight: float
    limit: int
    orientations: int
    calibration: str
    folds: int
    pool_images: int

    def __post_init__(self) -> None:
        check_range("probe.inverse_regularisation", self.inverse_regularisation, above=0)
        check_range("probe.rounds", self.rounds, low=0)
        check_range("probe.confidence", self.confidence, low=0.5, below=1)
        check_range("probe.weight", self.weight, above=0)
        check_range("probe.limit", self.limit, low=0)
        check_choice("probe.orientations", self.orientations, ORIENTATIONS)
        check_choice("probe.calibration", self.calibration, CALIBRATIONS)
        check_range("probe.folds", self.folds, low=2)
        check_range("probe.pool_images", self.pool_images, low=1)


@dataclass(frozen=True)
class Probe:
    """Fitted logistic regression: logit = features . coefficients + intercept."""

    coefficients: Float64[np.ndarray, " d"]
    intercept: float

    def logits(self, features: Float32[np.ndarray, "n d"]) -> Float64[np.ndarray, " n"]:
        """Compute the log-odds of being an anomaly."""
        return (features @ self.coefficients.astype(np.float32)).astype(np.float64) + self.intercept


@dataclass(frozen=True)
class SelfTraining:
    """Result of `self_train`: the probe of each round, the calibrated last one, and how well it generalises.

    It keeps the features of the labelled images and the gain of their columns (see `fit_logistic`).
    """

    rounds: list[Probe]
    """Probes after 0, 1, … rounds, not calibrated."""
    spec: ProbeSpec
    anomalies: Float32[np.ndarray, "a d"]
    normals: Float32[np.ndarray, "n d"]
    gain: Float64[np.ndarray, " d"] | None

    @cached_property
    def probe(self) -> Probe:
        """The probe of the last round, calibrated if the specification asks for it.

        It stays uncalibrated where a class has a single image, and where it ranks no better than chance: calibration
        would reverse its order.
        """
        probe = self.rounds[-1]
        if self.spec.calibration == "none" or self._out_of_fold is None:
            return probe
        slope, offset = platt(*self._out_of_fold)
        return probe if slope <= 0 else Probe(probe.coefficients * slope, probe.intercept * slope + offset)

    @cached_property
    def average_precision(self) -> float:
        """Average precision of the labelled images by cross-validation; NaN if a class has a single image."""
        if self._out_of_fold is None:
            return math.nan
        logits, targets = self._out_of_fold
        return float(average_precision_score(targets, logits))

    @cached_property
    def _out_of_fold(self) -> tuple[Float64[np.ndarray, " m"], Bool[np.ndarray, " m"]] | None:
        gain = np.float32(1.0) if self.gain is None else self.gain.astype(np.float32)
        return _cross_validate(self.anomalies * gain, self.normals * gain, self.spec)


def self_train(
    anomalies: Float32[np.ndarray, "a d"],
    normals: Float32[np.ndarray, "n d"],
    pool: Float32[np.ndarray, "p d"],
    spec: ProbeSpec,
    scaling: Scaling | None = None,
    *,
    turned: Float32[np.ndarray, "t d"] | None = None,
    second: Float64[np.ndarray, " p"] | None = None,
) -> SelfTraining:
    """Fit the probe, add confident unlabelled images as anomalies of less weight, and fit again, for some rounds.

    This is pseudo-labelling with a threshold, as in FixMatch, for the rare class alone. The threshold matters more than
    the number: the twenty most probable images of a pool with sixteen anomalies would add mistakes, but few of them
    reach the threshold.

    Args:
        anomalies: features of the labelled anomalies.
        normals: features of the labelled normals.
        pool: features of unlabelled images.
        spec: see `ProbeSpec`.
        scaling: views of the features, weighted by `column_gain`; None uses the features as they are.
        turned: features of the labelled anomalies mirrored and rotated. All views together weigh as much as the images.
        second: log-odds of the pool by another probe on other features. Then the mean of both must be confident, so
            neither repeats its own mistakes (co-training: Blum and Mitchell, COLT 1998).
    """
    gain = None if scaling is None else column_gain(anomalies, normals, scaling, spec)
    views = anomalies if turned is None else np.concatenate([anomalies, turned])
    share = len(anomalies) / len(views) if len(views) else 1.0

    def fit(chosen: Float32[np.ndarray, "s d"]) -> Probe:
        c, weight = spec.inverse_regularisation, spec.weight
        return fit_logistic(
            views, normals, inverse_regularisation=c, pseudo_labelled=chosen, weight=weight, gain=gain, share=share
        )

    rounds = [fit(pool[:0])]
    for _ in range(spec.rounds):
        logits = rounds[-1].logits(pool) if second is None else (rounds[-1].logits(pool) + second) / 2
        highest = np.argsort(-logits, kind="stable")[: spec.limit]
        rounds.append(fit(pool[highest[logits[highest] >= logit(spec.confidence)]]))
    return SelfTraining(rounds, spec, anomalies, normals, gain)


def fit_logistic(
    anomalies: Float32[np.ndarray, "a d"],
    normals: Float32[np.ndarray, "n d"],
    *,
    inverse_regularisation: float,
    pseudo_labelled: Float32[np.ndarray, "s d"] | None = None,
    weight: float = 1.0,
    gain: Float64[np.ndarray, " d"] | None = None,
    share: float = 1.0,
) -> Probe:
    """Fit a logistic regression with the same total weight for both classes.

    Args:
        anomalies: features of the labelled anomalies.
        normals: features of the labelled normals.
        inverse_regularisation: scikit-learn's C.
        pseudo_labelled: features of unlabelled images that are pseudo-labelled anomaly.
        weight: weight of one of `pseudo_labelled` relative to a labelled anomaly.
        gain: factor of each column before the regularisation of its coefficient; None for one.
        share: weight of a row of `anomalies`, where they are several views of each image.
    """
    extra = anomalies[:0] if pseudo_labelled is None else pseudo_labelled
    features = np.concatenate([anomalies, extra, normals]).astype(np.float64)
    if gain is not None:
        features *= gain
    centre = features.mean(axis=0)  # the optimum is the same, and the solver takes a quarter of the steps
    features -= centre
    positive = np.r_[np.full(len(anomalies), share), np.full(len(extra), weight)]
    half = (share * len(anomalies) + len(normals)) / 2  # scikit-learn's class_weight="balanced" for labelled images
    weights = np.r_[positive * (half / positive.sum()), np.full(len(normals), half / len(normals))]
    targets = np.r_[np.ones(len(positive)), np.zeros(len(normals))]
    model = LogisticRegression(C=inverse_regularisation, max_iter=2000, tol=1e-6)
    model.fit(features, targets, sample_weight=weights)
    coefficients = model.coef_[0].astype(np.float64)
    intercept = float(model.intercept_[0] - coefficients @ centre)
    return Probe(coefficients if gain is None else coefficients * gain, intercept)


def column_gain(
    anomalies: Float32[np.ndarray, "a d"], normals: Float32[np.ndarray, "n d"], scaling: Scaling, spec: ProbeSpec
) -> Float64[np.ndarray, " d"]:
    """Compute the factor of each column: its scale times the weight of its view.

    Each view alone ranks the labelled images by cross-validation; views are weighted in proportion to their average
    precision. Which view separates the anomalies depends on the data set (textures, objects), and the labels tell. With
    a single anomaly or normal they cannot, and all views have the same weight.
    """
    gain = scaling.scale.astype(np.float64)
    if len(scaling.blocks) == 1:
        return gain
    rare, common = anomalies * scaling.scale, normals * scaling.scale
    own = [_cross_validate(rare[:, part], common[:, part], spec) for part in scaling.blocks]
    trust = np.array([1.0 if each is None else average_precision_score(each[1], each[0]) for each in own])
    for part, share in zip(scaling.blocks, trust / np.linalg.norm(trust), strict=True):
        gain[part] *= share
    return gain


def platt(logits: Float64[np.ndarray, " n"], targets: Bool[np.ndarray, " n"]) -> tuple[float, float]:
    """Fit slope and offset that calibrate logits to the labels (Platt, 1999).

    This is the maximum-likelihood fit of a sigmoid with Platt's targets, which are short of certain by one image of
    each class: logits that separate the labels do not become infinitely steep. The logits are of images that were not
    in the fit; both classes must be among the targets (True for anomalies).
    """
    positive, negative = int(targets.sum()), int((~targets).sum())
    certain = np.where(targets, (positive + 1) / (positive + 2), 1 / (negative + 2))
    middle, spread = float(np.mean(logits)), max(float(np.std(logits)), 1e-12)
    both = np.tile((logits - middle) / spread, 2)[:, None]  # the solver needs numbers around one
    sides = np.repeat([1, 0], len(logits))
    weights = np.concatenate([certain, 1 - certain])
    model = LogisticRegression(C=np.inf, max_iter=1000, tol=1e-8).fit(both, sides, sample_weight=weights)
    slope = float(model.coef_[0, 0]) / spread
    return slope, float(model.intercept_[0]) - slope * middle


def _cross_validate(
    anomalies: Float32[np.ndarray, "a d"], normals: Float32[np.ndarray, "n d"], spec: ProbeSpec
) -> tuple[Float64[np.ndarray, " m"], Bool[np.ndarray, " m"]] | None:
    """Compute the log-odds of each image by a probe fitted on the other folds, and True for each anomaly.

    With a single image of a class there are no folds, and the result is None.
    """
    folds = min(spec.folds, len(anomalies), len(normals))
    if folds < 2:
        return None
    rows = np.concatenate([anomalies, normals])
    targets = np.repeat([True, False], [len(anomalies), len(normals)])
    if len(rows) < rows.shape[1]:  # the fits are the same in as many dimensions as there are images
        rows = np.asarray(np.linalg.qr(rows.T, mode="r")).T
    logits = np.empty(len(rows))
    for train, test in StratifiedKFold(folds, shuffle=True, random_state=0).split(rows, targets):
        seen, known = rows[train], targets[train]
        c = spec.inverse_regularisation
        logits[test] = fit_logistic(seen[known], seen[~known], inverse_regularisation=c).logits(rows[test])
    return logits, targets
