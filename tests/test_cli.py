"""Tests of what all commands share: paths as they are typed, sweeps, options, help, and what a start costs."""

import errno
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import example, given
from hypothesis import strategies as st
from omegaconf import OmegaConf

import anomalymatch as am
from anomalymatch import __main__, adapt, cluster, export, label, run, score
from anomalymatch.config import PATHS, compose, compose_partly, config_folder, expand
from anomalymatch.errors import ConfigError, describe_missing_package
from anomalymatch.terminal import errors_in_a_line

ROOT = Path(__file__).parents[1]
NASTY = "ü b,c=(d)[e]#f&g$h{i}"
COMMANDS = {"run": "config", "label": "label", "score": "score", "cluster": "cluster", "adapt": "adapt"}


def python(*words, **options):
    """Run `python -m WORDS` in a process of its own."""
    command = [sys.executable, "-m", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)


# --- paths ------------------------------------------------------------------------------------------------------


@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1))
@example("2024_01_05")
@example("1e5")
@example("true")
@example("null")
@example(NASTY)
@example("a\\")
@example("it's \"quoted\\'")
@example("C:\\photos\\")
def test_a_path_is_taken_as_it_is_typed(name):
    if name[0] + name[-1] in ("''", '""', "[]") or "${" in name:
        return  # Hydra's own syntax, see below
    word = expand(f"data.root={name}")
    assert expand(word) == word
    assert OverridesParser.create().parse_override(word).value() == name


USED = {
    "config": ("dataset=catalogue", "data.root data.cache_dir resume dataset.source.tiles dataset.source.labels_file"),
    "label": (
        "dataset=zarr",
        "dataset.source.root dataset.source.metadata ui.run ui.scores model.name model.weights al.describe text.model",
    ),
    "score": ("dataset=folder", "run output"),
    "cluster": ("dataset=folder", "names run"),
}


@pytest.mark.parametrize("name", USED)
def test_every_key_of_a_path_takes_any_name(name):
    dataset, keys = USED[name]
    config = compose(dataset, *(f"{key}={NASTY}" for key in keys.split()), name=name)
    assert {OmegaConf.select(config, key) for key in keys.split()} == {NASTY}
    tested = {key for _, keys in USED.values() for key in keys.split()}
    assert tested | {"hydra.run.dir", "hydra.sweep.dir"} == set(PATHS)


def test_keys_of_paths_are_complete():
    """A key of conf/ whose comment calls it a folder, a file or a path is one."""
    missing = []
    for file in config_folder().rglob("*.yaml"):
        for line in file.read_text(encoding="utf-8").splitlines():
            key, _, comment = line.partition("#")
            name = key.strip().partition(":")[0]
            if re.match(r" *(folder|CSV|file|run folder)\b", comment) and name:
                missing += [name] if not any(path.split(".")[-1] == name for path in PATHS) else []
    assert missing == []


@pytest.mark.parametrize(
    ("word", "values"),
    [
        ("data.root=a,b", ["a", "b"]),
        ("data.root=ü,1e5", ["ü", "1e5"]),
        ("data.root=choice(a,b)", ["a", "b"]),
        ("data.root='a,b'", ["a,b"]),
        (f"data.root={NASTY}/here", [f"{NASTY}/here"]),
    ],
)
def test_a_sweep_over_paths(word, values, tmp_path, monkeypatch):
    from anomalymatch.config import _parse, _single

    monkeypatch.chdir(tmp_path)
    (tmp_path / NASTY / "here").mkdir(parents=True)
    expanded = expand(word, multirun=True)
    assert [compose(single).data.root for single in _single(_parse(expanded))] == values


