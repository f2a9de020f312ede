"""LightningModule of FixMatch: a network, its moving average, the losses and an optimiser."""

import copy
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, Generic, TypeVar

import torch
import torch.nn.functional as F  # noqa: N812 (the field's own abbreviation)
from jaxtyping import Bool, Float, Shaped
from pytorch_lightning import LightningModule
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torchmetrics.classification import BinaryAveragePrecision

from anomalymatch.algorithms.fixmatch.batches import MixedBatch
from anomalymatch.algorithms.fixmatch.loss import (
    PseudoLabels,
    consistency_loss,
    cosine_7_16,
    pass_counts,
    pass_rates,
    squared_error,
)
from anomalymatch.algorithms.fixmatch.thresholds import rampup
from anomalymatch.algorithms.fixmatch.weighting import KEY, Alignment, FixedThreshold, Weighting
from anomalymatch.algorithms.layer_groups import batch_norms, layerwise_groups
from anomalymatch.algorithms.lightning import is_distributed, mean_over_processes
from anomalymatch.backbones.network import Backbone, Network, anomaly_logit, image_classifier
from anomalymatch.checks import check_choice, check_range
from anomalymatch.errors import ConfigError

SCHEDULES = ("constant", "cosine_7_16")
TEACHERS = ("student", "ema")
CONSISTENCIES = ("cross_entropy", "squared_error")
N = TypeVar("N", bound=nn.Module)


@dataclass(frozen=True)
class FixMatchSpec:
    """Hyper-parameters of the loss and of the training: the keys of `loss` in `conf/algorithm/fixmatch.yaml`.

    In the papers `threshold` is tau, and `unlabelled_weight` lambda_u. `weighting` is called with the number of images
    in the pool and the threshold. Weight decay spares normalisation layers. With `single_forward`, labelled, weak and
    strong views pass through the network as one batch with gradients, as in the paper; without it, the weak views,
    which need no gradient, are a batch of their own: same loss, less time. The defaults are those of the paper
    (`algorithm=fixmatch_reference`).

    Example:
        >>> am.FixMatchSpec(threshold=0.9).threshold
        0.9
    """

    threshold: float | None = 0.95
    weighting: Callable[..., Weighting] = FixedThreshold
    alignment: Callable[[], Alignment] | None = None
    consistency: str = "cross_entropy"
    unlabelled_weight: float = 1.0
    rampup: float = 0.0
    layer_decay: float = 1.0
    ema_decay: float = 0.99
    teacher: str = "student"
    schedule: str = "constant"
    weight_decay: float = 7.5e-4
    freeze_batch_norm: bool = False
    single_forward: bool = True

    def __post_init__(self) -> None:
        check_choice(f"{KEY}.schedule", self.schedule, SCHEDULES)
        check_choice(f"{KEY}.teacher", self.teacher, TEACHERS)
        check_choice(f"{KEY}.consistency", self.consistency, CONSISTENCIES)
        check_range(f"{KEY}.ema_decay", self.ema_decay, low=0, below=1)
        check_range(f"{KEY}.rampup", self.rampup, low=0, high=1)
        check_range(f"{KEY}.layer_decay", self.layer_decay, above=0, high=1)
        check_range(f"{KEY}.unlabelled_weight", self.unlabelled_weight, low=0)
        check_range(f"{KEY}.weight_decay", self.weight_decay, low=0)
        # Built once here, so that wrong settings are found before anything is written.
        self.make_weighting(0)
        self.make_alignment()

    @property
    def has_fixed_threshold(self) -> bool:
        """True if a fixed threshold decides from the first step which pseudo-labels are used."""
        return self.threshold is not None and isinstance(self.make_weighting(0), FixedThreshold)

    def make_weighting(self, pool: int) -> Weighting:
        """Make a new weighting for a pool of so many images."""
        return self.weighting(pool, self.threshold)

    def make_alignment(self) -> Alignment:
        """Make a new alignment."""
        return Alignment(prior=None, momentum=0.0) if self.alignment is None else self.alignment()


class ExponentialMovingAverage(nn.Module, Generic[N]):
    """Moving average of a network, which is part of the LightningModule's state.

    Parameters move by 1 - decay towards the network's at each update; buffers (batch statistics) are copied.
    """

    def __init__(self, network: N, decay: float) -> None:
        super().__init__()
        self.decay = decay
        self.network = copy.deepcopy(network)
        self.network.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "ExponentialMovingAverage[N]":
        """Stay in evaluation mode, whatever `mode` is: the average only predicts."""
        super().train(False)
        return self

    def update(self, network: nn.Module) -> None:
        """Move one step towards `network`. Frozen parameters never differ, so they are skipped."""
        pairs = [
            (average, value)
            for average, value in zip(self.network.parameters(), network.parameters(), strict=True)
            if value.requires_grad
        ]
        if pairs:
            get_ema_multi_avg_fn(self.decay)([a for a, _ in pairs], [v.detach() for _, v in pairs], torch.tensor(1))
        for average, value in zip(self.network.buffers(), network.buffers(), strict=True):
            average.copy_(value)


