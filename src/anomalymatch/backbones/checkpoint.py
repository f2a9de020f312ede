"""Checkpoints without pickle: tensors in a safetensors file, their description in a JSON file beside it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from anomalymatch.backbones.network import Head, Network, NetworkSpec, empty_backbone
from anomalymatch.checksums import check_file
from anomalymatch.data.rendering import Rendering
from anomalymatch.data.source import ImageSource
from anomalymatch.errors import DataError, StorageError
from anomalymatch.files import atomic_file, write_text

FORMAT = 2


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
        "classes": ["normal", "anomaly"],
        "pixels": "8-bit images, channels first; resized to image_size; the network normalises by mean and std",
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
        StorageError: if the file is missing or corrupt.
    """
    check_file(path)
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise StorageError(f"the tensors in {path} are missing or corrupt ({error})") from error


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
        spec = NetworkSpec(**stored | {"mean": tuple(stored["mean"]), "std": tuple(stored["std"])})
        head = Head(**description["head"])
        network = Network(spec, empty_backbone(spec), head)
        load_state(network, path)
        return network.eval()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StorageError(f"the checkpoint {path} is missing or corrupt ({error})") from error


def load_state(module: nn.Module, path: Path) -> None:
    """Load the tensors of `path` into `module`, all of them and no others.

    Raises:
        StorageError: if the file is missing, corrupt, or for another architecture.
    """
    try:
        module.load_state_dict(load_tensors(path), strict=True)
    except RuntimeError as error:
        raise StorageError(f"the weights {path} are missing or corrupt ({str(error).splitlines()[0]})") from error
