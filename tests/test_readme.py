"""Test that the README's code runs and that the files and options it names exist."""

import re
import shlex
from pathlib import Path

import pytest

import anomalymatch as am
from anomalymatch.config import check_overrides, config_folder
from anomalymatch.score import expand_data

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", TEXT, flags=re.MULTILINE | re.DOTALL)
COMMAND = r"^\s+python -m anomalymatch\.(run|label|score|cluster) (.+?)\s*(?:#.*)?$"
COMMANDS = re.findall(COMMAND, TEXT, flags=re.MULTILINE)


def test_the_first_example_is_short():
    assert all(5 <= block.count("\n") <= 20 for block in BLOCKS[:1])
    assert len({command for command, _ in COMMANDS}) == 4


@pytest.mark.parametrize("block", BLOCKS)
def test_the_code_runs(block, tiny_job, tiny_model, monkeypatch, tmp_path, capsys):
    """Run the block with fewer and smaller galaxies and a tiny network."""
    data = [w for w in tiny_job if w.startswith(("dataset.", "data."))]
    open_task, make_learner, initial_labels = am.open_task, am.make_learner, am.initial_labels
    monkeypatch.setattr(am, "open_task", lambda name, *words: open_task(name, *words, *data))
    monkeypatch.setattr(am, "make_learner", lambda name, task, *words: make_learner(name, task, *words, *tiny_model))
    few = {"anomalies": 3, "normals": 20}
    monkeypatch.setattr(am, "initial_labels", lambda task, **counts: initial_labels(task, **counts | few))
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})
    assert "demo-0" in capsys.readouterr().out


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
