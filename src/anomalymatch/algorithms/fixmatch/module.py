"""FixMatch as a LightningModule: it wires a network, its moving average, the losses and an optimiser."""

import copy
import io
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Generic, TypeVar

import torch
import torch.nn.functional as F  # noqa: N812 (the field's own abbreviation)
from jaxtyping import Bool, Float
from pytorch_lightning import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from anomalymatch.algorithms.fixmatch.loss import (
    PseudoLabels,
    consistency_loss,
    cosine_7_16,
    ema_update,
    pass_counts,
    pass_rates,
    squared_error,
)
from anomalymatch.algorithms.fixmatch.spec import FixMatchSpec as FixMatchSpec
from anomalymatch.algorithms.fixmatch.thresholds import rampup
from anomalymatch.algorithms.layer_groups import layerwise_groups
from anomalymatch.algorithms.processes import over_processes, several
from anomalymatch.backbones.frozen_stages import accelerate_frozen_stages
from anomalymatch.backbones.inference import Inference
from anomalymatch.backbones.network import Network

N = TypeVar("N", bound=nn.Module)


class ExponentialMovingAverage(nn.Module, Generic[N]):
    """A slow copy of `network`, part of the LightningModule's state so that it survives a resume.

    Parameters move by 1 - decay towards the network's at each update; buffers (batch-norm statistics) are copied.
    """

    def __init__(self, network: N, decay: float) -> None:
        super().__init__()
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"the EMA's decay is {decay}: it must lie in [0, 1)")
        self.decay = decay
        self.network = copy.deepcopy(network)
        self.network.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "ExponentialMovingAverage[N]":
        """The average only ever predicts: it stays in evaluation mode."""
        super().train(False)
        return self

    def update(self, network: nn.Module) -> None:
        """Move one step towards `network`. Frozen parameters never differ, so they are passed over."""
        pairs = [
            (average, value)
            for average, value in zip(self.network.parameters(), network.parameters(), strict=True)
            if value.requires_grad
        ]
        ema_update([a for a, _ in pairs], [v.detach() for _, v in pairs], self.decay)
        for average, value in zip(self.network.buffers(), network.buffers(), strict=True):
            average.copy_(value)


class FixMatch(LightningModule):
    """Trains `network` in place; `ema.network` is the one that scores.

    FlexMatch, FreeMatch, SoftMatch and mean teacher are this training with another weighting or consistency loss.

    Where several processes train, each has a share of every batch, and Lightning averages their gradients; the running
    statistics of batch norms are averaged here, so that network and average stay the same in all of them.

    Args:
        network: 8-bit images in, two logits out; parameters that must not learn have `requires_grad` off.
        spec: hyper-parameters.
        optimizer: makes an optimiser of parameter groups (a partial; its lr is the peak).
        iterations: length of the training, for the schedule.
        truth: whether each image of the pool is an anomaly, where a benchmark knows it: only to report how
            trustworthy the pseudo-labels are.
        pool: images in the pool, for a weighting that remembers each of them.
        weights: of each image of the pool, for alignment (see `Alignment.forward`).
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
        pool: int = 0,
        weights: Float[Tensor, " pool"] | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.ema = ExponentialMovingAverage(network, spec.ema_decay)
        self.spec = spec
        self.make_optimizer = optimizer
        self.iterations = iterations
        self.truth, self.weights = truth, weights
        self.weighting = spec.make_weighting(pool)
        self.alignment = spec.make_alignment()

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
        logits_w = self.alignment(logits_w, _at(self.weights, i_ulb))
        pseudo = self.weighting(logits_w, i_ulb)
        losses = {
            "loss_lb": F.cross_entropy(logits_lb, y_lb),
            "loss_ulb": self._consistency(logits_s, logits_w, pseudo),
        }
        loss = losses["loss_lb"] + self._unlabelled_weight(batch_idx) * losses["loss_ulb"]
        penalty = self.weighting.penalty(logits_s, pseudo)
        if penalty is not None:
            losses["loss_penalty"] = penalty
            loss = loss + penalty
        self._log({"loss": loss} | losses, pseudo, i_ulb)
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """The average follows after each step of the optimiser."""
        self._share_statistics()
        self.ema.update(self.network)

    def configure_optimizers(self) -> Any:
        """The optimiser with its schedule, stepped after every batch."""
        optimizer = self.make_optimizer(layerwise_groups(self.network, self.spec.weight_decay, self.spec.layer_decay))
        for group in optimizer.param_groups:
            group["lr"] *= group["lr_scale"]
        if self.spec.schedule == "constant":
            return optimizer
        schedule = LambdaLR(optimizer, lambda step: cosine_7_16(step, self.iterations))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def frozen_apart(
        self, inference: Inference, *, device: torch.device, batch_size: int, count: int
    ) -> AbstractContextManager[None]:
        """See `accelerate_frozen_stages`."""
        if not self.spec.freeze_batch_norm:
            return nullcontext()
        backbones, size = [self.network.backbone, self.ema.network.backbone], self.network.spec.image_size
        return accelerate_frozen_stages(
            backbones, inference, device=device, size=size, batch_size=batch_size, count=count
        )

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
        """A training is one epoch, so that its batches are its steps."""
        return self.spec.unlabelled_weight * rampup(step, float(self.spec.rampup * self.iterations))

    def _log(self, losses: dict[str, Tensor], pseudo: PseudoLabels, i_ulb: Tensor) -> None:
        """Of all processes: losses, which shares pass and, with truth, how much rightly so; and the thresholds."""
        both = losses | pass_counts(pseudo, _at(self.truth, i_ulb))
        values = over_processes(torch.stack([value.detach() for value in both.values()]))
        shared = dict(zip(both, values, strict=True))
        rates = pass_rates({name: value for name, value in shared.items() if name not in losses})
        self.log_dict({name: shared[name] for name in losses} | rates | self.weighting.in_force)

    def _batch_norms(self) -> Iterator[nn.modules.batchnorm._BatchNorm]:
        return (m for m in self.network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))

    def _share_statistics(self) -> None:
        """Each process saw other images: all go on with the mean of what they saw."""
        norms = [] if self.spec.freeze_batch_norm else list(self._batch_norms())
        statistics = [s for norm in norms for s in (norm.running_mean, norm.running_var) if s is not None]
        if not statistics or not several():
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


def _at(values: Tensor | None, i_ulb: Tensor) -> Tensor | None:
    """Of those of the pool, the ones of a batch."""
    return None if values is None else values.to(i_ulb.device)[i_ulb]
