"""Probe: a logistic regression on frozen features, with self-training and calibration."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int64
from scipy.special import logit

from anomalymatch.backbones.features import Scaling, one_thread
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
    fit_gap: float | None

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
        check_range("probe.fit_gap", self.fit_gap, low=0, null=True)


@dataclass(frozen=True)
class Probe:
    """Fitted logistic regression: logit = features . coefficients + intercept."""

    coefficients: Float64[np.ndarray, " d"]
    intercept: float

    def logits(self, features: Float32[np.ndarray, "n d"]) -> Float64[np.ndarray, " n"]:
        """Compute the log-odds of being an anomaly."""
        return (features @ self.coefficients.astype(np.float32)).astype(np.float64) + self.intercept


FitOnSome = Callable[[Int64[np.ndarray, " a"], Int64[np.ndarray, " n"]], Probe]
"""Function that fits a probe on the anomalies and normals at some positions."""
HeldOut = tuple[Float64[np.ndarray, " m"], Bool[np.ndarray, " m"]]
"""Log-odds of labelled images by probes that were not fitted on them, and True for each anomaly."""


@dataclass(frozen=True)
class SelfTraining:
    """Result of `self_train`: the probe of each round, the calibrated last one, and how well it generalises.

    It keeps the features of the labelled images and the gain of their columns (see `fit_logistic`).
    """

    rounds: list[Probe]
    """Probes after 0, 1, … rounds, not calibrated."""
    last: Probe
    """That of the last round; the first, on the labels alone, where the fit gap is too small."""
    spec: ProbeSpec
    anomalies: Float32[np.ndarray, "a d"]
    normals: Float32[np.ndarray, "n d"]
    gain: Float64[np.ndarray, " d"] | None
    refit: FitOnSome
    """Fits the probe of the last round on some of the labelled images."""

    @cached_property
    def probe(self) -> Probe:
        """The probe `last`, calibrated if the specification asks for it.

        The calibration is fitted on the logits of labelled images by the same recipe, views and self-training included,
        on the other folds. The probe stays uncalibrated where a class has a single image, and where it ranks no better
        than chance: calibration would reverse its order.
        """
        if self.spec.calibration == "none":
            return self.last
        held_out = _cross_validate(self.anomalies, self.normals, self.spec, self.refit)
        if held_out is None:
            return self.last
        slope, offset = platt(*held_out)
        probe = self.last
        return probe if slope <= 0 else Probe(probe.coefficients * slope, probe.intercept * slope + offset)

    @cached_property
    def average_precision(self) -> float:
        """Average precision of the labels alone by cross-validation; NaN if a class has a single image."""
        gain = np.float32(1.0) if self.gain is None else self.gain.astype(np.float32)
        held_out = _cross_validate_labels(self.anomalies * gain, self.normals * gain, self.spec)
        return math.nan if held_out is None else _average_precision(held_out)


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
    reach the threshold. Where the labelled anomalies hardly stand out of the pool even in the fit, pseudo-labels add
    mistakes, too: `spec.fit_gap` is the smallest `fit_gap` with which the rounds count.

    Args:
        anomalies: features of the labelled anomalies.
        normals: features of the labelled normals.
        pool: features of unlabelled images.
        spec: see `ProbeSpec`.
        scaling: views of the features, weighted by `column_gain`; None uses the features as they are.
        turned: features of the first of the labelled anomalies mirrored and rotated, `spec.orientations` - 1 rows for
            each of them. All views together weigh as much as the images.
        second: log-odds of the pool by another probe on other features. Then the mean of both must be confident, so
            neither repeats its own mistakes (co-training: Blum and Mitchell, COLT 1998). There is no fit gap then.
    """
    turned = anomalies[:0] if turned is None else turned
    owner = np.arange(len(turned)) // max(1, spec.orientations - 1)

    @one_thread()
    def train(
        some: Int64[np.ndarray, " a"], others: Int64[np.ndarray, " n"]
    ) -> tuple[list[Probe], Probe, Float64[np.ndarray, " d"] | None]:
        rare, common = anomalies[some], normals[others]
        gain = None if scaling is None else column_gain(rare, common, scaling, spec)
        views = np.concatenate([rare, turned[np.isin(owner, some)]])
        share = len(rare) / len(views) if len(views) else 1.0

        def fit(chosen: Float32[np.ndarray, "s d"]) -> Probe:
            c, weight = spec.inverse_regularisation, spec.weight
            return fit_logistic(
                views, common, inverse_regularisation=c, pseudo_labelled=chosen, weight=weight, gain=gain, share=share
            )

        first = fit(pool[:0])
        stands_out = (
            spec.fit_gap is None
            or second is not None
            or fit_gap(first.logits(rare), first.logits(pool)) >= spec.fit_gap
        )
        rounds = [first]
        for _ in range(spec.rounds):
            logits = rounds[-1].logits(pool) if second is None else (rounds[-1].logits(pool) + second) / 2
            highest = np.argsort(-logits, kind="stable")[: spec.limit]
            rounds.append(fit(pool[highest[logits[highest] >= logit(spec.confidence)]]))
        return rounds, rounds[-1] if stands_out else first, gain

    rounds, last, gain = train(np.arange(len(anomalies)), np.arange(len(normals)))
    return SelfTraining(rounds, last, spec, anomalies, normals, gain, lambda some, others: train(some, others)[1])


