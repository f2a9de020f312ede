"""Guard of FixMatch trainings: checks for harm, each of which returns findings as sentences, and the fallback.

The default limits are far from the values of a sound training; a finding is worth a look, not a proof.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
import scipy
from jaxtyping import Float64
from scipy.special import expit

from anomalymatch.algorithms.probe.learner import probe_network, rank_by_probe
from anomalymatch.algorithms.probe.regression import SelfTraining
from anomalymatch.backbones.embedding import Embedding
from anomalymatch.backbones.network import Network
from anomalymatch.checks import check_choice, check_range
from anomalymatch.data.labels import training_ids
from anomalymatch.errors import TrainingError
from anomalymatch.evaluation.metrics import ranking_metrics
from anomalymatch.ranking import Ranking

logger = logging.getLogger(__name__)

MODES = ("warn", "fallback", "retrain", "off")
KEPT = "the ranking of the probe is kept"

StepRows = Sequence[Mapping[str, float]]
ScoreArray = Float64[np.ndarray, " n"]
TrainAndScore = Callable[[dict[str, str], list[str]], Mapping[int, ScoreArray]]
"""Function of the labels to learn from and of the images to score; returns their logits by number of training steps.

The logits after 0 steps are those of the probe.
"""


@dataclass(frozen=True)
class GuardLimits:
    """Limits of the guard's checks: the keys of `guard_limits` in `conf/algorithm/fixmatch.yaml`."""

    cold_pass_rate: float
    anomaly_pass_rate: float
    collapse_rate: float
    collapse_steps: int
    correlation: float
    spread: float
    high_share: float
    high_ratio: float
    initial_weights: float
    folds: int
    labels_per_fold: int
    ranked_images: int
    checkpoints: int

    def __post_init__(self) -> None:
        lowest = {"folds": 2, "labels_per_fold": 1, "checkpoints": 1, "correlation": -1}
        for field in fields(self):
            key = f"algorithm.learner.guard_limits.{field.name}"
            check_range(key, getattr(self, field.name), low=lowest.get(field.name, 0))


def check_steps(
    rows: StepRows, limits: GuardLimits, *, cold: bool, fixed_threshold: bool = True, candidates: float = 0.0
) -> list[str]:
    """Check the logged steps of a training: its first pseudo-labels, its losses and its last pseudo-labels.

    Args:
        rows: one row a step with `loss`, `pass_rate` and `pass_rate_anomaly`; no rows give no findings.
        limits: see `GuardLimits`.
        cold: True if the head was untrained.
        fixed_threshold: False if the threshold adapts: then all pseudo-labels pass at first, by design.
        candidates: share of a batch drawn from likely anomalies, which may pass as such.
    """
    if not rows:
        return []
    found = (_check_first_step(rows, limits, cold, fixed_threshold, candidates), _check_collapse(rows, limits))
    return [finding for finding in found if finding]


def check_average(decay: float, steps: int, limits: GuardLimits) -> list[str]:
    """Check how much of the initial weights is left in the average: decay^k after k steps, over all cycles.

    That is no harm if the average began with the probe; from a cold head it explains why nothing was learnt.
    """
    old = decay**steps
    if old <= limits.initial_weights:
        return []
    return [f"the average that scores lags behind: {old:.0%} of it are the weights from before the first step"]


def check_finite(scores: ScoreArray) -> list[str]:
    """Check that every score is finite."""
    bad = int(np.count_nonzero(~np.isfinite(scores)))
    return [f"{bad:,} of {scores.size:,} scores are not finite"] if bad else []


def require_finite(ranking: Ranking) -> None:
    """Refuse a ranking with scores that are not finite.

    Raises:
        TrainingError: with what to do.
    """
    for finding in check_finite(ranking.logits):
        raise TrainingError(
            f"{finding}: the training has diverged. Choose a lower algorithm.learner.optimizer.lr, or "
            f"algorithm.learner.guard=fallback, which then keeps the probe's ranking"
        )


