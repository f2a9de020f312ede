"""Features that are means over orientations: what they do not depend on, and where there is but one view."""

import pytest
import torch

from anomalymatch.backbones.checkpoint import load_network, save_network
from anomalymatch.backbones.network import Head, Network, build_backbone
from anomalymatch.backbones.test_time_views import ORIENTATIONS, turned
from anomalymatch.errors import ConfigError


def built(orientations, **changes):
    options = {"name": "test_efficientnet", "weights": "none", "channels": 3, "image_size": 32} | changes
    return build_backbone(**options, orientations=orientations)


def some_images(count=3):
    return torch.randint(0, 256, (count, 3, 32, 32), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


def test_the_eight_orientations_are_all_there_are():
    image = torch.arange(9.0).view(1, 1, 3, 3)
    seen = {tuple(turned(image, i).flatten().tolist()) for i in range(8)}
    expected = {
        tuple(view.flatten().tolist())
        for k in range(4)
        for view in (image.rot90(k, (2, 3)), image.rot90(k, (2, 3)).flip(3))
    }
    assert seen == expected
    assert len(seen) == 8


@pytest.mark.parametrize("stages", [False, True])
@pytest.mark.parametrize("count", ORIENTATIONS)
def test_features_do_not_depend_on_the_orientations_that_they_are_means_of(count, stages):
    backbone = built(count, stages=stages)[1].eval()
    images = some_images()
    with torch.inference_mode():
        plain = backbone(images)
        same = [torch.allclose(backbone(turned(images, i)), plain, atol=1e-4) for i in range(8)]
    assert same == [i < count for i in range(8)]


@pytest.mark.parametrize("count", ORIENTATIONS)
def test_the_mean_is_that_of_the_views_one_by_one(count):
    one, several = built(1, stages=True)[1].eval(), built(count, stages=True)[1].eval()
    images = some_images()
    with torch.inference_mode():
        expected = sum(one(turned(images, i)) for i in range(count)) / count
        torch.testing.assert_close(several(images), expected)
        torch.testing.assert_close(several.folded()(images), expected, atol=1e-4, rtol=1e-4)


def test_training_sees_images_as_they_are():
    one, several = (built(count)[1].train() for count in (1, 8))
    images = some_images()
    torch.testing.assert_close(several(images), one(images))


def test_a_checkpoint_brings_the_orientations_back(tmp_path):
    spec, backbone = built(8)
    network = Network(spec, backbone, Head(backbone.features, normalised=True)).eval()
    save_network(network, tmp_path / "weights.safetensors")
    again = load_network(tmp_path / "weights.safetensors")
    assert again.spec.orientations == again.backbone.orientations == 8
    with torch.inference_mode():
        torch.testing.assert_close(again(some_images()), network(some_images()))


@pytest.mark.parametrize("count", [0, 3, 16, -1])
def test_other_numbers_are_refused(count):
    with pytest.raises(ConfigError, match=f"model.orientations is {count}: choose one of 1, 2, 4, 8"):
        built(count)