def fit_gap(anomalies: Float64[np.ndarray, " a"], pool: Float64[np.ndarray, " p"]) -> float:
    """Compute how far the lowest labelled anomaly lies above the pool's mean logit, in its standard deviations."""
    spread = float(pool.std()) if len(pool) else 0.0
    return (float(anomalies.min()) - float(pool.mean())) / spread if spread else 0.0


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
    from sklearn.linear_model import LogisticRegression  # late, as below: the page starts without it

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
    own = [_cross_validate_labels(rare[:, part], common[:, part], spec) for part in scaling.blocks]
    trust = np.array([1.0 if each is None else _average_precision(each) for each in own])
    for part, share in zip(scaling.blocks, trust / np.linalg.norm(trust), strict=True):
        gain[part] *= share
    return gain


def platt(logits: Float64[np.ndarray, " n"], targets: Bool[np.ndarray, " n"]) -> tuple[float, float]:
    """Fit slope and offset that calibrate logits to the labels (Platt, 1999).

    This is the maximum-likelihood fit of a sigmoid with Platt's targets, which are short of certain by one image of
    each class: logits that separate the labels do not become infinitely steep. The logits are of images that were not
    in the fit; both classes must be among the targets (True for anomalies).
    """
    from sklearn.linear_model import LogisticRegression

    positive, negative = int(targets.sum()), int((~targets).sum())
    certain = np.where(targets, (positive + 1) / (positive + 2), 1 / (negative + 2))
    middle, spread = float(np.mean(logits)), max(float(np.std(logits)), 1e-12)
    both = np.tile((logits - middle) / spread, 2)[:, None]  # the solver needs numbers around one
    sides = np.repeat([1, 0], len(logits))
    weights = np.concatenate([certain, 1 - certain])
    model = LogisticRegression(C=np.inf, max_iter=1000, tol=1e-8).fit(both, sides, sample_weight=weights)
    slope = float(model.coef_[0, 0]) / spread
    return slope, float(model.intercept_[0]) - slope * middle


def _average_precision(held_out: HeldOut) -> float:
    from sklearn.metrics import average_precision_score

    logits, targets = held_out
    return float(average_precision_score(targets, logits))


def _cross_validate(
    anomalies: Float32[np.ndarray, "a d"], normals: Float32[np.ndarray, "n d"], spec: ProbeSpec, fit: FitOnSome
) -> HeldOut | None:
    """Compute the log-odds of each image by a probe fitted on the other folds, and True for each anomaly.

    With a single image of a class there are no folds, and the result is None.
    """
    from sklearn.model_selection import StratifiedKFold

    folds = min(spec.folds, len(anomalies), len(normals))
    if folds < 2:
        return None
    rows = np.concatenate([anomalies, normals])
    targets = np.repeat([True, False], [len(anomalies), len(normals)])
    logits = np.empty(len(rows))
    for train, test in StratifiedKFold(folds, shuffle=True, random_state=0).split(rows, targets):
        rare = train < len(anomalies)
        logits[test] = fit(train[rare], train[~rare] - len(anomalies)).logits(rows[test])
    return logits, targets


def _cross_validate_labels(
    anomalies: Float32[np.ndarray, "a d"], normals: Float32[np.ndarray, "n d"], spec: ProbeSpec
) -> HeldOut | None:
    """Cross-validate a logistic regression on the labels alone, see `_cross_validate`."""
    count, width = len(anomalies), anomalies.shape[1]
    if count + len(normals) < width:  # the fits are the same in as many dimensions as there are images
        rows = np.asarray(np.linalg.qr(np.concatenate([anomalies, normals]).T, mode="r")).T
        anomalies, normals = rows[:count], rows[count:]
    c = spec.inverse_regularisation
    return _cross_validate(
        anomalies,
        normals,
        spec,
        lambda some, others: fit_logistic(anomalies[some], normals[others], inverse_regularisation=c),
    )
