"""Export of a trained network for other programs: ONNX, OpenVINO or TorchScript, and a JSON file about its input."""

import copy
import json
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32, UInt8
from torch import Tensor, nn

from anomalymatch.backbones.network import Network, anomaly_logit
from anomalymatch.backbones.openvino import root_logger_kept
from anomalymatch.checks import check_choice
from anomalymatch.errors import ConfigError, StorageError
from anomalymatch.files import atomic_folder
from anomalymatch.scoring.model import TrainedModel
from anomalymatch.scoring.model_card import model_card

FILES = {"onnx": "model.onnx", "openvino": "model.xml", "torchscript": "model.pt"}
"""File of each format; that of OpenVINO has its weights in `model.bin`."""
PACKAGES = {"onnx": ("onnx", "onnxruntime", "onnxscript"), "openvino": ("openvino",), "torchscript": ()}
"""Packages that each format needs; the extra has the name of the format."""
DESCRIPTION, CARD = "model.json", "README.md"
"""File about the input and the output, and the model card."""
TOLERANCE = 1e-3
"""Largest difference of log-odds on the images of the check."""
NOTHING: Mapping[str, object] = MappingProxyType({})


class AnomalyLogit(nn.Module):
    """Network with the log-odds of an anomaly as its only output."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: UInt8[Tensor, "b c h w"]) -> Float[Tensor, " b"]:
        """Compute the log-odds of 8-bit images."""
        return anomaly_logit(self.network(images))


def export_model(model: TrainedModel, folder: Path, kind: str, settings: Mapping[str, object] = NOTHING) -> float:
    """Write the network of a run for other programs, read it back, and compare its scores with those of PyTorch.

    Pixels are normalised inside of the network. What comes before, from the file of an image to 8-bit channels of the
    right size, is described in `model.json`.

    Args:
        model: the trained model.
        folder: folder of the files, which is replaced.
        kind: `onnx`, `openvino` or `torchscript`.
        settings: see `model_card`.

    Returns:
        The largest difference of the log-odds on random images.

    Raises:
        ConfigError: if the format is unknown, its package is missing, or the network cannot be converted.
        StorageError: if the weights are corrupt, or the disk is full.
    """
    check_choice("format", kind, FILES)
    missing = [package for package in PACKAGES[kind] if find_spec(package) is None]
    if missing:
        raise ConfigError(f'format={kind} needs the package {missing[0]}: pip install "anomalymatch[{kind}]"')
    if folder.exists() and not (folder / DESCRIPTION).is_file() and any(folder.iterdir()):
        raise StorageError(f"output={folder} has other files: choose another folder by output=FOLDER")
    network = model.network()
    module = AnomalyLogit(network.fused()).to(memory_format=torch.contiguous_format).eval()
    module.requires_grad_(False)
    spec, rng = network.spec, np.random.default_rng(0)
    shape = (3, spec.channels, spec.input_size, spec.input_size)
    images = torch.from_numpy(rng.integers(0, 256, shape, dtype=np.uint8))
    with torch.inference_mode():
        expected = module(images).numpy()
    with atomic_folder(folder) as temporary:
        (temporary / DESCRIPTION).write_text(json.dumps(_describe(model, network, kind), indent=2), encoding="utf-8")
        card = model_card(model, network, FILES[kind], settings)
        (temporary / CARD).write_text(card, encoding="utf-8")
        path = temporary / FILES[kind]
        try:
            with _quiet(), torch.no_grad():
                _write(module, images[:2], path, kind)
                found = _read(path, images, kind)
        except Exception as error:  # the conversion runs the model's own code, which may fail in any way
            raise ConfigError(f"this network cannot be written as {kind}, try another format: {error}") from error
        difference = float(np.abs(found - expected).max())
        if not difference <= TOLERANCE:
            raise ConfigError(
                f"written as {kind}, this network gives other scores: the log-odds differ by {difference:.2g}"
            )
    return difference


def _write(module: AnomalyLogit, example: UInt8[Tensor, "b c h w"], path: Path, kind: str) -> None:
    if kind == "torchscript":
        torch.jit.save(torch.jit.trace(module, example), path)
        return
    batch = {0: torch.export.Dim("batch", min=1)}
    program = torch.export.export(copy.deepcopy(module), (example,), dynamic_shapes=(batch,))
    if kind == "onnx":
        names: dict[str, Any] = {"input_names": ["images"], "output_names": ["logit"]}
        torch.onnx.export(program, (example,), path, external_data=False, verbose=False, **names)
        return
    import openvino as ov

    converted = ov.convert_model(program)
    converted.input().set_names({"images"})
    converted.output().set_names({"logit"})
    ov.save_model(converted, path, compress_to_fp16=False)


def _read(path: Path, images: UInt8[Tensor, "b c h w"], kind: str) -> Float32[np.ndarray, " b"]:
    """Compute the log-odds of images as the programs do that the file is for."""
    if kind == "torchscript":
        return torch.jit.load(path)(images).numpy()
    if kind == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        return session.run(["logit"], {"images": images.numpy()})[0]
    import openvino as ov

    compiled = ov.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return np.array(compiled(images.numpy())[0])


def _describe(model: TrainedModel, network: Network, kind: str) -> dict[str, Any]:
    spec, rendering = network.spec, model.input.rendering
    return {
        "file": FILES[kind],
        "format": kind,
        "run": model.run_id,
        "input": {
            "name": "images",
            "type": "uint8",
            "shape": ["batch", spec.channels, spec.input_size, spec.input_size],
            "channels": list(rendering.channels(model.input.bands)),
            "bands": list(model.input.bands),
            "units": model.input.units,
            "rendering": rendering.as_dict(),
            "preparation": "render the bands to 8-bit channels as `rendering` says; 8-bit images stay as they are with "
            "interval `auto` and curve `linear`. Then resize to the shape as `rendering.fit` says. The network "
            "normalises the pixels itself",
        },
        "output": {
            "name": "logit",
            "type": "float32",
            "shape": ["batch"],
            "meaning": "log-odds of an anomaly; its sigmoid is the score, from 0 to 1",
        },
    }


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what the exporters print, log and warn about."""
    level = logging.root.manager.disable
    with warnings.catch_warnings(), root_logger_kept(), open(os.devnull, "w") as nowhere:
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            with redirect_stdout(nowhere), redirect_stderr(nowhere):
                yield
        finally:
            logging.disable(level)
