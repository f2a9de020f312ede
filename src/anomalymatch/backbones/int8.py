"""int8: a model quantised on images of the archive, stored on disk, and its agreement with the model itself."""

import io
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import rich
import scipy  # which imports `scipy.stats` at its first use
import torch
from jaxtyping import Float, Float32, UInt8
from torch import Tensor, nn

from anomalymatch.backbones.openvino import (
    Forward,
    compiled_forward,
    conversion_errors,
    openvino_model,
    require_openvino,
    root_logger_kept,
    runtime,
)
from anomalymatch.cache import Cache, CacheEntry, Contents
from anomalymatch.data.source import ImageSource
from anomalymatch.data.stream import stream
from anomalymatch.errors import ConfigError, StorageError

logger = logging.getLogger(__name__)

CALIBRATION_IMAGES, SAMPLE_IMAGES = 320, 2048
"""Images on which a model is quantised, and other images on which it is compared."""
MIN_SPEARMAN, MIN_OVERLAP = 0.999, 0.98
_ENTRY = "int8"
LAYERS = ("Convolution", "GroupConvolution", "MatMul")

Scores = Callable[[Float32[np.ndarray, "n d"]], Float[np.ndarray, "n s"]]
"""Function from the outputs of a model to one or several rankings, a column for each."""


class Agreement(NamedTuple):
    """Agreement of an int8 model with the model itself, on images that it was not quantised on.

    Attributes:
        spearman: rank correlation of the scores.
        overlap: share of the top 1 % that is the same.
        speedup: how many times as fast it is.
        images: number of images.
    """

    spearman: float
    overlap: float
    speedup: float
    images: int

    @property
    def suffices(self) -> bool:
        """True if `auto` takes int8."""
        return self.spearman >= MIN_SPEARMAN and self.overlap >= MIN_OVERLAP and self.speedup > 1

    def __str__(self) -> str:
        return (
            f"Spearman {self.spearman:.4f} and {self.overlap:.1%} of the top 1 % on {self.images:,} images, "
            f"{self.speedup:.2f} times as fast"
        )


def has_nncf() -> bool:
    """Return True if nncf, which quantises, is installed."""
    return find_spec("nncf") is not None


def require_int8(key: str, device: torch.device) -> None:
    """Check that int8, which the configuration key asks for, can be computed.

    Raises:
        ConfigError: if not.
    """
    require_openvino(key, device, "int8")
    if not has_nncf():
        raise ConfigError(f'{key}=int8 needs: pip install "anomalymatch[int8]"')