def test_lists_interpolations_and_nothing_keep_their_meaning(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert compose("dataset=numpy", "data.root=[a.npy,b c.npy]").data.root == ["a.npy", "b c.npy"]
    assert compose("data.root=${data.cache_dir}/x", "data.cache_dir=ü").data.root == "ü/x"
    assert compose("data.root=").data.root is None
    for name in ("[a]", "${x}"):
        (tmp_path / name).mkdir()
        assert compose(f"data.root={name}").data.root == name


@pytest.mark.parametrize("name", [NASTY, "2024_01_05", "null"])
def test_images_in_a_folder_of_any_name_are_found(command, call_main, image_folder, tiny_model, name, tmp_path):
    folder = image_folder(3).rename(tmp_path / name)
    config = command("dataset=folder", f"data.root={name}", "--cfg", "job")
    assert config.code == 0, config.err
    assert OmegaConf.create(config.out).data.root == name
    outcome = call_main(cluster.main, "dataset=folder", f"data.root={name}", "clusters=9", *tiny_model[1:], "names=")
    assert "clusters is 9" in outcome.error_line
    assert folder.is_dir()


# --- what Hydra understands -------------------------------------------------------------------------------------


def test_sweeps_of_all_kinds_are_checked():
    config, choices = compose_partly(["algorithm=glob(soft*)"], multirun=True)
    assert config.algorithm.name == choices["algorithm"] == "softmatch"
    sweeper = "hydra/sweeper=optuna"
    assert compose_partly(["dataset.holdout=interval(0.1,0.3)", sweeper], multirun=True).config.dataset.holdout == 0.1
    assert compose_partly(["al.cycles=int(interval(1,5))", sweeper], multirun=True).config.al.cycles == 1
    for words, said in (
        (["al.cycles=interval(1.5,5)", sweeper], "al.cycles"),
        (["dataset.holdout=interval(0.1,0.3)"], sweeper),
        (["algorithm=glob(x*)"], "algorithm=glob"),
        (["algorithm=glob(*)", "seed=0,x"], "seed=x"),
    ):
        with pytest.raises(ConfigError) as error:
            compose_partly(words, multirun=True)
        assert said in str(error.value)


@pytest.mark.slow
def test_optuna_searches_an_interval(probe_job, tmp_path):
    search = ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=2", "hydra.sweeper.n_jobs=1", "hydra.sweep.dir=out"]
    words = ["-m", *search, "probe.weight=interval(0.1,0.5)", *probe_job, "al.cycles=1"]
    done = python("anomalymatch.run", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    weights = [OmegaConf.load(path).probe.weight for path in sorted(tmp_path.glob("out/*/config.yaml"))]
    assert len(set(weights)) == 2
    assert all(0.1 <= weight <= 0.5 for weight in weights)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--config-dir", "nothere"], "--config-dir nothere"),
        (["--bad"], "--bad"),
        (["hydra/launcher=submitit_local"], 'pip install "anomalymatch[submitit]"'),
        (["dataset.anomaly=käfer"], "dataset.anomaly='käfer'"),
    ],
)
def test_wrong_options_are_refused(command, words, said):
    assert said in command(*words).error_line


def test_a_launcher_that_is_not_installed_is_named_with_its_extra(command, monkeypatch):
    monkeypatch.setattr("anomalymatch.config.util", SimpleNamespace(find_spec=lambda name: None))
    assert 'pip install "anomalymatch[joblib]"' in command("-m", "hydra/launcher=joblib", "seed=0,1").error_line


def test_completion_is_printed(command):
    assert "complete" in command("-sc", "install=bash").out


@pytest.mark.parametrize(
    ("line", "answer"),
    [
        ("anomalymatch ", list(__main__.COMMANDS)),
        ("anomalymatch cl", ["cluster"]),
        ("anomalymatch run al.cyc", ["al.cycles="]),
        ("anomalymatch score scoring.eng", ["scoring.engine="]),
        ("anomalymatch run logger=c", ["logger=csv"]),
        ("anomalymatch convert pho", []),  # a file
        ("anomalymatch rnu al.cyc", []),
    ],
)
def test_the_umbrella_completes_commands_and_what_each_command_completes(call_main, monkeypatch, line, answer):
    monkeypatch.setenv("COMP_LINE", line)
    assert call_main(__main__.main, "-sc", "query=bash").out.split() == answer


def test_the_umbrella_installs_the_completion_of_its_own_name(call_main):
    assert "hydra_bash_completion anomalymatch" in call_main(__main__.main, "--shell-completion", "install=bash").out


