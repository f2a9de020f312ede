from anomalymatch.clustering.analysis import Divider, cluster


def test_it_gives_the_groups_with_their_medoids_first(make_patches, make_source, spec):
    source = make_source(24, size=32, unreadable={"im000007"})
    patches, ids = make_patches(source), list(source.ids)
    normals = ids[20:]
    found = cluster(patches, ids, spec, clusters=3, normals=normals, seed=1)
    groups = Divider(patches, spec, 1)(ids, normals, 3)
    assert sorted(id_ for group in groups for id_ in group) == sorted(set(ids) - {"im000007"})
    assert [len(group) for group in groups] == sorted((len(group) for group in groups), reverse=True)
    assert [group[0] for group in groups] == [found.ids[row] for row in found.medoids]
    assert groups == Divider(patches, spec, 1)(ids, normals, 3)
    assert len(Divider(patches, spec, 1)(ids)) >= 1
