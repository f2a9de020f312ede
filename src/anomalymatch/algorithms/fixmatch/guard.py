"""What tells that a fine-tuning did harm: pure checks, each of which gives its findings as sentences.

The thresholds are far from what a sound training gives; a finding is worth a look, not a proof.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float64
from scipy.special import expit
from scipy.stats import spearmanr

from anomalymatch.algorithms.lightning import StepListener
from anomalymatch.algorithms.probe.learner import fit_probe
from anomalymatch.algorithms.probe.regression import Probe, ProbeSpec, column_gain, out_of_fold_ap
from anomalymatch.backbones.embedding import Embedding
from anomalymatch.backbones.network import Network
from anomalymatch.data.labels import training_ids
from anomalymatch.errors import ConfigError, TrainingError
from anomalymatch.evaluation.metrics import ranking_metrics
from anomalymatch.ranking import Ranking

logger = logging.getLogger(__name__)

GUARDS = ("warn", "fallback", "retrain", "off")
COLD_PASS, PROBE_PASS = 0.5, 0.5
"""Share of pseudo-labels above the cut at step 0: of a cold head, and as anomaly, beside the candidates, of a head set
to the probe."""
ONE_CLASS = 0.9
"""Of what passes in the last quarter of the steps, the share of anomalies that is a collapse."""
FEWEST_STEPS = 5
"""In a quarter. If half of the steps let an anomaly pass before, none in five is unlikely (2^-5)."""
CORRELATION, SPREAD = 0.2, 1e-4
"""Spearman's correlation with the probe, and the standard deviation of the logits, that a ranking should have."""
HIGH_SHARE, RISE = 0.5, 2.0
"""Share of scores above 1/2, and by how much it exceeds the probe's, that is a drift."""
OLD_WEIGHTS = 0.2
FOLDS, PER_FOLD = 2, 2
"""Folds of the labels, and the fewest anomalies and normals in each."""

Scores = Float64[np.ndarray, " n"]
TrainAndScore = Callable[[dict[str, str], list[str]], Mapping[int, Scores]]
"""Learns from labels and scores other images, by the network after so many steps; after none, it is the probe."""


def check_training(
    rows: Sequence[Mapping[str, float]], *, cold: bool, cuts: bool = True, candidates: float = 0.0
) -> list[str]:
    """Look at what a training logged.

    Args:
        rows: one a step, with `loss`, `pass_rate` and `pass_rate_anomaly`; empty tells nothing.
        cold: whether the head began untrained.
        cuts: whether a fixed threshold decides what passes. What adapts lets all pass at first, by design.
        candidates: share of a batch that was chosen because it looks like anomalies, and may pass as such.
    """
    return [finding for finding in (_start(rows, cold, cuts, candidates), _collapse(rows)) if finding]


def check_average(decay: float, steps: int) -> list[str]:
    """Whether the average still is what it began with: after k steps it holds decay^k of that.

    That is no harm where it began with the probe; from a cold head it is why nothing was learnt.

    Args:
        decay: of the average that scores.
        steps: that it has followed, over all cycles that it was carried through.
    """
    old = decay**steps
    if old <= OLD_WEIGHTS:
        return []
    return [f"the average that scores lags behind: {old:.0%} of it are the weights from before the first step"]


def check_finite(scores: Scores) -> list[str]:
    """Whether there is a number for every image."""
    bad = int(np.count_nonzero(~np.isfinite(scores)))
    return [f"{bad:,} of {scores.size:,} scores are not finite"] if bad else []


def require_finite(ranking: Ranking) -> None:
    """Refuse what cannot be ranked.

    Raises:
        TrainingError: with what to do.
    """
    for finding in check_finite(ranking.logits):
        raise TrainingError(
            f"{finding}: the training has diverged. Choose a lower algorithm.learner.optimizer.lr, or "
            f"algorithm.learner.guard=fallback, which keeps the probe's ranking then"
        )


