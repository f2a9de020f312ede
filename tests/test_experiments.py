import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf
from scipy.stats import ttest_1samp

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


def call(script, *words, cwd):
    """What an experiment prints."""
    command = [sys.executable, str(ROOT / "experiments" / script), *map(str, words)]
    return subprocess.run(command, cwd=cwd, check=True, capture_output=True, text=True).stdout


@pytest.mark.slow
def test_the_benchmark_fills_its_tables_and_goes_on_where_it_stopped(tmp_path):
    words = ["--quick", "--runs", tmp_path / "runs", "--results", tmp_path / "results"]
    some = call("benchmark.py", *words, "--algorithms", "probe", cwd=tmp_path)
    assert "| probe | 1 | 1 | +0.000" in some
    (draw,) = (tmp_path / "runs" / "quick").glob("*.csv")
    before = draw.read_bytes()
    several = ["--algorithms", "probe", "plain probe", "nearest labelled", "knn", "fixmatch", "fixmatch, cold"]
    everything = call("benchmark.py", *words, *several, cwd=tmp_path)
    assert draw.read_bytes() == before
    with (tmp_path / "results" / "benchmark.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["algorithm"] for row in rows} == set(several[1:])
    assert [row["spent"] for row in rows if row["algorithm"] == "knn"] == ["0", "20", "40"]
    assert all(0 <= float(row["ap"]) <= 1 and int(row["peak_mb"]) > 100 for row in rows)
    first = next(row for row in rows if row["algorithm"] == "knn")
    (line,) = [line for line in everything.splitlines() if line.startswith("| all | ")][:1]
    assert f"{float(first['ap']):.3f}" in line
    assert (tmp_path / "results" / "benchmark_found.png").stat().st_size > 10_000
    words[2] = tmp_path / "elsewhere"
    assert call("benchmark.py", *words, *several, cwd=tmp_path) == everything  # nothing measured: times are the same
    assert len(list((tmp_path / "elsewhere" / "quick").glob("*.csv"))) == len(several) - 1


@pytest.mark.slow
def test_one_training_gives_all_heads_and_is_not_repeated(tmp_path):
    words = [
        "--tasks",
        "demo lenses",
        "--size",
        32,
        "--draws",
        1,
        "--iterations",
        2,
        "--results",
        tmp_path / "heads.csv",
    ]
    printed = call("final_head.py", *words, cwd=tmp_path)
    before = (tmp_path / "heads.csv").read_bytes()
    (row,) = csv.DictReader(before.decode().splitlines())
    assert (row["task"], row["size"], row["draw"]) == ("demo lenses", "32", "0")
    aps = [float(row[name]) for name in ("probe", "trained", "refitted", "mean")]
    assert all(0 < ap <= 1 for ap in aps)
    assert len(set(aps)) == 4
    assert f"| demo lenses | 32 | 1 | {' | '.join(f'{ap:.3f}' for ap in aps)} |" in printed
    assert call("final_head.py", *words, cwd=tmp_path) == printed
    assert (tmp_path / "heads.csv").read_bytes() == before


@pytest.mark.slow
@pytest.mark.realdata
@pytest.mark.skipif("ANOMALYMATCH_DATA" not in os.environ, reason="ANOMALYMATCH_DATA is not set")
def test_the_clustering_experiment_writes_what_every_method_groups(tmp_path):
    printed = call("clustering.py", "--quick", "--runs", tmp_path / "runs", "--results", tmp_path, cwd=tmp_path)
    with (tmp_path / "clustering.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["method"] for row in rows} == {"pooled", "average", "hausdorff", "unsupervised"}
    assert all(0 <= float(row["nmi"]) <= 1 and row["images"] == "48" for row in rows)
    assert "| neu_steel | 3+4 | 64 | pooled |" in printed


@pytest.mark.slow
def test_what_all_labels_would_find_is_no_more_than_there_is(tmp_path):
    words = ["dataset.source.count=400", "dataset.source.size=32", "dataset.source.rare_fraction=0.1"]
    words += ["dataset.start.normals=20", "model.name=test_efficientnet", "model.weights=none", "model.image_size=32"]
    words += ["model.stages=false", "probe.rounds=0"]
    results = tmp_path / "all.csv"
    call("all_labels.py", *words, "--tasks", "demo lenses", "--draws", 2, "--results", results, cwd=tmp_path)
    with results.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["draw"], row["there"]) for row in rows] == [("0", "35"), ("1", "35")]
    assert all(20 <= int(row["found"]) <= 35 for row in rows)  # 200 of 375 at random find 19
    assert rows[0]["ap"] != rows[1]["ap"]


