"""From command-line words to a checked configuration. Every default stands in `conf/`, none here."""

import difflib
from collections.abc import Iterator, Sequence
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any, cast

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from anomalymatch.errors import ConfigError, MissingValueError, StorageError

CHANGEABLE_ON_RESUME = (
    "al.cycles",
    "al.budget",
    "data",
    "inference",
    "logger",
    "log_level",
    "resume",
    "trainer.workers",
)
"""What may differ between a run and its continuation: nothing else would leave its numbers the same."""

NULLABLE = (
    "al.pool_size",
    "algorithm.learner.loss.alignment",
    "algorithm.learner.loss.threshold",
    "algorithm.learner.refit_confidence",
    "algorithm.learner.start_rounds",
    "algorithm.learner.trainable_groups",
    "clustering.patches.components",
    "dataset.anomaly",
    "dataset.holdout",
    "dataset.source.label_column",
    "model.bn_momentum",
)
"""What has a default and may still be switched off by null."""

ANY_TYPE = ("dataset.anomaly", "trainer.lightning.")
"""What other programs' words are for: class names may be numbers or a list, Lightning checks its own arguments."""

SHORT_FORMS = {"al.strategy.name": "al/strategy", "al.cold_start": "al/cold_start"}
"""Keys that stand for a config group on the command line: `al.cold_start=knn` is `al/cold_start=knn`."""

FILE = "config.yaml"

OmegaConf.register_new_resolver("first", lambda *values: next(v for v in values if v is not None), replace=True)


def config_folder() -> Path:
    """The folder `conf`: inside an installed package, or at the top of a checkout."""
    installed = Path(str(resources.files("anomalymatch"))) / "conf"
    return installed if installed.is_dir() else Path(__file__).resolve().parents[2] / "conf"


def expand(word: str) -> str:
    """Replace the short form of a config group by the group; null is `none`."""
    key, equals, value = word.partition("=")
    return f"{SHORT_FORMS[key]}={'none' if value == 'null' else value}" if equals and key in SHORT_FORMS else word


def compose(*overrides: str, name: str = "config") -> DictConfig:
    """Compose the configuration as the command line would: `compose("dataset=folder", "data.root=photos")`.

    Args:
        overrides: the words of a command line.
        name: of the primary configuration: `config` is that of the main job, `score` that of scoring.

    Raises:
        ConfigError: if a key or value is wrong.
    """
    return check_overrides(overrides, name=name)


def check_overrides(
    overrides: Sequence[str], *, multirun: bool = False, folder: Path | None = None, name: str = "config"
) -> DictConfig:
    """Refuse unknown groups, keys and values of the wrong type, in one line; values of a sweep are checked one by one.

    The types of the defaults are the schema: whole numbers where a whole number stands, and so on.

    Args:
        overrides: the words of a command line.
        multirun: whether a key may have several values.
        folder: a user's own configurations, beside those of the package.
        name: of the primary configuration.

    Returns:
        The configuration that they compose; of a sweep, that of its first job.

    Raises:
        ConfigError: with the first wrong override, and the nearest right one.
    """
    folders = [config_folder(), *([folder] if folder else [])]
    parsed = [override for override in map(_parse, map(expand, overrides)) if not _is_hydra(override)]
    groups = [override for override in parsed if _choices(override, folders)]
    for override in groups:
        _check_group(override, _choices(override, folders))
    default = _defaults(tuple(choice for override in groups for choice in list(_single(override))[:1]), folder, name)
    for override in parsed:
        if override.is_sweep_override() and not multirun:
            raise ConfigError(f"{override.input_line} gives several values: add -m to run them all")
        if override not in groups:
            _check_value(override, default)
    composed = _compose([choice for override in parsed for choice in list(_single(override))[:1]], folder, name)
    missing = sorted(OmegaConf.missing_keys(composed))
    if missing:
        raise MissingValueError(f"{missing[0]} has no default: set {missing[0]}=VALUE")
    return composed


