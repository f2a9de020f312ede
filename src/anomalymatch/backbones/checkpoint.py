"""Checkpoints without pickle: tensors in a safetensors file, their description in a JSON file beside it."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from anomalymatch.backbones.architectures import MIN_SIZE, Architecture
from anomalymatch.backbones.network import Head, Network, NetworkSpec, empty_backbone
from anomalymatch.backbones.tta import CROPS, MAX_TILES, ORIENTATIONS
from anomalymatch.backbones.weights import first_not_finite
from anomalymatch.checks import check_choice, check_range
from anomalymatch.checksums import check_file
from anomalymatch.data.rendering import Rendering
from anomalymatch.data.source import ImageSource
from anomalymatch.errors import ConfigError, DataError, StorageError
from anomalymatch.files import atomic_file, write_text

FORMAT = 3
MAX_CHANNELS, MAX_SIZE, MAX_MODELS = 4096, 8192, 16
"""Limits of what a checkpoint may describe: channels and size of its images, and models of an ensemble."""


class InputSpec(NamedTuple):
    """Bands, units and rendering of the images that a network was trained on."""

    bands: tuple[str, ...]
    units: str | None
    rendering: Rendering

    def check(self, source: ImageSource) -> None:
        """Check that an archive has the bands and units of the training.

        Raises:
            DataError: if not.
        """
        if tuple(source.bands) != self.bands:
            raise DataError(
                f"{source.name} has the bands {', '.join(source.bands)}, the training had {', '.join(self.bands)}: "
                f"name or order them with dataset.source.bands, or train on this archive"
            )
        if self.units and source.units and source.units != self.units:
            raise DataError(
                f"{source.name} is in {source.units}, the training was in {self.units}: convert the archive first"
            )


def save_network(network: Network, path: Path, **extra: Any) -> None:
    """Write a network to `path` (safetensors) and its description to the JSON beside it, both atomically.

    `extra` are further plain values for the JSON.

    Raises:
        StorageError: if the disk is full or the folder cannot be written to.
    """
    save_tensors(network.state_dict(), path)
    description = {
        "format": FORMAT,
        "network": network.spec.as_dict(),
        "head": {
            "features": network.head.features,
            "stage_features": network.head.stage_features,
            "normalised": network.head.normalised,
        },
        "averages_two": network.second is not None,
        "classes": ["normal", "anomaly"],
        "pixels": f"8-bit images, channels first; resized to {network.spec.input_size} pixels along both sides; the "
        "network normalises by mean and std",
        "score": "sigmoid(logit[1] - logit[0]): probability of an anomaly where both classes are equally frequent",
        **extra,
    }
    write_text(path.with_suffix(".json"), json.dumps(description, indent=2))


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write named tensors to `path` (safetensors), atomically.

    Raises:
        StorageError: if the disk is full or the folder cannot be written to.
    """
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        with atomic_file(path) as temporary:
            save_file(plain, temporary)
    except SafetensorError as error:  # safetensors' own error for a full disk
        raise StorageError(f"cannot write {path}: {error}") from error


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file.

    Raises:
        StorageError: if the file is missing or corrupt, or a number in it is not finite.
    """
    check_file(path)
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise StorageError(f"the tensors in {path} are missing or corrupt ({error})") from error
    if broken := first_not_finite(tensors):
        raise StorageError(
            f"the tensors in {path} are damaged, or a training diverged: {broken} has numbers that are not finite"
        )
    return tensors


def describe_input(source: ImageSource) -> dict[str, Any]:
    """Return bands, units and rendering of a source as plain values for the JSON of a checkpoint."""
    return {"bands": list(source.bands), "units": source.units, "rendering": source.rendering.as_dict()}


def load_description(path: Path) -> dict[str, Any]:
    """Read the JSON beside the weights at `path`.

    Raises:
        OSError: if it is missing.
        ValueError: if it is corrupt.
    """
    check_file(path.with_suffix(".json"))
    return json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))


def load_input(path: Path) -> InputSpec:
    """Read the input specification beside the weights at `path`.

    Raises:
        StorageError: if the file is missing, corrupt, or has no input specification.
    """
    try:
        stored = load_description(path)["input"]
        return InputSpec(tuple(stored["bands"]), stored["units"], Rendering(**stored["rendering"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StorageError(f"the checkpoint {path} is missing or corrupt ({error})") from error


def load_network(path: Path) -> Network:
    """Load a network that `save_network` wrote, in evaluation mode.

    Raises:
        StorageError: if a file is missing or corrupt.
    """
    try:
        description = load_description(path)
        stored = description["network"]
        if description["format"] != FORMAT:
            raise ValueError(f"it has format {description['format']}, this version reads {FORMAT}")
        _check_ranges(stored)
        architectures = tuple(Architecture(**each) for each in stored["architectures"])
        values = {"architectures": architectures, "mean": tuple(stored["mean"]), "std": tuple(stored["std"])}
        spec = NetworkSpec(**stored | values)
        network = _empty_network(spec, description["head"])
        if description.get("averages_two", False):  # older checkpoints do not say
            network.second = _empty_network(spec, description["head"])
        load_state(network, path)
        return network.eval()
    except (OSError, ValueError, KeyError, TypeError, ConfigError) as error:
        raise StorageError(f"the checkpoint {path} is missing or corrupt ({error})") from error


def _empty_network(spec: NetworkSpec, head: Mapping[str, Any]) -> Network:
    backbone = empty_backbone(spec)
    widths = {"features": backbone.features, "stage_features": backbone.stage_features}
    for name, width in widths.items():
        check_choice(f"head.{name}", head[name], [width])
    return Network(spec, backbone, Head(**head))


def _check_ranges(stored: Mapping[str, Any]) -> None:
    """Check a stored specification before anything is built from it that would take hours or all memory.

    Raises:
        ConfigError: if a value is out of range.
    """
    for name, value, low, high in (
        ("channels", stored["channels"], 1, MAX_CHANNELS),
        ("image_size", stored["image_size"], MIN_SIZE, MAX_SIZE),
        ("tiles", stored.get("tiles", 1), 1, MAX_TILES),
        ("architectures, number of models", len(stored["architectures"]), 1, MAX_MODELS),
    ):
        check_range(f"network.{name}", value, low=low, high=high)
        check_choice(f"network.{name}", value, [int(value)])
    for name, choices in (("orientations", ORIENTATIONS), ("crops", CROPS), ("stages", (False, True))):
        check_choice(f"network.{name}", stored[name], choices)
    check_range("network.bn_momentum", stored["bn_momentum"], low=0, high=1, null=True)
    for name, above in (("mean", -math.inf), ("std", 0.0)):
        check_choice(f"network.{name}, number of values", len(stored[name]), [stored["channels"]])
        for value in stored[name]:
            check_range(f"network.{name}", value, above=above, below=math.inf)


def load_state(module: nn.Module, path: Path) -> None:
    """Load the tensors of `path` into `module`, all of them and no others.

    Raises:
        StorageError: if the file is missing, corrupt, or for another architecture.
    """
    try:
        module.load_state_dict(load_tensors(path), strict=True)
    except RuntimeError as error:
        raise StorageError(f"the weights {path} are missing or corrupt ({str(error).splitlines()[0]})") from error
