"""Forward passes over many images: device, precision, backend and batch size."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float32, UInt8
from torch import Tensor, nn

from anomalymatch.backbones.int8 import Agreement, Scores, has_nncf, int8_forward, is_quantised, quantise, require_int8
from anomalymatch.backbones.network import Backbone, Network
from anomalymatch.backbones.openvino import Forward, has_openvino, openvino_forward, require_openvino
from anomalymatch.cache import Cache
from anomalymatch.checks import check_choice, check_range
from anomalymatch.data.source import ImageSource
from anomalymatch.data.stream import stream
from anomalymatch.errors import ConfigError
from anomalymatch.types import Reject

logger = logging.getLogger(__name__)
PRECISIONS = ("auto", "fp32", "bf16", "int8")
BACKENDS = ("auto", "torch", "openvino")
OPENVINO_PIXELS = 64 * 1024**2
"""Pixels from which OpenVINO saves more time than the seconds that its conversion takes."""
INT8_PIXELS = 200 * OPENVINO_PIXELS
"""Pixels from which the minute in which a model is quantised and compared does not matter."""
COMPILE_PIXELS = {"cpu": 10 * OPENVINO_PIXELS, "cuda": 50 * 1000**3}
"""Pixels from which `torch.compile` saves more time than the minute that it takes."""


class OutputBatch(NamedTuple):
    """Outputs for the readable images of a batch, and its rejects."""

    ids: list[str]
    outputs: Float32[np.ndarray, "b d"]
    rejects: list[Reject]


@dataclass(frozen=True)
class Inference:
    """Settings of forward passes.

    Attributes:
        device: `auto` (CUDA if there is one), `cpu`, `cuda` or `cuda:1`.
        precision: `auto` takes bf16 where the hardware computes in it, else fp32; for large archives it takes int8 if
            the scores agree and it is faster. `int8` is for features and scoring; all else is computed as with `auto`.
        batch_pixels: pixels in a batch; the batch size follows from the image size.
        workers: decoding threads.
        backend: `torch`, or `openvino` on a CPU; `auto` takes OpenVINO for many images, if it is installed.
    """

    device: str = "auto"
    precision: str = "auto"
    batch_pixels: int = 1_048_576
    workers: int = 2
    backend: str = "auto"

    def __post_init__(self) -> None:
        check_choice("inference.precision", self.precision, PRECISIONS)
        check_choice("inference.backend", self.backend, BACKENDS)
        check_range("inference.workers", self.workers, low=1)
        check_range("inference.batch_pixels", self.batch_pixels, low=1)
        try:
            device = self.torch_device
        except RuntimeError as error:
            raise ConfigError(f"inference.device is {self.device!r}, which is no device: {error}") from error
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise ConfigError(
                f"inference.device is {self.device!r}, but this machine has no such device: set it to auto"
            )
        if self.backend == "openvino":
            require_openvino("inference.backend", device)
        if self.precision == "int8":
            require_int8("inference.precision", device)
            if self.backend == "torch":
                raise ConfigError("inference.precision=int8 needs inference.backend=openvino: set it to auto")

    @property
    def torch_device(self) -> torch.device:
        """Device that `device` names."""
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return torch.device(self.device)

    @property
    def computes_bf16(self) -> bool:
        """True if forward passes run in bf16. Where the hardware only emulates it, fp32 is faster."""
        return self.precision == "bf16" or (self.precision != "fp32" and _has_bf16(self.torch_device))

    def autocast(self) -> AbstractContextManager[object]:
        """Return a bf16 autocast, or an empty context for fp32."""
        return torch.autocast(self.torch_device.type, torch.bfloat16) if self.computes_bf16 else nullcontext()

    def batch_size(self, image_size: int) -> int:
        """Return the number of images of `image_size` squared pixels in a batch."""
        return max(1, min(512, self.batch_pixels // image_size**2))

    def run(self, forward: Forward, source: ImageSource, ids: Sequence[str], *, size: int) -> Iterator[OutputBatch]:
        """Decode `ids` and yield the outputs of a prepared module, in order, batch by batch."""
        for batch in stream(source, ids, size=size, batch_size=self.batch_size(size), workers=self.workers):
            yield OutputBatch(batch.ids, forward(batch.images), batch.rejects)

    def tries_int8(self, pixels: int) -> bool:
        """Tell whether int8 is to be tried for an archive of so many pixels."""
        usable = self.torch_device.type == "cpu" and self.backend != "torch" and has_openvino() and has_nncf()
        return self.precision == "int8" or (self.precision == "auto" and usable and pixels >= INT8_PIXELS)

    def int8_agreement(
        self, module: nn.Module, source: ImageSource, cache: Cache, *, size: int, batch_size: int, scores: Scores
    ) -> Agreement | None:
        """Quantise a module for an archive and log how well it agrees; None if int8 is not to be taken.

        Args:
            module: 8-bit images in, one tensor out, as `quantise` takes it.
            source: the archive.
            cache: gets the int8 model, for `int8_forward`.
            size: side of the images in pixels.
            batch_size: number of images that are computed at once.
            scores: rankings by the outputs.

        Raises:
            ConfigError: if `precision` asks for int8 and the model cannot be quantised.
        """
        asked, known = self.precision == "int8", is_quantised(cache)
        try:
            found = quantise(
                module, source, cache, size=size, batch_size=batch_size, bf16=self.computes_bf16, scores=scores
            )
        except ConfigError as error:
            if asked:
                raise
            logger.info("int8 is not taken. %s", error)
            return None
        taken = asked or found.suffices
        if not known:
            logger.info("int8 is %s: %s", "taken" if taken else "not taken", found)
        return found if taken else None

    def prepare(self, module: Backbone | Network, *, size: int, count: int, int8: Cache | None = None) -> Forward:
        """Return a copy of a module, optimised for prediction, as a function of 8-bit images.

        Args:
            module: stays as it is.
            size: side of the images in pixels.
            count: approximate number of images to come.
            int8: cache with the int8 copy of the module, which is taken instead (see `int8_agreement`).
        """
        if int8 is not None:
            return int8_forward(int8)
        fused = module.fused().to(self.torch_device).to(memory_format=torch.channels_last)
        backbone = fused.backbone if isinstance(fused, Network) else fused
        converted = self.convert(
            fused,
            channels=backbone.mean.shape[1],
            size=size,
            batch_size=self.batch_size(size),
            count=round(count * fused.pixels_per_pixel),
            bf16=self.computes_bf16,
        )
        return converted or self.torch_forward(fused)

    def torch_forward(self, module: Callable[[Tensor], Tensor]) -> Forward:
        """Return a module on this device as a function of 8-bit images, computed by PyTorch."""
        device = self.torch_device

        def forward(images: UInt8[Tensor, "b c h w"]) -> Float32[np.ndarray, "b d"]:
            if images.device.type != device.type and device.type == "cuda":
                images = images.pin_memory()
            with torch.inference_mode(), self.autocast():
                return module(images.to(device, non_blocking=True)).float().cpu().numpy()

        return forward

    def convert(
        self, module: nn.Module, *, channels: int, size: int, batch_size: int, count: int, bf16: bool
    ) -> Forward | None:
        """Convert a module by `openvino_forward` for `count` passes of one image; None if PyTorch should compute it.

        Raises:
            ConfigError: if `backend` asks for OpenVINO and the model cannot be converted.
        """
        chosen = fastest_backend(self.torch_device, count * size**2) if self.backend == "auto" else self.backend
        if chosen != "openvino":
            return None
        try:
            return openvino_forward(module, channels=channels, size=size, batch_size=batch_size, bf16=bf16)
        except ConfigError as error:
            if self.backend == "openvino":
                raise
            logger.info("PyTorch computes this model. %s", error)
            return None


def fastest_backend(device: torch.device, pixels: int, *, compiler: bool = False) -> str:
    """Choose the backend that finishes first, its start-up included: `torch`, `openvino` or `compile`.

    Args:
        device: the device of the forward passes.
        pixels: number of pixels to come.
        compiler: also consider `torch.compile`.
    """
    if device.type == "cpu" and has_openvino():
        return "openvino" if pixels >= OPENVINO_PIXELS else "torch"
    return "compile" if compiler and pixels >= COMPILE_PIXELS.get(device.type, float("inf")) else "torch"


def _has_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(_cpu_flags() & {"avx512_bf16", "amx_bf16"})


@cache
def _cpu_flags() -> frozenset[str]:
    """Return the instruction sets of the CPU as Linux lists them; elsewhere none, and fp32 is used."""
    path = Path("/proc/cpuinfo")
    return frozenset(path.read_text(encoding="utf-8").split()) if path.exists() else frozenset()
