import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "src" / "anomalymatch"
FILES = sorted(path for path in ROOT.rglob("*.py"))
PAGE = ROOT.parents[1] / "docs" / "architecture.md"


def read_floors():
    """The table of floors in docs/architecture.md, from the lowest to the highest."""
    table = PAGE.read_text(encoding="utf-8").split("| Floor | Modules |")[1].split("\n\n")[0]
    rows = [re.findall(r"`(\w+)`", line.split("|")[2]) for line in table.splitlines()[2:]]
    return rows[::-1]


FLOORS = read_floors()
HEIGHT = {name: height for height, names in enumerate(FLOORS) for name in names}


def module_name(path):
    """`data/source.py` -> `data.source`; the package itself is the empty string."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix("__init__").rstrip(".")


MODULES = {module_name(path) for path in FILES}


def imported(node, package):
    """The modules below `anomalymatch` that an import statement names; `package` resolves relative ones."""
    if isinstance(node, ast.Import):
        return [
            alias.name.removeprefix("anomalymatch.") for alias in node.names if alias.name.startswith("anomalymatch.")
        ]
    base = (node.module or "").split(".")
    if node.level:
        base = [*package[: len(package) - node.level + 1], *filter(None, base)]
    elif base[0] == "anomalymatch":
        base = base[1:]
    else:
        return []
    names = [".".join([*base, alias.name]) for alias in node.names]
    return [name if name in MODULES or not base else ".".join(base) for name in names]


def imports(path):
    """All imports of a file, also inside functions, without those under TYPE_CHECKING in `__init__`."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    package = list(path.relative_to(ROOT).parent.parts)
    hidden = set()
    if path.name == "__init__.py":
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                hidden |= set(ast.walk(node))
    nodes = [n for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom) and n not in hidden]
    return [name for node in nodes for name in imported(node, package)]


def test_relative_and_plain_imports_are_understood():
    nodes = ast.parse(
        "import anomalymatch.data.source\nfrom anomalymatch import run\nfrom ..data import x\nimport torch"
    ).body
    assert [imported(n, ["models"]) for n in nodes] == [["data.source"], ["run"], ["data"], []]


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
def test_imports_run_downwards(path):
    own = module_name(path).split(".")[0]
    if not own:  # the package itself imports by name, when a name is first used
        assert imports(path) == []
        return
    assert own in HEIGHT, f"{own} has no place in the floors"
    above = [name for name in imports(path) if HEIGHT[name.split(".")[0]] > HEIGHT[own]]
    assert not above, f"{own} must not import {above}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_file_is_long(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 500


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_modules_and_public_names_have_docstrings(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), path
    kinds = ast.FunctionDef | ast.ClassDef
    silent = [n.name for n in tree.body if isinstance(n, kinds) and n.name[0] != "_" and not ast.get_docstring(n)]
    assert not silent


def test_no_circle():
    modules = {module_name(path): path for path in FILES}
    uses = {
        name: {other for other in imports(path) if other in modules and other != name} for name, path in modules.items()
    }

    def reached(name):
        found, waiting = set(), [name]
        while waiting:
            new = uses[waiting.pop()] - found
            found |= new
            waiting += new
        return found

    assert not [name for name in modules if name in reached(name)]


MATHEMATICS = ("loss", "distances", "thresholds", "ranks", "discovery")


def test_mathematics_imports_neither_files_nor_frameworks():
    files = [path for path in FILES if path.stem in MATHEMATICS]
    assert {path.stem for path in files} == set(MATHEMATICS)
    for path in files:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        roots = {a.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        roots |= {(n.module or "").split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
        assert not roots & {"pytorch_lightning", "hydra", "omegaconf", "logging", "pathlib", "os"}, path
