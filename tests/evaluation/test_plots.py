import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from matplotlib.colors import to_hex
from PIL import Image

from anomalymatch.evaluation.metrics import curves
from anomalymatch.evaluation.plots import (
    ANOMALY,
    NORMAL,
    discovery_figure,
    histogram_figure,
    metrics_figure,
    pr_figure,
    roc_figure,
    running_mean,
    save,
    training_figure,
)

RNG = np.random.default_rng(0)
TRUTH = RNG.random(500) < 0.1
SCORES = RNG.normal(size=500) + TRUTH


def make_curves(count):
    return {cycle: curves(SCORES + cycle * TRUTH, TRUTH) for cycle in range(count)}


def legend(figure, place=0):
    found = figure.axes[place].get_legend()
    return [] if found is None else [text.get_text() for text in found.get_texts()]


def colour(line):
    return to_hex(line.get_color()).upper()


def lines(figure, axes=0):
    return figure.axes[axes].get_lines()


@pytest.mark.parametrize(("draw", "measure"), [(roc_figure, "AUROC"), (pr_figure, "AP")])
def test_curves_by_cycle(draw, measure):
    by_cycle = make_curves(3)
    figure = draw(by_cycle)
    assert len(lines(figure)) == 4
    names = legend(figure)
    assert "chance" in names[0]
    value = by_cycle[2].auroc if measure == "AUROC" else by_cycle[2].ap
    assert names[3] == f"cycle 2: {measure} {value:.3f}"
    assert len({to_hex(line.get_color()) for line in lines(figure)}) == 4


def test_named_methods_undefined_cycles_and_many_cycles():
    undefined = curves(SCORES, np.zeros(500, dtype=bool))
    assert legend(roc_figure({"probe": undefined})) == ["chance", "probe: undefined"]
    assert legend(pr_figure({"probe": undefined})) == ["probe: undefined"]
    assert "nothing to show" in roc_figure({}).axes[0].texts[0].get_text()
    many = roc_figure(make_curves(12))
    assert len(lines(many)) == 13
    assert len(legend(many)) == 8
    assert legend(many)[-1].startswith("cycle 11")


def test_histogram_marks_labels_and_truth():
    figure = histogram_figure(SCORES, labelled_anomalies=SCORES[:3], true_anomalies=SCORES[TRUTH], bins=20)
    main, *strips = figure.axes[0], *figure.axes[0].child_axes
    assert main.get_yscale() == "log"
    assert legend(figure) == ["pool (500)", f"true anomalies in the pool ({TRUTH.sum()})"]
    pool = main.patches[0].get_data()
    assert pool.edges.size == 21
    assert pool.values[pool.values >= 1].sum() == 500
    assert len(strips) == 1
    assert len(strips[0].collections[0].get_segments()) == 3
    assert "labelled anomaly\n(3)" in [text.get_text() for text in strips[0].get_yticklabels()]


@pytest.mark.parametrize("scores", [np.empty(0), np.ones(5), np.full(4, 30.0), np.array([np.inf, 1.0, -np.inf, 2.0])])
def test_histogram_of_odd_scores(scores, tmp_path):
    save(histogram_figure(scores, labelled_normals=scores), tmp_path / "scores.png")
    assert (tmp_path / "scores.png").stat().st_size > 1000


def test_histogram_of_probabilities_spans_zero_to_one():
    edges = histogram_figure(np.array([0.2, 0.4])).axes[0].patches[0].get_data().edges
    assert (edges[0], edges[-1]) == (0, 1)


def test_discovery_with_its_bounds():
    figure = discovery_figure([500, 520, 540], [5, 12, 20], total=100, images=10_000)
    by_name = {line.get_label(): line for line in lines(figure)}
    assert by_name["found"].get_ydata().tolist() == [5, 12, 20]
    assert by_name["every label an anomaly"].get_ydata()[-1] == 45
    assert by_name["random labels (expected)"].get_ydata()[-1] == pytest.approx(5 + 40 * 95 / 9500)
    assert by_name["all 100 anomalies"].get_ydata()[0] == 100
    figure.canvas.draw()
    (axes,) = figure.axes
    assert axes.get_legend().get_window_extent().y1 < axes.get_window_extent().y0  # no point is hidden


