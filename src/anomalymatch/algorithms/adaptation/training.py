"""Adaptation as a function: from a pretrained backbone and an archive to weights, in a folder that can be continued."""

import csv
import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, UInt8
from pytorch_lightning import Trainer
from torch import Tensor
from torch.optim import Optimizer

from anomalymatch.algorithms.adaptation.checks import (
    Agreement,
    compare_agreement,
    instance_accuracy,
    neighbours_agree,
    spread,
)
from anomalymatch.algorithms.adaptation.methods import Method, Teacher
from anomalymatch.algorithms.adaptation.module import Adaptation, AdaptationSpec
from anomalymatch.algorithms.augmentation.pairs import PairedViews, TwoViewBatches
from anomalymatch.algorithms.augmentation.view import View
from anomalymatch.algorithms.base import WEIGHTS, StepListener, derive_seed, ignore_step
from anomalymatch.algorithms.layer_groups import batch_norms, freeze_lower_groups
from anomalymatch.algorithms.lightning import (
    AfterEpochs,
    StepLogger,
    StepProgress,
    build_trainer,
    check_optimizer,
    quiet_lightning,
    training_processes,
)
from anomalymatch.backbones.architectures import split_names
from anomalymatch.backbones.checkpoint import describe_input, load_description, load_tensors, save_tensors
from anomalymatch.backbones.embedding import Embedding
from anomalymatch.backbones.frozen_stages import accelerate_frozen_stages
from anomalymatch.backbones.network import Backbone
from anomalymatch.backbones.tta import Tiling
from anomalymatch.backbones.weights import first_not_finite
from anomalymatch.checks import Number
from anomalymatch.data.stream import collect
from anomalymatch.errors import ConfigError, DataError, StorageError, TrainingError
from anomalymatch.files import write_csv, write_text
from anomalymatch.progress import progress

logger = logging.getLogger(__name__)
CHECKPOINT, METRICS = "checkpoint.safetensors", "metrics.csv"
COLUMNS = ("epoch", "loss", "accuracy", "spread", "seconds")
DONE = "epochs_done"
STALE = 0.05
"""Share of the batch statistics that is older than the last epoch, at most."""
_HELD, _CHECK = 6, 7


@dataclass(frozen=True)
class Recipe:
    """Settings of an adaptation: partials of a method, an optimiser and a Trainer, the view, and where to stop.

    `minutes` is a time limit, at which the epoch is finished; None trains to the end. `workers` is the number of
    processes that prepare views.
    """

    name: str
    method: Callable[..., Method]
    spec: AdaptationSpec
    optimizer: Callable[..., Optimizer]
    trainer: Callable[..., Trainer]
    view: View
    workers: int
    minutes: Number | None
    seed: int


class Adapted(NamedTuple):
    """Result of an adaptation."""

    weights: Path
    """Weights of the last finished epoch, for `model.weights`."""
    rows: list[dict[str, Number]]
    """Loss, held-out accuracy, spread and time after each epoch; the first row is before the training."""
    agreement: Agreement | None
    """Agreement of neighbours with labels; None without labels, or before the end of the training."""
    epochs: int
    """Epochs of a whole training; fewer are done if the time limit ended it."""

    def sentences(self) -> Iterator[str]:
        """Describe the result: each figure before and after."""
        first, last = self.rows[0], self.rows[-1]
        yield (
            f"{last['epoch']:.0f} of {self.epochs} epochs: held-out accuracy {first['accuracy']:.3f} → "
            f"{last['accuracy']:.3f}, spread {first['spread']:.3f} → {last['spread']:.3f}"
        )
        if last["epoch"] < self.epochs:
            yield "The time limit was reached: the same command continues"
        if self.agreement is not None:
            before, after, error = self.agreement
            yield f"Nearest neighbours with the same label: {before:.3f} → {after:.3f} (change ± {error:.3f})"
            if self.agreement.is_worse:
                yield (
                    "Warning: the neighbours of labelled images agree less than before: compare average precisions "
                    "before you use these weights"
                )


