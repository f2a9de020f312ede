"""Test the tables, plots and recipes of the benchmark on rows with known numbers."""

import benchmark_plots
import benchmark_tables as tables
import numpy as np
import pytest
from recipes import RECIPES
from scipy.stats import ttest_1samp


def row(algorithm, task="x", draw=0, **columns):
    return {"algorithm": algorithm, "task": task, "draw": draw, "seconds": 2, "peak_mb": 300, **columns}


def lines(table):
    return table.splitlines()[2:]


def test_gains_over_the_probe_are_paired_by_draw():
    rows = [
        row("a", "x", ap=0.3, probe_ap=0.1),
        row("a", "x", ap=0.6, probe_ap=0.5),
        row("a", "y", ap=0.4, probe_ap=0.6),
        row("b", "x", ap=0.1, probe_ap=0.1),
    ]
    first, second = lines(tables.gain_over_probe(rows))
    assert first.startswith("| a | 2 | 3 | +0.033 ± 0.517 | -0.025 ± 2.224 | ")  # the tasks: +0.15 and -0.20
    assert "| y: -0.200 | 2.0 | 300 |" in first
    p_tasks = ttest_1samp([0.15, -0.2], 0.0).pvalue  # the mean gains of x and y
    assert f" | {p_tasks:.2g} | y: -0.200" in first
    assert "| b | 1 | 1 | +0.000 | +0.000 | not run | not run | x: +0.000 |" in second
    assert lines(tables.by_task(rows, "ap")) == [
        "| x | 0.450 ± 1.906 | 0.100 |",
        "| y | 0.400 | not run |",
        "| all | 0.425 | not run |",
    ]


@pytest.mark.parametrize("name", ["prototype", "nearest labelled", "label spreading"])
def test_every_head_ranks_images_like_the_anomalies_first(name):
    angles = np.deg2rad(np.r_[np.linspace(0, 20, 15), np.linspace(90, 160, 60)])
    rows = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    scores = RECIPES[name].head(None).score(rows, rows[[3, 9]], rows[20::4])
    assert scores.shape == (75,)
    assert scores[:15].min() > scores[15:].max()


def test_trainings_are_compared_on_tasks_with_equally_many_draws():
    scene = {"size": 84, "start": "5", "oracle": "top_k", "probe_ap": 0.5, "spent": 0, "found": 0}
    rows = [row("fixmatch", "hourglass", draw, ap=0.6 + draw / 5, **scene) for draw in range(2)]
    rows += [row("fixmatch", "cliff", ap=0.4, **scene)]
    plain = [row("plain probe", "cliff", ap=0.3, **scene), row("plain probe", "hourglass", ap=0.2, **scene)]
    four, first = (part for part in tables.summary(rows + plain).split("\n\n") if "p of tasks" in part)
    assert "| fixmatch | 1 | 2 | +0.200 ± 1.271 | +0.200 | 0.3 | not run | hourglass: +0.200 |" in four
    assert "| plain probe | 2 | 2 | -0.250" in four
    assert "| fixmatch | 2 | 2 | +0.000" in first
    assert "plain probe" not in first


def test_the_probe_that_a_training_is_compared_with_shares_its_backbone_settings():
    assert RECIPES["fixmatch, 5 crops"].backbone == ("model.crops=5",)
    assert RECIPES["fixmatch, 128 px"].backbone == ("model.image_size=128",)
    assert RECIPES["fixmatch, threshold 0.6"].backbone == ()


def test_a_training_is_compared_with_frozen_probes_at_its_image_size():
    table = tables.gain_over_frozen([
        row("plain probe", size="150", ap="0.9"),  # larger images
        row("plain probe, 96 px", size="96", ap="0.1"),
        row("probe, labels alone", size="96", ap="0.2"),
        row("probe, labels alone", draw=1, size="96", ap="0.4"),
        row("fixmatch", size="96", ap="0.5"),
        row("fixmatch", draw=1, size="96", ap="0.5"),
        row("probe, 1 round, 96 px", draw=2, size="96", ap="0.3"),
        row("softmatch", draw=2, size="96", ap="0.5"),
        row("fixmatch, 128 px", size="128", ap="0.5"),  # an ablation
    ])  # fmt: skip
    first, second = lines(table)
    assert first == "| fixmatch | +0.400 (1) | +0.200 ± 1.271 (2) | not run | not run |"
    assert second == "| softmatch | not run | not run | +0.200 (1) | not run |"


def test_ablations_are_compared_on_common_draws():
    table = tables.ablation_table([
        row("fixmatch", draw=0, ap=0.5, seconds=10),
        row("fixmatch", draw=1, ap=0.3, seconds=10),
        row("fixmatch, cold", draw=0, ap=0.2, seconds=20),
        row("fixmatch, cold", draw=2, ap=0.9, seconds=1),
        row("fixmatch_reference", draw=0, ap=0.1, seconds=1),
        row("fixmatch of 200", draw=0, ap=0.4, seconds=10),
        row("fixmatch of 200, cold", draw=0, ap=0.1, seconds=5),
    ])  # fmt: skip
    assert lines(table) == [
        "| fixmatch, cold | 0.500 | 0.200 | x -0.300 | 2.00 |",
        "| fixmatch of 200, cold | 0.400 | 0.100 | x -0.300 | 0.50 |",
    ]


def test_predicted_anomalies_are_divided_by_true_anomalies():
    values = [("10", "30", "0.2"), ("20", "20", "0.1"), ("0", "5", "0.9"), ("", "", "")]
    rows = [row("a", spent="0", there=there, promised=promise, log_loss=loss) for there, promise, loss in values]
    assert lines(tables.calibration_table(rows)) == ["| a | 0 | 1 | 2.0 | 0.1500 |"]


def test_found_anomalies_are_compared_on_common_draws():
    found = {
        ("plain probe", "merger"): (10, 20, 90),
        ("plain probe", "orange"): (0, 100),
        ("plain probe", "spirals"): (0,),
        ("probe", "merger"): (30, 30),
        ("probe", "orange"): (50, 100),
        ("probe", "spirals"): (5,),  # the ratio is undefined
        ("kNN", "edge-on"): (7,),
    }
    table = tables.relative_to_plain([
        row(*names, draw, found=count) for names, counts in found.items() for draw, count in enumerate(counts)
    ])  # fmt: skip
    assert "| plain probe | 2 | 5 | 1.00 |" in table
    assert "| probe | 2 | 4 | 1.75 |" in table  # 60 / 30 and 150 / 100
    assert "| kNN | 0 | 0 | not run |" in table


def test_plots_leave_out_ablations(monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(benchmark_plots, "gain_figure", lambda rows: drawn.extend(row["algorithm"] for row in rows))
    monkeypatch.setattr(benchmark_plots, "save", lambda figure, path: None)
    names = "fixmatch", "fixmatch, cold", "fixmatch_reference", "softmatch"
    benchmark_plots.save_plots([row(name, start="5", oracle="top_k", spent=0) for name in names], tmp_path)
    assert drawn == ["fixmatch", "fixmatch_reference", "softmatch"]
