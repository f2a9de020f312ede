"""What computes the forward pass: PyTorch, compiled PyTorch or OpenVINO, all with the same result."""

import copy
import logging
import os
import shutil
import time
from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float, Float32, UInt8
from torch import Tensor, nn

from anomalymatch.algorithms.fixmatch.loss import anomaly_logit
from anomalymatch.backbones.inference import Inference
from anomalymatch.backbones.network import Network
from anomalymatch.backbones.openvino import Forward, has_openvino, in_batches, openvino_forward
from anomalymatch.errors import ConfigError

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "torch", "compile", "openvino")
SETUP_S = {"openvino": 8.0, "compile": 60.0}
"""About how long a backend takes before its first batch, on a processor."""
GAIN = {"openvino": 2.5, "compile": 2.0}
"""About how many times faster than plain PyTorch it is then, on a processor."""
_PROBE_IMAGES = 16

Scorer = Forward
"""Logit of the anomaly in the first column, pooled features in the others, if they are kept."""


class ScoringNetwork(nn.Module):
    """8-bit images to the logit of the anomaly, with the features behind it if they are to be kept."""

    def __init__(self, network: Network, *, features: bool) -> None:
        super().__init__()
        self.backbone, self.head, self.features = network.backbone, network.head, features

    def forward(self, images: Tensor) -> Float[Tensor, "b d"]:
        """Logit, and the features."""
        pooled = self.backbone(images)
        logit = anomaly_logit(self.head(pooled))[:, None]
        return torch.cat([logit, pooled[:, : self.backbone.features]], dim=1) if self.features else logit


def make_scorer(
    network: Network, inference: Inference, *, backend: str, count: int, batch_size: int, features: bool
) -> tuple[str, Scorer]:
    """The backend's name, and a function that scores batches of `batch_size` images or fewer.

    Args:
        network: the trained network.
        inference: device and precision.
        backend: `auto` takes the fastest that is installed and pays off for `count` images.
        count: images to score.
        batch_size: images in a batch; every batch but the last has so many.
        features: whether the pooled features are wanted, too.

    Raises:
        ConfigError: if the backend is unknown, not installed, or not for this device.
    """
    if backend not in BACKENDS:
        raise ConfigError(f"scoring.backend is {backend!r}: choose one of {', '.join(BACKENDS)}")
    device = inference.torch_device
    module = ScoringNetwork(network.folded(), features=features).eval().to(device).to(memory_format=torch.channels_last)
    plain = _torch_scorer(module, inference)
    chosen = _choose(plain, network, device, count) if backend == "auto" else backend
    if chosen == "compile":
        return chosen, _compiled_scorer(module, inference, batch_size)
    if chosen == "openvino":
        try:
            return chosen, _openvino_scorer(module, inference, network, batch_size)
        except ConfigError as error:
            if backend == "openvino":
                raise
            logger.info("PyTorch computes this model: %s", error)
    return "torch", plain


def _choose(plain: Scorer, network: Network, device: torch.device, count: int) -> str:
    """The backend that is done first, by the measured rate of plain PyTorch and the usual gains."""
    if device.type == "cuda":
        return "compile" if count > 1_000_000 and _has_compiler() else "torch"
    images = torch.zeros(_PROBE_IMAGES, network.spec.channels, network.spec.image_size, network.spec.image_size).byte()
    plain(images)
    start = time.perf_counter()
    plain(images)
    seconds = (time.perf_counter() - start) * count / _PROBE_IMAGES
    total = {"torch": seconds}
    if has_openvino():
        total["openvino"] = SETUP_S["openvino"] + seconds / GAIN["openvino"]
    if _has_compiler():
        total["compile"] = SETUP_S["compile"] + seconds / GAIN["compile"]
    return min(total, key=total.__getitem__)


def _has_compiler() -> bool:
    return shutil.which(os.environ.get("CXX", "g++")) is not None


def _torch_scorer(module: Callable[[Tensor], Tensor], inference: Inference) -> Scorer:
    device = inference.torch_device

    def score(images: UInt8[Tensor, "b c h w"]) -> Float32[np.ndarray, "b d"]:
        moved = images if images.device.type == device.type else images.pin_memory().to(device, non_blocking=True)
        with torch.inference_mode(), inference.autocast():
            return module(moved).float().cpu().numpy()

    return score


def _compiled_scorer(module: nn.Module, inference: Inference, batch_size: int) -> Scorer:
    if not _has_compiler():
        raise ConfigError("scoring.backend=compile needs a C++ compiler (g++): install one, or take torch or openvino")
    import torch._inductor.config as inductor

    inductor.freezing = True  # weights become constants, which lets the compiler fold and pack them
    compiled = torch.compile(
        module, mode="max-autotune-no-cudagraphs" if inference.torch_device.type == "cuda" else None
    )
    score = _torch_scorer(compiled, inference)
    return in_batches(score, batch_size)


def _openvino_scorer(module: nn.Module, inference: Inference, network: Network, batch_size: int) -> Scorer:
    if not has_openvino():
        raise ConfigError('scoring.backend=openvino needs: pip install "anomalymatch[openvino]"')
    if inference.torch_device.type != "cpu":
        raise ConfigError(f"scoring.backend=openvino is for processors, not for {inference.torch_device}: take torch")
    spec, bf16 = network.spec, inference.computes_bf16
    own = copy.deepcopy(module)  # which is put into another memory format
    try:
        return openvino_forward(own, channels=spec.channels, size=spec.image_size, batch_size=batch_size, bf16=bf16)
    except Exception as error:  # it runs the model's own code, and converts what it knows: anything may fail
        raise ConfigError(f"scoring.backend=openvino cannot convert this model, take torch: {error}") from error


def find_batch_size(network: Network, inference: Inference) -> int:
    """Images in a batch: on a processor what fits its caches, on a GPU the smallest that reaches its full rate."""
    size = network.spec.image_size
    if inference.torch_device.type != "cuda":
        return inference.batch_size(size)
    module = ScoringNetwork(network.folded(), features=False).eval()
    score = _torch_scorer(module.to(inference.torch_device).to(memory_format=torch.channels_last), inference)
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
