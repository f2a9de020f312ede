"""Learner of mean-shifted contrastive learning: it fine-tunes on normal images and ranks by the distance to them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from pytorch_lightning import Callback, Trainer
from torch.optim import Optimizer

from anomalymatch.algorithms.augmentation.pairs import TwoViewBatches
from anomalymatch.algorithms.augmentation.two_views import TwoViewAugmentation
from anomalymatch.algorithms.base import BACKBONE, Truth, derive_seed, require_fitted
from anomalymatch.algorithms.layer_groups import freeze_lower_groups
from anomalymatch.algorithms.lightning import (
    AfterEpochs,
    StepLogger,
    StepProgress,
    build_trainer,
    check_optimizer,
    quiet_lightning,
)
from anomalymatch.algorithms.msc.module import MeanShiftedContrastive, MscSpec
from anomalymatch.algorithms.novelty.detectors import Detector, fit_detector
from anomalymatch.algorithms.novelty.distances import trimmed_mean
from anomalymatch.algorithms.novelty.learner import DistanceLearner
from anomalymatch.backbones.checkpoint import load_state, save_tensors
from anomalymatch.backbones.embedding import Embedding
from anomalymatch.backbones.frozen_stages import accelerate_frozen_stages
from anomalymatch.backbones.inference import OutputBatch
from anomalymatch.backbones.network import Backbone
from anomalymatch.checks import check_range
from anomalymatch.errors import ConfigError

PREFIX = "backbone."


class MscLearner(DistanceLearner):
    """Learner that fine-tunes the pretrained backbone on images taken as normal, and ranks by the distance to them.

    The backbone is saved separately, so another training can start from it: `model.weights=…/backbone.safetensors`.
    The settings are the keys of `conf/algorithm/msc.yaml`, and those of `DistanceLearner`. Images are dropped before
    the training. With 0 epochs, the pretrained features rank.
    """

    trains = True

    def __init__(
        self,
        embedding: Embedding,
        *,
        seed: int,
        detector: Detector,
        drop: float,
        least_normals: int,
        trim: float,
        trainable_groups: int | None,
        epochs: int,
        batch_size: int,
        workers: int,
        loss: MscSpec,
        optimizer: Callable[..., Optimizer],
        two_views: TwoViewAugmentation,
        trainer: Callable[..., Trainer],
        truth: Truth | None = None,
    ) -> None:
        super().__init__(embedding, detector=detector, drop=drop, least_normals=least_normals, seed=seed)
        check_range("algorithm.learner.trim", trim, low=0, below=1)
        for name, value, least in (("epochs", epochs, 0), ("batch_size", batch_size, 2), ("workers", workers, 0)):
            check_range(f"algorithm.learner.{name}", value, low=least)
        check_optimizer(optimizer)
        self.trim, self.trainable_groups = trim, trainable_groups
        self.epochs, self.batch_size, self.workers = epochs, batch_size, workers
        self.loss, self.optimizer, self.two_views, self.trainer = loss, optimizer, two_views, trainer
        self.on_epoch: Callable[[int], None] | None = None
        """Function called after each epoch (0 before the training); the learner ranks as of that epoch then."""
        self._backbone: Backbone | None = None
        self._make_trainer([], 1)  # wrong settings are found before anything is written

    def fit(self, labels: Mapping[str, str], *, pool: Sequence[str] | None = None, cycle: int = 1) -> "MscLearner":
        """See `Learner.fit`; no label is required."""
        seed = derive_seed(self.seed, cycle)
        self._backbone = self.embedding.backbone()
        ids, rows = self._training_features(labels, pool)
        # Before the training, because it finds unusable images.
        frozen = fit_detector(self.detector, rows, drop=self.drop, device=self.embedding.inference.torch_device)
        kept = np.flatnonzero(frozen.place >= 0)
        ids, rows = [ids[i] for i in kept], rows[kept]
        if self.on_epoch is not None or not self.epochs:
            self._fit_detector(ids, rows, 0.0)
        if self.on_epoch is not None:
            self.on_epoch(0)
        if self.epochs:
            centre = torch.from_numpy(trimmed_mean(rows, self.trim)).float()
            with torch.random.fork_rng():
                torch.manual_seed(seed)  # dropout and stochastic depth of backbones that have them
                self._train(self._backbone, ids, centre, seed, cycle)
            self._fit_detector(*self._read(ids), 0.0)
        return self

    def features(self, ids: Sequence[str]) -> Iterator[OutputBatch]:
        """Compute the features of the trained backbone, see `DistanceLearner.features`."""
        inference, size = self.embedding.inference, self.embedding.spec.input_size
        forward = inference.prepare(require_fitted(self._backbone), size=size, count=len(ids))
        for batch in inference.run(forward, self.embedding.source, ids, size=size):
            norms = np.linalg.norm(batch.outputs, axis=1, keepdims=True)
            rows = (batch.outputs / np.maximum(norms, 1e-12)).astype(np.float16).astype(np.float32)
            yield OutputBatch(batch.ids, rows, batch.rejects)

    def save(self, folder: Path) -> None:
        """Save the fitted detector and the backbone."""
        super().save(folder)
        state = require_fitted(self._backbone).state_dict()
        save_tensors({f"{PREFIX}{name}": tensor for name, tensor in state.items()}, folder / BACKBONE)

    def restore(self, folder: Path) -> None:
        """See `Learner.restore`."""
        super().restore(folder)
        holder = torch.nn.Module()
        holder.backbone = self.embedding.backbone()
        load_state(holder, folder / BACKBONE)
        self._backbone = holder.backbone

    def _train(self, backbone: Backbone, ids: list[str], centre: torch.Tensor, seed: int, cycle: int) -> None:
        data = TwoViewBatches(
            self.embedding.source,
            ids,
            view=self.two_views.view(self.embedding.source.channels, self.embedding.spec.image_size),
            image_size=self.embedding.spec.image_size,
            tiles=self.embedding.spec.tiles,
            batch_size=self.batch_size,
            epochs=self.epochs,
            workers=self.workers,
            seed=seed,
        )
        backbone.train()
        freeze_lower_groups(backbone.body, self.trainable_groups)
        module = MeanShiftedContrastive(backbone, centre, self.loss, optimizer=self.optimizer)
        steps = data.steps * self.epochs
        callbacks: list[Callback] = [AfterEpochs(data.steps, lambda epoch: self._after(epoch, ids))]
        if self.on_epoch is None:  # its function shows progress bars
            callbacks = [StepProgress(f"Training, cycle {cycle}", steps)]
        with quiet_lightning():
            trainer = self._make_trainer(callbacks, steps)
            apart = accelerate_frozen_stages(
                [backbone],
                self.embedding.inference,
                device=trainer.strategy.root_device,
                size=self.embedding.spec.image_size,
                batch_size=min(self.batch_size, 16),
                count=2 * len(ids) * self.epochs,
            )
            with apart:
                trainer.fit(module, datamodule=data)

    def _after(self, epoch: int, ids: list[str]) -> None:
        assert self.on_epoch is not None
        self._fit_detector(*self._read(ids), 0.0)
        self.on_epoch(epoch)

    def _make_trainer(self, callbacks: list[Callback], steps: int) -> Trainer:
        logger = StepLogger(self.on_step)
        trainer = build_trainer(self.trainer, max_steps=steps, logger=logger, callbacks=callbacks)
        if trainer.world_size > 1:
            raise ConfigError(
                f"trainer.lightning asks for {trainer.world_size} devices: the contrast needs all images of a batch, "
                f"so algorithm=msc trains on one device"
            )
        return trainer