def check_ranking(network: Scores, probe: Scores) -> list[str]:
    """Compare the scores of a network with those of the probe that it should improve on.

    Args:
        network: log-odds, shape (n,).
        probe: those of the same images, shape (n,).
    """
    if (bad := check_finite(network)) or network.size < 2:
        return bad
    if float(np.std(network)) < SPREAD:
        return ["all scores are the same"]
    findings = []
    if np.ptp(probe) > 0 and (correlation := float(spearmanr(network, probe).statistic)) < CORRELATION:
        findings.append(f"the ranking has little in common with the probe's (rank correlation {correlation:.2f})")
    ours, theirs = (float(np.mean(expit(logits) > 0.5)) for logits in (network, probe))
    if ours > HIGH_SHARE and ours > RISE * theirs:
        findings.append(f"the scores have drifted: {ours:.0%} are above 1/2, of the probe's {theirs:.0%}")
    return findings


def check_out_of_fold(network: float, probe: float) -> list[str]:
    """Compare average precisions out of fold; where one is not known, nothing is found."""
    if network < probe:
        return [f"out of fold, its average precision is {network:.2f}, below the probe's {probe:.2f}"]
    return []


def check_stop(aps: Mapping[int, float]) -> tuple[int, list[str]]:
    """After how many steps a training ranks best: of equals, the most. Unless that is known, none may stay.

    Args:
        aps: average precision by steps, as `out_of_fold` has it.
    """
    if not aps:
        return 0, [
            f"fewer than {FOLDS * PER_FOLD} anomalies or normals are labelled: too few to compare with the probe"
        ]
    best = max(aps, key=lambda steps: (aps[steps], steps))
    others = max(ap for steps, ap in aps.items() if steps)
    return best, [] if best else check_out_of_fold(others, aps[0])


def out_of_fold(labels: Mapping[str, str], seed: int, train_and_score: TrainAndScore) -> dict[int, float]:
    """Average precision on labels that were not learnt from, by steps; empty where there are too few.

    Each half of the labels is ranked by what learnt from the other. With few anomalies that is a rough measure (with
    five, one image that changes places moves it by a tenth); it is the one at hand, and errs towards neither side.

    Args:
        labels: label by image id.
        seed: of the halves.
        train_and_score: see `TrainAndScore`; scores that are not finite count as the lowest.
    """
    sides = training_ids(labels)
    if min(map(len, sides)) < FOLDS * PER_FOLD:
        return {}
    rng = np.random.default_rng([seed, 0x0F0])
    fold = {id_: place % FOLDS for ids in sides for place, id_ in enumerate(rng.permutation(ids).tolist())}
    aps: dict[int, float] = {}
    for number in range(FOLDS):
        held = [id_ for id_ in fold if fold[id_] == number]
        learnt = {id_: labels[id_] for id_ in fold if fold[id_] != number}
        truth = np.isin(held, sides[0])
        for steps, scores in train_and_score(learnt, held).items():
            aps[steps] = aps.get(steps, 0.0) + ranking_metrics(_finite(scores), truth).ap / FOLDS
    return aps


def _start(rows: Sequence[Mapping[str, float]], cold: bool, cuts: bool, candidates: float) -> str:
    if not rows:
        return ""
    passed, as_anomaly = rows[0].get("pass_rate", 0.0), rows[0].get("pass_rate_anomaly", 0.0)
    if cold and cuts and passed > COLD_PASS:
        return f"{passed:.0%} of the pseudo-labels pass at the first step, of a head that knows nothing yet"
    if not cold and as_anomaly > candidates + (1.0 - candidates) * PROBE_PASS:
        return f"{as_anomaly:.0%} of the first batch pass as anomalies"
    return ""


