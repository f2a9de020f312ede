import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "src" / "anomalymatch"
FILES = sorted(path for path in ROOT.rglob("*.py"))
LAYERS = [
    {"errors", "types", "text", "files", "checks", "cache", "lru", "progress", "tables", "votable", "ranking", "cli"},
    {"functional"},
    {"evaluation"},
    {"data"},
    {"models"},
    {"clustering"},
    {"scoring"},
    {"active"},
    {"ui"},
    {"run", "label", "score", "cluster", "launch", "sweep", "build", "config"},
]
"""Lowest first; what stands together may import each other. `anomalymatch/__init__.py` is above them all."""
HEIGHT = {name: height for height, names in enumerate(LAYERS) for name in names}


def module_name(path):
    """`data/source.py` -> `data.source`; the package itself is the empty string."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix("__init__").rstrip(".")


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
    return [".".join(base)] if base else [alias.name for alias in node.names]


def imports(path):
    """All imports of a file, also inside of functions, but for what only a type checker sees in `__init__`."""
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


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_run_downwards(path):
    own = module_name(path).split(".")[0]
    if not own:  # the package itself imports by name, when a name is first used
        assert imports(path) == []
        return
    assert own in HEIGHT, f"{own} has no place in the layers of DESIGN.md"
    above = [name for name in imports(path) if HEIGHT[name.split(".")[0]] > HEIGHT[own]]
    assert not above, f"{own} must not import {above}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_file_is_long(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 300


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_module_and_public_name_says_what_it_is(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), path
    kinds = ast.FunctionDef | ast.ClassDef
    silent = [n.name for n in tree.body if isinstance(n, kinds) and n.name[0] != "_" and not ast.get_docstring(n)]
    assert not silent


def test_the_mathematics_knows_neither_files_nor_frameworks():
    for path in (ROOT / "functional").glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        roots = {a.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        roots |= {(n.module or "").split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
        assert not roots & {"pytorch_lightning", "hydra", "omegaconf", "logging", "pathlib", "os"}
