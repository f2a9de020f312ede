"""Test that the README's code runs and that the files and options it names exist."""

import re
import shlex
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from torchvision.datasets import FakeData

import anomalymatch as am
from anomalymatch.config import check_overrides, config_folder
from anomalymatch.score import expand_data

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", TEXT, flags=re.MULTILINE | re.DOTALL)
COMMAND = r"^\s+python -m anomalymatch\.(run|label|score|cluster|adapt) (.+?)\s*(?:#.*)?$"
COMMANDS = re.findall(COMMAND, TEXT, flags=re.MULTILINE)


def test_the_first_example_is_short():
    assert all(5 <= block.count("\n") <= 20 for block in BLOCKS[:1])
    assert len({command for command, _ in COMMANDS}) == 5


def test_the_code_runs(tiny_job, tiny_model, monkeypatch, tmp_path, capsys, image_folder):
    """Run the blocks with fewer and smaller galaxies, a tiny network, and images of one's own."""
    data = [w for w in tiny_job if w.startswith(("dataset.", "data."))]
    open_task, make_learner, initial_labels = am.open_task, am.make_learner, am.initial_labels
    monkeypatch.setattr(am, "open_task", lambda name, *words: open_task(name, *words, *data))
    monkeypatch.setattr(am, "make_learner", lambda name, task, *words: make_learner(name, task, *words, *tiny_model))
    few = {"anomalies": 3, "normals": 20}
    monkeypatch.setattr(am, "initial_labels", lambda task, **counts: initial_labels(task, **counts | few))
    monkeypatch.chdir(tmp_path)
    paths = sorted(map(str, image_folder(20).iterdir()))
    hub = FakeData(size=20, image_size=(3, 32, 32), num_classes=2)
    hub.classes, hub.targets = ["cat", "dog"], [i % 2 for i in range(20)]
    frame = pd.DataFrame({"file": paths, "label": ["Anomaly", "normal", *[None] * 18]})
    names = {"am": am, "x": np.zeros((20, 32, 32), np.uint8), "paths": paths, "df": frame, "dataset": hub}
    first, second = (compile(block, "README.md", "exec") for block in BLOCKS)
    exec(first, {"__name__": "readme"})
    assert "demo-0" in capsys.readouterr().out
    exec(second, names)
    assert len(names["ranking"]) == len(names["task"].pool) == 16


def test_second_command_ranks_a_folder_without_labels(command, image_folder, tiny_model, tmp_path, without_pictures):
    _, words = next(words for words in COMMANDS if "data.root=photos" in words[1])
    image_folder(30).rename(tmp_path / "photos")
    outcome = command(*words.split(), *tiny_model, "logger=none", "hydra.run.dir=out")
    assert outcome.code == 0, outcome.err
    lines = (tmp_path / "out" / "scores.csv").read_text().splitlines()
    assert (lines[0], len(lines)) == ("rank,id,score,logit", 31)


@pytest.mark.parametrize(("command", "words"), COMMANDS)
def test_commands_are_valid(command, words):
    words = [expand_data(word.replace("$SLURM_ARRAY_TASK_ID", "3")) for word in shlex.split(words)]
    name = "config" if command == "run" else command
    check_overrides([word for word in words if word != "-m"], multirun="-m" in words, name=name)


def test_linked_files_and_named_choices_exist():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", TEXT) if "://" not in link]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
    for group, choice in re.findall(r"`(dataset|algorithm|oracle|logger)=(\w+)", TEXT):
        assert choice.isupper() or (config_folder() / group / f"{choice}.yaml").is_file(), choice
