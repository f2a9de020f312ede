"""Learner of FixMatch: it starts from the probe, fine-tunes the backbone, and ranks by the mean with the probe."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float32
from pytorch_lightning import Trainer
from torch.optim import Optimizer

from anomalymatch.algorithms.augmentation.view import Augmentation
from anomalymatch.algorithms.base import (
    GUARD,
    WEIGHTS,
    StepListener,
    Truth,
    derive_seed,
    ignore_step,
    require_fitted,
)
from anomalymatch.algorithms.fixmatch.batches import BatchSpec, MixedBatches
from anomalymatch.algorithms.fixmatch.guard import GuardLimits, ScoreArray, TrainingGuard, require_finite
from anomalymatch.algorithms.fixmatch.module import FixMatchSpec
from anomalymatch.algorithms.fixmatch.training import Recipe, Snapshots, Trained, spawns_processes, train
from anomalymatch.algorithms.lightning import check_optimizer
from anomalymatch.algorithms.probe.learner import fit_probe, probe_network, probe_of, rank_by_probe
from anomalymatch.algorithms.probe.regression import Probe, ProbeSpec, SelfTraining, self_train
from anomalymatch.backbones.checkpoint import describe_input, load_description, load_network, save_network
from anomalymatch.backbones.embedding import Embedding
from anomalymatch.backbones.features import normalise_last
from anomalymatch.backbones.network import Network, anomaly_logit
from anomalymatch.backbones.tta import reoriented
from anomalymatch.checks import check_choice, check_range
from anomalymatch.data.labels import ids_labelled
from anomalymatch.data.stream import collect, stream
from anomalymatch.errors import ConfigError
from anomalymatch.files import write_text
from anomalymatch.progress import Advance, ignore_progress, progress
from anomalymatch.ranking import Ranking
from anomalymatch.types import Label

STARTS = ("probe", "cold")
STUDENT = "student.safetensors"
SCALE_IMAGES = 256
"""Images of the pool on which log-odds are brought to the same scale before they are averaged."""


class FixMatchLearner:
    """Learner that fine-tunes the backbone by FixMatch and ranks by its moving average and the probe.

    The settings are the keys of `conf/algorithm/fixmatch.yaml`; `optimizer` and `trainer` are partials. `truth` serves
    only the logged precision of pseudo-labels.
    """

    needs_labels, is_detector, trains = True, False, True

    def __init__(
        self,
        embedding: Embedding,
        *,
        seed: int,
        start: str,
        carry_over: bool,
        trainable_groups: int | None,
        probe: ProbeSpec,
        start_rounds: int | None,
        refit: bool,
        refit_confidence: float | None,
        average_with_probe: bool,
        guard: str,
        guard_limits: GuardLimits,
        loss: FixMatchSpec,
        batch: BatchSpec,
        optimizer: Callable[..., Optimizer],
        augmentation: Augmentation,
        trainer: Callable[..., Trainer],
        truth: Truth | None = None,
    ) -> None:
        check_choice("algorithm.learner.start", start, STARTS)
        wanted = [name for name, on in (("refit", refit), ("average_with_probe", average_with_probe)) if on]
        if wanted and start != "probe":
            off = " and ".join(f"algorithm.learner.{name}=false" for name in wanted)
            raise ConfigError(f"algorithm.learner.start={start} needs {off}: a cold head has other features")
        check_range("algorithm.learner.start_rounds", start_rounds, low=0, null=True)
        check_range("algorithm.learner.trainable_groups", trainable_groups, low=0, null=True)
        check_optimizer(optimizer)
        self.embedding, self.seed, self.truth = embedding, seed, truth
        self.start, self.carry_over, self.refit = start, carry_over, refit
        self.average_with_probe = average_with_probe
        self.probe, self.refit_probe = probe, refit_spec(probe, refit_confidence)
        self.start_rounds = probe.rounds if start_rounds is None else min(start_rounds, probe.rounds)
        self.batch, self.augmentation = batch, augmentation
        self.recipe = Recipe(loss, optimizer, trainer, trainable_groups, embedding.inference)
        self.guard = TrainingGuard(guard, guard_limits, embedding, has_features=start == "probe")
        self.on_step: StepListener = ignore_step
        self._spawns = spawns_processes(trainer, batch)
        self._student: Network | None = None
        self._average: Network | None = None
        self._updates = 0
        """Updates of the average since it was initialised."""

    def fit(self, labels: Mapping[str, str], *, pool: Sequence[str] | None = None, cycle: int = 1) -> "FixMatchLearner":
        """See `Learner.fit`."""
        pool = [id_ for id_ in (self.embedding.default_ids if pool is None else pool) if id_ not in labels]
        carried = self.carry_over and self._student is not None
        probe = self._fit_probe(labels, pool, carried)
        self.guard.begin(cycle, probe)
        score = partial(self._train_and_score, pool=pool, cycle=cycle)
        seed = derive_seed(self.seed, cycle)
        steps = self.guard.choose_steps(labels, score, seed=seed, steps=self.batch.iterations)
        if not steps:
            self._fall_back()
            return self
        trained, average_precision = self._train(
            labels, pool, cycle, probe, carried=carried, steps=steps, on_step=self.on_step
        )
        self._average, self._student = trained.average, trained.student
        self._updates = steps + (self._updates if carried else 0)
        if self.guard.check_training(
            trained.rows,
            average_precision=average_precision,
            cold=self.start == "cold" and not carried,
            fixed_threshold=self.recipe.loss.has_fixed_threshold,
            candidates=self.batch.candidate_share if self.batch.wants_candidates else 0.0,
            decay=self.recipe.loss.ema_decay,
            steps=self._updates,
        ):
            self._fall_back()
        elif self.average_with_probe:
            assert probe is not None
            self._average.second = self._scaled_probe(probe.probe, self._average, pool, derive_seed(self.seed, cycle))
        return self

    def rank(self, ids: Sequence[str] | None = None) -> Ranking:
        """See `Learner.rank`."""
        ranking = self._rank(ids)
        if self.guard.check_ranking(ranking):
            self._fall_back()
            ranking = self._rank(ids)
        require_finite(ranking)
        second = require_fitted(self._average).second
        return ranking if second is None else self._averaged(ranking, probe_of(second))

    def save(self, folder: Path) -> None:
        """Save the average, the student if the next cycle continues from it, and the findings of the guard."""
        described = describe_input(self.embedding.source)
        save_network(require_fitted(self._average), folder / WEIGHTS, algorithm="fixmatch", input=described)
        if self.carry_over and self._student is not None:
            name, steps = "fixmatch, the student", self._updates
            save_network(self._student, folder / STUDENT, algorithm=name, input=described, steps=steps)
        if self.guard.notes:
            write_text(folder / GUARD, "\n".join(self.guard.notes) + "\n")

    def restore(self, folder: Path) -> None:
        """See `Learner.restore`."""
        self._average = load_network(folder / WEIGHTS)
        student = folder / STUDENT
        has_student = self.carry_over and student.exists()  # there is none after a fallback
        self._student = load_network(student) if has_student else None
        self._updates = int(load_description(student).get("steps", 0)) if has_student else 0

    def _needs_start_probe(self, carried: bool) -> bool:
        return self.batch.wants_candidates or (self.start == "probe" and not carried)

    def _fit_probe(self, labels: Mapping[str, str], pool: Sequence[str], carried: bool) -> SelfTraining | None:
        """Fit the only probe of a cycle on pretrained features, for guard, mean, candidates and head."""
        configured = self.guard.needs_probe or self.average_with_probe
        if not configured and not self._needs_start_probe(carried):
            return None
        rounds = self.probe.rounds if configured else self.start_rounds
        return fit_probe(self.embedding, labels, pool, replace(self.probe, rounds=rounds))

    def _train(
        self,
        labels: Mapping[str, str],
        pool: Sequence[str],
        cycle: int,
        probe: SelfTraining | None,
        *,
        carried: bool,
        steps: int,
        on_step: StepListener,
        look: Callable[[int, Network], None] | None = None,
        description: str = "Training",
    ) -> tuple[Trained, float]:
        """Train a network and refit its head; return the average precision of `refit_head`, or NaN.

        `look` is called with refitted copies of the average at the guard's checkpoints.
        """
        # The start probe is not calibrated: thresholds on its scores assume balanced classes.
        start = probe.rounds[self.start_rounds] if probe is not None and self._needs_start_probe(carried) else None
        candidates = Ranking([], np.empty(0))
        if start is not None:
            ranking = rank_by_probe(self.embedding.probe_features, start, pool)
            first = ranking.order[: self.batch.candidates_of(len(ranking))]
            candidates = Ranking([ranking.ids[i] for i in first], ranking.logits[first])
        data = MixedBatches(
            self.embedding.source,
            labels,
            pool,
            augmentation=self.augmentation,
            spec=self.batch,
            image_size=self.embedding.spec.image_size,
            tiles=self.embedding.spec.tiles,
            seed=derive_seed(self.seed, cycle),
            candidates=candidates.ids if self.batch.wants_candidates else [],
        )

        def refit(network: Network) -> float:
            if not self.refit:
                return math.nan
            return refit_head(network, self.embedding, labels, self.refit_probe, candidates)

        def refit_and_look(steps: int, network: Network) -> None:
            assert look is not None
            refit(network)
            look(steps, network)

        times, every = self.guard.limits.checkpoints, self.batch.iterations
        checkpoints = {every * time // times for time in range(1, times)} - {0}
        trained = train(
            self._student if carried and self._student is not None else self._new_network(start, data.seed),
            data,
            self.recipe,
            on_step,
            steps=steps,
            average=self._average.alone() if carried and self._average is not None else None,
            truth=None if self.truth is None else torch.from_numpy(self.truth(pool)),
            callbacks=[] if look is None else [Snapshots(checkpoints, refit_and_look)],
            description=f"{description}, cycle {cycle}",
        )
        return trained, refit(trained.average)

    def _train_and_score(
        self, learnt: dict[str, str], held: list[str], *, pool: Sequence[str], cycle: int
    ) -> dict[int, ScoreArray]:
        """Train on some labels and score other images after each checkpoint; see `TrainAndScore`."""
        probe = self._fit_probe(learnt, pool, carried=False)
        assert probe is not None
        scores = {0: probe.probe.logits(self.embedding.probe_features.take(held))}

        def score(steps: int, network: Network) -> None:
            ranking = rank_by_network(network, self.embedding, held)
            by_id = dict(zip(ranking.ids, ranking.logits.tolist(), strict=True))
            scores[steps] = np.array([by_id[id_] for id_ in held])

        trained, _ = self._train(
            learnt,
            pool,
            cycle,
            probe,
            carried=False,
            steps=self.batch.iterations,
            on_step=ignore_step,
            look=None if self._spawns else score,  # another process would keep the scores to itself
            description="Training on a fold of the labels",
        )
        score(self.batch.iterations, trained.average)
        return scores

    def _new_network(self, probe: Probe | None, seed: int) -> Network:
        generator = torch.Generator().manual_seed(seed)
        if self.start == "cold":
            return self.embedding.network(normalised=False, generator=generator)
        assert probe is not None
        return probe_network(self.embedding, probe, generator)

    def _rank(self, ids: Sequence[str] | None) -> Ranking:
        wanted = self.embedding.default_ids if ids is None else ids
        with progress("Ranking", len(wanted)) as advance:
            return rank_by_network(require_fitted(self._average).alone(), self.embedding, wanted, advance)

    def _scaled_probe(self, probe: Probe, network: Network, pool: Sequence[str], seed: int) -> Network | None:
        """Build the network of a probe whose log-odds have the mean and deviation of those of another network.

        They are measured on a sample of the pool. None if they cannot be: then no average is possible.
        """
        rng = np.random.default_rng([seed, 0x5CA])
        chosen = rng.choice(len(pool), min(SCALE_IMAGES, len(pool)), replace=False)
        theirs = rank_by_probe(self.embedding.probe_features, probe, [pool[i] for i in chosen])
        own = rank_by_network(network, self.embedding, theirs.ids)
        theirs = theirs.restrict(own.ids)
        if len(own) < 2 or not np.isfinite(own.logits).all() or not np.ptp(theirs.logits) > 0.0:
            return None
        scale = float(own.logits.std() / theirs.logits.std())
        shift = float(own.logits.mean() - scale * theirs.logits.mean())
        return probe_network(self.embedding, Probe(scale * probe.coefficients, scale * probe.intercept + shift)).eval()

    def _averaged(self, ranking: Ranking, probe: Probe) -> Ranking:
        """Average the log-odds of a ranking with those of a probe on the cached features."""
        theirs = rank_by_probe(self.embedding.probe_features, probe, ranking.ids)
        own = ranking.restrict(theirs.ids)
        rejects = [*ranking.rejects, *theirs.rejects]
        return replace(own, logits=(own.logits + theirs.logits) / 2, rejects=rejects)

    def _fall_back(self) -> None:
        """Rank by the probe; the next cycle does not continue from this training."""
        self._student, self._average = None, self.guard.fallback_network()


def rank_by_network(
    network: Network, embedding: Embedding, ids: Sequence[str], advance: Advance = ignore_progress
) -> Ranking:
    """Rank images of an embedding by the logits of a network, which may have been trained since."""
    inference, size = embedding.inference, embedding.spec.input_size
    forward = inference.prepare(network, size=size, count=len(ids))
    batches = inference.run(forward, embedding.source, ids, size=size)
    logits = ((b.ids, anomaly_logit(torch.from_numpy(b.outputs)).numpy(), b.rejects) for b in batches)
    found = collect(logits, np.empty(0), advance)
    return Ranking(found.ids, found.rows, found.rejects, embedding.source)


def refit_spec(spec: ProbeSpec, confidence: float | None) -> ProbeSpec:
    """Return the hyper-parameters of the new probe: those of the first with another confidence; None: labels alone."""
    check_range("algorithm.learner.refit_confidence", confidence, low=0.5, below=1, null=True)
    return replace(spec, rounds=0) if confidence is None else replace(spec, confidence=confidence)


def refit_head(
    network: Network,
    embedding: Embedding,
    labels: Mapping[str, str],
    spec: ProbeSpec,
    candidates: Ranking | None = None,
) -> float:
    """Replace the head of `network` by a probe on its features, in place.

    The head stays if no image of a class can be read, or if a diverged training left features that are not finite.

    Where anomalies are rare, many pseudo-labels are wrong. The features improve nevertheless, as they adapt to the
    archive, but a head that was trained on the pseudo-labels has learnt their mistakes.

    Args:
        network: network with a head on normalised features.
        embedding: the images and the backbone that the network was made from.
        labels: label by image id; images that cannot be read are left out.
        spec: hyper-parameters of the probe.
        candidates: unlabelled images for self-training, with the log-odds of a probe on the pretrained features: the
            mean of these and the new probe's must be confident. None uses the labels alone.

    Returns:
        The average precision of the labelled images by cross-validation of the probe, NaN if it is unknown. The
        features have seen the labels: a low value shows that they were damaged, a high value alone proves nothing.
    """
    backbone, scaling = network.backbone, embedding.scaling
    size, inference = embedding.spec.input_size, embedding.inference
    unlabelled = candidates.ids if candidates is not None and spec.rounds else []
    forward = inference.prepare(backbone, size=size, count=len(labels) + len(unlabelled))
    batch_size = inference.batch_size(size)

    def features(
        ids: Sequence[str], orientations: Sequence[int] = (0,)
    ) -> tuple[list[str], Float32[np.ndarray, "n d"]]:
        """Compute the features of all readable images in some orientations, one image after the other."""
        readable: list[str] = []
        rows = [np.empty((0, backbone.width), np.float32)]
        for batch in stream(embedding.source, ids, size=size, batch_size=batch_size, workers=inference.workers):
            readable += batch.ids
            if batch.ids and orientations:
                views = [forward(reoriented(batch.images, i)) for i in orientations]
                rows.append(np.stack(views, axis=1).reshape(-1, backbone.width))
        return readable, normalise_last(np.concatenate(rows), backbone.features)

    rare, anomalies = features(ids_labelled(labels, Label.ANOMALY))
    _, normals = features(ids_labelled(labels, Label.NORMAL))
    if not len(anomalies) or not len(normals) or not np.isfinite([anomalies.sum(), normals.sum()]).all():
        return math.nan
    _, mirrored = features(rare, range(1, spec.orientations))
    ids, pool = features(unlabelled)
    before = None if candidates is None else candidates.restrict(ids).logits
    fit = self_train(anomalies, normals, pool, spec, scaling, turned=mirrored, second=before)
    network.head.set_probe(torch.from_numpy(fit.probe.coefficients), fit.probe.intercept)
    return fit.average_precision
