"""Checkpoints that nothing has to unpickle: safetensors for the numbers, JSON for what they mean."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from anomalymatch.errors import StorageError
from anomalymatch.files import atomic_file, write_text
from anomalymatch.models.network import Head, Network, NetworkSpec, empty_backbone

FORMAT = 1


def save_network(network: Network, path: Path, **extra: Any) -> None:
    """Write `path` (safetensors) and the JSON beside it, both atomically.

    Args:
        network: the network that scores.
        path: file name ending in .safetensors.
        extra: more plain values for the JSON, such as the name of the anomaly class.

    Raises:
        StorageError: if the disk is full or the folder cannot be written to.
    """
    tensors = {k: v.detach().cpu().contiguous() for k, v in network.state_dict().items()}
    try:
        with atomic_file(path) as temporary:
            save_file(tensors, temporary)
    except SafetensorError as error:  # its own kind of "the disk is full"
        raise StorageError(f"cannot write {path}: {error}") from error
    description = {
        "format": FORMAT,
        "network": network.spec.as_dict(),
        "head": {"features": network.backbone.features, "normalised": network.head.normalised},
        "classes": ["normal", "anomaly"],
        "input": "8-bit images, channels first; resized to image_size; the network normalises by mean and std",
        "score": "sigmoid(logit[1] - logit[0]): probability of an anomaly where both classes are equally frequent",
        **extra,
    }
    write_text(path.with_suffix(".json"), json.dumps(description, indent=2))


def load_network(path: Path) -> Network:
    """Build the network that `save_network` wrote to `path`.

    Raises:
        StorageError: if a file is missing or corrupt.
    """
    try:
        description = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        stored = description["network"]
        spec = NetworkSpec(**stored | {"mean": tuple(stored["mean"]), "std": tuple(stored["std"])})
        head = Head(description["head"]["features"], normalised=description["head"]["normalised"])
        network = Network(spec, empty_backbone(spec), head)
        load_state(network, path)
        return network.eval()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StorageError(f"the checkpoint {path} is missing or corrupt ({error})") from error


def load_state(module: nn.Module, path: Path) -> None:
    """Load the tensors of `path` into `module`, all of them and no others.

    Raises:
        StorageError: if the file is missing, corrupt, or of another architecture.
    """
    try:
        module.load_state_dict(load_file(path), strict=True)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise StorageError(f"the weights {path} are missing or corrupt ({str(error).splitlines()[0]})") from error
