"""Compose and check the configuration from command-line words. `conf/` holds every default."""

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from importlib import util
from pathlib import Path
from typing import Any, NamedTuple, cast

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, IntervalSweep, Override, Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from anomalymatch.checks import nearest
from anomalymatch.config_folders import config_folder, config_folders, search_path
from anomalymatch.errors import ConfigError, MissingValueError, StorageError
from anomalymatch.saved_config import read_config
from anomalymatch.text import listed, printable

CHANGEABLE_ON_RESUME = (
    "al.cycles",
    "al.budget",
    "adapt.minutes",
    "data",
    "inference",
    "logger",
    "log_level",
    "output",
    "resume",
    "trainer.workers",
    "trust",
)
"""Keys that may change when a run is resumed; any other would change its numbers."""

NULLABLE = (
    "adapt.trainable_groups",
    "al.pool_size",
    "algorithm.learner.loss.alignment",
    "algorithm.learner.loss.threshold",
    "algorithm.learner.refit_confidence",
    "algorithm.learner.start_rounds",
    "algorithm.learner.trainable_groups",
    "clustering.patches.components",
    "clustering.patches.levels",
    "dataset.anomaly",
    "dataset.holdout",
    "dataset.normal",
    "dataset.source.label_column",
    "model.bn_momentum",
    "model.mean",
    "model.std",
    "probe.fit_gap",
)
"""Keys that have a default and accept null."""

ANY_TYPE = ("dataset.anomaly", "dataset.normal", "model.tiles", "trainer.lightning.")
"""Prefixes of keys whose type is not checked: class names may be numbers or a list, tiles a number or `auto`, and
Lightning checks its arguments."""

SHORT_FORMS = {
    "al.strategy.name": "al/strategy",
    "al.cold_start": "al/cold_start",
    "optimizer": "optimizer@algorithm.learner.optimizer",
}
"""Keys that stand for a config group on the command line: `al.cold_start=knn` is `al/cold_start=knn`."""

OWN_SHORT_FORMS = {"adapt": {"optimizer": "optimizer@adapt.optimizer"}}
"""Short forms of one command."""

SEVERAL = ("logger",)
"""Groups of which several entries may be chosen: `logger=[wandb,csv]`."""

ADDED = ("experiment", "debug")
"""Groups without a default, which are added: `+experiment=demo_quick`."""

PATHS = (
    "al.describe",
    "data.cache_dir",
    "data.root",
    "dataset.source.labels_file",
    "dataset.source.metadata",
    "dataset.source.root",
    "dataset.source.tiles",
    "hydra.run.dir",
    "hydra.sweep.dir",
    "model.name",
    "model.weights",
    "names",
    "output",
    "resume",
    "run",
    "text.model",
    "ui.run",
    "ui.scores",
)
"""Keys whose values are paths, hold one, or are sentences: they are taken as typed, without Hydra's syntax."""

_QUOTED = re.compile(r""""([^"\\]|\\.)*"|'([^'\\]|\\.)*\'""", re.DOTALL)
_SWEEP = re.compile(r"(choice|glob|range|interval|shuffle|sort|tag)\(.*\)", re.DOTALL)

PLUGINS = {
    "hydra/launcher=joblib": ("hydra_joblib_launcher", "joblib"),
    "hydra/launcher=submitit_local": ("hydra_submitit_launcher", "submitit"),
    "hydra/launcher=submitit_slurm": ("hydra_submitit_launcher", "submitit"),
    "hydra/sweeper=optuna": ("hydra_optuna_sweeper", "optuna"),
}
"""Module and extra of each plug-in of Hydra."""

FILE = "config.yaml"

OmegaConf.register_new_resolver("first", lambda *values: next(v for v in values if v is not None), replace=True)


def expand(word: str, *, multirun: bool = False, name: str = "config") -> str:
    """Replace the short form of a config group by the group (null is `none`), and quote a path for Hydra's parser.

    `name` is that of the primary configuration.
    """
    key, equals, value = word.partition("=")
    forms = SHORT_FORMS | OWN_SHORT_FORMS.get(name, {})
    if equals and key in forms:
        return f"{forms[key]}={'none' if value == 'null' else value}"
    return f"{key}={_quote_path(value, multirun=multirun)}" if equals and key.lstrip("+") in PATHS else word


