import csv
import math
import subprocess
import sys
from itertools import product

import pytest
from omegaconf import OmegaConf
from scipy import stats

from anomalymatch.active.run_folder import to_csv
from anomalymatch.sweep import SweepSummary, summarise


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def job(tmp_path):
    """Write what a job leaves: its configuration and its metrics."""

    def write(number, config, *aps):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "config.yaml").write_text(config)
        rows = [{"cycle": i, "ap": ap, "found": 3 + i} for i, ap in enumerate(aps, 1)]
        (folder / "metrics.csv").write_text(to_csv(rows))

    return write


def settings(seed=0, algorithm="probe", lr=0.1, oracle="top_k", anomaly="cat"):
    return (
        f"seed: {seed}\nalgorithm:\n  name: {algorithm}\n  learner: {{_target_: x.{algorithm}, lr: {lr}}}\n"
        f"oracle: {{name: {oracle}, answer: {{_target_: x.{oracle}}}}}\ndataset: {{name: d, anomaly: {anomaly}}}\n"
    )


def test_mean_and_interval_by_hand(job, tmp_path):
    for seed, ap in enumerate((0.5, 0.6, 0.8)):
        job(seed, settings(seed), ap, 0.9)
    first, second = summarise(tmp_path)
    assert (first["cycle"], first["runs"], first["found"]) == (1, 3, 4.0)
    mean = (0.5 + 0.6 + 0.8) / 3
    deviation = math.sqrt(((0.5 - mean) ** 2 + (0.6 - mean) ** 2 + (0.8 - mean) ** 2) / 2)
    half = stats.t.ppf(0.975, 2) * deviation / math.sqrt(3)
    assert half == pytest.approx(4.3027 * 0.152753 / 1.7320508, rel=1e-4)
    assert first["ap"] == pytest.approx(mean)
    assert (first["ap_low"], first["ap_high"]) == (pytest.approx(mean - half), pytest.approx(mean + half))
    assert (second["ap"], second["ap_low"]) == (pytest.approx(0.9), pytest.approx(0.9))


@pytest.mark.parametrize(
    ("key", "values", "column"),
    [
        ("algorithm", ("probe", "fixmatch"), "algorithm.name"),
        ("lr", (0.1, 0.01), "algorithm.learner.lr"),
        ("oracle", ("top_k", "paper_oracle"), "oracle.name"),
        ("anomaly", ("cat", "dog"), "dataset.anomaly"),
    ],
)
def test_runs_are_grouped_by_every_setting_except_the_seed(job, tmp_path, key, values, column):
    for number, (value, seed) in enumerate((value, seed) for value in values for seed in (0, 1)):
        job(number, settings(seed, **{key: value}), 0.1 * number)
    rows = summarise(tmp_path)
    assert [(row[column], row["runs"]) for row in rows] == [(str(value), 2) for value in values]
    assert [row["ap"] for row in rows] == [pytest.approx(0.05), pytest.approx(0.25)]
    assert list(rows[0])[:3] == [column, "cycle", "runs"]  # what follows from a name takes no column


def test_two_swept_keys_give_two_columns(job, tmp_path):
    for number, (oracle, lr, seed) in enumerate(product(("top_k", "paper_oracle"), (0.1, 0.01), (0, 1))):
        job(number, settings(seed, oracle=oracle, lr=lr), 0.5)
    rows = summarise(tmp_path)
    assert len(rows) == 4
    assert list(rows[0])[:4] == ["oracle.name", "algorithm.learner.lr", "cycle", "runs"]
    assert {row["runs"] for row in rows} == {2}


def test_a_sweep_of_seeds_has_one_group_and_a_single_seed_no_interval(job, tmp_path):
    job(0, settings(0), 0.5)
    (row,) = summarise(tmp_path)
    assert list(row)[:2] == ["cycle", "runs"]
    assert row["ap"] == 0.5
    assert math.isnan(row["ap_low"])
    assert summarise(tmp_path / "nothing") == []


def test_undefined_values_and_shorter_runs_are_summarised(job, tmp_path):
    job(0, settings(0), 0.5, float("nan"))
    job(1, settings(1), 0.7, 0.9, 1.0)
    first, second = summarise(tmp_path)
    assert (first["ap"], second["ap"]) == (pytest.approx(0.6), 0.9)


@pytest.mark.parametrize(("runs", "shown"), [(2, False), (3, True)])
def test_the_table_fits_80_columns_and_two_runs_have_no_interval(job, tmp_path, capsys, runs, shown):
    for number, (algorithm, seed) in enumerate(product(("fixmatch_reference", "mahalanobis"), range(runs))):
        job(number, settings(seed, algorithm), 0.5 + seed / 10, 0.6)
        path = tmp_path / str(number) / "metrics.csv"
        rows = [row | {"heldout_ap": row["ap"], "probe_heldout_ap": 0.25} for row in read(path)]
        path.write_text(to_csv(rows))
    SweepSummary().on_multirun_end(OmegaConf.create({"hydra": {"sweep": {"dir": str(tmp_path)}}}))
    _, *lines = capsys.readouterr().err.splitlines()
    assert max(map(len, lines)) <= 80
    text = "\n".join(lines)
    assert ("±" in text) is shown
    assert {"fixmatch_reference", "mahalanobis", "0.600"} <= set(text.split())


# --- the command ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_sweep_over_seeds_and_algorithms_on_several_processes(probe_job, tmp_path):
    job = [word for word in probe_job[1:] if not word.startswith("al.cycles")]
    words = [
        "hydra/launcher=joblib",
        "hydra.launcher.n_jobs=2",
        *job,
        "algorithm=probe,knn",
        "seed=0,1,2",
        "al.cycles=1",
    ]
    command = [sys.executable, "-m", "anomalymatch.run", "-m", *words, "hydra.sweep.dir=out"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=250)
    assert done.returncode == 0, done.stderr
    assert " ± " in done.stderr
    aps = [float(read(path)[0]["heldout_ap"]) for path in sorted(tmp_path.glob("out/*/metrics.csv"))]
    rows = read(tmp_path / "out" / "summary.csv")
    assert [(row["algorithm.name"], row["cycle"], row["runs"], float(row["heldout_ap"])) for row in rows] == [
        ("probe", "1", "3", pytest.approx(sum(aps[:3]) / 3)),
        ("knn", "1", "3", pytest.approx(sum(aps[3:]) / 3)),
    ]


def test_a_failed_job_is_reported_and_the_others_are_summarised(command, probe_job, tmp_path, without_pictures):
    job = [word for word in probe_job if not word.startswith("al.initial.anomalies")]
    sweep = [*job, "al.initial.anomalies=3,500", "hydra.sweep.dir=out"]
    line = command("-m", *sweep).error_line
    assert line.startswith("error: job 1 (")
    assert "al.initial.anomalies=500" in line
    assert "asks for 500 images" in line
    assert [row["runs"] for row in read(tmp_path / "out" / "summary.csv")] == ["1", "1"]
    # Corrected, the same sweep goes on where it was.
    outcome = command("-m", *[word.replace("3,500", "3,4") for word in sweep])
    assert outcome.code == 0, outcome.err
    assert len(read(tmp_path / "out" / "summary.csv")) == 4
