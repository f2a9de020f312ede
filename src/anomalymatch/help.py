"""Text of `--help`: the comments of `conf/`, which describe the commands and every key."""

import re
import shutil
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from anomalymatch.config import Composed, flatten
from anomalymatch.config_folders import config_folders

OPTIONS = {
    "--cfg job": "print every key with its value, and do nothing else",
    "--config-dir DIR": "folder with configurations of your own, laid out like conf/",
    "--multirun, -m": "run every combination of several values, such as seed=0,1,2",
    "--shell-completion": "with install=bash (or zsh, fish): print the code for completion",
    "--hydra-help": "print the options of Hydra",
    "--version": "print the version",
}
_KEY = re.compile(r"( *)([\w-]+):(?:\s|$)")
_COMMENT = re.compile(r"(?:^|\s)# ?(.*)")
_REFERENCE = re.compile(r"\$\{([\w.]+)\}")
COLUMN = 36
"""Width of the column of options, groups and keys."""


class Key(NamedTuple):
    """Key of a configuration, as `--help` and the reference show it.

    Attributes:
        name: dotted key.
        value: its value, as YAML; a value that follows another key is resolved.
        default: its value in Python, before that.
        text: what it means.
    """

    name: str
    value: str
    default: Any
    text: str


def help_text(composed: Composed, folder: Path | None, name: str) -> str:
    """Describe a command: what it does, examples, options, choices, and all keys with their values.

    Args:
        composed: the configuration that the words of the command line lead to.
        folder: folder with configurations of the user.
        name: name of the primary configuration.
    """
    folders = config_folders(folder)
    sections = {
        "Options": OPTIONS,
        "Choices (GROUP=NAME)": {
            f"{group}={choice}": ", ".join(names_of_group(folders, group)) for group, choice in composed.choices.items()
        },
        "Keys (KEY=VALUE)": {f"{key.name}={key.value}": key.text for key in describe_keys(composed, folders, name)},
    }
    body = [f"{title}:\n" + "\n".join(_lines(rows)) for title, rows in sections.items()]
    return "\n\n".join([describe_file(folders, name), *body])


def describe_keys(composed: Composed, folders: Sequence[Path], name: str) -> list[Key]:
    """List all keys that a user may set, with the comments of the files that a configuration is composed of.

    A key without a comment that follows another key has the text of that key. A `name` without a comment is that of a
    choice, which sets it, and is left out.
    """
    texts = dict(file_comments(folders, name))
    for group, choice in composed.choices.items():
        prefix, place = group.rpartition("@")[2].replace("/", "."), group.partition("@")[0]
        for each in str(choice).strip("[]").split(","):
            texts |= {f"{prefix}.{key}": text for key, text in file_comments(folders, f"{place}/{each}")}
    raw = flatten(composed.config, resolve=False)
    keys = [Key(key, value, raw[key], _text(key, raw, texts)) for key, value in _values(composed.config).items()]
    return [key for key in keys if key.text or not key.name.endswith(".name")]


def _text(key: str, raw: Mapping[str, Any], texts: Mapping[str, str]) -> str:
    """Return the text of a key, or of the key that it follows."""
    followed = _REFERENCE.fullmatch(str(raw.get(key)))
    if texts.get(key) or not followed:
        return texts.get(key, "")
    return _text(followed[1], raw, texts) or f"follows {followed[1]}"


def describe_file(folders: Sequence[Path], name: str) -> str:
    """Return the comment at the top of a configuration file."""
    lines = [line for line in _read(folders, name) if not line.startswith("# @package")]
    return "\n".join(line.removeprefix("#").removeprefix(" ") for line in lines[: _header_length(lines)])


def file_comments(folders: Sequence[Path], name: str) -> Iterator[tuple[str, str]]:
    """Yield each dotted key of a file with its comment; the files in its defaults list come first."""
    lines = _read(folders, name)
    for base in (yaml.safe_load("\n".join(lines)) or {}).get("defaults", []):
        if base != "_self_":
            yield from _comments_of_base(folders, name, base)
    parents: list[tuple[int, str]] = []
    key = text = ""
    for line in lines[_header_length(lines) :]:
        found, comment = _KEY.match(line), _COMMENT.search(line)
        if found:
            indent = len(found[1])
            parents = [*(parent for parent in parents if parent[0] < indent), (indent, found[2])]
            key, text = ".".join(parent for _, parent in parents), comment[1] if comment else ""
        elif comment and text:  # the comment goes on
            text = f"{text} {comment[1]}"
        if text:
            yield key, text


def _comments_of_base(
    folders: Sequence[Path], name: str, base: str | dict[str, str | None]
) -> Iterator[tuple[str, str]]:
    """Yield the comments of an entry of a defaults list: `file`, `file@node` or `group@node: choice`."""
    ((path, choice),) = base.items() if isinstance(base, dict) else [(base, None)]
    path, _, node = path.partition("@")
    if isinstance(base, dict):
        if path.startswith("override ") or not node:
            return  # a choice of a group, whose comments are read for its node
        path = f"{path}/{choice}"
    prefix = "" if node in ("", "_here_") else f"{node}."
    file = path[1:] if path.startswith("/") else str(Path(name).with_name(path))
    yield from ((f"{prefix}{key}", text) for key, text in file_comments(folders, file))


def _header_length(lines: Sequence[str]) -> int:
    return next((number for number, line in enumerate(lines) if not line.startswith("#")), len(lines))


def _read(folders: Sequence[Path], name: str) -> list[str]:
    """Return the lines of a configuration; none if it is not in these folders."""
    files = [folder / f"{name}.yaml" for folder in folders[::-1]]
    file = next((file for file in files if file.is_file()), None)
    return file.read_text(encoding="utf-8").splitlines() if file else []


def names_of_group(folders: Sequence[Path], group: str) -> list[str]:
    """Return the choices of a config group; of `group@node`, those of the group."""
    group = group.partition("@")[0]
    return sorted({path.stem for folder in folders for path in (folder / group).glob("*.yaml")})


def _values(config: DictConfig) -> dict[str, str]:
    """Return the values of all keys that a user may set, as YAML; keys without a default are `???`."""
    raw = flatten(config, resolve=False)
    try:
        resolved = flatten(config)
    except OmegaConfBaseException:  # a value is derived from a key that is not set
        resolved = raw
    # A node that repeats another one is shown as `${other}`.
    shown = {key: value if isinstance(resolved[key], dict) else resolved[key] for key, value in raw.items()}
    leaves = {key: value for key, value in shown.items() if not isinstance(value, dict) or not value}
    return {key: as_yaml(value) for key, value in leaves.items() if not key.rpartition(".")[2].startswith("_")}


def as_yaml(value: object) -> str:
    """Write a value as YAML in one line."""
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**6)
    return text.removesuffix("\n...\n").strip()


def _lines(rows: Mapping[str, str]) -> Iterator[str]:
    """Yield two columns, wrapped to the width of the terminal."""
    width = max(COLUMN + 30, shutil.get_terminal_size().columns)
    for left, right in rows.items():
        space = " " * COLUMN
        start = f"  {left}".ljust(COLUMN - 1)
        if len(start) >= COLUMN and right:
            yield start
            start = space[:-1]
        yield (
            textwrap.fill(
                f"{start} {right}".rstrip(),
                width,
                subsequent_indent=space,
                break_long_words=False,
                break_on_hyphens=False,
            )
            if right
            else start.rstrip()
        )