def check_scores(network: ScoreArray, probe: ScoreArray, limits: GuardLimits) -> list[str]:
    """Compare the logits of a network with those of the probe for the same images."""
    if (bad := check_finite(network)) or network.size < 2:
        return bad
    if float(np.std(network)) < limits.spread:
        return ["all scores are the same"]
    findings = []
    if (
        np.ptp(probe) > 0
        and (correlation := float(scipy.stats.spearmanr(network, probe).statistic)) < limits.correlation
    ):
        findings.append(f"the ranking has little in common with the probe's (rank correlation {correlation:.2f})")
    ours, theirs = (float(np.mean(expit(logits) > 0.5)) for logits in (network, probe))
    if ours > limits.high_share and ours > limits.high_ratio * theirs:
        findings.append(f"the scores have drifted: {ours:.0%} are above 1/2, of the probe's {theirs:.0%}")
    return findings


def check_out_of_fold(network: float, probe: float) -> list[str]:
    """Compare average precisions by cross-validation; NaN gives no finding."""
    if network < probe:
        return [f"out of fold, its average precision is {network:.2f}, below the probe's {probe:.2f}"]
    return []


def check_stop(aps: Mapping[int, float], limits: GuardLimits) -> tuple[int, list[str]]:
    """Choose the number of steps with the best `out_of_fold` precision, the larger of equals; 0 if it is unknown."""
    if not aps:
        fewest = limits.folds * limits.labels_per_fold
        return 0, [f"fewer than {fewest} anomalies or normals are labelled: too few to compare with the probe"]
    best = max(aps, key=lambda steps: (aps[steps], steps))
    others = max(ap for steps, ap in aps.items() if steps)
    return best, [] if best else check_out_of_fold(others, aps[0])


def out_of_fold(
    labels: Mapping[str, str], seed: int, train_and_score: TrainAndScore, limits: GuardLimits
) -> dict[int, float]:
    """Compute the average precision by number of steps on labels that were not learnt from; empty if there are too few.

    Each fold of the labels is ranked by a training on the others. With few anomalies that is a rough measure (with
    five, one image that changes places moves it by a tenth), but an unbiased one. Scores that are not finite count as
    the lowest.
    """
    sides = training_ids(labels)
    if min(map(len, sides)) < limits.folds * limits.labels_per_fold:
        return {}
    rng = np.random.default_rng([seed, 0x0F0])
    fold = {id_: place % limits.folds for ids in sides for place, id_ in enumerate(rng.permutation(ids).tolist())}
    aps: dict[int, float] = {}
    for number in range(limits.folds):
        held = [id_ for id_ in fold if fold[id_] == number]
        learnt = {id_: labels[id_] for id_ in fold if fold[id_] != number}
        truth = np.isin(held, sides[0])
        for steps, scores in train_and_score(learnt, held).items():
            finite = np.where(np.isfinite(scores), scores, -np.inf)
            aps[steps] = aps.get(steps, 0.0) + ranking_metrics(finite, truth).ap / limits.folds
    return aps


def _check_first_step(rows: StepRows, limits: GuardLimits, cold: bool, fixed_threshold: bool, candidates: float) -> str:
    passed, as_anomaly = rows[0].get("pass_rate", 0.0), rows[0].get("pass_rate_anomaly", 0.0)
    if cold and fixed_threshold and passed > limits.cold_pass_rate:
        return f"{passed:.0%} of the pseudo-labels pass at the first step, although the head is untrained"
    if not cold and as_anomaly > candidates + (1.0 - candidates) * limits.anomaly_pass_rate:
        return f"{as_anomaly:.0%} of the first batch pass as anomalies"
    return ""


