"""Write the reference pages of all commands and configuration keys, from conf/ and its comments, before a build.

The texts are those of `--help`; nothing is said twice.
"""

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from subprocess import run

import yaml
from hydra import compose, initialize_config_dir
from sphinx.application import Sphinx

from anomalymatch.__main__ import COMMANDS
from anomalymatch.config import NULLABLE, compose_partly, flatten
from anomalymatch.help import (
    OPTIONS,
    Key,
    as_yaml,
    config_folders,
    describe_file,
    describe_keys,
    file_comments,
    names_of_group,
)

FOLDERS = config_folders(None)[:1]
HYDRA = {name: "config" if name == "run" else name for name in COMMANDS}
"""Primary configuration of each command, where there is such a file."""
TYPES = {bool: "true or false", int: "whole number", float: "number", str: "text", list: "list", dict: "keys"}
CAPTIONS = {
    "Images": {
        "dataset": "Where images come from: `dataset=NAME`.",
        "stretch": "How pixels become 8 bits: `stretch=NAME`.",
    },
    "Network and training": {
        "model": "The backbone: `model=NAME`.",
        "probe": "The probe, which ranks and is the bar for everything that trains.",
        "algorithm": "What learns from the labels: `algorithm=NAME`.",
        "augment": "Random views of a training: `augment=NAME`.",
        "optimizer": "The optimiser of a training: `optimizer=NAME`.",
        "trainer": "Length and devices of a training.",
        "adapt": "Self-supervised adaptation of the backbone: `adapt=NAME`.",
        "inference": "Forward passes for features and rankings.",
        "text": "The image-text model of a description: `text=NAME`.",
    },
    "Search": {
        "al": "The active-learning protocol.",
        "al/strategy": "What `oracle=top_k` labels: `al.strategy.name=NAME`.",
        "al/cold_start": "What ranks without labels: `al.cold_start=NAME`.",
        "oracle": "What answers in a benchmark: `oracle=NAME`.",
        "ui": "The labelling page: `anomalymatch.label`.",
        "scoring": "Scoring of an archive: `anomalymatch.score`.",
        "clustering": "Grouping by kind.",
        "logger": "Where results are logged: `logger=NAME`, or several: `logger=[wandb,csv]`.",
    },
    "Predefined": {
        "experiment": "Predefined experiments: `+experiment=NAME`.",
        "debug": "Short runs that look at a training: `+debug=NAME`.",
    },
}
"""Groups in the order of the reference, with what they choose; others come last."""
NO_GROUPS = {"base", "sweep"}
GLOBAL = {
    path.parent.name for path in FOLDERS[0].glob("*/*.yaml") if path.read_text().startswith("# @package _global_")
}
"""Groups whose files change keys of other groups."""


def all_groups() -> dict[str, dict[str, str]]:
    """Return the captions with their groups, and those of conf/ that have no caption under the last one."""
    known = {group for groups in CAPTIONS.values() for group in groups}
    found = {path.parent.relative_to(FOLDERS[0]).as_posix() for path in FOLDERS[0].glob("*/**/*.yaml")}
    *_, last = CAPTIONS
    return CAPTIONS | {last: CAPTIONS[last] | dict.fromkeys(sorted(found - known - NO_GROUPS), "")}


GROUPS = {group: text for groups in all_groups().values() for group, text in groups.items()}
INDEX = """# Configuration

Every default stands in a YAML file of `conf/`, once. These pages are made from the files: each group is a folder,
each choice a file in it. `${…}` stands for the value of another key. A folder of your own, given by `--config-dir`,
[adds choices](../how-to/extend.md).
"""


def index_page() -> str:
    """Write the page that lists the groups."""
    parts = [INDEX]
    for caption, groups in all_groups().items():
        pages = [f"configuration/{file_of_group(group).removesuffix('.md')}" for group in groups]
        parts += ["```{toctree}", ":maxdepth: 1", f":caption: {caption}", "", *pages, "```", ""]
    return "\n".join(parts)


def command_page(name: str) -> str:
    """Write the page of a command: what it does, its options, the choices and the keys."""
    module, summary = COMMANDS[name]
    title = [f"# {name}", "", f"{summary[0].upper()}{summary[1:]}.", ""]
    if not (FOLDERS[0] / f"{HYDRA[name]}.yaml").is_file():
        program = [sys.executable, "-m", module, "--help"]
        said = run(program, capture_output=True, text=True, check=True, env={"COLUMNS": "100"}).stdout
        return "\n".join([*title, "```text", said.strip(), "```", ""])
    composed = compose_partly([], name=HYDRA[name])
    keys = describe_keys(composed, FOLDERS, HYDRA[name])
    choices = {
        f"`{group}`": (f"`{choice}`", ", ".join(_linked(group, names_of_group(FOLDERS, group))))
        for group, choice in composed.choices.items()
        if choice is not None
    }
    table = [
        "## Choices", "", "`GROUP=NAME` replaces the settings of a whole group.", "",
        *_table(("group", "default", "choices"), ((group, *cells) for group, cells in choices.items())), "",
    ]  # fmt: skip
    return "\n".join([
        *title,
        *_paragraphs(describe_file(FOLDERS, HYDRA[name])),
        "## Options", "", *_table(("option", "effect"), ((f"`{key}`", text) for key, text in OPTIONS.items())), "",
        *(table if choices else []),
        "## Keys", "", "`KEY=VALUE` sets one key. The values below are the defaults of the default choices above.", "",
        *_entries(keys),
    ])  # fmt: skip


