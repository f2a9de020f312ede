import json
import re
import runpy
import sys
from pathlib import Path

import pandas as pd
import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
PYTHON = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # Lightning's own, with a new torch
@pytest.mark.filterwarnings("ignore::UserWarning:pytorch_lightning")  # of the average in evaluation mode
def test_plain_lightning_trains_a_network_of_ones_own_on_ones_own_images(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # where Lightning may write
    monkeypatch.setattr(sys, "argv", ["plain_lightning.py"])
    rank = runpy.run_path(str(EXAMPLES / "plain_lightning.py"))["main"](epochs=2, steps=15)
    assert rank < 0.3


def test_a_source_a_strategy_and_a_method_of_ones_own(command, monkeypatch, tmp_path, tiny_model, without_pictures):
    """docs/how-to/extend.md: found by `--config-dir`, and trusted on resume only if the user says so."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    own = ["--config-dir", str(EXAMPLES / "mine" / "conf"), "dataset=squares", "algorithm=centroid"]
    small = ["dataset.source.count=60", "dataset.start.anomalies=2", "al.budget=4", "al.cycles=2", *tiny_model]
    outcome = command(*own, "al.strategy.name=every_other", "oracle=top_k", *small, "hydra.run.dir=out")
    assert outcome.code == 0, outcome.err
    scores = (tmp_path / "out" / "scores.csv").read_text().splitlines()
    assert len(scores) == 61
    assert "would run code" in command("resume=out", "al.cycles=3").error_line
    assert command("resume=out", "al.cycles=3", "trust=true").code == 0
    sys.modules.pop("mine_parts")


def test_exports_of_label_studio_and_zooniverse_become_labels(monkeypatch, tmp_path):
    """docs/how-to/exchange.md, on exports as these services write them."""
    monkeypatch.chdir(tmp_path)
    page = (EXAMPLES.parent / "docs" / "how-to" / "exchange.md").read_text(encoding="utf-8")
    found = [text.split("# needs an export of ") for text in PYTHON.findall(page) if "# needs an export" in text]
    blocks = {rest.split()[0]: head + "#" + rest for head, rest in found}
    answers = [{"result": [{"value": {"choices": [word]}}]} for word in ("normal", "anomaly")]
    tasks = [{"data": {"filename": name}, "annotations": given} for name, given in (("a.png", answers), ("b.png", []))]
    Path("label-studio-export.json").write_text(json.dumps(tasks))
    exec(blocks["Label"], {})
    assert Path("labels.csv").read_text().split() == ["filename,label", "a.png,anomaly"]
    votes = [("a.png", "Yes"), ("a.png", "Yes"), ("a.png", "No"), ("b.png", "No"), ("c.png", "Yes"), ("c.png", "No")]
    rows = [
        {"annotations": json.dumps([{"value": vote}]), "subject_data": json.dumps({"7": {"filename": name}})}
        for name, vote in votes
    ]
    pd.DataFrame(rows).to_csv("classifications.csv")
    exec(blocks["Zooniverse"], {})
    assert Path("labels.csv").read_text().split() == ["filename,label", "a.png,anomaly", "b.png,normal", "c.png,unsure"]
