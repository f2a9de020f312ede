from dataclasses import replace

import numpy as np
import pytest

from anomalymatch.clustering import analysis as module
from anomalymatch.clustering.analysis import ClusterSpec, ImageGrouper, cluster_images
from anomalymatch.errors import ConfigError, DataError


def test_anomalous_images_are_a_group(make_patches, make_source, spec):
    source = make_source(30)
    found = cluster_images(make_patches(source), source.ids, spec, clusters=2)
    small = {found.ids[i] for i in found.members(1)}
    assert small == {id_ for id_ in source.ids if source.truth[id_] == "rare"}
    assert found.weights.shape == (30, 16)
    np.testing.assert_allclose(found.weights.sum(1), 1.0, rtol=1e-4)
    for k, medoid in enumerate(found.medoids):
        members = found.members(k)
        assert members[0] == medoid
        assert found.distances[medoid] == 0.0
        assert (np.diff(found.distances[members]) >= 0.0).all()
        rows = found.embeddings[members]
        total = (np.linalg.norm(rows[:, None] - rows[None], axis=2) ** 2).sum(1)
        assert total[0] == pytest.approx(total.min())


def test_same_seed_gives_same_groups(make_patches, make_source, spec):
    source = make_source(20)
    patches = make_patches(source, components=6)
    one, two = (cluster_images(patches, source.ids, replace(spec, references=8), seed=3) for _ in range(2))
    assert (one.grouping.labels == two.grouping.labels).all()
    np.testing.assert_array_equal(one.embeddings, two.embeddings)
    assert one.grouping.choice == two.grouping.choice


@pytest.mark.parametrize(
    "change", [{"tau": 0.02}, {"tau": float("inf")}, {"references": 5}, {"lowest": 1.0}, {"neighbourhoods": [1]}]
)
def test_each_setting_changes_the_embeddings(make_patches, make_source, spec, change):
    source = make_source(20)
    patches = make_patches(source)
    before, after = (
        cluster_images(patches, source.ids, s, clusters=2).embeddings for s in (spec, replace(spec, **change))
    )
    assert not np.allclose(before, after)


def test_normal_images_change_the_weights_but_are_not_compared_with_themselves(make_patches, make_source, spec):
    source = make_source(20)
    patches = make_patches(source)
    alone = cluster_images(patches, source.ids, spec, clusters=2)
    normals = source.ids[1:6]
    known = cluster_images(patches, source.ids, spec, clusters=2, normals=normals)
    assert not np.allclose(alone.weights, known.weights)
    assert all(np.ptp(known.weights[known.ids.index(id_)]) > 1e-4 for id_ in normals)
    single = cluster_images(patches, source.ids, spec, clusters=2, normals=normals[:1])
    np.testing.assert_allclose(single.weights[1], 1 / single.weights.shape[1], rtol=0.2)


@pytest.mark.parametrize("method", ["kmeans", "spectral", "hdbscan"])
def test_every_method_runs(make_patches, make_source, spec, method):
    source = make_source(30)
    count = None if method == "hdbscan" else 2
    found = cluster_images(make_patches(source), source.ids, replace(spec, method=method), clusters=count)
    assert found.grouping.tree is None
    assert set(found.grouping.labels) <= {-1, 0, 1, 2, 3, 4}
    assert (np.isnan(found.distances) == (found.grouping.labels == -1)).all()


def test_many_images_are_compared_with_a_sample(make_patches, make_source, spec, monkeypatch):
    monkeypatch.setattr(module, "SAMPLED_REFERENCES", 6)
    seen = []
    scores = module.unsupervised_scores
    monkeypatch.setattr(module, "unsupervised_scores", lambda p, r, low: seen.append(r.tolist()) or scores(p, r, low))
    source = make_source(20)
    cluster_images(make_patches(source), source.ids, spec, clusters=2)
    assert len(seen) == 2  # neighbourhoods
    assert seen[0] == seen[1] == sorted(set(seen[0]))
    assert len(seen[0]) == 6


def test_identical_images_are_one_group(make_patches, make_source, spec, caplog):
    source = make_source(4)
    image = source.read(source.ids[1:2])[0]
    source.load = lambda position: image
    patches = make_patches(source)
    found = cluster_images(patches, source.ids, spec)
    assert found.grouping.labels.tolist() == [0, 0, 0, 0]
    assert "1 of 4 images differ" in caplog.text
    with pytest.raises(ConfigError, match="clusters is 2: of 4 images 1 differ"):
        cluster_images(patches, source.ids, spec, clusters=2)


def test_errors(make_patches, make_source, spec):
    source = make_source(6, unreadable={"im000000"})
    patches = make_patches(source)
    for ids in ([], ["im000001"], ["im000000", "im000001"]):
        with pytest.raises(DataError, match="at least two readable images"):
            cluster_images(patches, ids, spec)
    for count in (0, 6):
        with pytest.raises(ConfigError, match=f"clusters is {count}: of 5 images 5 differ"):
            cluster_images(patches, source.ids, spec, clusters=count)
    with pytest.raises(DataError, match="labelled normal can be read"):
        cluster_images(patches, source.ids, spec, clusters=2, normals=["im000000"])
    with pytest.raises(ConfigError, match="hdbscan finds the number"):
        cluster_images(patches, source.ids, replace(spec, method="hdbscan"), clusters=2)
    assert len(cluster_images(patches, source.ids[:3], spec, clusters=2).ids) == 2


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[("tau", -1.0), ("references", 1), ("most_groups", 1), ("smallest_group", 1), ("lowest", 0.0)],
        *[("lowest", 1.5), ("neighbourhoods", []), ("neighbourhoods", [1, 2]), ("neighbourhoods", [-1])],
        *[("method", "dbscan"), ("criterion", "elbow")],
    ],
)
def test_invalid_values_are_refused(spec, key, value):
    with pytest.raises(ConfigError, match=rf"clustering\.spec\.{key} is"):
        ClusterSpec(**{**spec.__dict__, key: value})


def test_grouper_returns_groups_with_their_medoids_first(make_patches, make_source, spec):
    source = make_source(24, size=32, unreadable={"im000007"})
    patches, ids = make_patches(source), list(source.ids)
    normals = ids[20:]
    found = cluster_images(patches, ids, spec, clusters=3, normals=normals, seed=1)
    groups = ImageGrouper(patches, spec, 1)(ids, normals, 3)
    assert sorted(id_ for group in groups for id_ in group) == sorted(set(ids) - {"im000007"})
    assert [len(group) for group in groups] == sorted((len(group) for group in groups), reverse=True)
    assert [group[0] for group in groups] == [found.ids[row] for row in found.medoids]
    assert len(ImageGrouper(patches, spec, 1)(ids)) >= 1
