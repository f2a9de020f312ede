"""The README's code is run as it stands, and its commands compose."""

import re
from pathlib import Path

import pytest

README = Path(__file__).resolve().parents[1] / "README.md"


def blocks():
    return re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.mark.slow
def test_the_code_of_the_readme_runs_as_it_stands(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("ANOMALYMATCH_CACHE", str(tmp_path))
    assert blocks()
    for block in blocks():
        exec(compile(block, str(README), "exec"), {})
    printed = capsys.readouterr().out
    assert len(re.findall(r"demo-\d{6}", printed)) == 10
    assert float(re.search(r"auroc=([\d.]+)", printed)[1]) > 0.7


def test_the_commands_of_the_readme_compose(tmp_path):
    from anomalymatch.config import check_overrides

    lines = re.findall(r"python -m anomalymatch\.run (.+)", README.read_text(encoding="utf-8"))
    assert len(lines) >= 8
    for line in lines:
        words = line.split()
        check_overrides([w for w in words if w != "-m"], multirun="-m" in words)
