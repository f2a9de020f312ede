import numpy as np
import pytest
from matplotlib.colors import to_hex

from anomalymatch.evaluation.plots import ANOMALY, NORMAL, running_mean, training_figure


def names(axes):
    legend = axes.get_legend()
    return [] if legend is None else [text.get_text() for text in legend.get_texts()]


def colour(line):
    return to_hex(line.get_color()).upper()


def test_each_quantity_has_a_panel_with_a_running_mean_where_it_is_noisy():
    figure = training_figure({"loss": {"": list(map(float, range(100)))}, "pass rate": {"all": [0.0, 1.0]}})
    assert [axes.get_ylabel() for axes in figure.axes] == ["loss", "pass rate"]
    assert [axes.get_xlabel() for axes in figure.axes] == ["", "step"]
    noisy, smooth = figure.axes[0].get_lines()
    assert len(noisy.get_ydata()) == 100
    assert (smooth.get_xdata()[0], smooth.get_ydata()[0]) == (4, 2)
    assert len(figure.axes[1].get_lines()) == 1
    assert [names(axes) for axes in figure.axes] == [[], ["all"]]
    assert training_figure({}).axes[0].texts


@pytest.mark.parametrize("steps", [5, 100])
def test_classes_have_their_own_colours_and_the_legend_names_them_once(steps):
    curves = {"normal": [0.9] * steps, "anomaly": [0.1] * steps}
    (axes,) = training_figure({"precision": curves}).axes
    assert names(axes) == ["normal", "anomaly"]
    drawn = axes.get_lines()[:: 1 if steps == 5 else 2]
    assert [colour(line) for line in drawn] == [NORMAL, ANOMALY]
    unnamed = training_figure({str(place): {"": [1.0, 2.0]} for place in range(8)})
    others = [colour(axes.get_lines()[0]) for axes in unnamed.axes]
    assert not {NORMAL, ANOMALY} & set(others)


def test_single_values_between_gaps_are_dots():
    gaps, whole = [np.nan, 1.0, np.nan], [0.0, 1.0, 0.5]
    (axes,) = training_figure({"precision": {"anomaly": gaps, "normal": whole}}).axes
    assert [line.get_marker() for line in axes.get_lines()] == [".", "None"]


def test_the_running_mean_passes_over_gaps():
    steps, means = running_mean(np.array([1.0, np.nan, 3.0, np.nan, np.nan, np.nan]), 3)
    assert steps.tolist() == [2, 3, 4, 5]
    np.testing.assert_allclose(means, [2.0, 3.0, 3.0, np.nan])
    values = np.random.default_rng(0).normal(size=30)
    slow = [values[step - 4 : step + 1].mean() for step in range(4, 30)]
    np.testing.assert_allclose(running_mean(values, 5)[1], slow)
