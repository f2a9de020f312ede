"""Test the tables, plots and recipes of the benchmark on rows with known numbers."""

from pathlib import Path

import numpy as np
import pytest
from scipy.stats import ttest_1samp

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def experiments_on_the_path(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))


def test_gains_over_the_probe_are_paired_by_draw():
    from benchmark_tables import by_task, gain_over_probe

    def row(algorithm, task, ap, probe_ap):
        return {"algorithm": algorithm, "task": task, "ap": ap, "probe_ap": probe_ap, "seconds": 2, "peak_mb": 300}

    rows = [row("a", "x", 0.3, 0.1), row("a", "x", 0.6, 0.5), row("a", "y", 0.4, 0.6), row("b", "x", 0.1, 0.1)]
    first, second = gain_over_probe(rows).splitlines()[2:]
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
def test_every_head_ranks_images_like_the_anomalies_first(name):
    from recipes import RECIPES

    angles = np.deg2rad(np.r_[np.linspace(0, 20, 15), np.linspace(90, 160, 60)])
    rows = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    scores = RECIPES[name].head(None).score(rows, rows[[3, 9]], rows[20::4])
    assert scores.shape == (75,)
    assert scores[:15].min() > scores[15:].max()


def test_trainings_are_compared_on_tasks_with_equally_many_draws():
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


def test_the_probe_that_a_training_is_compared_with_shares_its_backbone_settings():
    from recipes import RECIPES

    assert RECIPES["fixmatch, 5 crops"].backbone == ("model.crops=5",)
    assert RECIPES["fixmatch, 128 px"].backbone == ("model.image_size=128",)
    assert RECIPES["fixmatch, threshold 0.6"].backbone == ()


def test_a_training_is_compared_with_frozen_probes_at_its_image_size():
    from benchmark_tables import gain_over_frozen

    def row(algorithm, size, draw, ap):
        return {"algorithm": algorithm, "task": "x", "size": str(size), "draw": str(draw), "ap": str(ap)}

    table = gain_over_frozen([
        row("plain probe", 150, 0, 0.9),  # larger images
        row("plain probe, 96 px", 96, 0, 0.1),
        row("probe, labels alone", 96, 0, 0.2),
        row("probe, labels alone", 96, 1, 0.4),
        row("fixmatch", 96, 0, 0.5),
        row("fixmatch", 96, 1, 0.5),
        row("probe, 1 round, 96 px", 96, 2, 0.3),
        row("softmatch", 96, 2, 0.5),
        row("fixmatch, 128 px", 128, 0, 0.5),  # an ablation
    ])  # fmt: skip
    first, second = table.splitlines()[2:]
    assert first == "| fixmatch | +0.400 (1) | +0.200 ± 1.271 (2) | not run | not run |"
    assert second == "| softmatch | not run | not run | +0.200 (1) | not run |"


def test_ablations_are_compared_on_common_draws():
    from benchmark_tables import ablation_table

    def row(algorithm, draw, ap, seconds):
        return {"algorithm": algorithm, "task": "x", "draw": draw, "ap": ap, "seconds": seconds}

    rows = [row("fixmatch", "0", 0.5, 10), row("fixmatch", "1", 0.3, 10), row("fixmatch, cold", "0", 0.2, 20)]
    rows += [row("fixmatch, cold", "2", 0.9, 1), row("fixmatch_reference", "0", 0.1, 1)]
    rows += [row("fixmatch of 200", "0", 0.4, 10), row("fixmatch of 200, cold", "0", 0.1, 5)]
    assert ablation_table(rows).splitlines()[2:] == [
        "| fixmatch, cold | 0.500 | 0.200 | x -0.300 | 2.00 |",
        "| fixmatch of 200, cold | 0.400 | 0.100 | x -0.300 | 0.50 |",
    ]


def test_predicted_anomalies_are_divided_by_true_anomalies():
    from benchmark_tables import calibration_table

    def row(there, promise, loss):
        return {"algorithm": "a", "task": "x", "spent": "0", "there": there, "promised": promise, "log_loss": loss}

    rows = [row("10", "30", "0.2"), row("20", "20", "0.1"), row("0", "5", "0.9"), row("", "", "")]
    assert calibration_table(rows).splitlines()[2:] == ["| a | 0 | 1 | 2.0 | 0.1500 |"]


def test_found_anomalies_are_compared_on_common_draws():
    from benchmark_tables import relative_to_plain

    def rows(algorithm, task, *found):
        return [{"algorithm": algorithm, "task": task, "draw": d, "found": n} for d, n in enumerate(found)]

    table = relative_to_plain([
        *rows("plain probe", "merger", 10, 20, 90),
        *rows("plain probe", "orange", 0, 100),
        *rows("plain probe", "spirals", 0),
        *rows("probe", "merger", 30, 30),
        *rows("probe", "orange", 50, 100),
        *rows("probe", "spirals", 5),  # the ratio is undefined
        *rows("kNN", "edge-on", 7),
    ])  # fmt: skip
    assert "| plain probe | 2 | 5 | 1.00 |" in table
    assert "| probe | 2 | 4 | 1.75 |" in table  # 60 / 30 and 150 / 100
    assert "| kNN | 0 | 0 | not run |" in table


def test_plots_leave_out_ablations(monkeypatch, tmp_path):
    import benchmark_plots

    drawn = []
    monkeypatch.setattr(benchmark_plots, "gain_figure", lambda rows: drawn.extend(row["algorithm"] for row in rows))
    monkeypatch.setattr(benchmark_plots, "save", lambda figure, path: None)
    names = "fixmatch", "fixmatch, cold", "fixmatch_reference", "softmatch"
    row = {"task": "merger", "start": "5", "oracle": "top_k", "spent": 0}
    benchmark_plots.save_plots([row | {"algorithm": name} for name in names], tmp_path)
    assert drawn == ["fixmatch", "fixmatch_reference", "softmatch"]
