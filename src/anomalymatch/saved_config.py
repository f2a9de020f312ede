"""Read the config.yaml of a run folder as data: a folder from a stranger runs no code and reads no secrets.

Hydra calls whatever a `_target_` names, with any arguments, and OmegaConf's resolvers read environment variables. So
only the targets and interpolations that stand in the program's own `conf/` are accepted, unless the user trusts the
folder.
"""

import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from anomalymatch.errors import StorageError
from anomalymatch.text import printable, reason

MOST_BYTES, MOST_LEVELS, MOST_INTERPOLATIONS, LONGEST = 2**18, 40, 150, 120
"""Limits of a configuration: size, nesting, number of its interpolations and length of each."""
MOST_REFERENCES = 20
"""Limit of the interpolations that `conf/` does not have: each may double the size of the resolved configuration."""
REFERENCE = re.compile(r"\$\{[\w.]+\}")
"""Interpolation that stands for another key, without a resolver."""
TARGET, TRUST = "_target_", "trust"
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class Vocabulary(NamedTuple):
    """Targets and interpolations, each with the last part of its key, that stand in a folder of configurations."""

    targets: frozenset[str]
    interpolations: frozenset[tuple[str, str]]


def read_config(path: Path, conf: Path, *, trust: bool, called: bool = True) -> DictConfig:
    """Read a saved configuration; its interpolations can be resolved without errors.

    Args:
        path: the config.yaml.
        conf: the folder with the program's own configurations.
        trust: accept any target and interpolation. All keys named `trust` get this value, whatever the file says.
        called: its targets are going to be called; a configuration that is only compared may have any.

    Raises:
        StorageError: if it is damaged, or not trusted and asks for anything that `conf` does not have.
    """
    try:
        text = _read_text(path)
        _check_structure(text)
        config = OmegaConf.create(text)
        if not isinstance(config, DictConfig) or not config:
            raise ValueError("it is not a configuration")
        plain: Any = OmegaConf.to_container(config, resolve=False)
        if not trust:
            _check_vocabulary(path, plain, vocabulary(conf), called=called)
        config = OmegaConf.create(_with_trust(plain, trust))
        OmegaConf.to_container(config, resolve=True)
    except UnicodeDecodeError as error:
        raise StorageError(f"{path} is corrupt: it is not UTF-8 text") from error
    except yaml.MarkedYAMLError as error:
        line = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise StorageError(f"{path} is corrupt: {printable(str(error.problem), limit=200)}{line}") from error
    except (OSError, ValueError, RecursionError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise StorageError(f"{path} is corrupt: {printable(reason(error), limit=200)}") from error
    return config


@lru_cache
def vocabulary(conf: Path) -> Vocabulary:
    """Collect the targets and interpolations of all YAML files below `conf`."""
    files = [yaml.load(path.read_text(encoding="utf-8"), _Loader) for path in sorted(conf.rglob("*.yaml"))]
    values = [(key, str(value)) for file in files for _, key, value in _leaves(file)]
    return Vocabulary(
        frozenset(value for key, value in values if key == TARGET),
        frozenset((key, value) for key, value in values if "${" in value),
    )


def has_foreign_targets(config: DictConfig, conf: Path) -> bool:
    """Tell whether a configuration has targets that do not stand in `conf`: the user's own classes."""
    known = vocabulary(conf).targets
    return any(key == TARGET and value not in known for _, key, value in _leaves(OmegaConf.to_container(config)))


def _read_text(path: Path) -> str:
    with path.open("rb") as file:
        content = file.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise ValueError(f"it is larger than {MOST_BYTES:,} bytes")
    return content.decode("utf-8")


def _check_structure(text: str) -> None:
    """Refuse aliases, which multiply without limit, and what would take long to parse, before anything is built."""
    level = interpolations = 0
    for event in yaml.parse(text, _Loader):
        if isinstance(event, yaml.AliasEvent):
            raise ValueError("it has a YAML alias")
        if isinstance(event, yaml.ScalarEvent) and "${" in event.value:
            interpolations += 1
            if interpolations > MOST_INTERPOLATIONS or len(event.value) > LONGEST:
                raise ValueError("it has too many or too long interpolations")
        level += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if level > MOST_LEVELS:
            raise ValueError(f"it is nested more than {MOST_LEVELS} levels deep")


def _check_vocabulary(path: Path, plain: Any, known: Vocabulary, *, called: bool) -> None:
    references = 0
    for full_key, key, value in _leaves(plain):
        if key == TARGET:
            if called and str(value) not in known.targets:
                raise _untrusted(path, full_key, value, "would run code that is not part of anomalymatch")
        elif isinstance(value, str) and "${" in value and (key, value) not in known.interpolations:
            references += 1
            if not REFERENCE.fullmatch(value) or references > MOST_REFERENCES:
                raise _untrusted(path, full_key, value, "may read environment variables or grow without limit")


def _untrusted(path: Path, key: str, value: object, why: str) -> StorageError:
    return StorageError(
        f"{path}: {key}={printable(str(value), limit=80)} {why}: if the folder is your own, or you know who made it, "
        f"add trust=true, which lets its configuration run any program with your rights"
    )


def _leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, str, Any]]:
    """Yield the dotted key, its last part and the value of everything that is no mapping or list; targets always."""
    for key, value in node.items() if isinstance(node, dict) else enumerate(node):
        if isinstance(value, dict | list) and key != TARGET:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", str(key), value


def _with_trust(node: Any, trust: bool) -> Any:
    """Copy a tree with `trust` as the value of all keys of that name."""
    if isinstance(node, list):
        return [_with_trust(value, trust) for value in node]
    if not isinstance(node, dict):
        return node
    return {key: trust if key == TRUST else _with_trust(value, trust) for key, value in node.items()}
