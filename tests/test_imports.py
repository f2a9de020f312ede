import ast
import re
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "src" / "anomalymatch"
FILES = sorted(path for path in ROOT.rglob("*.py"))
PAGE = ROOT.parents[1] / "docs" / "explanation" / "architecture.md"


def read_floors():
    """The table of floors in docs/explanation/architecture.md, from the lowest to the highest."""
    table = PAGE.read_text(encoding="utf-8").split("| Floor | Modules |")[1].split("\n\n")[0]
    rows = [re.findall(r"`(\w+)`", line.split("|")[2]) for line in table.splitlines()[2:]]
    return rows[::-1]


FLOORS = read_floors()
HEIGHT = {name: height for height, names in enumerate(FLOORS) for name in names}


def module_name(path):
    """`data/source.py` -> `data.source`; the package itself is the empty string."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix("__init__").rstrip(".")


MODULES = {module_name(path): path for path in FILES}


@cache
def parse(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def imported(node):
    """The modules that an import statement names."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    assert not node.level, "relative imports are not understood here"
    names = [f"{node.module}.{alias.name}" for alias in node.names]
    return [name if name.removeprefix("anomalymatch.") in MODULES else str(node.module) for name in names]


def imports(path):
    """All imports of a file from this package, also inside functions; in `__init__` without those for types alone."""
    hidden = set()
    if path.name == "__init__.py":
        conditions = [node for node in ast.walk(parse(path)) if isinstance(node, ast.If)]
        hidden = {inner for node in conditions if "TYPE_CHECKING" in ast.unparse(node.test) for inner in ast.walk(node)}
    nodes = [n for n in ast.walk(parse(path)) if isinstance(n, ast.Import | ast.ImportFrom) and n not in hidden]
    names = [name for node in nodes for name in imported(node)]
    return [name.removeprefix("anomalymatch.") for name in names if name.startswith("anomalymatch.")]


def test_there_is_something_to_check():
    assert len(FILES) > 30
    assert sum(len(imports(path)) for path in FILES) > 80
    assert len(FLOORS) == 11


def test_the_architecture_page_names_files_that_exist():
    names = re.findall(r"`([\w/.]+/[\w.]+|\w+\.py)`", PAGE.read_text(encoding="utf-8"))
    for name in names:
        if "NAME" in name:  # a file to be added
            continue
        assert (ROOT / name).exists() or (ROOT.parents[1] / name).exists(), name


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_file_is_short_documented_and_imports_downwards(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 500
    assert ast.get_docstring(parse(path))
    kinds = ast.FunctionDef | ast.ClassDef
    assert not [
        n.name for n in parse(path).body if isinstance(n, kinds) and n.name[0] != "_" and not ast.get_docstring(n)
    ]
    own = module_name(path).split(".")[0]
    if not own:  # the package itself imports by name, when a name is first used
        assert imports(path) == []
        return
    assert own in HEIGHT, f"{own} has no place in the floors"
    above = [name for name in imports(path) if HEIGHT[name.split(".")[0]] > HEIGHT[own]]
    assert not above, f"{own} must not import {above}"


def test_no_circle():
    uses = {name: set(imports(path)) & set(MODULES) - {name} for name, path in MODULES.items()}
    TopologicalSorter(uses).prepare()  # raises CycleError with the modules of a circle


MATHEMATICS = ("loss", "distances", "thresholds", "ranks", "discovery")


def test_mathematics_imports_neither_files_nor_frameworks():
    files = [path for path in FILES if path.stem in MATHEMATICS]
    assert {path.stem for path in files} == set(MATHEMATICS)
    for path in files:
        nodes = [n for n in ast.walk(parse(path)) if isinstance(n, ast.Import | ast.ImportFrom)]
        roots = {name.split(".")[0] for node in nodes for name in imported(node)}
        assert not roots & {"pytorch_lightning", "hydra", "omegaconf", "logging", "pathlib", "os"}, path
