"""Exponential moving average of a network: parameters averaged, buffers copied."""

import copy
from typing import Generic, TypeVar

from torch import nn

from anomalymatch.functional.fixmatch import ema_update

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