def _collapse(rows: Sequence[Mapping[str, float]]) -> str:
    losses = [row["loss"] for row in rows if "loss" in row]
    broken = next((step for step, loss in enumerate(losses) if not math.isfinite(loss)), None)
    if broken is not None:
        return f"the loss is not finite from step {broken} on"
    quarter = -(-len(rows) // 4)
    last = _passed(rows[len(rows) - quarter :])
    if last[1] > ONE_CLASS * last[0]:
        return f"the pseudo-labels have collapsed: {last[1] / last[0]:.0%} of those that pass are anomalies"
    with_anomaly = sum(row.get("pass_rate_anomaly", 0.0) > 0 for row in rows[:quarter])
    if last[1] == 0 < last[0] and with_anomaly > quarter / 2 and quarter >= FEWEST_STEPS:
        return "the pseudo-labels have collapsed: none that passes is an anomaly any more"
    return ""


def _passed(rows: Sequence[Mapping[str, float]]) -> tuple[float, float]:
    """Mean share that passes, and that passes as anomaly."""
    if not rows:
        return 0.0, 0.0
    passed, as_anomaly = ([row.get(key, 0.0) for row in rows] for key in ("pass_rate", "pass_rate_anomaly"))
    return float(np.mean(passed)), float(np.mean(as_anomaly))


def _finite(scores: Scores) -> Scores:
    return np.where(np.isfinite(scores), scores, -np.inf)


KEPT = "the ranking of the probe is kept"
ENOUGH = 50
"""Images from which two rankings can be compared."""
Retrain = Callable[[dict[str, str], Sequence[str]], Mapping[int, Ranking]]
"""Trains anew on these labels, and ranks these images, by steps."""
FALLS_BACK = ("fallback", "retrain")


class Watch:
    """What one learner is guarded by.

    Args:
        mode: `warn` of signs of harm; `fallback` to the probe where there are any; `retrain` on halves of the labels
            before, too, to find when to stop; or `off`.
        embedding: the backbone and the images, for the probe.
        spec: how the probe is fitted.
        has_features: whether the features of the archive are there anyway. Where they are not, `warn` leaves out what
            needs them.

    Raises:
        ConfigError: if there is no such mode.
    """

    def __init__(self, mode: str, embedding: Embedding, spec: ProbeSpec, *, has_features: bool) -> None:
        if mode not in GUARDS:
            raise ConfigError(f"algorithm.learner.guard is {mode!r}: choose one of {', '.join(GUARDS)}")
        self.mode, self.embedding, self.spec = mode, embedding, spec
        self._compares = mode in FALLS_BACK or (mode == "warn" and has_features)
        self.notes: list[str] = []
        """What was found since the last training began, as sentences."""
        self._rows: list[dict[str, float]] = []
        self._probe: Probe | None = None
        self._cycle, self._has_ranked = 0, True

    def listen(self, listener: StepListener, cycle: int) -> StepListener:
        """A training begins: forget the last one, and keep the rows of this one on their way to `listener`."""
        self.notes, self._rows, self._probe, self._cycle, self._has_ranked = [], [], None, cycle, False
        if self.mode == "off":
            return listener

        def keep(row: dict[str, float]) -> None:
            self._rows.append(dict(row))
            listener(row)

        return keep

    def stop(
        self,
        labels: Mapping[str, str],
        pool: Sequence[str],
        retrain: Retrain,
        *,
        seed: int,
        steps: int,
    ) -> int:
        """After how many steps a training is to stop; none where the probe is to stay.

        Args:
            labels: to learn from.
            pool: unlabelled images.
            retrain: trains on other labels, to compare out of fold.
            seed: of the folds.
            steps: of a whole training.
        """
        if self.mode != "retrain":
            return steps
        self._probe = fit_probe(self.embedding, labels, pool, self.spec)
        aps = self._out_of_fold(labels, pool, retrain, seed)
        told = ", ".join(f"{ap:.2f} after {n} steps" for n, ap in sorted(aps.items()))
        logger.info("Out of fold, the average precision is %s", told or "unknown")
        best, findings = check_stop(aps)
        self._tell(findings)
        return best

    def finds_harm(
        self,
        labels: Mapping[str, str],
        pool: Sequence[str],
        *,
        refitted: float,
        cold: bool,
        cuts: bool,
        candidates: float,
        decay: float,
        steps: int,
    ) -> bool:
        """Check a training that is over; whether to fall back to the probe.

        Args:
            labels: what it learnt from.
            pool: unlabelled images.
            refitted: what `refit_head` gave; NaN where there is no such head.
            cold: whether the head began untrained.
            cuts: whether a fixed threshold lets pseudo-labels pass; what adapts lets all pass at first, by design.
            candidates: share of a batch that was chosen because it looks like anomalies.
            decay: of the average that scores.
            steps: that the average has followed.
        """
        if self.mode == "off":
            return False
        if self._compares and self._probe is None:
            self._probe = fit_probe(self.embedding, labels, pool, self.spec)
        self._tell(check_average(decay, steps), grave=False)
        findings = check_training(self._rows, cold=cold, cuts=cuts, candidates=candidates)
        if self._compares and not math.isnan(refitted):
            findings += check_out_of_fold(refitted, self._frozen(labels))
        return self._tell(findings)

    def finds_drift(self, ranking: Ranking) -> bool:
        """Check the first ranking after a training; whether to fall back to the probe."""
        if self._has_ranked or self._probe is None:
            return False
        if bad := check_finite(ranking.logits):
            return self._tell(bad)
        if len(ranking) < ENOUGH:
            return False
        self._has_ranked = True
        features = self.embedding.probe_features
        known = [i for i, id_ in enumerate(ranking.ids) if id_ in features]
        if len(known) < ENOUGH:
            return False
        logits = features.project(self._probe.coefficients) + self._probe.intercept
        at = features.positions([ranking.ids[i] for i in known])
        return self._tell(check_ranking(ranking.logits[known], logits[at].astype(np.float64)))

    def probe_network(self) -> Network:
        """The pretrained backbone with the probe as its head: it ranks as the probe does."""
        if self._probe is None:
            raise RuntimeError("there is no probe to fall back to before a training")
        self._has_ranked = True
        network = self.embedding.network(normalised=True)
        network.head.set_probe(torch.from_numpy(self._probe.coefficients), self._probe.intercept)
        return network

    def _frozen(self, labels: Mapping[str, str]) -> float:
        """What `refit_head` gives, on the features from before the training."""
        features, c = self.embedding.probe_features, self.spec.inverse_regularisation
        anomalies, normals = (features.take(id_ for id_ in ids if id_ in features) for ids in training_ids(labels))
        gain = column_gain(anomalies, normals, features.scaling, inverse_regularisation=c)
        return out_of_fold_ap(anomalies, normals, inverse_regularisation=c, gain=gain)

    def _out_of_fold(
        self, labels: Mapping[str, str], pool: Sequence[str], retrain: Retrain, seed: int
    ) -> dict[int, float]:
        features = self.embedding.probe_features

        def train_and_score(learnt: dict[str, str], held: list[str]) -> dict[int, Scores]:
            scores = {0: fit_probe(self.embedding, learnt, pool, self.spec).logits(features.take(held))}
            for steps, ranking in retrain(learnt, held).items():
                places = dict(zip(ranking.ids, ranking.logits.tolist(), strict=True))
                scores[steps] = np.array([places[id_] for id_ in held])
            return scores

        known = {id_: label for id_, label in labels.items() if id_ in features}
        return out_of_fold(known, seed, train_and_score)

    def _tell(self, findings: Sequence[str], *, grave: bool = True) -> bool:
        falls_back = grave and self.mode in FALLS_BACK and bool(findings)
        for finding in findings:
            note = f"{finding}: {KEPT}" if falls_back else finding
            logger.warning("Training, cycle %d: %s", self._cycle, note)
            self.notes.append(note)
        return falls_back
