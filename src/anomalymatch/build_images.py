"""Build image sources and tasks from a composed configuration, without the wait for PyTorch."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf

from anomalymatch.checks import check_range, trusting
from anomalymatch.config import compose
from anomalymatch.data.rendering import Rendering
from anomalymatch.data.source import ImageSource
from anomalymatch.data.task import Task, make_task
from anomalymatch.errors import AnomalyMatchError, ConfigError, DataError
from anomalymatch.files import write_text

IMAGES = "images.json"


def open_task(dataset: str, *overrides: str) -> Task:
    """Open a dataset by name, with the rare class and the held-out split of its configuration.

    Args:
        dataset: `demo`, `folder`, `parquet`, `galaxymnist`, `miniimagenet`, `cifar10` or another of `conf/dataset`.
        overrides: as on the command line: `open_task("folder", "data.root=photos")`.

    Raises:
        ConfigError: if a key or value is wrong.
        DataError: if the images are missing.

    Example:
        >>> am.open_task("demo", "dataset.source.count=200", "dataset.source.rare_fraction=0.1")
        <Task demo: 160 images in the pool, 40 held out, 20 true anomalies>
        >>> am.open_task("folder", "data.root=photos")
        <Task photos: 20 images in the pool, 5 labels>
    """
    return replace(build_task(compose(f"dataset={dataset}", *overrides)), dataset=dataset)


def build_task(config: DictConfig) -> Task:
    """Build the task: the images and the rare class among them."""
    check_range("seed", config.seed, low=0)
    prevalence, holdout = config.dataset.prevalence, config.dataset.holdout
    check_range("dataset.prevalence", prevalence, null=True)
    check_range("dataset.holdout", holdout, null=True)

    def classes(given: Any) -> str | list[str] | None:
        return [str(name) for name in given] if isinstance(given, ListConfig) else None if given is None else str(given)

    return make_task(
        build_source(config),
        anomaly=classes(config.dataset.anomaly),
        normal=classes(config.dataset.normal),
        prevalence=None if prevalence is None else float(prevalence),
        holdout=float(holdout or 0.0),
        seed=config.seed,
    )


def build_source(config: DictConfig) -> ImageSource:
    """Build the image source.

    Raises:
        ConfigError: if the dataset does not use `data.root`, or one of its settings is wrong.
    """
    source = config.dataset.source
    if config.data.root is not None and "root" not in source and "data.root" not in OmegaConf.to_yaml(source):
        raise ConfigError(
            f"data.root={config.data.root} is not used by dataset={config.dataset.name}: add dataset=auto for your own "
            f"images, or leave it out"
        )
    with trusting(bool(OmegaConf.select(config, "trust", default=False))):
        return build(source)


def build_archive(config: DictConfig, rendering: Rendering) -> ImageSource:
    """Build the source of an archive, shown with the stretch of a trained network."""
    target = f"{Rendering.__module__}.{Rendering.__qualname__}"
    stretch = {"stretch": {"_target_": target, **rendering.as_dict()}}
    return build_source(cast(DictConfig, OmegaConf.merge(config, stretch)))


def check_same_images(folder: Path, config: DictConfig, source: ImageSource, ways: str) -> None:
    """Check that a folder does not hold work on other images from another place.

    The same images in another place are accepted, and so is an archive that has changed in its place, because images
    may be added to it.

    Args:
        folder: a folder for which `remember_images` was called, or any other.
        config: the configuration of the new work.
        source: its images.
        ways: what to do if they are others, for the message.

    Raises:
        ConfigError: if they are.
    """
    try:
        saved = json.loads((folder / IMAGES).read_text(encoding="utf-8"))
        root, fingerprint = saved["root"], saved["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError):  # made by an earlier version, or damaged: nothing is known
        return
    if fingerprint != source.fingerprint and root != _root(config):
        raise ConfigError(
            f"{folder} holds work on other images, those of data.root={root}, not {_root(config)}: {ways}"
        )


def remember_images(folder: Path, config: DictConfig, source: ImageSource) -> None:
    """Write down which images the work in a folder is on, for `check_same_images`."""
    saved = {"root": _root(config), "fingerprint": source.fingerprint}
    write_text(folder / IMAGES, json.dumps(saved, indent=1))


def _root(config: DictConfig) -> str | None:
    """Return `data.root`, absolute if it is a path."""
    root = config.data.root
    return None if root is None else str(root) if "://" in str(root) else str(Path(root).expanduser().absolute())


def check_place(key: str, place: object) -> None:
    """Check that a path exists; URLs are not looked up.

    Raises:
        DataError: if there is nothing.
    """
    if isinstance(place, str) and "://" not in place and not Path(place).expanduser().exists():
        raise DataError(f"{key}={place}: there is no such file or folder")


def build(node: DictConfig) -> Any:
    """Instantiate a node that has a `_target_`, as Hydra does.

    Raises:
        ConfigError: if an argument is unknown or wrong; errors of this package are raised as they are.
    """
    try:
        return instantiate(node)
    except InstantiationException as error:
        if isinstance(error.__cause__, AnomalyMatchError):
            raise error.__cause__ from None
        raise ConfigError(f"{node._target_}: {error.__cause__ or error}") from error