def test_gains_over_the_probe_are_paired_by_draw(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    from benchmark_tables import against_probe, by_task

    def row(algorithm, task, ap, probe_ap):
        return {"algorithm": algorithm, "task": task, "ap": ap, "probe_ap": probe_ap, "seconds": 2, "peak_mb": 300}

    rows = [row("a", "x", 0.3, 0.1), row("a", "x", 0.6, 0.5), row("a", "y", 0.4, 0.6), row("b", "x", 0.1, 0.1)]
    first, second = against_probe(rows).splitlines()[2:]
    assert first.startswith("| a | 2 | 3 | +0.033 ± 0.517 | ")
    assert "| y: -0.200 | 2.0 | 300 |" in first
    p_tasks = ttest_1samp([0.15, -0.2], 0.0).pvalue  # the mean gains of x and y
    assert f" | {p_tasks:.2g} | y: -0.200" in first
    assert "| b | 1 | 1 | +0.000 | not run | not run | x: +0.000 |" in second
    assert by_task(rows, "ap").splitlines()[2:] == [
        "| x | 0.450 ± 1.906 | 0.100 |",
        "| y | 0.400 | not run |",
        "| all | 0.425 | not run |",
    ]


@pytest.mark.parametrize("name", ["prototype", "nearest labelled", "label spreading"])
def test_a_head_that_is_tried_ranks_what_is_like_the_anomalies_first(monkeypatch, name):
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    from recipes import RECIPES

    angles = np.deg2rad(np.r_[np.linspace(0, 20, 15), np.linspace(90, 160, 60)])
    rows = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    scores = RECIPES[name].head(None).score(rows, rows[[3, 9]], rows[20::4])
    assert scores.shape == (75,)
    assert scores[:15].min() > scores[15:].max()


def test_trainings_are_compared_where_all_have_as_many_draws(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    from benchmark_tables import summary

    def row(algorithm, task, draw, ap):
        scene = {"algorithm": algorithm, "task": task, "draw": draw, "size": 84, "start": "5", "oracle": "top_k"}
        return scene | {"ap": ap, "probe_ap": 0.5, "spent": 0, "found": 0, "seconds": 2, "peak_mb": 300}

    rows = [row("fixmatch", "hourglass", draw, 0.6 + draw / 5) for draw in range(2)] + [
        row("fixmatch", "cliff", 0, 0.4)
    ]
    text = summary([*rows, row("plain probe", "cliff", 0, 0.3), row("plain probe", "hourglass", 0, 0.2)])
    four, first = (part for part in text.split("\n\n") if "p of tasks" in part)
    assert "| fixmatch | 1 | 2 | +0.200 ± 1.271 | 0.3 | not run | hourglass: +0.200 |" in four
    assert "| plain probe | 2 | 2 | -0.250" in four
    assert "| fixmatch | 2 | 2 | +0.000" in first
    assert "plain probe" not in first


def test_the_probe_beside_a_training_sees_the_images_as_it_does(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    from recipes import RECIPES

    assert RECIPES["fixmatch, 5 crops"].backbone == ("model.crops=5",)
    assert RECIPES["fixmatch, 128 px"].backbone == ("model.image_size=128",)
    assert RECIPES["fixmatch, threshold 0.6"].backbone == ()


def test_a_training_is_set_against_what_is_frozen_at_its_size(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    from benchmark_tables import over_frozen

    def row(algorithm, size, draw, ap):
        return {"algorithm": algorithm, "task": "x", "size": str(size), "draw": str(draw), "ap": str(ap)}

    table = over_frozen([
        row("plain probe", 150, 0, 0.9),  # of larger images
        row("plain probe, 96 px", 96, 0, 0.1),
        row("probe, labels alone", 96, 0, 0.2),
        row("probe, labels alone", 96, 1, 0.4),
        row("fixmatch", 96, 0, 0.5),
        row("fixmatch", 96, 1, 0.5),
        row("probe, 1 round, 96 px", 96, 2, 0.3),
        row("softmatch", 96, 2, 0.5),
        row("fixmatch, 128 px", 128, 0, 0.5),  # a change to it, not itself
    ])  # fmt: skip
    first, second = table.splitlines()[2:]
    assert first == "| fixmatch | +0.400 (1) | +0.200 ± 1.271 (2) | not run | not run |"
    assert second == "| softmatch | not run | not run | +0.200 (1) | not run |"


def test_a_change_is_compared_on_the_draws_that_both_have(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    from benchmark_tables import ablations

    def row(algorithm, draw, ap, seconds):
        return {"algorithm": algorithm, "task": "x", "draw": draw, "ap": ap, "seconds": seconds}

    rows = [row("fixmatch", "0", 0.5, 10), row("fixmatch", "1", 0.3, 10), row("fixmatch, cold", "0", 0.2, 20)]
    rows += [row("fixmatch, cold", "2", 0.9, 1), row("fixmatch_reference", "0", 0.1, 1)]
    rows += [row("fixmatch of 200", "0", 0.4, 10), row("fixmatch of 200, cold", "0", 0.1, 5)]
    assert ablations(rows).splitlines()[2:] == [
        "| fixmatch, cold | 0.500 | 0.200 | x -0.300 | 2.00 |",
        "| fixmatch of 200, cold | 0.400 | 0.100 | x -0.300 | 0.50 |",
    ]


def test_what_scores_promise_is_set_against_what_is_there(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    from benchmark_tables import promised

    def row(there, promise, loss):
        return {"algorithm": "a", "task": "x", "spent": "0", "there": there, "promised": promise, "log_loss": loss}

    rows = [row("10", "30", "0.2"), row("20", "20", "0.1"), row("0", "5", "0.9"), row("", "", "")]
    assert promised(rows).splitlines()[2:] == ["| a | 0 | 1 | 2.0 | 0.1500 |"]


def test_what_is_found_is_compared_on_the_draws_that_both_have(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    from benchmark_tables import times_plain

    def rows(algorithm, task, *found):
        return [{"algorithm": algorithm, "task": task, "draw": d, "found": n} for d, n in enumerate(found)]

    table = times_plain([
        *rows("plain probe", "merger", 10, 20, 90),
        *rows("plain probe", "orange", 0, 100),
        *rows("plain probe", "spirals", 0),
        *rows("probe", "merger", 30, 30),
        *rows("probe", "orange", 50, 100),
        *rows("probe", "spirals", 5),  # no multiple of nothing
        *rows("kNN", "edge-on", 7),
    ])  # fmt: skip
    assert "| plain probe | 2 | 5 | 1.00 |" in table
    assert "| probe | 2 | 4 | 1.75 |" in table  # 60 / 30 and 150 / 100
    assert "| kNN | 0 | 0 | not run |" in table


def test_the_changes_to_fixmatch_are_for_the_tables_and_not_for_the_plot(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    import benchmark_plots

    drawn = []
    monkeypatch.setattr(benchmark_plots, "gain_figure", lambda rows: drawn.extend(row["algorithm"] for row in rows))
    monkeypatch.setattr(benchmark_plots, "save", lambda figure, path: None)
    names = "fixmatch", "fixmatch, cold", "fixmatch_reference", "softmatch"
    row = {"task": "merger", "start": "5", "oracle": "top_k", "spent": 0}
    benchmark_plots.draw([row | {"algorithm": name} for name in names], tmp_path)
    assert drawn == ["fixmatch", "fixmatch_reference", "softmatch"]
