"""OpenVINO: forward passes on a CPU about 2.5 times as fast as PyTorch's, equal up to rounding."""

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, UInt8
from torch import Tensor, nn

from anomalymatch.errors import ConfigError

Forward = Callable[[UInt8[Tensor, "b c h w"]], Float32[np.ndarray, "b d"]]
"""Function from a batch of 8-bit images to the outputs of a module."""


def has_openvino() -> bool:
    """Return True if OpenVINO is installed."""
    return find_spec("openvino") is not None


def require_openvino(key: str, device: torch.device, value: str = "openvino") -> None:
    """Check that OpenVINO, which `value` of the configuration key needs, is installed and the device is a CPU.

    Raises:
        ConfigError: if not.
    """
    if not has_openvino():
        raise ConfigError(f'{key}={value} needs: pip install "anomalymatch[{value}]"')
    if device.type != "cpu":
        raise ConfigError(f"{key}={value} runs on a CPU, not on {device}: set {key}=auto")


def openvino_forward(module: nn.Module, *, channels: int, size: int, batch_size: int, bf16: bool) -> Forward:
    """Convert a module; it will use as many threads as PyTorch would.

    Args:
        module: 8-bit images in, one tensor out; in evaluation mode. It stays as it is.
        channels: channels of the images.
        size: side of the images in pixels.
        batch_size: number of images that are computed at once; the function takes any number.
        bf16: compute in half precision.

    Raises:
        ConfigError: if OpenVINO cannot convert it.
    """
    with conversion_errors():
        return compiled_forward(openvino_model(module, channels, size, batch_size), batch_size, bf16=bf16)


@contextmanager
def conversion_errors() -> Iterator[None]:
    """Turn every error into a ConfigError: the export runs the model's own code, which may fail in any way."""
    try:
        yield
    except Exception as error:
        raise ConfigError(f"OpenVINO cannot convert this model, set backend=torch: {error}") from error


def openvino_model(module: nn.Module, channels: int, size: int, batch_size: int) -> Any:
    """Convert a module to a model of OpenVINO, which takes batches of 8-bit images with the channels last."""
    import openvino as ov

    example = torch.zeros(batch_size, channels, size, size, dtype=torch.uint8)
    own = copy.deepcopy(module).to(memory_format=torch.contiguous_format)
    with root_logger_kept():
        converted = ov.convert_model(torch.export.export(own, (example,)))
    prepared = ov.preprocess.PrePostProcessor(converted)
    # The decoder's memory is channels-last; the transpose becomes part of the graph.
    prepared.input().tensor().set_element_type(ov.Type.u8).set_layout(ov.Layout("NHWC"))
    prepared.input().model().set_layout(ov.Layout("NCHW"))
    return prepared.build()


def compiled_forward(model: Any, batch_size: int, *, bf16: bool) -> Forward:
    """Compile a model of OpenVINO for batches of this size; the function takes any number of images."""
    options: dict[str, Any] = {
        "INFERENCE_PRECISION_HINT": "bf16" if bf16 else "f32",
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    compiled = runtime().compile_model(model, "CPU", options)

    def forward(images: UInt8[Tensor, "b c h w"]) -> Float32[np.ndarray, "b d"]:
        pixels = np.ascontiguousarray(images.permute(0, 2, 3, 1).numpy())
        return np.array(compiled(pixels)[0], dtype=np.float32)

    return in_batches(forward, batch_size)


def in_batches(forward: Forward, batch_size: int) -> Forward:
    """Split longer batches and pad shorter ones, so that one compiled shape serves all."""

    def of_one(images: UInt8[Tensor, "b c h w"]) -> Float32[np.ndarray, "b d"]:
        missing = batch_size - len(images)
        if not missing:
            return forward(images)
        black = images.new_zeros(missing, *images.shape[1:])  # the whole batch if no image of it can be read
        full = torch.cat([images, black]).to(memory_format=torch.channels_last)
        return forward(full)[: len(images)]

    def of_any(images: UInt8[Tensor, "b c h w"]) -> Float32[np.ndarray, "b d"]:
        return np.concatenate([of_one(part) for part in images.split(batch_size)])

    return of_any


@cache
def runtime() -> Any:
    """Return the one OpenVINO runtime of the process; it is never dropped.

    A runtime gives the thread that made it a stack for signal handlers, and frees the stack with itself. If another
    thread drops the runtime (any garbage collection may), the first thread keeps a dangling address, and the next
    handled signal, such as Ctrl-C or the end of a data loader's worker, kills the process.
    """
    import openvino as ov

    return ov.Core()


@contextmanager
def root_logger_kept() -> Iterator[None]:
    """Restore the root logger afterwards: a failed conversion leaves it at level ERROR."""
    root = logging.getLogger()
    level, filters, handlers = root.level, root.filters[:], root.handlers[:]
    try:
        yield
    finally:
        root.setLevel(level)
        root.filters[:], root.handlers[:] = filters, handlers
