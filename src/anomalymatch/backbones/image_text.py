"""Image-text models of open_clip (CLIP, SigLIP): embeddings of images and of descriptions in one space."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 (the field's own abbreviation)
from jaxtyping import Float, Float32
from torch import Tensor, nn

from anomalymatch.backbones.features import FeatureCache, Features
from anomalymatch.backbones.hub import require_hub
from anomalymatch.backbones.inference import Inference
from anomalymatch.backbones.network import Backbone
from anomalymatch.backbones.openvino import root_logger_kept
from anomalymatch.checks import check_range, nearest
from anomalymatch.data.source import ImageSource
from anomalymatch.errors import ConfigError, DownloadError, describe_missing_package
from anomalymatch.progress import ShowProgress, progress
from anomalymatch.text import listed, reason

HUB, FOLDER = "hf-hub:", "local-dir:"
"""Prefixes of models that are a repository of the hub, or a folder with the files of one."""
PLACE = "{}"
"""Place of the description in a template."""
CONFIG, SAFE_WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
PLAIN_WEIGHTS = "open_clip_pytorch_model.bin"
SMALL_FILES = ("*.json", "*.txt", "*.model")
"""Files of a repository beside the weights: the configuration, and the vocabulary of the tokenizer."""


@dataclass(frozen=True)
class ImageTextSpec:
    """Image-text model, and the templates around a description: the keys of `conf/text`.

    Attributes:
        model: name of a model of open_clip, `hf-hub:OWNER/NAME` or `local-dir:PATH`.
        pretrained: tag of the weights of a named model; the others bring their own.
        image_size: side of the images in pixels; None for the model's own.
        templates: sentences with `{}` for the description; its embedding is their average.
    """

    model: str
    pretrained: str | None
    image_size: int | None
    templates: Sequence[str]

    def __post_init__(self) -> None:
        check_range("text.image_size", self.image_size, low=16, null=True)
        wrong = [each for each in self.templates if not isinstance(each, str) or each.count(PLACE) != 1]
        if wrong or not self.templates:
            shown = f"{wrong[0]!r} is no such sentence" if wrong else "the list is empty"
            raise ConfigError(f"text.templates must be sentences with one {PLACE} for the description: {shown}")

    def check(self) -> None:
        """Check, without loading the model, that open_clip is installed and knows it.

        Raises:
            ConfigError: if not.
        """
        if find_spec("open_clip") is None:
            raise ConfigError('a description needs open_clip: pip install "anomalymatch[text]"')
        if self.model.startswith(FOLDER):
            if not (self._folder / CONFIG).is_file():
                raise ConfigError(f"text.model={self.model}: there is no folder {self._folder} with an {CONFIG}")
        elif not self.model.startswith(HUB):
            self._check_name()

    def check_weights(self) -> None:
        """Check that the weights are on this machine, or that the hub can be reached.

        Raises:
            ConfigError: if the model is unknown.
            DownloadError: if the weights are neither here nor can be fetched.
        """
        self.check()
        repository = self._repository
        if repository is not None and _cached(repository) is None:
            _check_hub(repository)

    def load(self) -> "ImageTextModel":
        """Load the model; the hub is asked only for files that are not in its cache.

        Raises:
            ConfigError: if the model is unknown, or its files are not those of an image-text model.
            DownloadError: if the weights cannot be fetched.
        """
        self.check()
        repository = self._repository
        name = self.model
        if repository is not None or name.startswith(FOLDER):
            name = f"{FOLDER}{self._folder if repository is None else _cached(repository) or _fetch(repository)}"
        import open_clip

        with root_logger_kept(), torch.random.fork_rng():
            logging.getLogger().addFilter(lambda record: False)  # to which open_clip logs each step
            try:
                options = _tokenizer_options(open_clip.get_model_config(name), name)
                model = open_clip.create_model(
                    name,
                    pretrained=None if name.startswith(FOLDER) else self.pretrained,
                    force_image_size=self.image_size,
                    require_pretrained=True,
                )
                tokenizer = open_clip.get_tokenizer(name, **options)
            except (ConfigError, DownloadError):
                raise
            except ModuleNotFoundError as error:
                raise ConfigError(f"text.model={self.model}: {describe_missing_package(error)}") from error
            except Exception as error:  # the files may be wrong in any way
                raise ConfigError(f"text.model={self.model} cannot be loaded: {reason(error)}") from error
        return ImageTextModel(self, model.eval(), tokenizer)

    @property
    def _folder(self) -> Path:
        return Path(self.model.removeprefix(FOLDER)).expanduser()

    @property
    def _repository(self) -> str | None:
        """Repository of the hub with configuration and weights; None for a folder, and where open_clip knows better."""
        if self.model.startswith(HUB):
            return self.model.removeprefix(HUB)
        if self.model.startswith(FOLDER):
            return None
        import open_clip

        place = open_clip.get_pretrained_cfg(self.model, str(self.pretrained)).get("hf_hub", "")
        is_plain = not open_clip.get_model_config(self.model)["text_cfg"].get("hf_model_name")
        return place.removesuffix("/") if is_plain and place.endswith("/") else None

    def _check_name(self) -> None:
        import open_clip

        if open_clip.get_model_config(self.model) is None:
            close = nearest(self.model, open_clip.list_models(), 3)
            hint = f"did you mean {', '.join(close)}?" if close else "open_clip.list_models() gives all names"
            raise ConfigError(f"open_clip has no model text.model={self.model!r}; {hint}")
        tags = open_clip.list_pretrained_tags_by_model(self.model)
        if self.pretrained is None or not open_clip.is_pretrained_cfg(self.model, self.pretrained):
            raise ConfigError(
                f"text.pretrained={self.pretrained} is no tag of weights of {self.model}: choose one of {listed(tags)}"
            )


class ImageTextModel:
    """Loaded image-text model.

    Args:
        spec: its description.
        model: the model of open_clip, in evaluation mode.
        tokenizer: its tokenizer.
    """

    def __init__(self, spec: ImageTextSpec, model: Any, tokenizer: Any) -> None:
        self.spec, self._model, self._tokenizer = spec, model, tokenizer

    def encode_text(self, description: str) -> Float32[np.ndarray, " d"]:
        """Average the normalised embeddings of the templates with a description, and normalise the average.

        This is the prompt ensembling of CLIP (Radford et al. 2021, section 3.1.4).
        """
        tokens = self._tokenizer(self._prompts(description))
        with torch.inference_mode():
            rows = F.normalize(self._model.encode_text(tokens).float(), dim=-1)
            return F.normalize(rows.mean(dim=0), dim=-1).numpy()

    def is_cut(self, description: str) -> bool:
        """Tell whether a description is longer than the model's context, beyond which it is not read."""
        length = self._tokenizer.context_length
        longest = max(self._prompts(description), key=len)
        # With one more token of context, a sentence that fits only gets one more token of padding.
        fits, longer = self._tokenizer([longest])[0], self._tokenizer([longest], context_length=length + 1)[0]
        padding = self._tokenizer([""], context_length=length + 1)[0, -1]
        return not (torch.equal(longer[:-1], fits) and longer[-1] == padding)

    def image_backbone(self, channels: int) -> tuple["ImageTowerSpec", Backbone]:
        """Return the image tower for images of any number of bands, as feature extraction takes it."""
        import open_clip

        settings = open_clip.get_model_preprocess_cfg(self._model)
        size = settings["size"]
        height, width = (size, size) if isinstance(size, int) else size
        if height != width:
            raise ConfigError(f"text.model={self.spec.model} takes images of {height} x {width} pixels, not squares")
        tower = _ImageTower(self._model.visual, settings["mean"], settings["std"], self.encode_text("").size)
        backbone = Backbone(tower, mean=(0.0,) * channels, std=(1.0,) * channels)
        return ImageTowerSpec(self.spec.model, int(height)), backbone.eval()

    def _prompts(self, description: str) -> list[str]:
        return [template.replace(PLACE, description) for template in self.spec.templates]


