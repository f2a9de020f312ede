"""The probe: a logistic regression on frozen features. Cheap, and the bar for everything that trains."""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float32, Float64
from scipy.special import logit
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score
from sklearn.model_selection import StratifiedKFold

from anomalymatch.backbones.features import Scaling
from anomalymatch.backbones.tta import ORIENTATIONS
from anomalymatch.errors import ConfigError


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


FOLDS = 5
CALIBRATIONS = ("none", "platt")


@dataclass(frozen=True)
class ProbeSpec:
    """How the probe is fitted.

    Attributes:
        inverse_regularisation: scikit-learn's C; larger fits the labels more closely.
        rounds: rounds of self-training on unlabelled images; 0 uses the labels alone.
        confidence: probability from which an unlabelled image is taken to be an anomaly.
        weight: of a pseudo-labelled anomaly beside a labelled one.
        limit: pseudo-labelled anomalies at most, the surest.
        orientations: views of each labelled anomaly that teach, mirrored and turned; see `tta.reoriented`.
        calibration: `platt` makes log-odds those of the labels, by what is out of fold; `none` leaves them as if both
            classes were equally frequent. The order stays.

    Raises:
        ConfigError: if a value is out of range.
    """

    inverse_regularisation: float
    rounds: int
    confidence: float
    weight: float
    limit: int
    orientations: int = 1
    calibration: str = "none"

    def __post_init__(self) -> None:
        if not self.inverse_regularisation > 0:
            raise ConfigError(f"probe.inverse_regularisation is {self.inverse_regularisation}: it must be positive")
        if self.rounds < 0 or self.limit < 0:
            raise ConfigError(f"probe.rounds={self.rounds} and probe.limit={self.limit} cannot be negative")
        check_confidence("probe.confidence", self.confidence)
        if not self.weight > 0:
            raise ConfigError(f"probe.weight is {self.weight}: it must be positive")
        if self.orientations not in ORIENTATIONS:
            choices = ", ".join(map(str, ORIENTATIONS))
            raise ConfigError(f"probe.orientations is {self.orientations}: choose one of {choices}")
        if self.calibration not in CALIBRATIONS:
            choices = ", ".join(CALIBRATIONS)
            raise ConfigError(f"probe.calibration is {self.calibration!r}: choose one of {choices}")


def check_confidence(key: str, value: float) -> None:
    """Refuse a cut that takes for an anomaly what is more likely none.

    Raises:
        ConfigError: which names the key.
    """
    if not 0.5 <= value < 1:
        raise ConfigError(f"{key} is {value}: it must be at least 0.5 and below 1")


@dataclass(frozen=True)
class Probe:
    """A fitted logistic regression: logit = features . coefficients + intercept."""

    coefficients: Float64[np.ndarray, " d"]
    intercept: float

    def logits(self, features: Float32[np.ndarray, "n d"]) -> Float64[np.ndarray, " n"]:
        """Log-odds of being an anomaly."""
        return (features @ self.coefficients.astype(np.float32)).astype(np.float64) + self.intercept


def self_train(
    anomalies: Float32[np.ndarray, "a d"],
    normals: Float32[np.ndarray, "n d"],
    pool: Float32[np.ndarray, "p d"],
    spec: ProbeSpec,
    scaling: Scaling | None = None,
    *,
    turned: Float32[np.ndarray, "t d"] | None = None,
    second: Float64[np.ndarray, " p"] | None = None,
) -> Probe:
    """Fit the probe, let the unlabelled images that it is sure of join as anomalies of less weight, and fit again.

    This is pseudo-labelling with a confidence cut, as in FixMatch, for the rare class alone. The cut matters more than
    the number: the surest twenty of a pool with sixteen anomalies would teach mistakes, but few of them pass it.

    Args:
        anomalies: features of the labelled anomalies.
        normals: features of the labelled normals.
        pool: features of unlabelled images.
        spec: see `ProbeSpec`.
        scaling: of the features; None takes them as they are. Of several views each counts as `column_gain` says.
        turned: features of the labelled anomalies mirrored and turned: a few examples show few of the ways that their
            kind can lie. All views together weigh as much as the images.
        second: log-odds of the pool by a probe that sees it in another way. The mean of both is what has to be sure
            then: neither teaches itself its own mistakes (co-training: Blum and Mitchell, COLT 1998).
    """
    c = spec.inverse_regularisation
    gain = None if scaling is None else column_gain(anomalies, normals, scaling, inverse_regularisation=c)
    views = anomalies if turned is None else np.concatenate([anomalies, turned])
    share = len(anomalies) / len(views) if len(views) else 1.0
    probe = fit_logistic(views, normals, inverse_regularisation=c, gain=gain, share=share)
    for _ in range(spec.rounds):
        logits = probe.logits(pool) if second is None else (probe.logits(pool) + second) / 2
        surest = np.argsort(-logits, kind="stable")[: spec.limit]
        pseudo_labelled = pool[surest[logits[surest] >= logit(spec.confidence)]]
        probe = fit_logistic(
            views,
            normals,
            inverse_regularisation=c,
            pseudo_labelled=pseudo_labelled,
            weight=spec.weight,
            gain=gain,
            share=share,
        )
    return probe if spec.calibration == "none" else calibrated(probe, anomalies, normals, c, gain)


