"""The configurations of conf/debug: each changes what it says."""

import csv

import pytest

from anomalymatch.config import compose

BATCH = "algorithm.learner.batch.labelled=8"


def test_one_batch_is_a_single_step_of_a_single_cycle(command, tiny_job, tmp_path, without_pictures):
    job = [word for word in tiny_job if not word.startswith(("al.cycles", "trainer.", "logger"))]
    outcome = command(*job, "+debug=one_batch", "hydra.run.dir=out")
    assert outcome.code == 0, outcome.err
    assert [path.name for path in (tmp_path / "out" / "cycles").iterdir()] == ["01"]
    assert len(steps(tmp_path / "out")) == 1
    assert not (tmp_path / "out" / "wandb").exists()


def test_overfit_learns_the_labels_by_heart(command, tiny_job, tmp_path, without_pictures):
    job = [word for word in tiny_job if not word.startswith(("al.cycles", "trainer.", "logger"))]
    outcome = command(*job, "+debug=overfit", "trainer.iterations=60", BATCH, "hydra.run.dir=out")
    assert outcome.code == 0, outcome.err
    losses = [float(row["loss"]) for row in steps(tmp_path / "out")]
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])


def test_profile_writes_the_time_of_each_part(command, tiny_job, tmp_path, without_pictures):
    job = [word for word in tiny_job if not word.startswith(("al.cycles", "logger"))]
    outcome = command(*job, "+debug=profile", "hydra.run.dir=out")
    assert outcome.code == 0, outcome.err
    (report,) = (tmp_path / "profile").iterdir()
    assert "run_training_batch" in report.read_text()


@pytest.mark.parametrize("name", ["one_batch", "overfit", "profile"])
def test_a_debug_configuration_logs_nowhere_and_runs_one_cycle(name):
    config = compose(f"+debug={name}", "dataset=demo")
    assert list(config.logger) == ["none"]
    assert config.al.cycles == 1


def steps(run):
    with (run / "cycles" / "01" / "steps.csv").open(newline="") as file:
        return list(csv.DictReader(file))
