"""The command, as a user meets it, and its weights in all other commands."""

import csv
import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from anomalymatch import adapt as module
from anomalymatch import cluster, run, score
from anomalymatch.config import compose
from anomalymatch.errors import ConfigError, StorageError

ADAPT = """adapt.epochs=2 adapt.batch_size=32 adapt.held_out=16 adapt.collapse=0.0 adapt.method.hidden=16
    adapt.method.projection=8 inference.device=cpu inference.precision=fp32 trainer.lightning.accelerator=cpu"""


@pytest.fixture
def words(tiny_job):
    """The tiny job's images and network."""
    kept = ("dataset", "model.", "data.", "inference.", "logger")
    return [*(word for word in tiny_job if word.startswith(kept)), *ADAPT.split()]


@pytest.fixture
def call(call_in_folder):
    return call_in_folder(module.main)


def test_the_command_adapts_continues_and_refuses_other_settings(call, words, tmp_path):
    code, out, err = call(*words)
    assert code == 0, err
    folder = tmp_path / "work" / "adapted" / "demo-simclr"
    assert "model.weights=adapted/demo-simclr/weights.safetensors" in out + err
    assert "2 of 2 epochs" in out + err
    assert json.loads((folder / "weights.json").read_text())["epochs"] == 2
    with (folder / "metrics.csv").open(newline="") as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["0", "1", "2"]
    before = (folder / "weights.safetensors").read_bytes()
    assert call(*words, "adapt.minutes=5", "log_level=warning").code == 0  # there is nothing left to do
    assert (folder / "weights.safetensors").read_bytes() == before
    for word in ("adapt.epochs=3", "seed=1", "augment.noise=0.1", "adapt.method.temperature=0.5"):
        other = call(*words, word)
        assert other.error_line.endswith("choose another folder for this one")
        assert word.split("=")[0] in other.error_line
    assert (folder / "weights.safetensors").read_bytes() == before


def test_mistakes_are_reported_in_a_line_and_leave_no_folder(call, words, tmp_path):
    for word, said in {
        "adapt=swav": "there is no adapt=swav",
        "adapt.epoch=3": "did you mean adapt.epochs",
        "adapt.epochs=0": "adapt.epochs is 0",
        "trainer.lightning.devices=2": "asks for 2 devices",
        "augment.zoom=[2.0,1.0]": "augment.zoom is [2.0, 1.0]",
        "data.root=nowhere": "nowhere",
    }.items():
        assert said in call(*words, word).error_line
    assert not (tmp_path / "work" / "adapted" / "demo-simclr").exists()


def test_one_process_at_a_time_works_in_a_folder(words, tmp_path):
    from filelock import FileLock

    (tmp_path / "out").mkdir()
    with FileLock(tmp_path / "out" / ".lock"), pytest.raises(StorageError, match="another process is working in"):
        module.execute(compose(*words, f"output={tmp_path / 'out'}", name="adapt"))


def test_without_lightly_the_message_says_what_to_install(monkeypatch, words):
    for name in [name for name in sys.modules if name.startswith(("lightly", "anomalymatch.algorithms.adaptation"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lightly.loss", None)
    with pytest.raises(ConfigError, match=r"pip install 'anomalymatch\[adapt\]'"):
        module.execute(compose(*words, name="adapt"))


@pytest.mark.slow
def test_all_commands_take_the_weights_and_a_run_keeps_them(words, tiny_job, tmp_path, without_pictures):
    weights = module.adapt(*words, f"output={tmp_path / 'adapted'}")
    own = [word for word in tiny_job if not word.startswith("model.weights")]
    for algorithm in ("probe", "fixmatch"):
        more = [f"algorithm={algorithm}", "al.cycles=1"] + ["algorithm.learner.guard=off"] * (algorithm == "fixmatch")
        used = [w for w in own if algorithm == "fixmatch" or not w.startswith("algorithm.learner.batch")]
        folders = {name: tmp_path / f"{algorithm}-{name}" for name in ("plain", "adapted")}
        plain = run.run(*used, *more, "model.weights=none", folder=folders["plain"])
        adapted = run.run(*used, *more, f"model.weights={weights}", folder=folders["adapted"])
        assert plain[0]["ap"] != adapted[0]["ap"]
    kept = load_file(folders["adapted"] / "cycles" / "01" / "weights.safetensors")
    frozen = "backbone.body.conv_stem.weight"  # fixmatch trains the upper stages alone
    assert torch.equal(kept[frozen], load_file(weights)["conv_stem.weight"])
    images = tmp_path / "images"
    images.mkdir()
    source = compose(*words, name="adapt")
    from anomalymatch.build_images import build_source

    demo = build_source(source)
    from PIL import Image

    for id_, pixels in zip(demo.ids[:20], demo.read(demo.ids[:20]), strict=True):
        Image.fromarray(pixels).save(images / f"{id_}.png")
    model = [word for word in own if word.startswith(("model.", "data.", "inference.", "dataset.image_size", "logger"))]
    patches = ["clustering.patches.levels=[2,3]", "clustering.patches.components=6", "clusters=2"]
    weights_of = {}
    for name, path in (("plain", "none"), ("adapted", weights)):
        folder = cluster.cluster(
            "dataset=folder", f"data.root={images}", *model, *patches, f"model.weights={path}",
            f"output={tmp_path / f'groups-{name}'}",
        )  # fmt: skip
        weights_of[name] = (folder / "clusters.parquet").read_bytes()
    assert weights_of["plain"] != weights_of["adapted"]
    shutil.rmtree(weights.parent)  # the checkpoint of a run needs nothing else
    inference = [word for word in own if word.startswith(("inference.", "data."))]
    scores = score.score(
        f"run={folders['adapted']}", f"data.root={images}", *inference, f"output={tmp_path / 'scores'}"
    )
    assert (scores / "scores.csv").read_text().count("\n") == 21


@pytest.mark.slow
def test_a_killed_command_goes_on_with_the_same_numbers(words, tmp_path):
    more = ["adapt.epochs=8", "log_level=info"]
    command = [sys.executable, "-m", "anomalymatch.adapt", *words, *more, f"output={tmp_path / 'killed'}"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tmp_path
    ) as process:
        for line in process.stdout:
            if "Epoch 1 of 8" in line:
                process.kill()
    assert process.returncode
    again = module.adapt(*words, *more, f"output={tmp_path / 'killed'}")
    whole = module.adapt(*words, *more, f"output={tmp_path / 'whole'}")
    one, other = load_file(again), load_file(whole)
    assert all(torch.equal(one[name], other[name]) for name in one)