def calibrated(
    probe: Probe,
    anomalies: Float32[np.ndarray, "a d"],
    normals: Float32[np.ndarray, "n d"],
    inverse_regularisation: float,
    gain: Float64[np.ndarray, " d"] | None = None,
) -> Probe:
    """The probe with the log-odds of the labels; as it is where one image of a class is all there is.

    Args:
        probe: see `fit_logistic`.
        anomalies: features of the labelled anomalies.
        normals: features of the labelled normals.
        inverse_regularisation: see `fit_logistic`.
        gain: see `fit_logistic`.
    """
    judged = _judged(anomalies, normals, inverse_regularisation, gain)
    if judged is None:
        return probe
    logits, targets = judged
    slope, offset = platt(logits, targets)
    if slope <= 0:  # out of fold it ranks no better than chance: an order turned round would help nobody
        return probe
    return Probe(probe.coefficients * slope, probe.intercept * slope + offset)


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
    """Fit the probe, both classes weighing the same in total.

    Args:
        anomalies: features of the labelled anomalies.
        normals: features of the labelled normals.
        inverse_regularisation: scikit-learn's C; larger fits the labels more closely.
        pseudo_labelled: features of unlabelled images that are taken for anomalies.
        weight: of one of `pseudo_labelled` beside a labelled anomaly.
        gain: of each column, by which it is multiplied before its coefficient is held back; None for one.
        share: of an image that a row of `anomalies` is, where they are several views of each.
    """
    extra = anomalies[:0] if pseudo_labelled is None else pseudo_labelled
    features = np.concatenate([anomalies, extra, normals]).astype(np.float64)
    if gain is not None:
        features *= gain
    centre = features.mean(axis=0)  # the optimum is the same, the solver is there in a quarter of the steps
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
    anomalies: Float32[np.ndarray, "a d"],
    normals: Float32[np.ndarray, "n d"],
    scaling: Scaling,
    *,
    inverse_regularisation: float,
) -> Float64[np.ndarray, " d"]:
    """The gain of each column: its scale, and how far its view is to be trusted.

    A view by itself ranks the labelled images out of fold; the views share one length in proportion to their average
    precision at that. Which of them tells an anomaly is another one for a texture than for an object, and the labels
    at hand say it. With a single anomaly or normal they cannot, and all views count the same.

    Args:
        anomalies: features of the labelled anomalies.
        normals: features of the labelled normals.
        scaling: the views.
        inverse_regularisation: see `fit_logistic`.
    """
    gain = scaling.scale.astype(np.float64)
    folds = min(FOLDS, len(anomalies), len(normals))
    if len(scaling.blocks) == 1:
        return gain
    trust = np.ones(len(scaling.blocks))
    if folds > 1:
        rows = np.concatenate([anomalies, normals]) * scaling.scale
        targets = np.repeat([True, False], [len(anomalies), len(normals)])
        own = (_out_of_fold(rows[:, part], targets, folds, inverse_regularisation) for part in scaling.blocks)
        trust[:] = [average_precision_score(targets, logits) for logits in own]
    for part, share in zip(scaling.blocks, trust / np.linalg.norm(trust), strict=True):
        gain[part] *= share
    return gain


def out_of_fold_ap(
    anomalies: Float32[np.ndarray, "a d"],
    normals: Float32[np.ndarray, "n d"],
    *,
    inverse_regularisation: float,
    gain: Float64[np.ndarray, " d"],
) -> float:
    """Average precision of labelled images that are ranked by probes which have not seen them; NaN if one is alone.

    Args:
        anomalies: features of the labelled anomalies.
        normals: features of the labelled normals.
        inverse_regularisation: see `fit_logistic`.
        gain: see `fit_logistic`.
    """
    judged = _judged(anomalies, normals, inverse_regularisation, gain)
    return math.nan if judged is None else float(average_precision_score(judged[1], judged[0]))


def _judged(
    anomalies: Float32[np.ndarray, "a d"],
    normals: Float32[np.ndarray, "n d"],
    c: float,
    gain: Float64[np.ndarray, " d"] | None,
) -> tuple[Float64[np.ndarray, " m"], Bool[np.ndarray, " m"]] | None:
    """Log-odds out of fold, and which are of anomalies; None where one image of a class is all there is."""
    folds = min(FOLDS, len(anomalies), len(normals))
    if folds < 2:
        return None
    rows = np.concatenate([anomalies, normals])
    targets = np.repeat([True, False], [len(anomalies), len(normals)])
    return _out_of_fold(rows if gain is None else rows * gain.astype(np.float32), targets, folds, c), targets


def _out_of_fold(
    rows: Float32[np.ndarray, "n d"], targets: Bool[np.ndarray, " n"], folds: int, c: float
) -> Float64[np.ndarray, " n"]:
    """Log-odds of images, each by a probe that has not seen it."""
    if len(rows) < rows.shape[1]:  # in as many dimensions as there are images the fits are the same
        rows = np.asarray(np.linalg.qr(rows.T, mode="r")).T
    logits = np.empty(len(rows))
    for train, test in StratifiedKFold(folds, shuffle=True, random_state=0).split(rows, targets):
        seen, known = rows[train], targets[train]
        logits[test] = fit_logistic(seen[known], seen[~known], inverse_regularisation=c).logits(rows[test])
    return logits
