import pydoc
import re
import subprocess
import sys
import zipfile
from inspect import signature
from pathlib import Path

import pytest
from omegaconf import OmegaConf

import anomalymatch as am

ROOT = Path(__file__).parents[1]


def python(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


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
    assert 8 <= len(am.__all__) <= 27
    for name in am.__all__:
        assert callable(getattr(am, name))
        assert getattr(am, name).__doc__
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = am.nothing


@pytest.mark.parametrize(
    ("name", "config"), [("run", "config"), ("score", "score"), ("cluster", "cluster"), ("adapt", "adapt")]
)
def test_help_of_a_command_names_its_keys_and_they_exist(name, config):
    command = getattr(am, name)
    assert "overrides" in signature(command).parameters
    shown = pydoc.plaintext.document(command)
    keys = re.findall(r"^ +([a-z_.]+)=\S+: ", shown, flags=re.MULTILINE)
    assert len(keys) >= 9
    words = ["run=any"] if name == "score" else []
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
def test_a_wheel_contains_configurations_and_templates(tmp_path):
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, ROOT]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "site")
    conf = {path.relative_to(ROOT).as_posix() for path in (ROOT / "conf").rglob("*.yaml")}
    assert {f"anomalymatch/{name}" for name in conf} <= names
    assert "anomalymatch/evaluation/report.html.j2" in names
    assert not [name for name in names if name.startswith(("tests", "experiments")) or name.endswith(".pyc")]
    code = f"""
import sys; sys.path.insert(0, {str(tmp_path / "site")!r})
import anomalymatch.config as config
print(config.__file__); print(config.config_folder()); print(config.compose("dataset=galaxymnist").dataset.name)
"""
    module, folder, name = python(code).splitlines()
    assert Path(module).is_relative_to(tmp_path)
    assert Path(folder) == tmp_path / "site" / "anomalymatch" / "conf"
    assert name == "galaxymnist"
