"""Watches over a fine-tuning: collects what the checks need, tells what they find, and has the probe ready."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from anomalymatch.active.guard import (
    GUARDS,
    Scores,
    check_average,
    check_finite,
    check_out_of_fold,
    check_ranking,
    check_stop,
    check_training,
    out_of_fold,
)
from anomalymatch.active.learner import probe_of
from anomalymatch.active.steps import StepListener
from anomalymatch.data.labels import training_ids
from anomalymatch.errors import ConfigError
from anomalymatch.models.embedding import Embedding
from anomalymatch.models.network import Network
from anomalymatch.models.probe import Probe, ProbeSpec, out_of_fold_ap, trusted
from anomalymatch.ranking import Ranking

logger = logging.getLogger(__name__)
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
        self._probe = probe_of(self.embedding, labels, pool, self.spec)
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
            self._probe = probe_of(self.embedding, labels, pool, self.spec)
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
        features = self.embedding.views.features
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
        views, c = self.embedding.views, self.spec.inverse_regularisation
        anomalies, normals = (
            views.features.take(id_ for id_ in ids if id_ in views.features) for ids in training_ids(labels)
        )
        gain = trusted(anomalies, normals, views.scaling, inverse_regularisation=c)
        return out_of_fold_ap(anomalies, normals, inverse_regularisation=c, gain=gain)

    def _out_of_fold(
        self, labels: Mapping[str, str], pool: Sequence[str], retrain: Retrain, seed: int
    ) -> dict[int, float]:
        features = self.embedding.views.features

        def train_and_score(learnt: dict[str, str], held: list[str]) -> dict[int, Scores]:
            scores = {0: probe_of(self.embedding, learnt, pool, self.spec).logits(features.take(held))}
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