def _quote_path(text: str, *, multirun: bool) -> str:
    """Quote a path, so that Hydra takes it as it is typed; an empty one is null.

    Quotes around all of it are kept. Where no such file exists, `[a,b]` is a list, `${key}` an interpolation and, in a
    sweep, `a,b` are two values and `choice(…)` and the like are functions.
    """
    if not text:
        return "null"
    if _QUOTED.fullmatch(text):
        return text
    if os.path.lexists(os.path.expanduser(text.removeprefix("local-dir:"))):
        return QuotedString(text.replace("${", "\\${"), Quote.single).with_quotes()
    if multirun and _SWEEP.fullmatch(text):
        return text
    if text.startswith("[") and text.endswith("]"):
        return f"[{','.join(_quote_path(part.strip(), multirun=False) for part in text[1:-1].split(','))}]"
    if multirun and "," in text:
        return ",".join(_quote_path(part, multirun=False) for part in text.split(","))
    return QuotedString(text, Quote.single).with_quotes()


def compose(*overrides: str, name: str = "config") -> DictConfig:
    """Compose the configuration as the command line does: `compose("dataset=folder", "data.root=photos")`.

    Args:
        overrides: words of a command line.
        name: name of the primary configuration: `config` for the main job, `label`, `score` or `cluster`.

    Raises:
        ConfigError: if a key or value is wrong.

    Example:
        >>> config = am.compose("dataset=folder", "data.root=photos", "al.cycles=5")
        >>> config.al.cycles, config.algorithm.name
        (5, 'fixmatch')
    """
    return check_overrides(overrides, name=name)


def with_images_of_run(config: DictConfig) -> DictConfig:
    """Replace dataset and stretch by those of the run that `config.run` names; without one, change nothing.

    Raises:
        StorageError: if there is no such run.
    """
    if config.run is None:
        return config
    saved = _load(Path(config.run).expanduser(), trust=config.trust)
    if saved is None:
        raise StorageError(f"run={config.run}: there is no such run folder (no {FILE} in it)")
    kept = OmegaConf.masked_copy(config, [str(key) for key in config if key not in ("dataset", "stretch")])
    own = {
        "data": {"root": saved.data.root if config.data.root is None else config.data.root},
        "dataset": {"image_size": config.dataset.image_size},
    }
    return cast(DictConfig, OmegaConf.merge(kept, OmegaConf.masked_copy(saved, ["dataset", "stretch"]), own))


def check_overrides(
    overrides: Sequence[str], *, multirun: bool = False, folder: Path | None = None, name: str = "config"
) -> DictConfig:
    """Compose and check the configuration; of a sweep (`multirun`), check all values and return the first job's.

    The default of a key gives its type. `folder` has configurations of the user.

    Raises:
        ConfigError: for the first unknown group or key or value of the wrong type, with the most similar right one.
        MissingValueError: if a key without a default is not set.
    """
    composed = compose_partly(overrides, multirun=multirun, folder=folder, name=name).config
    check_complete(composed)
    return composed


def check_complete(config: DictConfig) -> None:
    """Check that every key has a value.

    Raises:
        MissingValueError: if a key without a default is not set.
    """
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise MissingValueError(f"{missing[0]} has no default: set {missing[0]}=VALUE")


class Composed(NamedTuple):
    """Configuration, and the name chosen in each of its groups; several names are `[a,b]`."""

    config: DictConfig
    choices: dict[str, str]


def compose_partly(
    overrides: Sequence[str], *, multirun: bool = False, folder: Path | None = None, name: str = "config"
) -> Composed:
    """Compose and check like `check_overrides`, without the check for keys that are not set."""
    folders = config_folders(folder)
    everything = [_parse(expand(word, multirun=multirun, name=name)) for word in overrides]
    for override in everything:
        _check_plugin(override)
    parsed = [override for override in everything if not _is_hydra(override)]
    groups = [override for override in parsed if _choices(override, folders)]
    for override in groups:
        _check_group(override, _choices(override, folders))

    def first(overrides: Sequence[Override]) -> tuple[str, ...]:
        """Return the first value of each override: those of the first job."""
        return tuple(next(_single(override, _choices(override, folders))) for override in overrides)

    default = _defaults(first(groups), folder, name).config
    for override in parsed:
        if override.is_sweep_override() and not multirun:
            raise ConfigError(f"{override.input_line} gives several values: add -m to run them all")
        if isinstance(override.value(), IntervalSweep) and not any("sweeper" in str(word) for word in overrides):
            raise ConfigError(f"{override.input_line}: an interval needs a sweeper that searches: hydra/sweeper=optuna")
        if override not in groups:
            _check_value(override, default)
    return _compose(first(parsed), folder, name)