def _check_collapse(rows: StepRows, limits: GuardLimits) -> str:
    losses = [row["loss"] for row in rows if "loss" in row]
    broken = next((step for step, loss in enumerate(losses) if not math.isfinite(loss)), None)
    if broken is not None:
        return f"the loss is not finite from step {broken} on"
    quarter = -(-len(rows) // 4)
    passed, as_anomaly = (
        float(np.mean([row.get(key, 0.0) for row in rows[-quarter:]])) for key in ("pass_rate", "pass_rate_anomaly")
    )
    if as_anomaly > limits.collapse_rate * passed:
        return f"the pseudo-labels have collapsed: {as_anomaly / passed:.0%} of those that pass are anomalies"
    with_anomaly = sum(row.get("pass_rate_anomaly", 0.0) > 0 for row in rows[:quarter])
    if as_anomaly == 0 < passed and with_anomaly > quarter / 2 and quarter >= limits.collapse_steps:
        return "the pseudo-labels have collapsed: none that passes is an anomaly any more"
    return ""


class TrainingGuard:
    """Guard of one learner: it checks each training and ranking, and falls back to the probe where they harm.

    Args:
        mode: `warn` reports findings; `fallback` also ranks by the probe then; `retrain` first trains on folds of the
            labels to choose the number of steps, and falls back too; `off` checks nothing.
        limits: see `GuardLimits`.
        embedding: the backbone and the images.
        has_features: True if features of all images are computed anyway. If not, `warn` skips checks that need them.

    Raises:
        ConfigError: if the mode is unknown.
    """

    def __init__(self, mode: str, limits: GuardLimits, embedding: Embedding, *, has_features: bool) -> None:
        check_choice("algorithm.learner.guard", mode, MODES)
        self.mode, self.limits, self.embedding = mode, limits, embedding
        self.falls_back = mode in ("fallback", "retrain")
        self.needs_probe = self.falls_back or (mode == "warn" and has_features)
        self.notes: list[str] = []
        """Findings since the last training began, as sentences."""
        self._probe: SelfTraining | None = None
        self._cycle, self._has_checked_ranking = 0, True

    def begin(self, cycle: int, probe: SelfTraining | None) -> None:
        """Begin a training and forget the findings of the last one.

        `probe` is fitted on the same labels and the pretrained features; None if `needs_probe` is False.
        """
        self.notes, self._cycle, self._has_checked_ranking = [], cycle, False
        self._probe = probe if self.needs_probe else None

    def choose_steps(self, labels: Mapping[str, str], train_and_score: TrainAndScore, *, seed: int, steps: int) -> int:
        """Return the number of steps to train: `steps`, or in mode `retrain` the best one, 0 to keep the probe."""
        if self.mode != "retrain":
            return steps
        known = {id_: label for id_, label in labels.items() if id_ in self.embedding.probe_features}
        aps = out_of_fold(known, seed, train_and_score, self.limits)
        told = ", ".join(f"{ap:.2f} after {n} steps" for n, ap in sorted(aps.items()))
        logger.info("Out of fold, the average precision is %s", told or "unknown")
        best, findings = check_stop(aps, self.limits)
        self._report(findings)
        return best

    def check_training(
        self,
        rows: StepRows,
        *,
        average_precision: float,
        cold: bool,
        fixed_threshold: bool,
        candidates: float,
        decay: float,
        steps: int,
    ) -> bool:
        """Check a finished training; return True to fall back to the probe.

        `average_precision` is the result of `refit_head`. For the others see `check_steps` and `check_average`.
        """
        if self.mode == "off":
            return False
        self._report(check_average(decay, steps, self.limits), grave=False)
        findings = check_steps(rows, self.limits, cold=cold, fixed_threshold=fixed_threshold, candidates=candidates)
        if self._probe is not None and not math.isnan(average_precision):
            findings += check_out_of_fold(average_precision, self._probe.average_precision)
        return self._report(findings)

    def check_ranking(self, ranking: Ranking) -> bool:
        """Check the first ranking after a training; return True to fall back to the probe."""
        if self._has_checked_ranking or self._probe is None:
            return False
        if bad := check_finite(ranking.logits):
            return self._report(bad)
        fewest = self.limits.ranked_images
        if len(ranking) < fewest:
            return False
        self._has_checked_ranking = True
        probe = rank_by_probe(self.embedding.probe_features, self._probe.probe, ranking.ids)
        if len(probe) < fewest:
            return False
        return self._report(check_scores(ranking.restrict(probe.ids).logits, probe.logits, self.limits))

    def fallback_network(self) -> Network:
        """Build the pretrained network with the probe as its head."""
        if self._probe is None:
            raise RuntimeError("there is no probe to fall back to before a training")
        self._has_checked_ranking = True
        return probe_network(self.embedding, self._probe.probe)

    def _report(self, findings: Sequence[str], *, grave: bool = True) -> bool:
        falls_back = grave and self.falls_back and bool(findings)
        for finding in findings:
            note = f"{finding}: {KEPT}" if falls_back else finding
            logger.warning("Training, cycle %d: %s", self._cycle, note)
            self.notes.append(note)
        return falls_back
