"""Architectures of backbones: from timm's own, from a repository of the hub, or from a local folder."""

import json
import logging
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple, cast

import timm
import torch
from timm.models import get_pretrained_cfg
from torch import Tensor, nn

from anomalymatch.backbones.hub import hub_file
from anomalymatch.backbones.stages import feature_reductions
from anomalymatch.checks import check_range, nearest
from anomalymatch.errors import ConfigError
from anomalymatch.text import printable, reason

logger = logging.getLogger(__name__)
SEPARATOR = "+"
"""Separator of the model names of an ensemble."""
HUB, FOLDER = ("hf_hub:", "hf-hub:"), ("local-dir:",)
"""Prefixes of the name of a repository of the hub, and of the path of a folder in the same layout."""
MIN_SIZE = 16
"""Smallest side of an image, in pixels."""
RESERVED = frozenset({*signature(timm.create_model).parameters, "in_chans", "num_classes", "img_size"})
"""Arguments of timm that a stored architecture must not have: they read files, or are set here."""
LARGEST = 8192
"""Largest whole number among the arguments of an architecture."""


class Architecture(NamedTuple):
    """Architecture of a timm model without its weights, input channels, image size and classifier.

    Attributes:
        name: name in timm's registry, without the tag of its weights.
        arguments: further arguments of `timm.create_model`, all plain values.
    """

    name: str
    arguments: dict[str, Any]

    @property
    def has_fixed_size(self) -> bool:
        """True if the model is built for one size of images, as most transformers are."""
        config = get_pretrained_cfg(self.name)
        return bool(config and config.fixed_input_size)

    def check(self) -> None:
        """Check name and arguments, which may be a stranger's.

        Raises:
            ConfigError: if timm does not know the name, or an argument is not a plain value or could read a file.
        """
        if not timm.is_model(self.name):
            raise ConfigError(f"timm has no model {self.name!r}{_did_you_mean(self.name, timm.list_models())}")
        for key, value in self.arguments.items():
            if key in RESERVED or not _is_plain(value):
                raise ConfigError(f"{key}={printable(str(value), limit=40)} is no argument of an architecture")

    def build(
        self,
        *,
        channels: int,
        size: int | None,
        classifier: bool = False,
        config: Mapping[str, Any] | None = None,
        tensors: Mapping[str, Tensor] | None = None,
    ) -> nn.Module:
        """Build the model.

        Args:
            channels: input channels.
            size: side of the images, if the model is built for one size; None keeps that of `config`.
            classifier: keep the classifier.
            config: facts on the weights as timm has them; None takes those of the registry.
            tensors: weights, which timm converts where they come from another layout, and resamples where they were
                trained on another size or number of channels; None draws random ones.

        Raises:
            ConfigError: if timm cannot build this architecture.
        """
        self.check()
        options: dict[str, Any] = {"in_chans": channels, **({} if classifier else {"num_classes": 0})}
        if size is not None and self.has_fixed_size:
            options["img_size"] = size
        if config is not None:
            options["pretrained_cfg"] = {**config, "state_dict": None if tensors is None else dict(tensors)}
        try:
            with _quiet(), torch.random.fork_rng():  # the initial weights are drawn, and replaced
                model = timm.create_model(self.name, pretrained=tensors is not None, **self.arguments, **options)
        except Exception as error:  # models check their arguments in many ways
            raise ConfigError(f"timm cannot build {self.name}: {printable(reason(error), limit=200)}") from error
        cast(Any, model).pretrained_cfg.pop("state_dict", None)
        return model


@dataclass(frozen=True)
class Origin:
    """Origin of a backbone: its architecture, and where its weights lie.

    Attributes:
        architecture: the architecture.
        config: facts on the weights as timm has them: hub repository, mean, std, size, first convolution.
        arguments: arguments of the architecture that its weights were saved with, image size and channels included.
        folder: local folder with the weights.
        repository: repository of the hub with the weights.
        registered: True for a name of timm's registry.
    """

    architecture: Architecture
    config: dict[str, Any]
    folder: Path | None = None
    repository: str | None = None
    registered: bool = False
    files: tuple[str, ...] = field(default=("model.safetensors", "pytorch_model.bin"), kw_only=True)

    @property
    def channels(self) -> int:
        """Number of channels that the weights were trained on."""
        return int(self.config["input_size"][0])

    def with_channels(self, channels: int) -> "Origin":
        """Return the same origin with weights for another number of channels."""
        return replace(self, config=self.config | {"input_size": (channels, *self.config["input_size"][1:])})

    def build(self, **options: Any) -> nn.Module:
        """Build the model with its classifier, for the size and channels of its weights; see `Architecture.build`."""
        native = {"channels": self.channels, "size": int(self.config["input_size"][-1]), "classifier": True}
        return self.architecture.build(**native | {"config": self.config} | options)


def split_names(name: str) -> list[str]:
    """Split the name of an ensemble; a plus in the path of a folder does not separate if no model's name follows."""
    parts: list[str] = []
    for part in name.split(SEPARATOR):
        is_model = part.startswith((*HUB, *FOLDER)) or timm.is_model(part.partition(".")[0])
        if parts and parts[-1].startswith(FOLDER) and not is_model:
            parts[-1] += SEPARATOR + part
        else:
            parts.append(part)
    return parts


