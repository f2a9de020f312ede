from itertools import combinations

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from anomalymatch.clustering import patches as module
from anomalymatch.clustering.patches import Bags
from anomalymatch.data.rendering import FITS, Rendering
from anomalymatch.errors import ConfigError


def test_patches_are_averaged_resized_and_normalised_levels(make_patches, make_source):
    source = make_source(3)
    embedding = make_patches(source)
    bags = embedding.bags(source.ids)
    backbone = embedding.embedding.backbone().eval()
    images = torch.from_numpy(np.stack(source.read(source.ids))).permute(0, 3, 1, 2).float()
    with torch.inference_mode():
        maps = backbone.body.forward_intermediates(
            (images - backbone.mean) / backbone.std, indices=[2, 3], intermediates_only=True
        )
    side = maps[0].shape[-1]
    assert bags.grid == side
    expected = []
    for level in maps:
        padded = F.pad(level, (1, 1, 1, 1))
        counts = F.pad(torch.ones_like(level), (1, 1, 1, 1))
        total = sum(padded[..., i : i + level.shape[-2], j : j + level.shape[-1]] for i in range(3) for j in range(3))
        inside = sum(counts[..., i : i + level.shape[-2], j : j + level.shape[-1]] for i in range(3) for j in range(3))
        resized = F.interpolate(total / inside, size=(side, side), mode="bilinear", antialias=True)
        expected.append(resized / resized.norm(dim=1, keepdim=True))
    rows = torch.cat(expected, 1).permute(0, 2, 3, 1).reshape(3, side * side, -1)
    torch.testing.assert_close(bags.patches.float(), rows, rtol=1e-2, atol=2e-3)


def test_cached_patches_are_read_back(make_patches, make_source, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_IMAGES", 4)
    source = make_source(10, unreadable={"im000003"})
    first = make_patches(source).bags(source.ids)
    reads = source.reads
    again = make_patches(source).bags(source.ids)
    assert source.reads == reads
    assert torch.equal(first.patches, again.patches)
    assert (first.grid, first.ids) == (again.grid, again.ids)
    assert first.ids == [id_ for id_ in source.ids if id_ != "im000003"]
    assert [reject.id for reject in again.rejects] == ["im000003"]
    longer = make_patches(make_source(10, unreadable={"im000003"})).bags([*source.ids[:8], "im000009"])
    assert longer.ids[-1] == "im000009"
    torch.testing.assert_close(longer.patches[-1], first.patches[-1])


@pytest.mark.parametrize("change", [{"levels": [3]}, {"grid": 2}, {"average": 1}, {"image_size": 48}])
def test_each_setting_changes_the_patches(make_patches, make_source, change):
    source = make_source(3)
    before, after = (make_patches(source, **options).bags(source.ids).patches for options in ({}, change))
    assert before.shape != after.shape or not torch.equal(before, after)


def test_fit_of_wide_images_changes_the_patches_and_their_cache(make_patches, make_source):
    image = np.random.default_rng(0).integers(0, 256, (24, 60, 3), dtype=np.uint8)
    found = []
    for fit in FITS:
        source = make_source(1, rendering=Rendering(fit=fit))
        source.load = lambda position: image
        found.append(make_patches(source).bags(source.ids).patches)
        np.testing.assert_array_equal(source.read(source.ids)[0], image)  # shown without distortion
    assert not any(torch.equal(one, other) for one, other in combinations(found, 2))


def test_average_of_neighbours_by_hand():
    maps = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]])
    bags = Bags(["a", "b"], torch.stack([maps, 10 * maps]).reshape(2, 9, 1).half(), [])
    assert bags.average(1) is bags
    means = bags.average(3).patches
    assert means.dtype == torch.float16
    assert means[0, :, 0].tolist() == [3.0, 3.5, 4.0, 4.5, 5.0, 5.5, 6.0, 6.5, 7.0]  # the corner is (1 + 2 + 4 + 5) / 4
    torch.testing.assert_close(means[1], 10 * means[0])
    torch.testing.assert_close(bags.average(5).patches[1, :, 0].reshape(3, 3), torch.full((3, 3), 50.0).half())
    assert Bags(["a"], torch.ones(1, 1, 4).half(), []).average(5).patches.tolist() == [[[1.0] * 4]]


def test_projection_applies_to_other_images(make_patches, make_source):
    source = make_source(12)
    plain = make_patches(source)
    bags = plain.bags(source.ids)
    assert plain.fit_projection(bags, seed=0)(bags) is bags
    shapes = {}
    for whitening in (0.0, 1.0):
        embedding = make_patches(source, components=5, whitening=whitening)
        project = embedding.fit_projection(bags, seed=0)
        shapes[whitening] = project(bags.select(source.ids[:4])).patches
        torch.testing.assert_close(shapes[whitening], project(bags).patches[:4])
        assert shapes[whitening].shape[2] == 5
    assert not torch.equal(shapes[0.0], shapes[1.0])


def test_projection_of_a_sample_depends_on_the_seed_only(make_patches, make_source, monkeypatch):
    monkeypatch.setattr(module, "SAMPLE_PATCHES", 50)
    source = make_source(12)
    embedding = make_patches(source, components=4)
    bags = embedding.bags(source.ids)
    one, same, other = (embedding.fit_projection(bags, seed=seed)(bags).patches for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_patches_of_a_transformer_are_its_tokens(make_patches, make_source):
    source = make_source(2)
    bags = make_patches(source, name="test_vit", levels=[0, 1], image_size=160).bags(source.ids)
    assert bags.patches.shape[0] == 2
    assert bags.grid**2 == bags.patches.shape[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"levels": []}, "name at least one"),
        ({"levels": [2, 2]}, "none twice"),
        ({"levels": [2, 9]}, "the backbone has no such feature maps"),
        ({"grid": 0}, "patches.grid is 0"),
        ({"average": 2}, "patches.average is 2"),
        ({"components": 0}, "patches.components is 0"),
        ({"whitening": 2.0}, "patches.whitening is 2.0"),
    ],
)
def test_invalid_values_are_refused(make_patches, make_source, options, message):
    source = make_source(2)
    with pytest.raises(ConfigError, match=message):
        make_patches(source, **options).bags(source.ids)


def test_without_readable_images_the_result_is_empty(make_patches, make_source):
    source = make_source(2, unreadable={"im000000", "im000001"})
    bags = make_patches(source).bags(source.ids)
    assert (bags.ids, len(bags.patches), len(bags.rejects)) == ([], 0, 2)