def adapt(
    embedding: Embedding,
    pool: Sequence[str],
    anomalies: Mapping[str, bool],
    recipe: Recipe,
    folder: Path,
    on_step: StepListener = ignore_step,
) -> Adapted:
    """Train the backbone of `embedding` on the images `pool` without labels, or go on in a folder with a checkpoint.

    Args:
        embedding: the images, and the pretrained backbone without stage features, orientations and crops.
        pool: ids to learn from; `held_out` of them are kept aside for the check.
        anomalies: labelled images with True for an anomaly, for the guard alone: nothing is learnt from them.
        recipe: settings.
        folder: gets the weights and their description, the metrics, and a checkpoint after each epoch.
        on_step: called with the loss of each step.

    Raises:
        ConfigError: if a setting is wrong.
        DataError: if the images are too few.
        TrainingError: if the training diverges, or the features collapse.
        StorageError: if the checkpoint is damaged or of another archive.
    """
    return _Run(embedding, pool, recipe, folder, on_step).run(anomalies)


class _Run:
    """One adaptation and its folder."""

    def __init__(
        self, embedding: Embedding, pool: Sequence[str], recipe: Recipe, folder: Path, on_step: StepListener
    ) -> None:
        if len(split_names(embedding.name)) > 1:
            raise ConfigError(f"model.name is {embedding.name!r}: adapt one model at a time, not an ensemble")
        check_optimizer(recipe.optimizer, "adapt.optimizer")
        self.embedding, self.recipe, self.folder, self.on_step = embedding, recipe, folder, on_step
        self.spec, self.weights = recipe.spec, folder / WEIGHTS
        order = np.random.default_rng([recipe.seed, _HELD]).permutation(len(pool))
        held = min(self.spec.held_out, len(pool) // 4)
        if held < 2:
            raise DataError(
                f"{embedding.source.name}: there are {len(pool)} images to learn from, and the check needs at least 2 "
                f"of every 4: adapt to a larger archive"
            )
        self.held, self.ids = [pool[i] for i in order[:held]], [pool[i] for i in sorted(order[held:])]
        self.pool = len(pool)
        self.size = max(self.spec.image_size, embedding.spec.image_size)  # of the images of which views are cut out
        self.digest = hashlib.blake2b("\n".join(pool).encode(), digest_size=8).hexdigest()
        self.rows: list[dict[str, Number]] = []
        self.started = self.last = time.monotonic()

    def run(self, anomalies: Mapping[str, bool]) -> Adapted:
        """Train what is left, and check the result."""
        description = self._description()
        if "agreement" in description:
            self.rows = self._read_rows(description["epochs"])
            found = description["agreement"]
            return Adapted(self.weights, self.rows, found and Agreement(**found), self.spec.epochs)
        with torch.random.fork_rng():
            torch.manual_seed(self.recipe.seed)  # heads, dropout and stochastic depth
            backbone, done = self._train()
        if done < self.spec.epochs:
            return Adapted(self.weights, self.rows, None, self.spec.epochs)
        agreement = self._agreement(backbone, anomalies)
        self._write_description(done, agreement=agreement and agreement._asdict())
        (self.folder / CHECKPOINT).unlink(missing_ok=True)
        return Adapted(self.weights, self.rows, agreement, self.spec.epochs)

    def _train(self) -> tuple[Backbone, int]:
        """Train to the end or to the time limit; return the backbone and the number of epochs done."""
        backbone = self.embedding.backbone().train()
        freeze_lower_groups(backbone.body, self.spec.trainable_groups, "adapt.trainable_groups")
        self._check_size(backbone)
        method = self.recipe.method(backbone)
        tensors = load_tensors(self.folder / CHECKPOINT) if (self.folder / CHECKPOINT).exists() else {}
        done = int(tensors.pop(DONE)) if tensors else 0
        data = TwoViewBatches(
            self.embedding.source,
            self.ids,
            view=self.recipe.view,
            image_size=self.size,
            batch_size=self.spec.batch_size,
            epochs=self.spec.epochs,
            workers=self.recipe.workers,
            seed=self.recipe.seed,
            done=done,
        )
        for norm in batch_norms(backbone):
            # An epoch may be a few steps: its statistics must still replace those of the pretraining.
            norm.momentum = max(norm.momentum or 0.0, 1.0 - STALE ** (1.0 / data.steps))
        steps = data.steps * self.spec.epochs
        module = Adaptation(backbone, method, self.spec, optimizer=self.recipe.optimizer, steps=steps)
        with quiet_lightning():
            trainer = self._make_trainer(steps - done * data.steps, data.steps, done, module)
            if tensors:
                self.rows = self._read_rows(done)
                try:
                    module.restore(tensors, done * data.steps)
                except (RuntimeError, KeyError) as error:
                    raise StorageError(
                        f"{self.folder / CHECKPOINT} is corrupt: {str(error).splitlines()[0]}"
                    ) from error
            else:
                self.rows = [{"epoch": 0, "loss": math.nan, **self._check(backbone), "seconds": 0.0}]
            if done == self.spec.epochs:
                return backbone, done
            apart = accelerate_frozen_stages(
                [backbone, *(module.backbone for module in method.modules() if isinstance(module, Teacher))],
                self.embedding.inference,
                device=trainer.strategy.root_device,
                size=self.spec.image_size,
                batch_size=min(2 * data.batch_size, 16),
                count=2 * len(self.ids) * self.spec.epochs,
            )
            with apart, training_processes(trainer):
                trainer.fit(module, datamodule=data)
        return backbone, int(self.rows[-1]["epoch"])

    def _check_size(self, backbone: Backbone) -> None:
        """Check that the model takes images of the size of the views: a transformer takes only its own."""
        size = self.spec.image_size
        images = torch.zeros(2, self.embedding.source.channels, size, size, dtype=torch.uint8)
        try:
            with torch.inference_mode():
                backbone.with_body(backbone.body, stages=False).eval()(images)
        except (AssertionError, RuntimeError) as error:
            raise ConfigError(
                f"adapt.image_size is {size}, but {self.embedding.name} takes images of model.image_size="
                f"{self.embedding.spec.image_size} pixels only: leave it out"
            ) from error
        finally:
            backbone.train()

    def _make_trainer(self, left: int, steps: int, done: int, module: Adaptation) -> Trainer:
        def after(epochs: int) -> None:
            row = {"loss": float(np.mean(module.losses[-steps:])), **self._check(module.backbone)}
            self._finish_epoch(done + epochs, row, module)
            if self.recipe.minutes is not None and time.monotonic() - self.started > 60 * self.recipe.minutes:
                trainer.should_stop = True

        trainer = build_trainer(
            self.recipe.trainer,
            max_steps=left,
            logger=StepLogger(self.on_step),
            callbacks=[StepProgress(f"Adapting by {self.recipe.name}", left), AfterEpochs(steps, after)],
        )
        if trainer.world_size > 1:
            raise ConfigError(
                f"trainer.lightning asks for {trainer.world_size} devices: the losses compare all images of a batch, "
                f"so the adaptation is on one device"
            )
        return trainer

    def _finish_epoch(self, epoch: int, row: dict[str, Number], module: Adaptation) -> None:
        """Check and save an epoch.

        Raises:
            TrainingError: if the features collapsed, or the weights are no longer finite; the last weights stay.
        """
        last = f"the weights of epoch {epoch - 1} are kept" if epoch > 1 else "no weights are written"
        tensors = {name: tensor.detach() for name, tensor in module.backbone.body.state_dict().items()}
        if broken := first_not_finite(tensors):
            raise TrainingError(
                f"the training diverged: after epoch {epoch}, {broken} has numbers that are not finite ({last}): lower "
                f"adapt.optimizer.lr, and choose another output="
            )
        limits = {name: self.spec.collapse * self.rows[0][name] for name in ("accuracy", "spread")}
        chance = limits["accuracy"] * (1.0 - limits["accuracy"]) / len(self.held)
        limits["accuracy"] -= 2.0 * math.sqrt(chance)  # few images are recognised more or less often by chance
        for name, limit in limits.items():
            before, now = self.rows[0][name], row[name]
            if not now >= limit:
                raise TrainingError(
                    f"the features collapsed: after epoch {epoch}, the held-out {name} is {now:.3f}, which was "
                    f"{before:.3f} before ({last}): try another adapt=, or lower adapt.optimizer.lr"
                )
        now = time.monotonic()
        self.rows.append({"epoch": epoch, **row, "seconds": now - self.last})
        self.last = now
        save_tensors(tensors, self.weights)
        self._write_description(epoch)
        write_csv(self.folder / METRICS, COLUMNS, [[each[name] for name in COLUMNS] for each in self.rows])
        save_tensors({DONE: torch.tensor(epoch), **module.checkpoint()}, self.folder / CHECKPOINT)
        logger.info(
            "Epoch %d of %d: loss %.3f, accuracy %.3f (before: %.3f), spread %.3f (before: %.3f)",
            epoch, self.spec.epochs, row["loss"],
            row["accuracy"], self.rows[0]["accuracy"], row["spread"], self.rows[0]["spread"],
        )  # fmt: skip

    def _check(self, backbone: Backbone) -> dict[str, Number]:
        """Compute accuracy and spread of the images kept aside."""
        first, second = self._held_views
        inference = self.embedding.inference
        forward = inference.prepare(backbone, size=self.spec.image_size, count=2 * len(first))
        size = inference.batch_size(self.spec.image_size)
        a, b = (
            torch.from_numpy(np.concatenate([forward(part) for part in views.split(size)])) for views in (first, second)
        )
        return {"accuracy": instance_accuracy(a, b), "spread": spread(a)}

    @cached_property
    def _held_views(self) -> tuple[UInt8[Tensor, "n c h w"], UInt8[Tensor, "n c h w"]]:
        """Two views of each image kept aside, the same at each check."""
        seed = derive_seed(self.recipe.seed, _CHECK)
        places = np.arange(len(self.held))
        views = PairedViews(self.embedding.source, self.held, places, self.recipe.view, Tiling(1, self.size), seed)
        pairs = [views[i] for i in range(len(views))]
        return torch.stack([pair.x_a for pair in pairs]), torch.stack([pair.x_b for pair in pairs])

    def _agreement(self, backbone: Backbone, anomalies: Mapping[str, bool]) -> Agreement | None:
        """Compare the agreement of neighbours with labels before and after; None with fewer than two of a class."""
        if not _has_both_classes(torch.tensor(list(anomalies.values()), dtype=torch.bool)):
            return None
        agree: list[Bool[Tensor, " n"]] = []
        with progress("Comparing neighbours", 2 * len(anomalies)) as advance:
            for each in (self.embedding.backbone(), backbone):
                forward = self.embedding.inference.prepare(
                    each, size=self.embedding.spec.image_size, count=len(anomalies)
                )
                batches = self.embedding.inference.run(
                    forward, self.embedding.source, list(anomalies), size=self.embedding.spec.image_size
                )
                found = collect(((b.ids, b.outputs, b.rejects) for b in batches), np.empty((0, each.width)), advance)
                mask = torch.tensor([anomalies[id_] for id_ in found.ids], dtype=torch.bool)
                if not _has_both_classes(mask):  # the others cannot be read
                    return None
                agree.append(neighbours_agree(torch.from_numpy(found.rows), mask))
        return compare_agreement(agree[0], agree[1], mask)

    def _description(self) -> dict[str, Any]:
        """Read the description of earlier epochs.

        Raises:
            StorageError: if it is of another archive.
        """
        if not self.weights.with_suffix(".json").exists():
            return {}
        try:
            found = load_description(self.weights)
            same = found["images"]["digest"] == self.digest
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StorageError(f"{self.weights.with_suffix('.json')} is missing or corrupt ({error})") from error
        if not same:
            raise StorageError(
                f"{self.folder} was adapted to {found['images']['pool']:,} images, there are {self.pool:,} now, or "
                f"others: choose another folder by output="
            )
        return found

    def _write_description(self, epoch: int, **more: Any) -> None:
        values = {
            "method": self.recipe.name,
            "epochs": epoch,
            "of": self.spec.epochs,
            "network": self.embedding.spec.as_dict(),
            "origin": self.embedding.spec.weights,
            "archive": self.embedding.source.name,
            "images": {"pool": self.pool, "learnt": len(self.ids), "held_out": len(self.held), "digest": self.digest},
            "input": describe_input(self.embedding.source),
            "before": _plain(self.rows[0]),
            "after": _plain(self.rows[-1]),
            **more,
        }
        write_text(self.weights.with_suffix(".json"), json.dumps(values, indent=2))

    def _read_rows(self, epoch: int) -> list[dict[str, Number]]:
        """Read the metrics up to an epoch."""
        try:
            with (self.folder / METRICS).open(encoding="utf-8", newline="") as file:
                rows = [{name: float(row[name]) for name in COLUMNS} for row in csv.DictReader(file)]
                if [row["epoch"] for row in rows[: epoch + 1]] != list(range(epoch + 1)):
                    raise ValueError("epochs are missing")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StorageError(f"{self.folder / METRICS} is missing or corrupt ({error})") from error
        return rows[: epoch + 1]


def _has_both_classes(anomaly: Bool[Tensor, " n"]) -> bool:
    """Return True if there are at least two images of each class."""
    return min(int(anomaly.sum()), int((~anomaly).sum())) >= 2


def _plain(row: Mapping[str, Number]) -> dict[str, Number]:
    return {name: value for name, value in row.items() if value == value}  # JSON has no NaN
