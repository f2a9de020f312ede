"""The template of a plug-in, as if it were installed."""

import sys
from pathlib import Path

import numpy as np
import pytest

import anomalymatch as am
from anomalymatch.config import check_overrides
from anomalymatch.config_folders import plugin_folders
from anomalymatch.errors import ConfigError

TEMPLATE = Path(__file__).parents[1] / "examples" / "plugin"


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Function that installs an entry point of a plug-in for one test."""

    def write(name, package):
        folder = tmp_path / "site" / f"{name}-0.1.0.dist-info"
        folder.mkdir(parents=True)
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1.0\n")
        (folder / "entry_points.txt").write_text(f"[anomalymatch.plugins]\n{name} = {package}\n")
        plugin_folders.cache_clear()

    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.syspath_prepend(str(TEMPLATE / "src"))
    yield write
    plugin_folders.cache_clear()
    sys.modules.pop("anomalymatch_lottery", None)


def test_the_template_adds_a_source_and_a_strategy_to_the_menus(
    install, command, tiny_model, tmp_path, without_pictures, events
):
    install("lottery", "anomalymatch_lottery")
    words = ["dataset=noise", "al.strategy.name=lottery"]
    text = command("--help", *words).out
    assert "anomalymatch_lottery" not in sys.modules  # the menus need none of its code
    assert "al.strategy.half=10.0 rank at which the chance is half" in " ".join(text.split())
    assert "noise, numpy, parquet" in " ".join(text.split())
    few = ["al.cycles=2", "al.budget=4", "al.initial.anomalies=2", "al.initial.normals=6", "al.compare_probe=false"]
    small = [word for word in tiny_model if not word.startswith("dataset.")]
    job = [*words, *small, *few, "algorithm=probe", "oracle=top_k", "dataset.image_size=32"]
    outcome = command(*job, "al.strategy.half=2.0", "hydra.run.dir=out")
    assert outcome.code == 0, outcome.err
    asked = [event.id for event in events(tmp_path / "out") if event.cycle == 1]
    assert len(asked) == 4
    assert all(id_.startswith("noise-") for id_ in asked)
    # Its classes are not part of anomalymatch: whoever made the folder must be trusted.
    assert "would run code that is not part of anomalymatch" in command("resume=out", "al.cycles=3").error_line
    assert command("resume=out", "al.cycles=3", "trust=true").code == 0


def test_a_broken_plugin_is_one_sentence(install):
    install("broken", "nowhere_to_be_found")
    with pytest.raises(ConfigError, match="the plug-in broken names the package nowhere_to_be_found, which has no"):
        check_overrides(["seed=1"])


def test_the_strategy_of_the_template_draws_from_the_top(install):
    install("lottery", "anomalymatch_lottery")
    from anomalymatch_lottery import Lottery

    ranking = am.Ranking([str(i) for i in range(100)], np.arange(100.0, 0.0, -1.0))
    drawn = Lottery(half=3.0)(ranking, 10, rng=np.random.default_rng(0))
    assert len(set(drawn)) == 10
    assert np.mean(list(map(int, drawn))) < 15  # of all images: 49.5
