"""OpenVINO: forward passes on a processor in two fifths of PyTorch's time, with the same result up to rounding."""

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

Forward = Callable[[UInt8[Tensor, "b c h w"]], Float32[np.ndarray, "b d"]]
"""A module as a function of 8-bit images."""


def has_openvino() -> bool:
    """Whether it is installed."""
    return find_spec("openvino") is not None


def openvino_forward(module: nn.Module, *, channels: int, size: int, batch_size: int, bf16: bool) -> Forward:
    """`module`, converted.

    It takes as many threads as PyTorch would.

    Args:
        module: 8-bit images in, one tensor out; in evaluation mode, and for nothing else after this.
        channels: of the images.
        size: side of the images in pixels.
        batch_size: images that it computes at once.
        bf16: whether to compute in half precision.
    """
    import openvino as ov

    example = torch.zeros(batch_size, channels, size, size, dtype=torch.uint8)
    exported = torch.export.export(module.to(memory_format=torch.contiguous_format), (example,))
    with _root_logger_kept():
        converted = ov.convert_model(exported)
    prepared = ov.preprocess.PrePostProcessor(converted)
    # The decoder's memory is channels-last; the transpose becomes part of the graph.
    prepared.input().tensor().set_element_type(ov.Type.u8).set_layout(ov.Layout("NHWC"))
    prepared.input().model().set_layout(ov.Layout("NCHW"))
    options: dict[str, Any] = {
        "INFERENCE_PRECISION_HINT": "bf16" if bf16 else "f32",
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    compiled = _core().compile_model(prepared.build(), "CPU", options)

    def forward(images: UInt8[Tensor, "b c h w"]) -> Float32[np.ndarray, "b d"]:
        pixels = np.ascontiguousarray(images.permute(0, 2, 3, 1).numpy())
        return np.array(compiled(pixels)[0], dtype=np.float32)

    return in_batches(forward, batch_size)


@cache
def _core() -> Any:
    """The one runtime of the process, for as long as it lives.

    A runtime gives the thread that made it a stack for its signal handlers, and frees it when the runtime goes. Where
    another thread drops it (so may any garbage collection), the first one keeps an address that is no more, and the
    next signal with a handler, a Ctrl-C or a data loader's worker that ends, kills the process without a word.
    """
    import openvino as ov

    return ov.Core()


@contextmanager
def _root_logger_kept() -> Iterator[None]:
    """Let no conversion change what is logged: one that fails leaves the root logger with errors alone."""
    root = logging.getLogger()
    level, filters, handlers = root.level, root.filters[:], root.handlers[:]
    try:
        yield
    finally:
        root.setLevel(level)
        root.filters[:], root.handlers[:] = filters, handlers


def in_batches(forward: Forward, batch_size: int) -> Forward:
    """Cut what is longer and fill up what is shorter, so that one compiled shape serves all."""

    def of_one(images: UInt8[Tensor, "b c h w"]) -> Float32[np.ndarray, "b d"]:
        missing = batch_size - len(images)
        if not missing:
            return forward(images)
        black = images.new_zeros(missing, *images.shape[1:])  # where no image of a batch can be read, it is all black
        full = torch.cat([images, black]).to(memory_format=torch.channels_last)
        return forward(full)[: len(images)]

    def of_any(images: UInt8[Tensor, "b c h w"]) -> Float32[np.ndarray, "b d"]:
        return np.concatenate([of_one(part) for part in images.split(batch_size)])

    return of_any