def resumed(folder: Path, config: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """Return the configuration of the run in `folder`, with the values in `config` of the keys in `overrides`.

    Raises:
        StorageError: if there is no run in the folder.
        ConfigError: if an override would change the numbers of the run.
    """
    saved = _load(folder, trust=config.trust)
    if saved is None:
        raise StorageError(f"resume={folder}: there is no run in that folder (no {FILE})")
    for override in OverridesParser.create().parse_overrides(list(map(expand, overrides))):
        key = override.key_or_group or ""
        if not _changeable(key):
            raise ConfigError(
                f"{override.input_line} cannot change on resume: only {', '.join(CHANGEABLE_ON_RESUME)} can; "
                f"start a new run for anything else"
            )
        if OmegaConf.select(saved, key.rpartition(".")[0]) is None:
            group = key.partition(".")[0]
            raise ConfigError(f"{override.input_line}: the run has no such {group}; choose it by {group}=NAME")
        OmegaConf.update(saved, key, OmegaConf.select(config, key), merge=False)
    return saved


def check_same_run(folder: Path, config: DictConfig, name: str = "config") -> None:
    """Check that a folder holds no run with other settings; `name` is that of the primary configuration.

    Raises:
        ConfigError: for the first setting that differs.
    """
    saved = _load(folder, trust=config.trust, called=False, name=name)
    if saved is None:
        return
    before, now = flatten(saved), flatten(config)
    follows = {key for key, value in flatten(config, resolve=False).items() if isinstance(value, str) and "${" in value}
    for key in sorted({*before, *now} - follows):
        old, new = before.get(key), now.get(key)
        if old != new and not isinstance(old, dict) and not isinstance(new, dict) and not _changeable(key):
            raise ConfigError(f"{folder} holds a run with {key}={old}, not {new}: choose another folder for this one")


def _load(folder: Path, *, trust: bool, called: bool = True, name: str = "config") -> DictConfig | None:
    """Read the configuration of a run folder, and check the types of its values; None if there is none."""
    path = folder / FILE
    if not path.is_file():
        return None
    saved = read_config(path, config_folder(), trust=trust, called=called)
    default = _defaults(tuple(_choices_of(saved)), None, name).config
    known = flatten(default, resolve=False)
    missing = [key for key, value in default.items() if isinstance(value, DictConfig) and saved.get(key) is None]
    if missing:
        raise StorageError(f"{path} is corrupt: it has no {missing[0]!s}")
    for key, value in flatten(saved).items():
        expected = _default_of(key, known.get(key), default)
        if value is not None and not _fits(key, value, expected):
            shown = printable(str(value), limit=80)
            raise StorageError(f"{path} is corrupt: {key}={shown} is not {_kind(expected)}")
    return saved


def _choices_of(saved: DictConfig) -> Iterator[str]:
    """Yield the choices of config groups by which a saved configuration was composed, as far as they exist."""
    for key in (
        "adapt.name",
        "dataset.name",
        "algorithm.name",
        "oracle.name",
        "al.strategy.name",
        "al.cold_start.name",
    ):
        group = key.removesuffix(".name").replace(".", "/")
        name = OmegaConf.select(saved, key, throw_on_resolution_failure=False)
        if name in {path.stem for path in (config_folder() / group).glob("*.yaml")}:
            yield f"{group}={name}"


def _changeable(key: str) -> bool:
    return any(key == allowed or key.startswith(f"{allowed}.") for allowed in CHANGEABLE_ON_RESUME)


def _parse(word: str) -> Override:
    try:
        override = OverridesParser.create().parse_override(word)
    except HydraException as error:
        key, _, value = word.partition("=")
        hint = f"; letters beyond a-z and signs need quotes inside of those of the shell: \"{key}='{value}'\""
        raise ConfigError(
            f"{word!r} cannot be understood, expected KEY=VALUE: {_first_line(error)}{hint if value else ''}"
        ) from error
    if not override.key_or_group:
        raise ConfigError(f"{word!r} cannot be understood, expected KEY=VALUE: there is no key")
    return override


def _is_hydra(override: Override) -> bool:
    return str(override.key_or_group).split(".")[0].split("/")[0] == "hydra"


def _check_plugin(override: Override) -> None:
    """Check that the launcher or sweeper of Hydra that an override chooses is installed."""
    module, extra = PLUGINS.get(str(override.input_line), ("", ""))
    if module and (util.find_spec("hydra_plugins") is None or util.find_spec(f"hydra_plugins.{module}") is None):
        raise ConfigError(f'{override.input_line} needs: pip install "anomalymatch[{extra}]"')


@lru_cache
def _defaults(groups: tuple[str, ...], folder: Path | None, name: str) -> Composed:
    """Compose the chosen groups without other overrides; the cached result must not be changed."""
    return _compose(groups, folder, name)


def _compose(overrides: Sequence[str], folder: Path | None, name: str) -> Composed:
    outer = GlobalHydra.instance().hydra  # of a notebook or of a running command
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(config_folder()), version_base="1.3"):
            others = search_path(config_folders(folder)[1:])
            composed = hydra_compose(name, overrides=[*overrides, *others], return_hydra_config=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_first_line(error)) from error
    finally:
        GlobalHydra.instance().hydra = outer
    with open_dict(composed):
        choices = composed.pop("hydra").runtime.choices
    for key, group in SHORT_FORMS.items():
        name_key = key.removesuffix(".name") + ".name"
        named = OmegaConf.select(composed, name_key, throw_on_resolution_failure=False)
        if "@" not in group and group in choices and named != choices[group]:
            raise ConfigError(f"a file sets {key}: choose it in the file's defaults list, as `override /{group}: NAME`")
    several = {group: f"[{','.join(map(str, composed[group]))}]" for group in SEVERAL if group in composed}
    chosen = {group: choice for group, choice in {**several, **choices}.items() if not group.startswith("hydra/")}
    return Composed(composed, chosen)


