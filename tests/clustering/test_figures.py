import numpy as np
import pytest

from anomalymatch.clustering.figures import (
    check_map,
    dendrogram_figure,
    flat_map,
    group_sheet,
    heat,
    map_figure,
)
from anomalymatch.clustering.groups import cut_tree, ward_tree
from anomalymatch.errors import ConfigError


def weights(peak, side=4):
    values = np.full(side * side, 0.01, dtype=np.float32)
    values[peak] = 1.0
    return values


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_the_heat_is_where_the_weight_is(channels):
    image = np.full((40, 80, channels), 100, dtype=np.uint8)
    warm = heat(image, weights(0), "stretch")
    assert warm.shape == (40, 80, 3)
    assert (warm[:5, :10] != 100).any()
    assert (warm[20:, 40:] == 100).all()
    assert (heat(image, np.full(16, 1 / 16, dtype=np.float32), "stretch") == 100).all()
    cropped = heat(image, weights(0), "crop")
    assert (cropped[:5, 20:25] != 100).any()
    assert (cropped[:, :20] == 100).all()  # outside of the square at the centre
    padded = heat(image, weights(4), "pad")  # the patch lies at rows 20 to 40 of 80, of which the first 20 are border
    assert (padded[:5, :10] != 100).any()
    assert (padded[25:, 40:] == 100).all()


def test_a_sheet_has_images_above_their_heat():
    images = [np.full((30 + 5 * k, 40, 3), 50, dtype=np.uint8) for k in range(11)]
    values = np.stack([weights(k) for k in range(11)])
    one, eight, eleven = (
        group_sheet(images[:n], values[:n], [f"im{k}" for k in range(n)], "pad").height for n in (1, 8, 11)
    )
    assert one == eight < eleven


@pytest.mark.parametrize("count", [2, 3, 70])
def test_the_dendrogram_is_cut_where_the_groups_are(count):
    rows = np.random.default_rng(0).normal(size=(count, 3))
    tree = ward_tree(rows)
    figure = dendrogram_figure(tree, cut_tree(tree, 2))
    line = figure.axes[0].lines[-1].get_ydata()[0]
    assert (tree[:, 2] > line).sum() == 1
    assert len(dendrogram_figure(tree, cut_tree(tree, 1)).axes[0].lines) == min(count, 40) - 1


def test_the_map_has_every_image():
    rows = np.random.default_rng(0).normal(size=(20, 5))
    places = flat_map(rows, "pca", seed=0)
    assert places.shape == (20, 2)
    assert places[:, 0].std() >= places[:, 1].std()
    labels = np.arange(20) % 9 - 1
    figure = map_figure(places, labels, np.arange(1, 9))
    assert sum(len(c.get_offsets()) for c in figure.axes[0].collections) == 20
    assert (flat_map(np.ones((3, 5)), "pca", seed=0) == 0.0).all()
    assert flat_map(np.array([[0.0], [1.0]]), "pca", seed=0).shape == (2, 2)


def test_a_map_that_is_not_there_is_refused(monkeypatch):
    with pytest.raises(ConfigError, match="map is 'tsne'"):
        check_map("tsne")
    monkeypatch.setattr("anomalymatch.clustering.figures.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install 'anomalymatch\\[umap\\]'"):
        check_map("umap")


def test_umap_where_it_is_installed():
    pytest.importorskip("umap")
    rows = np.random.default_rng(0).normal(size=(30, 5))
    one, two = (flat_map(rows, "umap", seed=0) for _ in range(2))
    np.testing.assert_array_equal(one, two)