def find_origin(name: str) -> Origin:
    """Find the architecture and the weights that a name stands for.

    Args:
        name: a model of timm, with or without the tag of its weights; `hf_hub:OWNER/NAME` with an optional `@REVISION`;
            or `local-dir:PATH`, a folder with the same files.

    Raises:
        ConfigError: if there is no such model.
        DownloadError: if the description of a model of the hub cannot be fetched.
    """
    source, _, rest = name.partition(":")
    if f"{source}:" in HUB:
        config = hub_file(rest, ["config.json"], otherwise="set model.name=local-dir:PATH")
        return _read_origin(config, rest, repository=rest)
    if f"{source}:" in FOLDER:
        folder = Path(rest).expanduser()
        if not (folder / "config.json").is_file():
            raise ConfigError(f"{name}: there is no config.json in that folder; it must hold a model as timm saves it")
        return _read_origin(folder / "config.json", str(folder), folder=folder)
    return _registered(name)


def fitting_size(name: str, models: Iterable[tuple[Architecture, nn.Module]], image_size: int) -> int:
    """Return the image size that all of these models take, as near to `image_size` as possible.

    A transformer takes multiples of its largest patches, a convolutional network any size. Another size than the one
    asked for is told, once in a process.
    """
    step = 1
    for architecture, model in models:
        if architecture.has_fixed_size:
            step = math.lcm(step, *feature_reductions(model))
    size = max(-(-MIN_SIZE // step), (2 * image_size + step) // (2 * step)) * step
    if size != image_size:
        _tell_size(name, image_size, size, step)
    return size


@cache
def _tell_size(name: str, asked: int, taken: int, step: int) -> None:
    logger.warning("%s takes multiples of %d pixels: model.image_size is %d, not %d", name, step, taken, asked)


def _registered(name: str) -> Origin:
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        hint = _did_you_mean(name, timm.list_models())
        if "/" in name:
            hint = f": write hf_hub:{name} for a repository of the hub, local-dir:{name} for a folder"
        raise ConfigError(f"timm has no model {name!r}{hint}")
    try:
        config = get_pretrained_cfg(name)
    except RuntimeError as error:
        known = timm.list_pretrained(f"{architecture}.*")
        raise ConfigError(f"timm has no weights {tag!r} of {architecture}{_did_you_mean(name, known)}") from error
    if config is None:
        raise ConfigError(f"timm has no facts on {architecture}, such as its image size: choose another model")
    facts = config.to_dict()
    files = (facts["hf_hub_filename"],) if facts.get("hf_hub_filename") else ("model.safetensors", "pytorch_model.bin")
    return Origin(
        Architecture(architecture, {}),
        _without_source(facts) | {"architecture": architecture},
        repository=facts.get("hf_hub_id"),
        registered=True,
        files=files,
    )


def _read_origin(path: Path, name: str, *, folder: Path | None = None, repository: str | None = None) -> Origin:
    """Read the config.json that `timm.models.save_for_hf` writes: architecture, arguments, and facts on the weights."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        facts = stored.get("pretrained_cfg", stored)
        architecture = str(stored["architecture"]).partition(".")[0]
        arguments = dict(stored.get("model_args") or {})
        given = {key: facts[key] for key in ("mean", "std", "input_size") if facts.get(key) is not None}
        given = {key: tuple(map(float if key != "input_size" else int, value)) for key, value in given.items()}
        classes = stored.get("num_classes", facts.get("num_classes"))
        if classes is not None:
            given["num_classes"] = int(classes)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{name} holds no model of timm: its config.json does not describe one ({type(error).__name__})"
        ) from error
    if not timm.is_model(architecture):
        raise ConfigError(
            f"{name} has the architecture {printable(architecture, limit=60)!r}, unknown to timm: update timm"
        )
    registered = get_pretrained_cfg(architecture)
    config = _without_source(registered.to_dict() if registered else {}) | given | {"architecture": architecture}
    channels, *sides = config.get("input_size", (3, 224, 224))
    channels, side = arguments.pop("in_chans", channels), arguments.pop("img_size", sides[-1])
    side = side[-1] if isinstance(side, Sequence) and side else side
    arguments.pop("num_classes", None)
    for key, value in (("input_size", channels), ("input_size", side)):
        check_range(f"{name}, config.json: {key}", value, low=1, high=LARGEST)
    for key in ("mean", "std"):
        for value in config.get(key, ()):
            check_range(f"{name}, config.json: {key}", value, above=0 if key == "std" else None, below=float("inf"))
    config["input_size"] = (channels, side, side)
    found = Architecture(architecture, arguments)
    found.check()
    return Origin(found, config, folder=folder, repository=repository)


def _without_source(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return facts on weights without their places and their own loaders: weights are given as tensors."""
    places = ("url", "file", "hf_hub_id", "hf_hub_filename", "source", "state_dict", "custom_load", "label_offset")
    return {key: value for key, value in facts.items() if key not in places}


def _is_plain(value: object) -> bool:
    if isinstance(value, list | tuple):
        return len(value) <= LARGEST and all(map(_is_plain, value))
    if isinstance(value, int | float) and not isinstance(value, bool):
        return abs(value) <= LARGEST
    return value is None or isinstance(value, bool | str)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence timm, which tells for each tensor how it adapted it, and PyTorch's warnings about timm's own code."""
    log = logging.getLogger("timm")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            yield
    finally:
        log.setLevel(level)


def _did_you_mean(name: str, known: Sequence[str]) -> str:
    close = nearest(name, known, 3)
    return f"; did you mean {', '.join(close)}?" if close else ": timm.list_models() gives all names"
