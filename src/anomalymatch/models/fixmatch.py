"""FixMatch as a LightningModule: it wires a network, its moving average, the losses and an optimiser."""

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812 (the field's own abbreviation)
from jaxtyping import Bool, Float
from pytorch_lightning import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from anomalymatch.errors import ConfigError
from anomalymatch.functional.fixmatch import PseudoLabels, consistency_loss, cosine_7_16, pseudo_labels
from anomalymatch.models.ema import ExponentialMovingAverage
from anomalymatch.models.network import Network, parameter_groups

SCHEDULES = ("constant", "cosine_7_16")
TEACHERS = ("student", "ema")
KINDS = ("", "_anomaly")


@dataclass(frozen=True)
class FixMatchSpec:
    """The hyper-parameters of the loss and of its training.

    Attributes:
        threshold: softmax from which a pseudo-label teaches (tau).
        unlabelled_weight: weight of the consistency loss (lambda_u).
        ema_decay: decay of the average that scores.
        teacher: who makes the pseudo-labels, the `student` itself or its `ema`.
        schedule: of the learning rate, `constant` or `cosine_7_16`.
        weight_decay: of all weights but those of normalisation layers.
        freeze_batch_norm: keep the pretrained statistics and use them.
        single_forward: push labelled, weak and strong views through the network as one batch with gradients, as
            the paper does. Otherwise the weak views, which need none, go through alone: same loss, less time.
    """

    threshold: float
    unlabelled_weight: float
    ema_decay: float
    teacher: str
    schedule: str
    weight_decay: float
    freeze_batch_norm: bool
    single_forward: bool

    def __post_init__(self) -> None:
        for name, value, choices in (("schedule", self.schedule, SCHEDULES), ("teacher", self.teacher, TEACHERS)):
            if value not in choices:
                raise ConfigError(f"algorithm.learner.loss.{name} is {value!r}: choose one of {', '.join(choices)}")
        if not 0.0 < self.threshold <= 1.0:
            raise ConfigError(f"algorithm.learner.loss.threshold is {self.threshold}: it must lie in (0, 1]")
        if not 0.0 <= self.ema_decay < 1.0:
            raise ConfigError(f"algorithm.learner.loss.ema_decay is {self.ema_decay}: it must lie in [0, 1)")
        for name, weight in (("unlabelled_weight", self.unlabelled_weight), ("weight_decay", self.weight_decay)):
            if not weight >= 0.0:
                raise ConfigError(f"algorithm.learner.loss.{name} is {weight}: it cannot be negative")


def over_processes(values: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Mean over the processes that train together; the values themselves where there is one."""
    if not (dist.is_available() and dist.is_initialized()):
        return values
    total = values.clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


class FixMatch(LightningModule):
    """Trains `network` in place; `ema.network` is the one that scores.

    Where several processes train, each has a share of every batch, and Lightning averages their gradients; the running
    statistics of batch norms are averaged here, so that network and average stay the same in all of them.

    Args:
        network: 8-bit images in, two logits out; parameters that must not learn have `requires_grad` off.
        spec: hyper-parameters.
        optimizer: makes an optimiser of parameter groups (a partial; its lr is the peak).
        iterations: length of the training, for the schedule.
        truth: whether each image of the pool is an anomaly, where a benchmark knows it: only to report how
            trustworthy the pseudo-labels are.
    """

    memory_format = torch.channels_last
    """Layout of the images; channels-last is the fastest for the backward pass, on CPUs too."""

    def __init__(
        self,
        network: Network,
        spec: FixMatchSpec,
        *,
        optimizer: Callable[..., Optimizer],
        iterations: int,
        truth: Bool[Tensor, " pool"] | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.ema = ExponentialMovingAverage(network, spec.ema_decay)
        self.spec = spec
        self.make_optimizer = optimizer
        self.iterations = iterations
        self.truth = truth

    def on_train_start(self) -> None:
        """Lightning has just set training mode: batch norms that are to keep their statistics leave it again."""
        if self.spec.freeze_batch_norm:
            for module in self._batch_norms():
                module.eval()
        if self.global_rank:
            torch.manual_seed(torch.initial_seed() + self.global_rank)  # dropout must differ from process to process

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Float[Tensor, ""]:
        """One FixMatch step: supervised plus weighted consistency loss."""
        x_lb, y_lb = batch["lb"]
        x_ulb_w, x_ulb_s, i_ulb = batch["ulb"]
        logits_lb, logits_w, logits_s = self._forward(
            *(x.contiguous(memory_format=self.memory_format) for x in (x_lb, x_ulb_w, x_ulb_s))
        )
        pseudo = pseudo_labels(logits_w, self.spec.threshold)
        loss_lb = F.cross_entropy(logits_lb, y_lb)
        loss_ulb = consistency_loss(logits_s, pseudo)
        loss = loss_lb + self.spec.unlabelled_weight * loss_ulb
        self._log({"loss": loss, "loss_lb": loss_lb, "loss_ulb": loss_ulb}, self._passed(pseudo, i_ulb))
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """The average follows after each step of the optimiser."""
        self._share_statistics()
        self.ema.update(self.network)

    def configure_optimizers(self) -> Any:
        """The optimiser with its schedule, stepped after every batch."""
        optimizer = self.make_optimizer(parameter_groups(self.network, self.spec.weight_decay))
        if self.spec.schedule == "constant":
            return optimizer
        schedule = LambdaLR(optimizer, lambda step: cosine_7_16(step, self.iterations))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

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

    def _passed(self, pseudo: PseudoLabels, i_ulb: Tensor) -> dict[str, Tensor]:
        """How many images pass the cut, how many as anomaly and, with truth, how many of each rightly so."""
        mask = pseudo.mask.float()
        anomaly = mask * (pseudo.targets == 1)
        passed = {"images": torch.ones_like(mask), "pass": mask, "pass_anomaly": anomaly}
        if self.truth is not None:
            right = (pseudo.targets == self.truth.to(i_ulb.device)[i_ulb].long()).float()
            passed |= {"right": mask * right, "right_anomaly": anomaly * right}
        return {name: value.sum() for name, value in passed.items()}

    def _log(self, losses: dict[str, Tensor], passed: dict[str, Tensor]) -> None:
        """Of all processes: losses, the share of images that passes the cut and, with truth, how much rightly so."""
        both = losses | passed
        values = over_processes(torch.stack([value.detach() for value in both.values()]))
        shared = dict(zip(both, values, strict=True))
        row = {name: shared[name] for name in losses}
        row |= {f"pass_rate{kind}": shared[f"pass{kind}"] / shared["images"] for kind in KINDS}
        if self.truth is not None:
            row |= {f"pseudo_precision{kind}": shared[f"right{kind}"] / shared[f"pass{kind}"] for kind in KINDS}
        self.log_dict(row)

    def _batch_norms(self) -> Iterator[nn.modules.batchnorm._BatchNorm]:
        return (m for m in self.network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))

    def _share_statistics(self) -> None:
        """Each process saw other images: all go on with the mean of what they saw."""
        norms = [] if self.spec.freeze_batch_norm else list(self._batch_norms())
        statistics = [s for norm in norms for s in (norm.running_mean, norm.running_var) if s is not None]
        if not statistics or not (dist.is_available() and dist.is_initialized()):
            return
        means = over_processes(torch.cat(statistics))
        for own, mean in zip(statistics, means.split([len(s) for s in statistics]), strict=True):
            own.copy_(mean)

    def __getstate__(self) -> dict[str, Any]:
        # For a spawned process: sent one by one, every tensor would cost an open file and shared memory.
        block = io.BytesIO()
        torch.save(super().__getstate__(), block)
        return {"block": block.getvalue()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(torch.load(io.BytesIO(state["block"]), weights_only=False))