def test_discovery_without_a_truth_or_with_a_far_ceiling():
    assert legend(discovery_figure([0, 50], [0, 12])) == ["found"]
    assert not any("all" in name for name in legend(discovery_figure([0, 50], [0, 12], total=5000)))
    assert len(lines(discovery_figure([], [], total=5))) == 1
    with pytest.raises(ValueError, match="expected one count per cycle"):
        discovery_figure([1, 2], [1])


def test_metrics_over_cycles_leave_gaps():
    rows = [{"cycle": 1, "auroc": 0.9, "ap": float("nan")}, {"cycle": 2, "auroc": 0.95, "ap": 0.4}, {"cycle": 3}]
    figure = metrics_figure(rows)
    assert legend(figure) == ["AUROC", "AP"]
    assert lines(figure)[0].get_xdata().tolist() == [1, 2, 3]
    np.testing.assert_array_equal(lines(figure)[1].get_ydata(), [np.nan, 0.4, np.nan])
    assert legend(metrics_figure(rows, names=["ap"])) == ["AP"]
    assert metrics_figure([]).axes[0].texts


def test_save(tmp_path):
    path = tmp_path / "plots" / "roc.png"
    save(roc_figure(make_curves(2)), path)
    with Image.open(path) as picture:
        assert picture.size == (1024, 640)
        assert len(picture.convert("RGB").getcolors(100_000)) > 20
    assert [file.name for file in path.parent.iterdir()] == ["roc.png"]
    save(roc_figure({}), tmp_path / "roc.svg")
    assert "<svg" in (tmp_path / "roc.svg").read_text()


def test_figures_are_drawn_in_threads_without_pyplot(tmp_path):
    had_pyplot = "matplotlib.pyplot" in sys.modules
    by_cycle = make_curves(2)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda name: save(roc_figure(by_cycle), tmp_path / f"{name}.png"), range(4)))
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1
    assert had_pyplot or "matplotlib.pyplot" not in sys.modules


def test_training_figure_has_a_panel_for_each_quantity_and_running_means():
    figure = training_figure({"loss": {"": list(map(float, range(100)))}, "pass rate": {"all": [0.0, 1.0]}})
    assert [axes.get_ylabel() for axes in figure.axes] == ["loss", "pass rate"]
    assert [axes.get_xlabel() for axes in figure.axes] == ["", "step"]
    noisy, smooth = figure.axes[0].get_lines()
    assert len(noisy.get_ydata()) == 100
    assert (smooth.get_xdata()[0], smooth.get_ydata()[0]) == (4, 2)
    assert len(figure.axes[1].get_lines()) == 1
    assert [legend(figure, place) for place in (0, 1)] == [[], ["all"]]
    assert training_figure({}).axes[0].texts


@pytest.mark.parametrize("steps", [5, 100])
def test_training_figure_has_class_colours_and_one_legend_entry_each(steps):
    drawn = {"normal": [0.9] * steps, "anomaly": [0.1] * steps}
    figure = training_figure({"precision": drawn})
    assert legend(figure) == ["normal", "anomaly"]
    assert [colour(line) for line in lines(figure)[:: 1 if steps == 5 else 2]] == [NORMAL, ANOMALY]
    unnamed = training_figure({str(place): {"": [1.0, 2.0]} for place in range(8)})
    others = [colour(axes.get_lines()[0]) for axes in unnamed.axes]
    assert not {NORMAL, ANOMALY} & set(others)


def test_training_figure_draws_single_values_as_dots():
    gaps, whole = [np.nan, 1.0, np.nan], [0.0, 1.0, 0.5]
    (axes,) = training_figure({"precision": {"anomaly": gaps, "normal": whole}}).axes
    assert [line.get_marker() for line in axes.get_lines()] == [".", "None"]


def test_running_mean_ignores_gaps():
    steps, means = running_mean(np.array([1.0, np.nan, 3.0, np.nan, np.nan, np.nan]), 3)
    assert steps.tolist() == [2, 3, 4, 5]
    np.testing.assert_allclose(means, [2.0, 3.0, 3.0, np.nan])
    values = np.random.default_rng(0).normal(size=30)
    slow = [values[step - 4 : step + 1].mean() for step in range(4, 30)]
    np.testing.assert_allclose(running_mean(values, 5)[1], slow)
