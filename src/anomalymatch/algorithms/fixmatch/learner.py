"""FixMatch as a learner: where it starts from, what learns, and how it ranks."""

import copy
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.plugins.environments import LightningEnvironment
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch.optim import Optimizer

from anomalymatch.algorithms.base import GUARD, WEIGHTS, Truth, ranked_by
from anomalymatch.algorithms.fixmatch.batches import BatchSpec, MixedBatches
from anomalymatch.algorithms.fixmatch.guard import Watch, require_finite
from anomalymatch.algorithms.fixmatch.module import FixMatch
from anomalymatch.algorithms.fixmatch.refit import refit_head, refit_spec
from anomalymatch.algorithms.fixmatch.spec import FixMatchSpec
from anomalymatch.algorithms.fixmatch.views import Augmentation
from anomalymatch.algorithms.layer_groups import check_not_negative, freeze_lower_groups
from anomalymatch.algorithms.lightning import (
    AtSteps,
    StepListener,
    StepLogger,
    StepProgress,
    ignore_step,
    processes_of,
    quiet_lightning,
    relayed,
    spawns,
)
from anomalymatch.algorithms.probe.learner import fit_probe, top_by_probe
from anomalymatch.algorithms.probe.regression import Probe, ProbeSpec
from anomalymatch.backbones.checkpoint import describe_input, load_description, load_network, save_network
from anomalymatch.backbones.embedding import Embedding
from anomalymatch.backbones.network import Network
from anomalymatch.errors import ConfigError
from anomalymatch.files import write_text
from anomalymatch.progress import progress
from anomalymatch.ranking import Ranking

logger = logging.getLogger(__name__)
STARTS = ("probe", "cold")
STUDENT = "student.safetensors"
QUARTERS = 4
"""Of a training, after each of which it may be found best to stop."""


