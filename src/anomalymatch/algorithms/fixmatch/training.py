"""FixMatch training as a function: from a network and batches to the trained average and student."""

import copy
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Bool
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from anomalymatch.algorithms.base import StepListener, ignore_step
from anomalymatch.algorithms.fixmatch.batches import BatchSpec, MixedBatches
from anomalymatch.algorithms.fixmatch.module import FixMatch, FixMatchSpec
from anomalymatch.algorithms.layer_groups import freeze_lower_groups
from anomalymatch.algorithms.lightning import (
    StepFile,
    StepLogger,
    StepProgress,
    build_trainer,
    quiet_lightning,
    training_processes,
)
from anomalymatch.backbones.frozen_stages import accelerate_frozen_stages
from anomalymatch.backbones.inference import Inference
from anomalymatch.backbones.network import Network
from anomalymatch.errors import ConfigError


@dataclass(frozen=True)
class Recipe:
    """Settings of a training: losses, partials of an optimiser and a Trainer, and the groups that learn (None: all).

    `inference` computes frozen stages faster, where that pays.
    """

    loss: FixMatchSpec
    optimizer: Callable[..., Optimizer]
    trainer: Callable[..., Trainer]
    trainable_groups: int | None
    inference: Inference


class Trained(NamedTuple):
    """Result of a training."""

    average: Network
    """Moving average of the network, which scores."""
    student: Network
    """Network that was trained, in place."""
    rows: list[dict[str, float]]
    """Logged metrics of each step."""


class Snapshots(Callback):
    """Callback that calls `look` with a copy of the average after each of some numbers of steps."""

    def __init__(self, steps: Collection[int], look: Callable[[int, Network], None]) -> None:
        self._steps, self._look = steps, look

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Copy the average before the next step begins: it has followed the last one by then."""
        if trainer.global_step in self._steps:
            network = cast(Network, copy.deepcopy(cast(FixMatch, pl_module).ema.network))
            network.backbone.averages = True
            self._look(trainer.global_step, network)


def train(
    network: Network,
    data: MixedBatches,
    recipe: Recipe,
    on_step: StepListener = ignore_step,
    *,
    steps: int | None = None,
    average: Network | None = None,
    truth: Bool[Tensor, " pool"] | None = None,
    callbacks: Sequence[Callback] = (),
    description: str = "Training",
) -> Trained:
    """Train a network by FixMatch; its random numbers follow from the seed of `data`.

    Args:
        network: network to train, in place.
        data: the batches.
        recipe: settings.
        on_step: called with the metrics of each step, by the first process where several train.
        steps: steps to train; None for all batches.
        average: average to continue; None begins with the network.
        truth: see `FixMatch`.
        callbacks: further callbacks of the trainer.
        description: title of the progress bar.
    """
    steps = data.spec.iterations if steps is None else steps
    network.backbone.averages = False  # the teacher sees one view too, which the augmentation has reoriented
    network.train()  # Lightning leaves the mode as it is, and a restored network is in evaluation mode
    freeze_lower_groups(network.backbone.body, recipe.trainable_groups)
    with torch.random.fork_rng(), TemporaryDirectory() as folder, quiet_lightning():
        torch.manual_seed(data.seed)  # dropout and stochastic depth of backbones that have them
        module = FixMatch(
            network,
            recipe.loss,
            optimizer=recipe.optimizer,
            iterations=data.spec.iterations,
            truth=truth,
            pool=len(data.pool),
            weights=torch.from_numpy(data.weights()) if recipe.loss.make_alignment().aligns else None,
        )
        if average is not None:
            module.ema.network.load_state_dict(average.state_dict())
        file = StepFile(Path(folder) / "steps.jsonl")
        trainer = build_trainer(
            recipe.trainer,
            max_steps=steps,
            logger=StepLogger(file, on_step),
            callbacks=[StepProgress(description, steps), *callbacks],
            use_distributed_sampler=False,  # `MixedBatches` divides its batches itself
        )
        with training_processes(trainer), _frozen_stages_apart(trainer, module, recipe, data.spec, steps):
            trainer.fit(module, datamodule=data)
        rows = file.rows()
    trained = Trained(cast(Network, module.ema.network), network, rows)
    for each in (trained.average, trained.student):
        each.backbone.averages = True
    return trained


def spawns_processes(make: Callable[..., Trainer], batch: BatchSpec) -> bool:
    """Return True if a trainer starts processes, after checking that they can train and can share each batch.

    Raises:
        ConfigError: if they cannot, with what to set instead.
    """
    trainer = build_trainer(make, logger=False)
    options = getattr(make, "keywords", {})
    starts = trainer.strategy.launcher is not None
    # Lightning's `ddp` runs the command line again for every device: each would go through the whole loop and write
    # the run folder. A fork inherits threads that stand still and a GPU that it cannot use.
    if starts and "spawn" not in str(options.get("strategy")):
        raise ConfigError(
            f"trainer.lightning: {type(trainer.strategy).__name__} with {trainer.num_devices} devices would run this "
            "program again, or fork it: set trainer.lightning.strategy=ddp_spawn to train on several devices"
        )
    if trainer.num_nodes > 1:
        raise ConfigError(f"trainer.lightning.num_nodes is {trainer.num_nodes}: training is on one host")
    if options.get("sync_batchnorm"):
        raise ConfigError(
            "trainer.lightning.sync_batchnorm would remove the activations from timm's networks: leave it out, "
            "the statistics are averaged over the processes after every step"
        )
    batch.shared_by(trainer.world_size)
    return starts


def _frozen_stages_apart(
    trainer: Trainer, module: FixMatch, recipe: Recipe, batch: BatchSpec, steps: int
) -> AbstractContextManager[None]:
    if trainer.strategy.launcher is not None or not recipe.loss.freeze_batch_norm:
        return nullcontext()
    network, average = cast(Network, module.network), cast(Network, module.ema.network)
    return accelerate_frozen_stages(
        [network.backbone, average.backbone],
        recipe.inference,
        device=trainer.strategy.root_device,
        size=network.spec.image_size,
        batch_size=batch.labelled,
        count=steps * (batch.labelled + 2 * batch.unlabelled),
    )
