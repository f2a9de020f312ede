"""Mean-shifted contrastive learning as a LightningModule: it wires a backbone, the loss and an optimiser."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (the field's own abbreviation)
from jaxtyping import Float
from pytorch_lightning import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer

from anomalymatch.algorithms.layer_groups import parameter_groups
from anomalymatch.algorithms.msc.loss import angular_term, has_direction, mean_shifted_contrastive
from anomalymatch.backbones.network import Backbone
from anomalymatch.errors import ConfigError, DataError


@dataclass(frozen=True)
class MscSpec:
    """The hyper-parameters of the loss.

    Attributes:
        temperature: of the contrast (tau).
        mean_shift: measure angles around the mean of the normal features; false is the plain contrastive loss.
        angular_weight: weight of the term that keeps features close to their mean; 0 leaves it out.
        weight_decay: of all weights but those of normalisation layers.
    """

    temperature: float
    mean_shift: bool
    angular_weight: float
    weight_decay: float

    def __post_init__(self) -> None:
        if not self.temperature > 0.0:
            raise ConfigError(f"algorithm.learner.loss.temperature is {self.temperature}: it must be positive")
        for name in ("angular_weight", "weight_decay"):
            if not getattr(self, name) >= 0.0:
                raise ConfigError(f"algorithm.learner.loss.{name} is {getattr(self, name)}: it cannot be negative")


class MeanShiftedContrastive(LightningModule):
    """Trains `backbone` in place.

    Args:
        backbone: 8-bit images in, features out; parameters that must not learn have `requires_grad` off.
        centre: mean of the normal images' L2-normalised features before training; it stays as it is.
        spec: hyper-parameters.
        optimizer: makes an optimiser of parameter groups (a partial).
    """

    memory_format = torch.channels_last
    centre: Tensor

    def __init__(
        self,
        backbone: Backbone,
        centre: Float[Tensor, " d"],
        spec: MscSpec,
        *,
        optimizer: Callable[..., Optimizer],
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.register_buffer("centre", centre)
        self.spec = spec
        self.make_optimizer = optimizer

    def on_train_start(self) -> None:
        """Lightning has just set training mode: batch norms leave it again, and keep their pretrained statistics."""
        for module in self.backbone.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()

    def training_step(self, batch: Any, batch_idx: int) -> Float[Tensor, ""]:
        """The contrast of two views of each image, and how far they are from the mean.

        A pair of which one view has no direction from the centre (a view of plain sky, say, to which no neuron answers)
        is left out.

        Raises:
            DataError: if fewer than two pairs remain, or the features are no longer finite.
        """
        views = torch.cat(list(batch)).contiguous(memory_format=self.memory_format)
        features = F.normalize(self.backbone(views).float(), dim=1)
        a, b = features.chunk(2)
        centre = self.centre if self.spec.mean_shift else torch.zeros_like(self.centre)
        whole = has_direction(a, centre) & has_direction(b, centre)
        try:
            if not features.isfinite().all():  # left out, they would still spoil the gradient
                raise ValueError("some features are not finite, lower the learning rate")
            a, b = a[whole], b[whole]
            contrast = mean_shifted_contrastive(a, b, centre, self.spec.temperature)
            angle = angular_term(a, b, self.centre)
        except ValueError as error:
            raise DataError(f"the contrastive training cannot go on: {error}") from error
        loss = contrast + self.spec.angular_weight * angle
        self.log_dict({"loss": loss, "loss_contrast": contrast, "loss_angular": angle})
        return loss

    def configure_optimizers(self) -> Optimizer:
        """The optimiser; its rate stays constant."""
        return self.make_optimizer(parameter_groups(self.backbone, self.spec.weight_decay))
