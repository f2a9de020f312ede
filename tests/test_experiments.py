import os
import re
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from anomalymatch.config import compose, config_folder

FOLDER = config_folder() / "experiment"
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", NAMES)
def test_every_experiment_composes_as_its_file_says(name):
    config = compose(f"+experiment={name}")
    text = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")
    for group, choice in re.findall(r"override /(\w+): (\w+)", text):
        assert config[group].name == choice
    own = OmegaConf.load(FOLDER / f"{name}.yaml")
    del own["defaults"]
    assert OmegaConf.merge(config, own) == config
    assert not OmegaConf.missing_keys(config)


@pytest.mark.parametrize("name", NAMES)
def test_the_sweep_that_an_experiment_proposes_is_right(name):
    from anomalymatch.config import check_overrides

    text = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")
    for words in re.findall(r"^# .*: -m (.+)$", text, flags=re.MULTILINE):
        check_overrides(words.split(), multirun=True)
        assert f"+experiment={name}" in words


def test_the_paper_is_followed():
    galaxies, photographs = (compose(f"+experiment={name}") for name in ("galaxymnist_paper", "miniimagenet_1pct"))
    for config in (galaxies, photographs):
        assert config.algorithm.name == "fixmatch_reference"
        assert config.oracle.name == "paper_oracle"
        assert (config.al.cycles, config.model.image_size, config.trainer.iterations) == (3, 224, 100)
    assert tuple(galaxies.al.initial.values()) == (10, 30)
    assert tuple(photographs.al.initial.values()) == (5, 495)


@pytest.mark.slow
def test_the_quick_demonstration_runs_when_shrunk(command, tiny_job, tmp_path):
    outcome = command(*tiny_job, "+experiment=demo_quick", "hydra.run.dir=out")
    assert outcome.code == 0, outcome.err
    config = OmegaConf.load(tmp_path / "out" / "config.yaml")
    assert (config.oracle.name, config.algorithm.name, config.trainer.iterations) == ("top_k", "fixmatch", 2)
    assert (tmp_path / "out" / "report.html").is_file()


@pytest.mark.realdata
@pytest.mark.skipif("ANOMALYMATCH_DATA" not in os.environ, reason="ANOMALYMATCH_DATA is not set")
@pytest.mark.parametrize("dataset", ["galaxyzoo1", "miniimagenet"])
def test_the_real_images_run(command, dataset, tmp_path):
    outcome = command(
        f"dataset={dataset}",
        f"data.root={Path(os.environ['ANOMALYMATCH_DATA']) / dataset}",
        f"data.cache_dir={tmp_path / 'cache'}",
        "algorithm=probe",
        "model.name=test_efficientnet",
        "model.weights=none",
        "dataset.image_size=32",
        "al.cycles=1",
        "logger=none",
        "hydra.run.dir=out",
    )
    assert outcome.code == 0, outcome.err
    assert (tmp_path / "out" / "report.html").stat().st_size > 100_000


def test_the_makefile_runs_what_exists():
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert set(re.findall(r"\+experiment=(\w+)", text)) <= set(NAMES)
    scripts = re.findall(r"python (experiments/\w+\.py)", text)
    assert scripts
    assert all((ROOT / script).is_file() for script in scripts)
