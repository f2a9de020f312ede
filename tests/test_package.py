import json
import pydoc
import re
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from inspect import signature
from pathlib import Path
from sysconfig import get_path

import pytest
import trove_classifiers
import yaml
from omegaconf import OmegaConf
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import anomalymatch as am

ROOT = Path(__file__).parents[1]


def run(*command, cwd=None):
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def python(code):
    return run(sys.executable, "-c", code)


def test_importing_is_fast_and_needs_no_torch():
    code = """
import sys, time
start = time.perf_counter()
import anomalymatch
print(time.perf_counter() - start)
print(sorted({"torch", "timm", "pytorch_lightning", "numpy", "hydra", "wandb"} & set(sys.modules)))
"""
    seconds, heavy = python(code).splitlines()
    assert float(seconds) < 0.5
    assert heavy == "[]"


def test_help_and_a_mistyped_command_do_not_import_torch():
    code = """
import sys
from anomalymatch.run import main
for word in ("--help", "al.cylces=3"):
    sys.argv = ["x", word]
    try: main()
    except SystemExit as end: print(end.code, "torch" in sys.modules)
"""
    assert python(code).splitlines()[-1] == "1 False"


def test_scoring_and_the_page_start_without_what_they_do_not_use():
    code = """
import sys
import anomalymatch.build, anomalymatch.scoring.job, anomalymatch.ui
unused = {"pytorch_lightning", "torchmetrics", "albumentations", "astropy", "scipy.stats", "sklearn.linear_model"}
print("torch" in sys.modules, sorted(unused & set(sys.modules)))
"""
    assert python(code).splitlines()[-1] == "True []"


def test_every_public_name_can_be_imported():
    assert dir(am) == sorted(am.__all__)
    assert 8 <= len(am.__all__) <= 29
    for name in am.__all__:
        assert callable(getattr(am, name))
        assert getattr(am, name).__doc__
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = am.nothing


@pytest.mark.parametrize(
    ("name", "config"), [("run", "config"), *((name, name) for name in ("score", "cluster", "adapt", "export"))]
)
def test_help_of_a_command_names_its_keys_and_they_exist(name, config):
    command = getattr(am, name)
    assert "overrides" in signature(command).parameters
    shown = pydoc.plaintext.document(command)
    keys = re.findall(r"^ +([a-z_.]+)=\S+: ", shown, flags=re.MULTILINE)
    assert len(keys) >= 5
    words = ["run=any"] if name in ("score", "export") else []
    composed = am.compose(*words, name=config)
    unknown = [key for key in keys if OmegaConf.select(composed, key, default="absent") == "absent"]
    assert not unknown
    assert "Returns" in command.__doc__


@pytest.mark.slow
def test_importing_albumentations_does_not_ask_for_updates():
    code = """
import os, urllib.request
os.environ.pop("NO_ALBUMENTATIONS_UPDATE", None)
urllib.request.OpenerDirector.open = lambda *args, **options: os._exit(7)
import anomalymatch.algorithms.fixmatch.batches
print("imported")
"""
    assert python(code).splitlines()[-1] == "imported"


@pytest.mark.slow
def test_the_wheel_of_the_sdist_installs_and_its_commands_start(tmp_path, monkeypatch):
    """Build as a release does: the sdist, and the wheel from it; its dependencies are those of this environment."""
    monkeypatch.delenv("PYTHONPATH", raising=False)  # the installed package is meant, not this checkout
    built = run(sys.executable, "-m", "build", "--no-isolation", "--outdir", tmp_path, ROOT, cwd=tmp_path)
    (sdist,), (wheel,) = tmp_path.glob("*.tar.gz"), tmp_path.glob("*.whl")
    with tarfile.open(sdist) as archive:
        files = {name.partition("/")[2] for name in archive.getnames()}
    needed = [
        "conf/config.yaml",
        "docs/conf.py",
        "tests/test_package.py",
        "tests/golden.json",
        "constraints.txt",
    ]
    assert set(needed) <= files, built
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    conf = {path.relative_to(ROOT).as_posix() for path in (ROOT / "conf").rglob("*.yaml")}
    assert {f"anomalymatch/{name}" for name in conf} <= names
    assert {"anomalymatch/evaluation/report.html.j2", "anomalymatch/py.typed"} <= names
    assert not [name for name in names if name.startswith(("tests", "experiments")) or name.endswith(".pyc")]

    venv.create(tmp_path / "env")
    scripts = tmp_path / "env" / ("Scripts" if sys.platform == "win32" else "bin")
    options = ("--no-deps", "--no-index", "--quiet", "--disable-pip-version-check")
    run(sys.executable, "-m", "pip", "--python", scripts / "python", "install", *options, wheel)
    (packages,) = (tmp_path / "env").rglob("site-packages")
    (packages / "dependencies.pth").write_text(get_path("purelib"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for script in project["scripts"]:
        text = run(scripts / script, "--help", cwd=tmp_path)
        assert script.replace("anomalymatch-", "anomalymatch.") in text, script
    assert run(scripts / "anomalymatch", "--version", cwd=tmp_path).split() == ["anomalymatch", project["version"]]
    same = [
        run(*command, "--help", cwd=tmp_path)
        for command in ([scripts / "anomalymatch", "run"], [scripts / "anomalymatch-run"])
    ]
    assert same[0] == same[1]
    code = "import anomalymatch.config as c; print(c.__file__); print(c.config_folder())"
    module, folder = run(scripts / "python", "-c", code, cwd=tmp_path).splitlines()
    assert Path(module).is_relative_to(packages)
    assert Path(folder) == packages / "anomalymatch" / "conf"


def test_classifiers_extras_and_versions_agree():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert not set(project["classifiers"]) - trove_classifiers.classifiers
    (dev,) = (word for word in project["optional-dependencies"]["dev"] if word.startswith("anomalymatch["))
    assert set(re.findall(r"\w+", dev)[1:]) <= set(project["optional-dependencies"])
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert (str(citation["version"]), citation["license"]) == (project["version"], project["license"])
    switcher = json.loads((ROOT / "docs" / "_static" / "switcher.json").read_text(encoding="utf-8"))
    assert project["version"] in [entry["version"] for entry in switcher]
    first = re.search(r"^## \[(.+?)\] - (\S+)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert first[1] == project["version"]
    assert str(citation.get("date-released", "unreleased")) == first[2]


def test_the_lower_bounds_are_the_stated_minima():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "constraints-minimum.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    stated = {}
    for word in project["dependencies"]:
        requirement = Requirement(word)
        (stated[canonicalize_name(requirement.name)],) = (
            s.version for s in requirement.specifier if s.operator == ">="
        )
    # A minimum of two numbers, 3.12, stands for its first release: 3.12.1 where there is no 3.12.0.
    starts = {name: (*Version(text).release, 0)[:2] for name, text in stated.items()}
    assert {name: Version(pins[name]).release[:2] for name in stated} == starts
    assert all(Version(pins[name]) >= Version(text) for name, text in stated.items())