def _paragraphs(text: str) -> Iterator[str]:
    """Yield the paragraphs of a comment; commands in it become a block of code."""
    for paragraph in text.split("\n\n"):
        yield from ["```text", paragraph, "```", ""] if paragraph.startswith("python ") else [_escaped(paragraph), ""]


def _linked(group: str, names: Iterable[str]) -> Iterator[str]:
    """Link each choice of a group to its description."""
    place = group.partition("@")[0]
    for name in names:
        yield f"[`{name}`](../configuration/{file_of_group(place)}#{name})" if place in GROUPS else f"`{name}`"


def file_of_group(group: str) -> str:
    """Return the name of the page of a config group."""
    return f"{group.replace('/', '-')}.md"


def _entries(keys: Iterable[Key]) -> Iterator[str]:
    """Yield a definition list: the key with its default and type, and what it means."""
    for key in keys:
        value = None if "${" in key.value or key.value == "???" else yaml.safe_load(key.value)
        kind = type_of(key.name, value)
        yield f"`{key.name}` = `{key.value}`{kind and f' ({kind})'}"
        yield f": {_escaped(key.text)}"
        yield ""


def type_of(key: str, value: object) -> str:
    """Describe which values a key takes: the default gives the type."""
    if value is None:
        return ""  # any
    return TYPES.get(type(value), "text") + (", or null" if key in NULLABLE else "")


def group_page(group: str) -> str:
    """Write the page of a config group: each choice with the comment of its file and its keys."""
    parts = [f"# {group}", "", GROUPS[group], ""]
    for choice in names_of_group(FOLDERS, group):
        head = describe_file(FOLDERS, f"{group}/{choice}")
        parts += [f"## {choice}", "", _escaped(head.replace("\n", " ")), ""]
        parts += _entries(_choice_keys(group, choice))
    return "\n".join(parts)


def _choice_keys(group: str, choice: str) -> Iterator[Key]:
    """Yield the keys of a choice, by the names that they have where the group is chosen."""
    if group in GLOBAL:
        return
    prefix = {"optimizer": "algorithm.learner.optimizer"}.get(group, group.replace("/", "."))
    texts = dict(file_comments(FOLDERS, f"{group}/{choice}"))
    before = [] if group == "augment" else ["+augment=objects"]  # which a data set or an algorithm may replace
    node = compose(None, overrides=[*before, f"+{group}@node={choice}"]).node
    inner = tuple(f"{other.replace('/', '.')}." for other in GROUPS if "/" in other and other != group)
    for key, value in flatten(node, resolve=False).items():
        name, last = f"{prefix}.{key}", key.rpartition(".")[2]
        text = texts.get(key) or (f"follows `{value[2:-1]}`" if str(value).startswith("${") else "")
        is_node = isinstance(value, dict) and value
        if is_node or last.startswith("_") or name.startswith(inner) or (last == "name" and not text):
            continue
        yield Key(name, as_yaml(value), value, text)


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    lines = [" | ".join(head), " | ".join("---" for _ in head)]
    lines += [" | ".join(_escaped(cell) for cell in row) for row in rows]
    return [f"| {line} |" for line in lines]


def _escaped(text: str) -> str:
    """Escape what Markdown would take for markup outside of code."""
    pieces = text.split("`")
    for i in range(0, len(pieces), 2):
        for sign in ("|", "*", "_", "<", "$"):
            pieces[i] = pieces[i].replace(sign, f"\\{sign}")
    return "`".join(piece.replace("|", "\\|") if i % 2 else piece for i, piece in enumerate(pieces))


def write_pages(app: Sphinx) -> None:
    """Write all pages that have changed."""
    folder = Path(app.srcdir) / "reference"
    pages = {folder / "commands" / f"{name}.md": command_page(name) for name in COMMANDS}
    with initialize_config_dir(str(FOLDERS[0]), version_base="1.3"):
        pages |= {folder / "configuration" / file_of_group(group): group_page(group) for group in GROUPS}
    pages[folder / "configuration.md"] = index_page()
    for path, text in pages.items():
        path.parent.mkdir(exist_ok=True)
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


def setup(app: Sphinx) -> dict[str, bool]:
    """Connect to Sphinx."""
    app.connect("builder-inited", write_pages)
    return {"parallel_read_safe": True}
