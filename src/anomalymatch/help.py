"""Text of `--help`: the comments of `conf/`, which describe the commands and every key."""

import re
import shutil
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import yaml
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from anomalymatch.config import Composed, config_folders, flatten

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
COLUMN = 36
"""Width of the column of options, groups and keys."""


def help_text(composed: Composed, folder: Path | None, name: str) -> str:
    """Describe a command: what it does, examples, options, choices, and all keys with their values.

    Args:
        composed: the configuration that the words of the command line lead to.
        folder: folder with configurations of the user.
        name: name of the primary configuration.
    """
    folders = config_folders(folder)
    comments = dict(_comments(folders, name))
    for group, choice in composed.choices.items():
        prefix = group.replace("/", ".")
        comments |= {f"{prefix}.{key}": text for key, text in _comments(folders, f"{group}/{choice}")}
    sections = {
        "Options": OPTIONS,
        "Choices (GROUP=NAME)": {
            f"{group}={choice}": ", ".join(_names(folders, group)) for group, choice in composed.choices.items()
        },
        "Keys (KEY=VALUE)": {
            f"{key}={value}": comments.get(key, "") for key, value in _values(composed.config).items()
        },
    }
    body = [f"{title}:\n" + "\n".join(_lines(rows)) for title, rows in sections.items()]
    return "\n\n".join([_head(folders, name), *body])


def _head(folders: Sequence[Path], name: str) -> str:
    """Return the comment at the top of a file."""
    lines = _read(folders, name)
    return "\n".join(line.removeprefix("#").removeprefix(" ") for line in lines[: _header_length(lines)])


def _comments(folders: Sequence[Path], name: str) -> Iterator[tuple[str, str]]:
    """Yield each dotted key of a file with its comment; the files in its defaults list come first."""
    lines = _read(folders, name)
    for base in (yaml.safe_load("\n".join(lines)) or {}).get("defaults", []):
        if isinstance(base, str) and base != "_self_":
            path = base.partition("@")[0]
            yield from _comments(folders, path[1:] if path.startswith("/") else str(Path(name).with_name(path)))
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


def _header_length(lines: Sequence[str]) -> int:
    return next((number for number, line in enumerate(lines) if not line.startswith("#")), len(lines))


def _read(folders: Sequence[Path], name: str) -> list[str]:
    """Return the lines of a configuration; none if it is not in these folders."""
    files = [folder / f"{name}.yaml" for folder in folders[::-1]]
    file = next((file for file in files if file.is_file()), None)
    return file.read_text(encoding="utf-8").splitlines() if file else []


def _names(folders: Sequence[Path], group: str) -> list[str]:
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
    return {key: _as_yaml(value) for key, value in leaves.items() if not key.rpartition(".")[2].startswith("_")}


def _as_yaml(value: object) -> str:
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
