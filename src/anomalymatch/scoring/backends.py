"""Scoring backends: PyTorch, compiled PyTorch or OpenVINO, with equal results up to rounding."""

import logging
import os
import shutil
import time
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from anomalymatch.backbones.inference import Inference, fastest_backend
from anomalymatch.backbones.int8 import int8_forward
from anomalymatch.backbones.network import Network, anomaly_logit
from anomalymatch.backbones.openvino import Forward, in_batches, openvino_forward, require_openvino
from anomalymatch.cache import Cache
from anomalymatch.errors import ConfigError

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "torch", "compile", "openvino")
Scorer = Forward
"""Function of 8-bit images; it returns the anomaly's logit, followed by the pooled features if they are kept."""


def make_scorer(
    network: Network,
    inference: Inference,
    *,
    backend: str,
    count: int,
    batch_size: int,
    features: bool,
    int8: Cache | None = None,
) -> tuple[str, Scorer]:
    """Build the name of the backend and the function that scores batches of up to `batch_size` images.

    Args:
        network: the trained network.
        inference: device and precision.
        backend: `torch`, `compile` or `openvino`; `auto` takes the one that finishes first.
        count: number of images to score.
        batch_size: images in a batch.
        features: also return the pooled features.
        int8: cache with the int8 copy of the network, which is taken instead of it.

    Raises:
        ConfigError: if the backend is not installed, or not for this device.
    """
    if int8 is not None:
        return "openvino", int8_forward(int8)
    size = network.spec.input_size
    return make_forward(
        ScoringNetwork(network, inference, features=features),
        inference,
        backend=backend,
        pixels=round(count * network.pixels_per_pixel * size**2),
        channels=network.spec.channels,
        size=size,
        batch_size=batch_size,
    )


def make_forward(
    module: nn.Module, inference: Inference, *, backend: str, pixels: int, channels: int, size: int, batch_size: int
) -> tuple[str, Forward]:
    """Build the name of the backend and the function that computes the outputs of a module.

    Args:
        module: 8-bit images in, one tensor out; in evaluation mode and on the device.
        inference: device and precision.
        backend: see `make_scorer`.
        pixels: number of pixels to come.
        channels: channels of the images.
        size: side of the images in pixels.
        batch_size: images in a batch.

    Raises:
        ConfigError: if the backend is not installed, or not for this device.
    """
    chosen = backend
    if backend == "auto":
        chosen = fastest_backend(inference.torch_device, pixels, compiler=_has_compiler())
    if chosen == "compile":
        return chosen, in_batches(inference.torch_forward(_compiled(module, inference)), batch_size)
    if chosen == "openvino":
        try:
            require_openvino("scoring.backend", inference.torch_device)
            return chosen, openvino_forward(
                module, channels=channels, size=size, batch_size=batch_size, bf16=inference.computes_bf16
            )
        except ConfigError as error:
            if backend == "openvino":
                raise
            logger.info("PyTorch computes this model. %s", error)
    return "torch", inference.torch_forward(module)


class ScoringNetwork(nn.Module):
    """Copy of a network, optimised for prediction, whose output is the anomaly's logit and optionally the features."""

    def __init__(self, network: Network, inference: Inference, *, features: bool) -> None:
        super().__init__()
        self.network, self.features = network.fused(), features
        self.eval().to(inference.torch_device).to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Float[Tensor, "b d"]:
        """Compute the logit in the first column, and the features of the last layer in the others."""
        features, logits = self.network.features_and_logits(images)
        logit = anomaly_logit(logits)[:, None]
        return torch.cat([logit, features[:, : self.network.backbone.features]], dim=1) if self.features else logit


def _has_compiler() -> bool:
    return shutil.which(os.environ.get("CXX", "g++")) is not None


def _compiled(module: nn.Module, inference: Inference) -> Callable[[Tensor], Tensor]:
    if not _has_compiler():
        raise ConfigError("scoring.backend=compile needs a C++ compiler (g++): install one, or set it to torch")
    # Frozen weights are constants, which the compiler folds and packs.
    tuning = {"max_autotune": True, "coordinate_descent_tuning": True} if inference.torch_device.type == "cuda" else {}
    return torch.compile(module, options={"freezing": True, **tuning})


def find_batch_size(network: Network, inference: Inference) -> int:
    """Choose the batch size: on a CPU what fits its caches, on a GPU the smallest that reaches its full rate."""
    size = network.spec.input_size
    if inference.torch_device.type != "cuda":
        return inference.batch_size(size)
    score = inference.torch_forward(ScoringNetwork(network, inference, features=False))
    best, rate = 1, 0.0
    for batch in (32, 64, 128, 256, 512, 1024, 2048):
        images = torch.zeros(batch, network.spec.channels, size, size, dtype=torch.uint8)
        try:
            score(images)
            start = time.perf_counter()
            score(images)
        except torch.cuda.OutOfMemoryError:
            torch.cuda.empty_cache()
            break
        now = batch / (time.perf_counter() - start)
        if now < rate * 1.05:
            break
        best, rate = batch, now
    return best