def resumed(folder: Path, config: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """The configuration that the run in `folder` was started with, but for the few things that may change.

    Args:
        folder: the run folder.
        config: what the command line gives now.
        overrides: the words of the command line.

    Raises:
        StorageError: if there is no run in the folder.
        ConfigError: if an override would change the numbers of the run.
    """
    saved = _load(folder)
    if saved is None:
        raise StorageError(f"resume={folder}: there is no run in that folder (no {FILE})")
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        key = override.key_or_group or ""
        if not _changeable(key):
            raise ConfigError(
                f"{override.input_line} cannot change on resume: only {', '.join(CHANGEABLE_ON_RESUME)} can; "
                f"start a new run for anything else"
            )
        OmegaConf.update(saved, key, OmegaConf.select(config, key), merge=False)
    return saved


def check_same_run(folder: Path, config: DictConfig) -> None:
    """Refuse to go on in a folder whose run was started with other settings.

    Raises:
        ConfigError: with the first setting that differs.
    """
    saved = _load(folder)
    if saved is None:
        return
    before, now = _flat(saved), _flat(config)
    follows = {key for key, value in _flat(config, resolve=False).items() if isinstance(value, str) and "${" in value}
    for key in sorted({*before, *now} - follows):
        old, new = before.get(key), now.get(key)
        if old != new and not isinstance(old, dict) and not isinstance(new, dict) and not _changeable(key):
            raise ConfigError(f"{folder} holds a run with {key}={old}, not {new}: choose another folder for this one")


def _load(folder: Path) -> DictConfig | None:
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        saved = OmegaConf.load(path)
    except (OSError, YAMLError) as error:
        raise StorageError(f"{path} is corrupt: {_first_line(error)}") from error
    if not isinstance(saved, DictConfig) or not saved:
        raise StorageError(f"{path} is corrupt: it is no configuration")
    return saved


def _changeable(key: str) -> bool:
    return any(key == allowed or key.startswith(f"{allowed}.") for allowed in CHANGEABLE_ON_RESUME)


def _parse(word: str) -> Override:
    try:
        override = OverridesParser.create().parse_override(word)
    except HydraException as error:
        raise ConfigError(f"{word!r} cannot be understood, expected KEY=VALUE: {_first_line(error)}") from error
    if not override.key_or_group:
        raise ConfigError(f"{word!r} cannot be understood, expected KEY=VALUE: there is no key")
    return override


def _is_hydra(override: Override) -> bool:
    return str(override.key_or_group).split(".")[0].split("/")[0] == "hydra"


@lru_cache
def _defaults(groups: tuple[str, ...], folder: Path | None, name: str) -> DictConfig:
    """What the chosen groups give by themselves; never to be changed."""
    return _compose(groups, folder, name)


def _compose(overrides: Sequence[str], folder: Path | None, name: str) -> DictConfig:
    outer = GlobalHydra.instance().hydra  # a notebook's own, or that of a running command
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(config_folder()), version_base="1.3"):
            own = [f"hydra.searchpath=['file://{folder.resolve()}']"] if folder else []
            composed = hydra_compose(name, overrides=[*overrides, *own], return_hydra_config=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_first_line(error)) from error
    finally:
        GlobalHydra.instance().hydra = outer
    with open_dict(composed):
        choices = composed.pop("hydra").runtime.choices
    for key, group in SHORT_FORMS.items():
        name_key = key.removesuffix(".name") + ".name"
        named = OmegaConf.select(composed, name_key, throw_on_resolution_failure=False)
        if group in choices and named != choices[group]:
            raise ConfigError(f"a file sets {key}: choose it in the file's defaults list, as `override /{group}: NAME`")
    return composed


def _choices(override: Override, folders: Sequence[Path]) -> list[str]:
    """What a group offers; nothing if the key of the override is no group."""
    files = (path for folder in folders for path in (folder / str(override.key_or_group)).glob("*.yaml"))
    return sorted({path.stem for path in files})


def _single(override: Override) -> Iterator[str]:
    """The override, or one override for each value of its sweep."""
    if not override.is_sweep_override():
        yield override.input_line or ""
    else:
        key = f"{'+' if override.is_add() else ''}{override.key_or_group}"
        yield from (f"{key}={value}" for value in override.sweep_string_iterator())


def _check_group(override: Override, choices: Sequence[str]) -> None:
    group = str(override.key_or_group)
    for single in _single(override):
        choice = single.partition("=")[2]
        if override.is_delete() or choice not in choices:
            raise ConfigError(f"there is no {group}={choice}: choose one of {', '.join(choices)}")
        if group == "experiment" and not override.is_add():
            raise ConfigError(f"an experiment is added to the configuration: write +{group}={choice}")


def _check_value(override: Override, default: DictConfig) -> None:
    key = str(override.key_or_group)
    if override.is_delete():
        raise ConfigError(f"{override.input_line}: no key can be taken away, only set to another value")
    known = _flat(default, resolve=False)
    if key not in known:
        if override.is_add() or override.is_force_add():
            _check_addition(key, known)
            return
        close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]}?" if close else "see `python -m anomalymatch.run --cfg job` for all keys"
        raise ConfigError(f"there is no key {key!r}: {hint}")
    for single in _single(override):
        value = OverridesParser.create().parse_override(single).value()
        expected = _default_of(key, known[key], default)
        if not _fits(key, value, expected):
            told = f"set {key}.{next(iter(expected))}=…" if isinstance(expected, dict) else f"the default is {expected}"
            raise ConfigError(f"{key}={value} is not {_kind(expected)} ({told})")


def _check_addition(key: str, known: dict[str, Any]) -> None:
    """Only what is built of other libraries' parts (an optimiser, Lightning's Trainer) takes more arguments."""
    node = known.get(key.rpartition(".")[0])
    if not isinstance(node, dict) or str(node.get("_target_", "anomalymatch")).startswith("anomalymatch"):
        raise ConfigError(f"there is no key {key!r}, and none can be added there")


def _flat(config: DictConfig, *, resolve: bool = True) -> dict[str, Any]:
    return dict(_leaves(cast(dict[str, Any], OmegaConf.to_container(config, resolve=resolve))))


def _leaves(node: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys of a nested dictionary, groups among them."""
    for key, value in node.items():
        yield f"{prefix}{key}", value
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")


def _default_of(key: str, raw: Any, config: DictConfig) -> Any:
    if isinstance(raw, str) and raw.startswith("${"):
        return OmegaConf.select(config, key, throw_on_resolution_failure=False)
    return None if raw == "???" else raw


def _fits(key: str, value: Any, default: Any) -> bool:
    """Whether `value` may stand where `default` stands; an unset default says nothing of its type."""
    if default is None or (isinstance(value, str) and value.startswith("${")):
        return True
    if value is None:
        return key in NULLABLE
    if isinstance(default, dict) or isinstance(value, dict):
        return isinstance(default, dict) and isinstance(value, dict)
    if key.startswith(ANY_TYPE):
        return True
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(value, bool) and isinstance(default, bool)
    if isinstance(default, float):
        return isinstance(value, int | float)
    return isinstance(value, type(default) if isinstance(default, int | str) else list)


def _kind(default: Any) -> str:
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "a word", dict: "a group of keys"}
    return names.get(type(default), "a list")


def _first_line(error: Exception) -> str:
    return next(line.strip() for line in str(error).splitlines() if line.strip())
