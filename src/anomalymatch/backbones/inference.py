"""Forward passes at the speed of the hardware: channels-last, reduced precision where the processor has it."""

import copy
import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float32, UInt8
from torch import Tensor, nn

from anomalymatch.backbones.network import Backbone, Network
from anomalymatch.backbones.openvino import Forward, has_openvino, openvino_forward
from anomalymatch.data.source import ImageSource
from anomalymatch.data.stream import stream
from anomalymatch.errors import ConfigError
from anomalymatch.types import Reject

logger = logging.getLogger(__name__)
PRECISIONS = ("auto", "fp32", "bf16")
BACKENDS = ("auto", "torch", "openvino")
WORTH_CONVERTING = 64 * 1024**2
"""Pixels from which OpenVINO wins more than the seconds that it takes to convert a network."""


class OutputBatch(NamedTuple):
    """What the module gave for the readable images of a batch."""

    ids: list[str]
    outputs: Float32[np.ndarray, "b d"]
    rejects: list[Reject]


@dataclass(frozen=True)
class Inference:
    """How to run a module over images.

    Attributes:
        device: `auto` (CUDA if there is one), `cpu`, `cuda` or `cuda:1`.
        precision: `auto` takes bf16 where the hardware computes in it, else fp32.
        batch_pixels: pixels in a batch; the batch size follows from the image size.
        workers: decoding threads.
        backend: `torch`, or `openvino` on a processor; `auto` takes that where it is installed and images are many.
    """

    device: str = "auto"
    precision: str = "auto"
    batch_pixels: int = 1_048_576
    workers: int = 2
    backend: str = "auto"

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ConfigError(f"inference.precision is {self.precision!r}: choose one of {', '.join(PRECISIONS)}")
        if self.workers < 1 or self.batch_pixels < 1:
            raise ConfigError("inference.workers and inference.batch_pixels must be at least 1")
        if self.backend not in BACKENDS:
            raise ConfigError(f"inference.backend is {self.backend!r}: choose one of {', '.join(BACKENDS)}")
        try:
            device = self.torch_device
        except RuntimeError as error:
            raise ConfigError(f"inference.device is {self.device!r}, which is no device: {error}") from error
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise ConfigError(f"inference.device is {self.device!r}, but this machine has no such device: take auto")
        if self.backend == "openvino" and not has_openvino():
            raise ConfigError('inference.backend=openvino needs: pip install "anomalymatch[openvino]"')
        if self.backend == "openvino" and device.type != "cpu":
            raise ConfigError(f"inference.backend=openvino is for processors, not for {device}: take torch")

    @property
    def torch_device(self) -> torch.device:
        """The device that `device` names."""
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return torch.device(self.device)

    @property
    def computes_bf16(self) -> bool:
        """Whether the forward pass runs in bf16. Where the hardware only emulates it, fp32 is faster."""
        return self.precision == "bf16" or (self.precision == "auto" and _has_bf16(self.torch_device))

    def autocast(self) -> AbstractContextManager[object]:
        """bf16 autocast, or nothing."""
        return torch.autocast(self.torch_device.type, torch.bfloat16) if self.computes_bf16 else nullcontext()

    def batch_size(self, image_size: int) -> int:
        """Images of `image_size` squared pixels that make one batch."""
        return max(1, min(512, self.batch_pixels // image_size**2))

    def run(self, forward: Forward, source: ImageSource, ids: Sequence[str], *, size: int) -> Iterator[OutputBatch]:
        """Outputs for `ids`, in order, batch by batch, of a module that is `prepared`."""
        for batch in stream(source, ids, size=size, batch_size=self.batch_size(size), workers=self.workers):
            yield OutputBatch(batch.ids, forward(batch.images), batch.rejects)

    def prepared(self, module: Backbone | Network, *, size: int, count: int) -> Forward:
        """`module` as a function of images, on its device and in the form that is fastest.

        Args:
            module: stays as it is.
            size: side of the images in pixels.
            count: of the images that are to come, about.
        """
        device = self.torch_device
        folded = module.folded().eval().to(device).to(memory_format=torch.channels_last)
        backbone = folded.backbone if isinstance(folded, Network) else folded
        converted = self.converted(
            folded,
            channels=backbone.mean.shape[1],
            size=size,
            batch_size=self.batch_size(size),
            count=count * backbone.orientations * (1 + backbone.crops),
            bf16=self.computes_bf16,
        )
        if converted is not None:
            return converted

        def forward(images: UInt8[Tensor, "b c h w"]) -> Float32[np.ndarray, "b d"]:
            with torch.inference_mode(), self.autocast():
                return folded(images.to(device, non_blocking=True)).float().cpu().numpy()

        return forward

    def converted(
        self, module: nn.Module, *, channels: int, size: int, batch_size: int, count: int, bf16: bool
    ) -> Forward | None:
        """`module` through OpenVINO; None where PyTorch is to compute it.

        Args:
            module: see `openvino_forward`; it stays as it is.
            channels: of the images.
            size: side of the images in pixels.
            batch_size: images that it computes at once.
            count: of the images that are to come, about, each look at one for itself.
            bf16: whether to compute in half precision.
        """
        worth = has_openvino() and self.torch_device.type == "cpu" and count * size**2 >= WORTH_CONVERTING
        if self.backend != "openvino" and not (self.backend == "auto" and worth):
            return None
        try:
            own = copy.deepcopy(module)  # which is put into another memory format
            return openvino_forward(own, channels=channels, size=size, batch_size=batch_size, bf16=bf16)
        except Exception as error:  # it runs the model's own code, and converts what it knows: anything may fail
            if self.backend == "openvino":
                raise ConfigError(f"inference.backend=openvino cannot convert this model: {error}") from error
            logger.info("OpenVINO cannot convert this model, PyTorch computes it: %s", error)
            return None


def _has_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