class ImageTowerSpec(NamedTuple):
    """Name of an image-text model, and the side of its images in pixels."""

    name: str
    image_size: int


class _ImageTower(nn.Module):
    """Image tower of an image-text model, for images with pixels between 0 and 1.

    Images that have not three bands are shown as grey images of the mean of their bands.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, tower: nn.Module, mean: Sequence[float], std: Sequence[float], width: int) -> None:
        super().__init__()
        self.tower, self.num_features = tower, width
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1))

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d"]:
        if images.shape[1] != 3:
            images = images.mean(dim=1, keepdim=True)
        embedding = self.tower((images - self.mean) / self.std)
        return embedding[0] if isinstance(embedding, tuple) else embedding  # CoCa also returns the tokens


class ImageTextEmbedding:
    """Image-text model and source; the embeddings of the images are computed on first use and cached on disk.

    Args:
        spec: the model.
        source: the images.
        cache_dir: folder of the feature cache.
        inference: device, precision and batch size.
        pool: ids that are ranked unless others are given; None for all of the source.
    """

    def __init__(
        self,
        spec: ImageTextSpec,
        *,
        source: ImageSource,
        cache_dir: Path,
        inference: Inference,
        pool: Sequence[str] | None = None,
    ) -> None:
        self.spec, self.source, self.inference = spec, source, inference
        self.pool = source.ids if pool is None else pool
        self._cache = FeatureCache(cache_dir / "features", inference)
        self._features: Features | None = None

    @cached_property
    def model(self) -> ImageTextModel:
        """The model, loaded on first use; see `ImageTextSpec.load`."""
        return self.spec.load()

    def features(self, show: ShowProgress = progress) -> Features:
        """Return the normalised embeddings of all images: from disk, or computed now."""
        if self._features is None:
            self._features = self._cache.features(
                self.source, *self.model.image_backbone(self.source.channels), show=show
            )
        return self._features


def _tokenizer_options(config: dict[str, Any], name: str) -> dict[str, Any]:
    """Return options of the tokenizer, after a check that the files of a model run no code of their author.

    Raises:
        ConfigError: if they ask for it.
    """
    text = config["text_cfg"]
    if name.startswith(FOLDER) and text.get("hf_model_name"):
        raise ConfigError(
            f"text.model={name} has a text tower of the package transformers ({text['hf_model_name']}), which may "
            f"run code from the hub: choose another model, or one of open_clip.list_models()"
        )
    return {"trust_remote_code": False} if text.get("hf_tokenizer_name") else {}


def _cached(repository: str) -> Path | None:
    """Return the folder of a repository in the hub's cache; None if it is not complete."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(repository, local_files_only=True))
    except HFValidationError as error:
        raise ConfigError(f"text.model={HUB}{repository} is no name of a repository: write {HUB}OWNER/NAME") from error
    except LocalEntryNotFoundError:
        return None
    has_weights = any((folder / name).exists() for name in (SAFE_WEIGHTS, PLAIN_WEIGHTS))
    return folder if has_weights and (folder / CONFIG).exists() else None


def _check_hub(repository: str) -> None:
    try:
        require_hub()
    except Exception as error:  # of the network, of any kind
        raise DownloadError(
            f"the weights of {repository} are not on this machine, and the hub cannot be reached "
            f"({type(error).__name__}): check the network, or set text.model={FOLDER}PATH"
        ) from error


def _fetch(repository: str) -> Path:
    from huggingface_hub import snapshot_download

    _check_hub(repository)
    folder: Path | None = None
    try:
        for weights in (SAFE_WEIGHTS, PLAIN_WEIGHTS):
            if folder is None or not (folder / SAFE_WEIGHTS).exists():
                folder = Path(snapshot_download(repository, allow_patterns=[*SMALL_FILES, weights]))
    except Exception as error:  # the hub's client raises dozens of types
        raise DownloadError(f"cannot fetch {repository} from the hub: {reason(error)}") from error
    found = _cached(repository)
    if found is None:
        raise ConfigError(f"the repository {repository} has no model of open_clip: {CONFIG} or the weights are missing")
    return found
