"""LightningModule of the adaptation: a backbone, a self-supervised method and an optimiser."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from pytorch_lightning import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from anomalymatch.algorithms.adaptation.methods import Method, Teacher
from anomalymatch.algorithms.augmentation.pairs import ViewPair
from anomalymatch.algorithms.layer_groups import batch_norms, layerwise_groups, parameter_groups
from anomalymatch.backbones.network import Backbone
from anomalymatch.checks import check_range
from anomalymatch.errors import TrainingError

STATE, MOMENTS, NUMBERS, RANDOM = "module.", "optimizer.", "optimizer_numbers.", "random."
"""Prefixes of the tensors of a checkpoint."""


@dataclass(frozen=True)
class AdaptationSpec:
    """Hyper-parameters of the training: keys of `conf/base/adapt.yaml`."""

    epochs: int
    batch_size: int
    image_size: int
    trainable_groups: int | None
    freeze_batch_norm: bool
    layer_decay: float
    head_rate: float
    weight_decay: float
    warmup: float
    held_out: int
    collapse: float

    def __post_init__(self) -> None:
        check_range("adapt.epochs", self.epochs, low=1)
        check_range("adapt.batch_size", self.batch_size, low=2)
        check_range("adapt.image_size", self.image_size, low=16)
        check_range("adapt.trainable_groups", self.trainable_groups, low=1, null=True)
        check_range("adapt.layer_decay", self.layer_decay, above=0, high=1)
        check_range("adapt.head_rate", self.head_rate, above=0)
        check_range("adapt.weight_decay", self.weight_decay, low=0)
        check_range("adapt.warmup", self.warmup, low=0, high=1)
        check_range("adapt.held_out", self.held_out, low=2)
        check_range("adapt.collapse", self.collapse, low=0, high=1)


class Adaptation(LightningModule):
    """LightningModule that trains `backbone` in place by a self-supervised method.

    Args:
        backbone: module that maps 8-bit images to features; its parameters with `requires_grad` learn.
        method: heads and loss.
        spec: hyper-parameters.
        optimizer: partial of an optimiser, called with parameter groups; its lr is the peak.
        steps: number of steps of the whole training, for the schedules.
    """

    memory_format = torch.channels_last

    def __init__(
        self,
        backbone: Backbone,
        method: Method,
        spec: AdaptationSpec,
        *,
        optimizer: Callable[..., Optimizer],
        steps: int,
    ) -> None:
        super().__init__()
        self.backbone, self.method, self.spec = backbone, method, spec
        self.make_optimizer, self.steps = optimizer, steps
        self.done = 0
        """Steps that were done before this training continued."""
        self.losses: list[float] = []
        """Loss of each step so far."""
        self._moments: dict[int, dict[str, Any]] = {}

    def on_train_start(self) -> None:
        """Switch frozen batch norms to evaluation mode, and give the optimiser its state back."""
        teachers = [batch_norms(module.backbone) for module in self.method.modules() if isinstance(module, Teacher)]
        for norm, *others in zip(batch_norms(self.backbone), *teachers, strict=True):
            if self.spec.freeze_batch_norm or not any(p.requires_grad for p in norm.parameters()):
                for frozen in (norm, *others):
                    frozen.eval()
        if self._moments:
            optimizer = self.trainer.optimizers[0]
            optimizer.load_state_dict(optimizer.state_dict() | {"state": self._moments})

    def training_step(self, batch: ViewPair, batch_idx: int) -> Float[Tensor, ""]:
        """Compute the loss of two views of each image.

        Raises:
            TrainingError: if the loss is no longer finite.
        """
        step = self.done + batch_idx
        if step:  # the teacher follows the step before; here, so that a checkpoint does not fall between both
            self.method.follow(self.backbone, step / self.steps)
        views = torch.cat(batch).contiguous(memory_format=self.memory_format)
        loss = self.method(self.backbone, views)
        if not loss.isfinite():
            raise TrainingError(
                f"the training diverged in step {step + 1} of {self.steps}: its loss is {loss.item()}; lower "
                f"adapt.optimizer.lr, and choose another output="
            )
        self.losses.append(loss.item())
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        """Build the optimiser and its schedule: a linear warm-up, then half a cosine to zero."""
        decay, body = self.spec.weight_decay, nn.ModuleDict({"backbone": self.backbone})
        heads = [group | {"lr_scale": self.spec.head_rate} for group in parameter_groups(self.method, decay)]
        groups = [*layerwise_groups(body, decay, self.spec.layer_decay), *heads]
        optimizer = self.make_optimizer([group for group in groups if group["params"]])
        for group in optimizer.param_groups:
            group["lr"] *= group["lr_scale"]
        schedule = LambdaLR(optimizer, lambda step: warm_cosine(self.done + step, self.steps, self.spec.warmup))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def checkpoint(self) -> dict[str, Tensor]:
        """Return all that a training needs to go on, as named tensors: weights, optimiser and random numbers."""
        tensors = {f"{STATE}{name}": tensor for name, tensor in self.state_dict().items()}
        for index, values in self.trainer.optimizers[0].state_dict()["state"].items():
            for name, value in values.items():
                if isinstance(value, Tensor):
                    tensors[f"{MOMENTS}{index}.{name}"] = value
                elif value is not None:
                    tensors[f"{NUMBERS}{index}.{name}"] = torch.tensor(value, dtype=torch.float64)
        tensors[f"{RANDOM}cpu"] = torch.get_rng_state()
        if self.device.type == "cuda":
            tensors[f"{RANDOM}cuda"] = torch.cuda.get_rng_state(self.device)
        return {name: tensor.clone() for name, tensor in tensors.items()}  # tied weights would be refused

    def restore(self, tensors: Mapping[str, Tensor], done: int) -> None:
        """Go on from a checkpoint after `done` steps."""
        self.load_state_dict(dict(_under(tensors, STATE)))
        self.done = done
        for prefix in (MOMENTS, NUMBERS):
            for path, value in _under(tensors, prefix):
                index, _, name = path.partition(".")
                self._moments.setdefault(int(index), {})[name] = value if prefix == MOMENTS else value.item()
        torch.set_rng_state(tensors[f"{RANDOM}cpu"])
        if f"{RANDOM}cuda" in tensors and torch.cuda.is_available():
            torch.cuda.set_rng_state(tensors[f"{RANDOM}cuda"])


def warm_cosine(step: int, steps: int, warmup: float) -> float:
    """Compute the factor of the learning rate: it rises linearly in a share of the steps, then falls along a cosine."""
    warm = math.ceil(warmup * steps)
    if step < warm:
        return (step + 1) / warm
    return (1.0 + math.cos(math.pi * (step - warm) / max(1, steps - warm))) / 2


def _under(tensors: Mapping[str, Tensor], prefix: str) -> Iterator[tuple[str, Tensor]]:
    return ((name.removeprefix(prefix), value) for name, value in tensors.items() if name.startswith(prefix))
