import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # Lightning's own, with a new torch
@pytest.mark.filterwarnings("ignore::UserWarning:pytorch_lightning")  # of the average in evaluation mode
def test_plain_lightning_trains_a_network_of_ones_own_on_ones_own_images(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # where Lightning may write
    monkeypatch.setattr(sys, "argv", ["plain_lightning.py"])
    rank = runpy.run_path(str(EXAMPLES / "plain_lightning.py"))["main"](epochs=2, steps=15)
    assert rank < 0.3
