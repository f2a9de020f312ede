import numpy as np
import pytest

from anomalymatch.clustering.figures import (
    dendrogram_figure,
    flat_map,
    group_sheet,
    map_figure,
    scale_weights,
)
from anomalymatch.clustering.groups import cut_tree, ward_tree
from anomalymatch.errors import ConfigError


def weights(peak, side=4):
    values = np.full(side * side, 0.01, dtype=np.float32)
    values[peak] = 1.0
    return values


def test_weights_are_scaled_for_each_image():
    np.testing.assert_allclose(scale_weights(weights(5)), np.eye(1, 16, 5).reshape(4, 4), atol=1e-7)
    assert not scale_weights(np.full(16, 1 / 16, dtype=np.float32)).any()


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


def test_an_unknown_map_is_refused():
    with pytest.raises(ConfigError, match="map is 'tsne'"):
        flat_map(np.ones((3, 5)), "tsne", seed=0)


def test_umap_of_the_same_seed_is_the_same():
    rows = np.random.default_rng(0).normal(size=(30, 5))
    one, two = (flat_map(rows, "umap", seed=0) for _ in range(2))
    np.testing.assert_array_equal(one, two)