def _choices(override: Override, folders: Sequence[Path]) -> list[str]:
    """Return the choices of a config group; none if the key of the override is not a group."""
    files = (path for folder in folders for path in (folder / str(override.key_or_group)).glob("*.yaml"))
    return sorted({path.stem for path in files})


def _single(override: Override, choices: Sequence[str] = ()) -> Iterator[str]:
    """Yield the override, or one override for each value of its sweep: both ends of an interval, or globbed choices."""
    if not override.is_sweep_override():
        yield override.input_line or ""
        return
    sweep: Any = override.value()
    values: Iterable[object]
    if isinstance(sweep, IntervalSweep):
        values = [sweep.start, sweep.end]
    else:
        values = sweep.filter(list(choices)) if isinstance(sweep, Glob) else override.sweep_string_iterator()
    yield from (f"{'+' if override.is_add() else ''}{override.key_or_group}={value}" for value in values)


def _check_group(override: Override, choices: Sequence[str]) -> None:
    group = str(override.key_or_group)
    singles = list(_single(override, choices))
    for single in singles or [override.input_line or ""]:
        choice = single.partition("=")[2]
        several = group in SEVERAL and choice.startswith("[") and choice.endswith("]")
        for one in choice[1:-1].split(",") if several else [choice]:
            if override.is_delete() or one.strip() not in choices:
                raise ConfigError(f"there is no {group}={one.strip()}: choose one of {listed(choices, most=40)}")
        if group in ADDED and not override.is_add():
            raise ConfigError(f"{group} is added to the configuration: write +{group}={choice}")


def _check_value(override: Override, default: DictConfig) -> None:
    key = str(override.key_or_group)
    if override.is_delete():
        raise ConfigError(f"{override.input_line}: a key cannot be removed, only set to another value")
    known = flatten(default, resolve=False)
    if key not in known:
        if override.is_add() or override.is_force_add():
            _check_addition(key, known)
            return
        close = nearest(key, known)
        hint = f"did you mean {close[0]}?" if close else "see `python -m anomalymatch.run --cfg job` for all keys"
        raise ConfigError(f"there is no key {key!r}: {hint}")
    for single in _single(override):
        value = OverridesParser.create().parse_override(single).value()
        expected = _default_of(key, known[key], default)
        if not _fits(key, value, expected):
            hint = f"set {key}.{next(iter(expected))}=…" if isinstance(expected, dict) else f"the default is {expected}"
            raise ConfigError(f"{key}={value} is not {_kind(expected)} ({hint})")


def _check_addition(key: str, known: dict[str, Any]) -> None:
    """Allow more arguments only for other libraries, Lightning's Trainer for example, and options of `dataset=auto`."""
    node = known.get(key.rpartition(".")[0])
    target = str(node.get("_target_", "anomalymatch")) if isinstance(node, dict) else "anomalymatch"
    if target.startswith("anomalymatch") and target != "anomalymatch.data.open.open_path":
        raise ConfigError(f"there is no key {key!r}, and none can be added there")


def flatten(config: DictConfig, *, resolve: bool = True) -> dict[str, Any]:
    """Return all values by dotted key, inner nodes included."""
    return dict(_leaves(cast(dict[str, Any], OmegaConf.to_container(config, resolve=resolve))))


def _leaves(node: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted keys of a nested dictionary with their values, inner nodes included."""
    for key, value in node.items():
        yield f"{prefix}{key}", value
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")


def _default_of(key: str, raw: Any, config: DictConfig) -> Any:
    if isinstance(raw, str) and raw.startswith("${"):
        value = OmegaConf.select(config, key, throw_on_resolution_failure=False)
        return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
    return None if raw == "???" else raw


def _fits(key: str, value: Any, default: Any) -> bool:
    """Tell whether a value has the type of its default; a default of None allows any."""
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
