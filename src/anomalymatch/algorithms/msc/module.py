"""LightningModule of mean-shifted contrastive learning: a backbone, the loss and an optimiser."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 (the field's own abbreviation)
from jaxtyping import Float
from pytorch_lightning import LightningModule
from torch import Tensor
from torch.optim import Optimizer

from anomalymatch.algorithms.augmentation.pairs import ViewPair
from anomalymatch.algorithms.layer_groups import batch_norms, parameter_groups
from anomalymatch.algorithms.msc.loss import angular_term, has_direction, mean_shifted_contrastive
from anomalymatch.backbones.network import Backbone
from anomalymatch.checks import check_range
from anomalymatch.errors import DataError


@dataclass(frozen=True)
class MscSpec:
    """Hyper-parameters of the loss: the keys of `loss` in `conf/algorithm/msc.yaml`."""

    temperature: float
    mean_shift: bool
    angular_weight: float
    weight_decay: float

    def __post_init__(self) -> None:
        check_range("algorithm.learner.loss.temperature", self.temperature, above=0)
        check_range("algorithm.learner.loss.angular_weight", self.angular_weight, low=0)
        check_range("algorithm.learner.loss.weight_decay", self.weight_decay, low=0)


class MeanShiftedContrastive(LightningModule):
    """LightningModule that trains `backbone` in place.

    Args:
        backbone: module that maps 8-bit images to features; its parameters with `requires_grad` learn.
        centre: mean of the normal images' L2-normalised features before training; it is constant.
        spec: hyper-parameters.
        optimizer: partial of an optimiser, called with parameter groups.
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
        """Switch batch norms back to evaluation mode, so that they keep their pretrained statistics."""
        for module in batch_norms(self.backbone):
            module.eval()

    def training_step(self, batch: ViewPair, batch_idx: int) -> Float[Tensor, ""]:
        """Compute the contrast of two views of each image, and their distance from the mean.

        A pair is left out if one of its views has no direction from the centre (plain sky that activates no neuron).

        Raises:
            DataError: if fewer than two pairs remain, or the features are no longer finite.
        """
        views = torch.cat(batch).contiguous(memory_format=self.memory_format)
        features = F.normalize(self.backbone(views).float(), dim=1)
        a, b = features.chunk(2)
        centre = self.centre if self.spec.mean_shift else torch.zeros_like(self.centre)
        whole = has_direction(a, centre) & has_direction(b, centre)
        try:
            if not features.isfinite().all():  # even left out they would make the gradient NaN
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
        """Build the optimiser; its learning rate is constant."""
        return self.make_optimizer(parameter_groups(self.backbone, self.spec.weight_decay))