REFERENCE_LOSS = FixMatchSpec()
"""Losses and average of the paper."""
REFERENCE_OPTIMIZER = partial(SGD, lr=0.0075, momentum=0.9, nesterov=True)
"""Optimiser of the paper."""


class FixMatch(LightningModule):
    """LightningModule that trains `network` in place; the moving average `ema.network` scores.

    Calling it, `predict_step` and `validation_step` use the average: `FixMatch(...)(images)` are its logits.

    FlexMatch, FreeMatch, SoftMatch and mean teacher are this training with another weighting or consistency loss.

    Where several processes train, each has a share of every batch, and Lightning averages their gradients. The running
    statistics of batch norms are averaged here, so the network and its average stay the same in all processes.

    Args:
        network: module that maps images to logits of (normal, anomaly), or the name of a timm model, which is built
            with pretrained weights. It gets pixels from 0 to 255 as floating-point numbers; a classifier of timm gets
            them normalised as its weights were trained. Parameters with `requires_grad` learn.
        spec: hyper-parameters.
        optimizer: partial of an optimiser, called with parameter groups; its lr is the peak.
        iterations: number of steps, for the schedules; None for all steps of the trainer.
        truth: for each image of the pool, True if it is an anomaly; only for the logged precision of pseudo-labels.
        pool: number of images in the pool, for weightings that remember each of them.
        weights: weight of each image of the pool, for alignment (see `pool_weights`).

    Example:
        >>> network = nn.Sequential(nn.AvgPool2d(8), nn.Flatten(), nn.Linear(48, 2))
        >>> model = am.FixMatch(network)
        >>> model.predict_step(torch.zeros(4, 3, 32, 32, dtype=torch.uint8), 0).shape
        torch.Size([4])
    """

    memory_format = torch.channels_last
    """Layout of the images; channels-last is the fastest for the backward pass, also on CPUs."""

    def __init__(
        self,
        network: nn.Module | str,
        spec: FixMatchSpec = REFERENCE_LOSS,
        *,
        optimizer: Callable[..., Optimizer] = REFERENCE_OPTIMIZER,
        iterations: int | None = None,
        truth: Bool[Tensor, " pool"] | None = None,
        pool: int = 0,
        weights: Float[Tensor, " pool"] | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(describe_hyperparameters(spec, optimizer, iterations))
        self.network = image_classifier(network)
        self.ema = ExponentialMovingAverage(self.network, spec.ema_decay)
        self.average_precision = BinaryAveragePrecision()
        self.spec = spec
        self.make_optimizer = optimizer
        self.iterations = iterations
        self.truth, self.weights = truth, weights
        self.weighting = spec.make_weighting(pool)
        self.alignment = spec.make_alignment()

    def forward(self, images: Shaped[Tensor, "b c h w"]) -> Float[Tensor, "b 2"]:
        """Compute the average's logits of (normal, anomaly)."""
        return self.ema.network(self._prepare(images))

    def predict_step(self, batch: Any, batch_idx: int) -> Float[Tensor, " b"]:
        """Compute the log-odds of an anomaly for a batch of images, or for the first tensor of a tuple."""
        return anomaly_logit(self(batch if isinstance(batch, Tensor) else batch[0]))

    def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        """Log loss and average precision of a batch of images and classes (1: anomaly), as `val_loss` and `val_ap`."""
        images, targets = batch
        logits = self(images)
        self.average_precision(anomaly_logit(logits).sigmoid(), targets)
        self.log("val_loss", F.cross_entropy(logits, targets), batch_size=len(targets))
        self.log("val_ap", self.average_precision, on_step=False, on_epoch=True, batch_size=len(targets))

    def on_train_start(self) -> None:
        """Switch frozen batch norms to evaluation mode, which Lightning has just switched to training mode."""
        if self.spec.freeze_batch_norm:
            for module in batch_norms(self.network):
                module.eval()
        if self.global_rank:
            torch.manual_seed(torch.initial_seed() + self.global_rank)  # dropout must differ between processes

    def training_step(self, batch: MixedBatch, batch_idx: int) -> Float[Tensor, ""]:
        """Compute the supervised plus the weighted consistency loss of one batch."""
        logits_lb, logits_w, logits_s = self._forward(*map(self._prepare, (batch.x_lb, batch.x_ulb_w, batch.x_ulb_s)))
        logits_w = self.alignment(logits_w, _select(self.weights, batch.i_ulb))
        pseudo = self.weighting(logits_w, batch.i_ulb)
        losses = {
            "loss_lb": F.cross_entropy(logits_lb, batch.y_lb),
            "loss_ulb": self._consistency(logits_s, logits_w, pseudo),
        }
        step = batch_idx if self._trainer is None else self.global_step
        loss = losses["loss_lb"] + self._unlabelled_weight(step) * losses["loss_ulb"]
        penalty = self.weighting.penalty(logits_s, pseudo)
        if penalty is not None:
            losses["loss_penalty"] = penalty
            loss = loss + penalty
        self._log({"loss": loss} | losses, pseudo, batch.i_ulb)
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Update the average after each step of the optimiser."""
        self._share_statistics()
        self.ema.update(self.network)

    def configure_optimizers(self) -> Any:
        """Build the optimiser and its schedule, which is stepped after every batch."""
        optimizer = self.make_optimizer(layerwise_groups(self.network, self.spec.weight_decay, self.spec.layer_decay))
        for group in optimizer.param_groups:
            group["lr"] *= group["lr_scale"]
        if self.spec.schedule == "constant":
            return optimizer
        steps = self._steps
        schedule = LambdaLR(optimizer, lambda step: cosine_7_16(step, steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    @property
    def _steps(self) -> int:
        """Number of steps of the whole training."""
        if self.iterations is not None:
            return self.iterations
        steps = self.trainer.estimated_stepping_batches
        if not math.isfinite(steps):
            raise ConfigError("the trainer has no end, which a schedule needs: give FixMatch iterations=STEPS")
        return int(steps)

    def _prepare(self, images: Shaped[Tensor, "b c h w"]) -> Shaped[Tensor, "b c h w"]:
        """Lay images out for the network, and convert 8-bit pixels for any but our own, which does that itself."""
        images = images.contiguous(memory_format=self.memory_format)
        return images if isinstance(self.network, (Network, Backbone)) else images.float()

    def _forward(
        self, x_lb: Tensor, x_ulb_w: Tensor, x_ulb_s: Tensor
    ) -> tuple[Float[Tensor, "l 2"], Float[Tensor, "u 2"], Float[Tensor, "u 2"]]:
        together = self.spec.single_forward and self.spec.teacher == "student"
        views = [x_lb, x_ulb_s, x_ulb_w] if together else [x_lb, x_ulb_s]
        logits_lb, logits_s, *rest = self.network(torch.cat(views)).split([len(x) for x in views])
        if together:
            return logits_lb, rest[0], logits_s
        teacher = self.ema.network if self.spec.teacher == "ema" else self.network
        with torch.no_grad():
            return logits_lb, teacher(x_ulb_w), logits_s

    def _consistency(self, logits_s: Tensor, logits_w: Tensor, pseudo: PseudoLabels) -> Float[Tensor, ""]:
        if self.spec.consistency == "squared_error":
            return squared_error(logits_s, logits_w, pseudo)
        return consistency_loss(logits_s, pseudo)

    def _unlabelled_weight(self, step: int) -> float:
        """Compute the weight of the consistency loss at a step of the training."""
        if not self.spec.rampup:
            return self.spec.unlabelled_weight
        return self.spec.unlabelled_weight * rampup(step, float(self.spec.rampup * self._steps))

    def _log(self, losses: dict[str, Tensor], pseudo: PseudoLabels, i_ulb: Tensor) -> None:
        """Log losses, pass rates, precisions and adaptive values, averaged over all processes."""
        both = losses | pass_counts(pseudo, _select(self.truth, i_ulb))
        values = mean_over_processes(torch.stack([value.detach() for value in both.values()]))
        shared = dict(zip(both, values, strict=True))
        rates = pass_rates({name: value for name, value in shared.items() if name not in losses})
        self.log_dict({name: shared[name] for name in losses} | rates | self.weighting.state_to_log)

    def _share_statistics(self) -> None:
        """Replace the batch statistics by their mean over all processes, each of which had other images."""
        norms = [] if self.spec.freeze_batch_norm else list(batch_norms(self.network))
        statistics = [s for norm in norms for s in (norm.running_mean, norm.running_var) if s is not None]
        if not statistics or not is_distributed():
            return
        means = mean_over_processes(torch.cat(statistics))
        for own, mean in zip(statistics, means.split([len(s) for s in statistics]), strict=True):
            own.copy_(mean)

    def __getstate__(self) -> dict[str, Any]:
        # For a spawned process: sent one by one, every tensor would cost an open file and shared memory.
        block = io.BytesIO()
        torch.save(super().__getstate__(), block)
        return {"block": block.getvalue()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(torch.load(io.BytesIO(state["block"]), weights_only=False))


def describe_hyperparameters(
    spec: FixMatchSpec, optimizer: Callable[..., Optimizer], iterations: int | None
) -> dict[str, Any]:
    """Return hyper-parameters as plain values, for loggers and Lightning's checkpoints."""
    values: dict[str, Any] = {field.name: getattr(spec, field.name) for field in fields(spec)}
    values["optimizer"] = optimizer
    plain: dict[str, Any] = {"iterations": iterations}
    for name, value in values.items():
        if callable(value):
            plain |= {f"{name}.{key}": word for key, word in getattr(value, "keywords", {}).items()}
        plain[name] = getattr(value, "func", value).__name__ if callable(value) else value
    return plain


def _select(values: Tensor | None, i_ulb: Tensor) -> Tensor | None:
    return None if values is None else values.to(i_ulb.device)[i_ulb]
