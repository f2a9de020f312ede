"""FixMatch as a learner: where it starts from, what learns, and how it ranks."""

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from pytorch_lightning import Trainer
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch.optim import Optimizer

from anomalymatch.active.learner import WEIGHTS, Truth, probe_of
from anomalymatch.active.steps import StepListener, StepLogger, StepProgress, ignore_step
from anomalymatch.data.augment import Augmentation
from anomalymatch.data.mixed_batches import BatchSpec, MixedBatches
from anomalymatch.errors import ConfigError
from anomalymatch.functional.fixmatch import anomaly_logit
from anomalymatch.models.checkpoint import describe_input, load_network, save_network
from anomalymatch.models.embedding import Embedding
from anomalymatch.models.fixmatch import FixMatch, FixMatchSpec
from anomalymatch.models.network import Network, freeze_lower_groups
from anomalymatch.models.probe import ProbeSpec
from anomalymatch.progress import progress
from anomalymatch.ranking import Ranking
from anomalymatch.types import Reject

logger = logging.getLogger(__name__)
STARTS = ("probe", "cold")
STUDENT = "student.safetensors"


class FixMatchLearner:
    """Fine-tunes the backbone by FixMatch; its moving average ranks.

    Args:
        embedding: the pretrained backbone and the images.
        seed: seed of everything that is random here.
        start: `probe` sets the head to the probe, so that training starts from a good ranking; `cold` draws it anew.
        carry_over: go on from the last cycle's weights instead of starting each cycle from the pretrained ones.
        trainable_groups: how many of the backbone's last layer groups learn; None for all.
        probe: how the probe is fitted.
        loss: hyper-parameters of the losses and the average.
        batch: make-up and number of the batches.
        optimizer: partial of an optimiser.
        augmentation: weak and strong views.
        trainer: partial of Lightning's Trainer with device, precision and strategy.
        truth: whether an image is an anomaly, in a benchmark; only to log how right the pseudo-labels are.
    """

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
        truth: Truth | None = None,
    ) -> None:
        if start not in STARTS:
            raise ConfigError(f"algorithm.learner.start is {start!r}: choose one of {', '.join(STARTS)}")
        try:
            optimizer([torch.nn.Parameter(torch.zeros(1))])
        except (TypeError, ValueError) as error:
            raise ConfigError(f"algorithm.learner.optimizer: {error}") from error
        self.embedding, self.seed, self.start, self.carry_over = embedding, seed, start, carry_over
        self.trainable_groups, self.probe = trainable_groups, probe
        self.loss, self.batch, self.optimizer = loss, batch, optimizer
        self.augmentation, self.trainer, self.truth = augmentation, trainer, truth
        self.on_step: StepListener = ignore_step
        self._student: Network | None = None
        self._average: Network | None = None

    def fit(self, labels: Mapping[str, str], *, pool: Sequence[str] | None = None, cycle: int = 1) -> None:
        """See `Learner.fit`."""
        pool = [id_ for id_ in (self.embedding.source.ids if pool is None else pool) if id_ not in labels]
        seed = int(np.random.SeedSequence([self.seed, cycle]).generate_state(1)[0])
        data = MixedBatches(
            self.embedding.source,
            labels,
            pool,
            augmentation=self.augmentation,
            spec=self.batch,
            image_size=self.embedding.image_size,
            seed=seed,
        )
        with torch.random.fork_rng():
            torch.manual_seed(seed)  # dropout and stochastic depth of backbones that have them
            self._train(self._starting_network(labels, pool, seed), data, pool, cycle)

    def rank(self, ids: Sequence[str] | None = None) -> Ranking:
        """See `Learner.rank`."""
        network, source = self._fitted(), self.embedding.source
        wanted = source.ids if ids is None else ids
        kept: list[str] = []
        logits: list[np.ndarray] = []
        rejects: list[Reject] = []
        with progress("Ranking", len(wanted)) as advance:
            for batch in self.embedding.inference.run(network, source, wanted, size=self.embedding.image_size):
                kept += batch.ids
                rejects += batch.rejects
                logits.append(anomaly_logit(torch.from_numpy(batch.outputs)).double().numpy())
                advance(len(batch.ids) + len(batch.rejects))
        return Ranking(kept, np.concatenate(logits), rejects)

    def save(self, folder: Path) -> None:
        """See `Learner.save`: the average, and the student for a training that goes on from it."""
        described = describe_input(self.embedding.source)
        save_network(self._fitted(), folder / WEIGHTS, algorithm="fixmatch", input=described)
        if self.carry_over and self._student is not None:
            save_network(self._student, folder / STUDENT, algorithm="fixmatch, the student", input=described)

    def restore(self, folder: Path) -> None:
        """See `Learner.restore`."""
        self._average = load_network(folder / WEIGHTS)
        if self.carry_over:
            self._student = load_network(folder / STUDENT)

    def _starting_network(self, labels: Mapping[str, str], pool: Sequence[str], seed: int) -> Network:
        if self.carry_over and self._student is not None:
            return self._student
        network = self.embedding.network(
            normalised=self.start == "probe", generator=torch.Generator().manual_seed(seed)
        )
        if self.start == "probe":
            probe = probe_of(self.embedding, labels, pool, self.probe)
            network.head.set_probe(torch.from_numpy(probe.coefficients), probe.intercept)
        return network

    def _train(self, network: Network, data: MixedBatches, pool: Sequence[str], cycle: int) -> None:
        network.train()  # Lightning leaves the mode as it is, and a restored network predicts
        freeze_lower_groups(network.backbone.body, self.trainable_groups)
        module = FixMatch(
            network,
            self.loss,
            optimizer=self.optimizer,
            iterations=self.batch.iterations,
            truth=None if self.truth is None else torch.from_numpy(self.truth(pool)),
        )
        if self.carry_over and self._average is not None:
            module.ema.network.load_state_dict(self._average.state_dict())
        trainer = self._make_trainer(cycle)
        with warnings.catch_warnings():
            # Lightning warns of what is meant here: a frozen average in evaluation mode, few loader workers; and its
            # own dependencies deprecate what it calls.
            warnings.filterwarnings("ignore", module="pytorch_lightning")
            warnings.filterwarnings("ignore", message=".*LeafSpec.*")
            try:
                trainer.fit(module, datamodule=data)
            except SystemExit:
                raise KeyboardInterrupt from None  # into which Lightning turns Ctrl-C
        self._student, self._average = network, module.ema.network

    def _make_trainer(self, cycle: int) -> Trainer:
        try:
            return self.trainer(
                max_steps=self.batch.iterations,
                logger=StepLogger(self.on_step),
                callbacks=[StepProgress(f"Training, cycle {cycle}", self.batch.iterations)],
            )
        except (TypeError, ValueError, MisconfigurationException) as error:
            raise ConfigError(f"trainer.lightning: {error}") from error

    def _fitted(self) -> Network:
        if self._average is None:
            raise RuntimeError("call fit or restore before rank or save")
        return self._average