class FixMatchLearner:
    """Fine-tunes the backbone by FixMatch; its moving average ranks.

    Args:
        embedding: the pretrained backbone and the images.
        seed: seed of everything that is random here.
        start: `probe` sets the head to the probe, so that training starts from a good ranking; `cold` draws it anew.
        carry_over: go on from the last cycle's weights instead of starting each cycle from the pretrained ones.
        trainable_groups: how many of the backbone's last layer groups learn; None for all.
        probe: how probes are fitted.
        start_rounds: of self-training at most, of the probe that it starts from; None for as many as `probe` says.
        loss: hyper-parameters of the losses and the average.
        batch: make-up and number of the batches.
        optimizer: partial of an optimiser.
        augmentation: weak and strong views.
        trainer: partial of Lightning's Trainer with device, precision and strategy.
        guard: see `Watch`.
        refit: after training, let a new probe rank, on the features that were learnt.
        refit_confidence: probability from which a candidate teaches it; None for the labels alone.
        truth: whether an image is an anomaly, in a benchmark; only to log how right the pseudo-labels are.
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
        loss: FixMatchSpec,
        batch: BatchSpec,
        optimizer: Callable[..., Optimizer],
        augmentation: Augmentation,
        trainer: Callable[..., Trainer],
        start_rounds: int | None = None,
        guard: str = "off",
        refit: bool = False,
        refit_confidence: float | None = None,
        truth: Truth | None = None,
    ) -> None:
        if start not in STARTS:
            raise ConfigError(f"algorithm.learner.start is {start!r}: choose one of {', '.join(STARTS)}")
        if refit and start != "probe":
            raise ConfigError("algorithm.learner.refit=true needs start=probe: a cold head has other features")
        check_not_negative("start_rounds", start_rounds)
        check_not_negative("trainable_groups", trainable_groups)
        try:
            optimizer([torch.nn.Parameter(torch.zeros(1))])
        except (TypeError, ValueError) as error:
            raise ConfigError(f"algorithm.learner.optimizer: {error}") from error
        self.embedding, self.seed, self.truth = embedding, seed, truth
        self.start, self.carry_over, self.trainable_groups = start, carry_over, trainable_groups
        self.refit, self._likely = refit, Ranking([], np.empty(0))
        self.last_probe = refit_spec(probe, refit_confidence)
        rounds = probe.rounds if start_rounds is None else min(start_rounds, probe.rounds)
        self.probe = replace(probe, rounds=rounds, calibration="none")  # what cuts its scores expects balanced classes
        self.loss, self.batch, self.optimizer, self.trainer = loss, batch, optimizer, trainer
        self.augmentation = augmentation
        self.watch = Watch(guard, embedding, probe, has_features=start == "probe")
        self.on_step: StepListener = ignore_step
        self._callbacks: list[Callback] = []
        self._doing = "Training"
        # Made once here only to be looked at: what is wrong shows before anything is written.
        self._spawns = spawns(self._make_trainer(ignore_step, 1, batch.iterations), batch)
        self._student: Network | None = None
        self._average: Network | None = None
        self._followed = 0  # steps, by the average

    def fit(self, labels: Mapping[str, str], *, pool: Sequence[str] | None = None, cycle: int = 1) -> None:
        """See `Learner.fit`."""
        pool = [id_ for id_ in (self.embedding.source.ids if pool is None else pool) if id_ not in labels]
        seed = int(np.random.SeedSequence([self.seed, cycle]).generate_state(1)[0])
        carried = self.carry_over and self._student is not None
        probe = None
        if self.batch.wants_candidates or (self.start == "probe" and not carried):
            probe = fit_probe(self.embedding, labels, pool, self.probe)
        listener = self.watch.listen(self.on_step, cycle)
        retrain = partial(self._fold, pool=pool, cycle=cycle)
        steps = self.watch.stop(labels, pool, retrain, seed=seed, steps=self.batch.iterations)
        if not steps:
            self._fall_back()
            return
        self._likely = top_by_probe(self.embedding, probe, pool, self.batch.candidates_of)
        data = MixedBatches(
            self.embedding.source,
            labels,
            pool,
            augmentation=self.augmentation,
            spec=self.batch,
            image_size=self.embedding.image_size,
            seed=seed,
            candidates=self._likely.ids if self.batch.wants_candidates else [],
        )
        with torch.random.fork_rng():
            torch.manual_seed(seed)  # dropout and stochastic depth of backbones that have them
            self._train(self._starting_network(probe, seed), data, pool, cycle, listener, steps)
        self._followed = steps + (self._followed if carried else 0)
        refitted = self._refit(self._fitted(), labels)
        if self.watch.finds_harm(
            labels,
            pool,
            refitted=refitted,
            cold=self.start == "cold" and not carried,
            cuts=self.loss.cuts,
            candidates=self.batch.candidate_share if self.batch.wants_candidates else 0.0,
            decay=self.loss.ema_decay,
            steps=self._followed,
        ):
            self._fall_back()

    def rank(self, ids: Sequence[str] | None = None) -> Ranking:
        """See `Learner.rank`."""
        ranking = self._rank(ids)
        if self.watch.finds_drift(ranking):
            self._fall_back()
            ranking = self._rank(ids)
        require_finite(ranking)
        return ranking

    def _rank(self, ids: Sequence[str] | None) -> Ranking:
        wanted = self.embedding.source.ids if ids is None else ids
        with progress("Ranking", len(wanted)) as advance:
            return ranked_by(self._fitted(), self.embedding, wanted, advance)

    def _fall_back(self) -> None:
        """Rank as the probe does; what went wrong is not carried on, either."""
        self._student, self._average = None, self.watch.probe_network()

    def _fold(
        self, learnt: Mapping[str, str], held: Sequence[str], *, pool: Sequence[str], cycle: int
    ) -> dict[int, Ranking]:
        """Train anew on other labels, and rank after every quarter of the steps."""
        rankings: dict[int, Ranking] = {}

        def look(steps: int, network: Network) -> None:
            other._refit(network, learnt)
            rankings[steps] = ranked_by(network, self.embedding, held)

        other, every = copy.copy(self), self.batch.iterations
        other.watch, other.on_step = Watch("off", self.embedding, self.watch.spec, has_features=False), ignore_step
        other._student = other._average = None
        other._doing = "Training on half of the labels"
        if not self._spawns:  # another process would keep what it sees to itself
            other._callbacks = [AtSteps({every * quarter // QUARTERS for quarter in range(1, QUARTERS)} - {0}, look)]
        other.fit(learnt, pool=pool, cycle=cycle)
        rankings[every] = ranked_by(other._fitted(), self.embedding, held)
        return rankings

    def save(self, folder: Path) -> None:
        """See `Learner.save`: the average, and the student for a training that goes on from it."""
        described = describe_input(self.embedding.source)
        save_network(self._fitted(), folder / WEIGHTS, algorithm="fixmatch", input=described)
        if self.carry_over and self._student is not None:
            name, steps = "fixmatch, the student", self._followed
            save_network(self._student, folder / STUDENT, algorithm=name, input=described, steps=steps)
        if self.watch.notes:
            write_text(folder / GUARD, "\n".join(self.watch.notes) + "\n")

    def restore(self, folder: Path) -> None:
        """See `Learner.restore`."""
        self._average = load_network(folder / WEIGHTS)
        if self.carry_over:  # after a fallback there is none
            student = folder / STUDENT
            self._student = load_network(student) if student.exists() else None
            self._followed = int(load_description(student).get("steps", 0)) if student.exists() else 0

    def _refit(self, network: Network, labels: Mapping[str, str]) -> float:
        return refit_head(network, self.embedding, labels, self.last_probe, self._likely) if self.refit else math.nan

    def _starting_network(self, probe: Probe | None, seed: int) -> Network:
        if self.carry_over and self._student is not None:
            return self._student
        generator = torch.Generator().manual_seed(seed)
        network = self.embedding.network(normalised=self.start == "probe", generator=generator)
        if self.start == "probe":
            assert probe is not None
            network.head.set_probe(torch.from_numpy(probe.coefficients), probe.intercept)
        return network

    def _train(
        self,
        network: Network,
        data: MixedBatches,
        pool: Sequence[str],
        cycle: int,
        listener: StepListener,
        steps: int,
    ) -> None:
        carried = self.carry_over and self._student is not None
        network.backbone.averages = False  # the teacher sees one view, too, which augmentation has turned
        network.train()  # Lightning leaves the mode as it is, and a restored network predicts
        freeze_lower_groups(network.backbone.body, self.trainable_groups)
        module = FixMatch(
            network,
            self.loss,
            optimizer=self.optimizer,
            iterations=self.batch.iterations,
            truth=None if self.truth is None else torch.from_numpy(self.truth(pool)),
            pool=len(pool),
            weights=torch.from_numpy(data.weights()) if self.loss.make_alignment().aligns else None,
        )
        if carried and self._average is not None:
            module.ema.network.load_state_dict(self._average.state_dict())
        with quiet_lightning(), relayed(listener) if self._spawns else nullcontext(listener) as relay:
            trainer = self._make_trainer(relay, cycle, steps)
            with processes_of(trainer), self._apart(trainer, module, steps):
                trainer.fit(module, datamodule=data)
        self._student, self._average = network, module.ema.network
        for trained in (self._student, self._average):
            trained.backbone.averages = True

    def _apart(self, trainer: Trainer, module: FixMatch, steps: int) -> AbstractContextManager[None]:
        if self._spawns:
            return nullcontext()
        device, batch = trainer.strategy.root_device, self.batch
        count = steps * (batch.labelled + 2 * batch.unlabelled)
        return module.frozen_apart(self.embedding.inference, device=device, batch_size=batch.labelled, count=count)

    @quiet_lightning()
    def _make_trainer(self, listener: StepListener, cycle: int, steps: int) -> Trainer:
        try:
            return self.trainer(
                max_steps=steps,
                logger=StepLogger(listener),
                callbacks=[StepProgress(f"{self._doing}, cycle {cycle}", steps), *self._callbacks],
                # A batch scheduler counts the tasks that it started, not the processes that Lightning starts in one.
                plugins=[LightningEnvironment()],
                use_distributed_sampler=False,  # `MixedBatches` shares its batches out itself
            )
        except (TypeError, ValueError, MisconfigurationException) as error:
            raise ConfigError(f"trainer.lightning: {error}") from error

    def _fitted(self) -> Network:
        if self._average is None:
            raise RuntimeError("call fit or restore before rank or save")
        return self._average