# --- help and version -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "main", [run.main, label.main, score.main, cluster.main, adapt.main, export.main, __main__.main]
)
def test_version(call_main, main):
    assert call_main(main, "--version").out.split() == ["anomalymatch", am.__version__]
    assert am.__version__ == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_examples_and_describes_the_keys(call_main, name):
    commands = {"run": run, "label": label, "score": score, "cluster": cluster, "adapt": adapt}
    text = call_main(commands[name].main, "--help").out
    assert f"python -m anomalymatch.{name} " in text
    words = " ".join(text.split())
    assert "inference.workers=" in words
    assert "side to which images are resized, in pixels" in words  # of a base file
    assert max(map(len, text.splitlines())) <= 120


def test_help_follows_the_choices(command):
    text = " ".join(command("--help", "algorithm=flexmatch", "al.cycles=7").out.split())
    assert "al.cycles=7 trainings; the oracle labels between two of them" in text
    assert "algorithm.learner.loss.threshold=0.95 of the class with most images" in text
    assert "probe.rounds" in text  # a comment of two lines goes on


def test_overview_names_every_command(call_main):
    outcome = call_main(__main__.main)
    assert outcome.code == 0
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"].values()
    for name, (module, _) in __main__.COMMANDS.items():
        assert f"  {name} " in outcome.out
        assert name in __main__.OTHERS or f"{module}:main" in scripts
    assert "did you mean run?" in call_main(__main__.main, "rum").error_line
    assert "al.cycles" in call_main(__main__.main, "run", "al.cylces=3").error_line


# --- errors of the machine --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "x"), 1, "No space left on device"),
        (PermissionError(errno.EACCES, "Permission denied", "x"), 1, "Permission denied"),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), 1, "Broken pipe"),  # of a worker process
        (ModuleNotFoundError("No module named 'zarr'", name="zarr"), 1, 'pip install "anomalymatch[zarr]"'),
        (MemoryError("Unable to allocate 5 GiB"), 1, "Unable to allocate 5 GiB"),
        (KeyboardInterrupt(), 130, "Continue."),
    ],
)
def test_an_error_of_the_machine_is_one_line(capfd, error, code, said):
    with pytest.raises(SystemExit) as end, errors_in_a_line(stopped="Continue."):
        raise error
    assert end.value.code == code
    printed = capfd.readouterr().err
    assert said in printed
    assert printed.count("\n") == 1


def test_a_missing_package_is_named_with_its_extra():
    for module, package, extra in (("faiss", "faiss-cpu", "faiss"), ("ray.data", "ray", "ray")):
        said = describe_missing_package(ModuleNotFoundError(name=module))
        assert f"{package} is missing" in said
        assert f"anomalymatch[{extra}]" in said
    assert "pip install timm" in describe_missing_package(ModuleNotFoundError(name="timm.models"))


@pytest.mark.parametrize("words", ["anomalymatch.run --cfg job", "anomalymatch.run --help", "anomalymatch"])
def test_a_reader_that_leaves_is_no_error(words):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as pipe:
        done = subprocess.run([sys.executable, "-m", *words.split()], stdout=pipe, stderr=subprocess.PIPE, timeout=60)
    assert (done.returncode, done.stderr) == (0, b"")


# --- what a start costs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "words", "said"),
    [
        ("run", ["dataset=folder", "data.root=nothere"], "nothere"),
        ("label", ["dataset=folder", "data.root=nothere"], "nothere"),
        ("cluster", ["data.root=nothere"], "data.root=nothere"),
        ("score", ["run=.", "data=nothere"], "data.root=nothere"),
    ],
)
def test_missing_images_are_reported_without_torch(command, words, said, tmp_path):
    code = f"""
import sys
from anomalymatch.{command} import main
sys.argv[1:] = {words}
try: main()
except SystemExit: print(sorted({{"torch", "sklearn", "timm", "wandb"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert done.stdout == "[]\n", done.stderr
    first, last = done.stderr.splitlines()
    assert "opening the images" in first
    assert last.startswith("error: ")
    assert said in last


def test_the_cross_match_does_not_import_torch():
    code = "import sys, anomalymatch.scoring.crossmatch; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "False\n", done.stderr