def quantise(
    module: nn.Module, source: ImageSource, cache: Cache, *, size: int, batch_size: int, bf16: bool, scores: Scores
) -> Agreement:
    """Quantise a module on images of an archive, store it in `cache`, and compare it with the module itself.

    A stored model is taken as it is.

    Args:
        module: 8-bit images in, one tensor out; in evaluation mode. It stays as it is.
        source: the archive; a random sample of its images is read.
        cache: its entry is for this module and archive alone.
        size: side of the images in pixels.
        batch_size: number of images that are computed at once.
        bf16: compute what is not quantised in half precision; without int8, all would be.
        scores: rankings of the images by the outputs; the worst agreement of one counts.

    Raises:
        ConfigError: if OpenVINO or nncf cannot convert the module.
    """

    def compute() -> Contents:
        images = sample_images(source, size)
        if len(images) < 2:
            raise ConfigError(f"int8 needs readable images to quantise on, {source.name} has {len(images)}: use fp32")
        cut = min(CALIBRATION_IMAGES, len(images) // 2)
        first, others = images[:cut], images[cut:]
        with conversion_errors():
            plain = openvino_model(module, source.channels, size, batch_size)
            small = quantised_model(plain, full_batches(first, batch_size))
            usual, quick = (compiled_forward(model, batch_size, bf16=bf16) for model in (plain, small))
            exact = compiled_forward(plain, batch_size, bf16=False)(others)
        worst = agreement(scores(exact), scores(quick(others)))
        speedup = _speedup(usual, quick, others[:batch_size])
        return _as_arrays(small), {
            "bf16": bf16,
            "batch_size": batch_size,
            "agreement": Agreement(*worst, speedup, len(others)),
        }

    return Agreement(*cache.get(_ENTRY, compute).info["agreement"])


def is_quantised(cache: Cache) -> bool:
    """Return True if `cache` has an int8 model."""
    return (cache.folder / _ENTRY).exists()


def int8_forward(cache: Cache) -> Forward:
    """Return the function of the model that `quantise` stored, with the same precision of what is not quantised.

    Raises:
        StorageError: if it is missing or damaged.
    """
    with cache.locked():
        entry = cache.read(_ENTRY)
    if entry is None:
        raise StorageError(f"{cache.folder}: its int8 model is damaged, delete {cache.folder.parent} and start again")
    return compiled_forward(_from_arrays(entry), entry.info["batch_size"], bf16=entry.info["bf16"])


def agreement(expected: Float[np.ndarray, "n s"], got: Float[np.ndarray, "n s"]) -> tuple[float, float]:
    """Compute the lowest rank correlation of a column, and the lowest overlap of the top 1 % (at least one image)."""
    k = max(1, round(len(expected) / 100))
    correlations = [float(scipy.stats.spearmanr(a, b).statistic) for a, b in zip(expected.T, got.T, strict=True)]
    tops = zip(*(np.argsort(-columns, axis=0, kind="stable")[:k].T for columns in (expected, got)), strict=True)
    return min(correlations), min(len(set(a) & set(b)) / k for a, b in tops)


def sample_images(source: ImageSource, size: int) -> UInt8[Tensor, "n c h w"]:
    """Read random images of an archive, the same ones every time."""
    order = np.random.default_rng(0).permutation(len(source.ids))[: CALIBRATION_IMAGES + SAMPLE_IMAGES]
    ids = [source.ids[int(i)] for i in order]
    return torch.cat([batch.images for batch in stream(source, ids, size=size, batch_size=64)])


def full_batches(images: UInt8[Tensor, "n c h w"], batch_size: int) -> list[UInt8[np.ndarray, "b h w c"]]:
    """Divide images into batches of one size, with the first images once more at the end."""
    count = -(-len(images) // batch_size) * batch_size
    repeated = images[torch.arange(count) % len(images)].permute(0, 2, 3, 1).contiguous().numpy()
    return list(repeated.reshape(-1, batch_size, *repeated.shape[1:]))


def quantised_model(model: Any, batches: Sequence[UInt8[np.ndarray, "b h w c"]]) -> Any:
    """Return an int8 copy of a model.

    The first and the last layer and depthwise convolutions, which are the most sensitive, keep their precision.
    """
    usual = logging.getLoggerClass()
    # nncf draws a progress bar for every step, and changes the class of all loggers that are made after its import.
    with root_logger_kept(), _no_progress_bars():
        import nncf

        logging.setLoggerClass(usual)
        nncf.nncf_logger.setLevel(logging.ERROR)  # nncf.set_log_level also changes handlers of others
        layers = [op for op in model.get_ordered_ops() if op.get_type_name() in LAYERS]
        kept = [layers[0], layers[-1], *(op for op in layers if op.get_type_name() == "GroupConvolution")]
        return nncf.quantize(
            model,
            nncf.Dataset(batches),
            subset_size=len(batches),
            fast_bias_correction=False,  # the fast one: 0.950 instead of 0.989 (README, 18, Lite0)
            ignored_scope=nncf.IgnoredScope(names=list({op.get_friendly_name() for op in kept})),
        )


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Silence rich's shared console, but nothing that other threads print: the page says its address meanwhile."""
    console = rich.get_console()
    before, console.quiet = console.quiet, True
    try:
        yield
    finally:
        console.quiet = before


def _speedup(usual: Forward, quick: Forward, images: UInt8[Tensor, "b c h w"]) -> float:
    """Measure how many times as fast the second function is, in turns: a slow moment of the machine affects both."""
    ratios = []
    for _ in range(5):
        start = time.perf_counter()
        usual(images)
        between = time.perf_counter()
        quick(images)
        ratios.append((between - start) / (time.perf_counter() - between))
    return float(np.median(ratios))


def _as_arrays(model: Any) -> dict[str, np.ndarray]:
    import openvino as ov

    with TemporaryDirectory() as name:
        path = Path(name) / "model.xml"
        ov.save_model(model, path, compress_to_fp16=False)
        return {part: np.fromfile(path.with_suffix(f".{part}"), np.uint8) for part in ("xml", "bin")}


def _from_arrays(entry: CacheEntry) -> Any:
    return runtime().read_model(*(io.BytesIO(entry.arrays[part].tobytes()) for part in ("xml", "bin")))
