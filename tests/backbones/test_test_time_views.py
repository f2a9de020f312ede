"""Features that are means over crops: what a crop shows, and that the mean is of all looks."""

import pytest
import torch

from anomalymatch.backbones.checkpoint import load_network, save_network
from anomalymatch.backbones.network import Head, Network, build_backbone
from anomalymatch.backbones.test_time_views import CROPS, cropped, looks
from anomalymatch.errors import ConfigError


def built(crops, **changes):
    options = {"name": "test_efficientnet", "weights": "none", "channels": 3, "image_size": 32} | changes
    return build_backbone(**options, crops=crops)


def some_images(count=3):
    return torch.randint(0, 256, (count, 3, 32, 32), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


@pytest.mark.parametrize(
    ("crop", "middle"), [(0, (15.5, 15.5)), (1, (11.5, 11.5)), (2, (11.5, 19.5)), (3, (19.5, 11.5)), (4, (19.5, 19.5))]
)
def test_a_crop_shows_three_quarters_of_the_side_around_its_middle(crop, middle):
    rows = torch.arange(32.0).view(1, 1, 32, 1).expand(1, 1, 32, 32)
    down, right = cropped(rows, crop), cropped(rows.transpose(2, 3), crop)
    assert down.shape == rows.shape
    assert (down.mean().item(), right.mean().item()) == pytest.approx(middle)
    assert down[0, 0, :, 0].diff()[4:-4].tolist() == pytest.approx([0.75] * 23)  # magnified by 4/3


@pytest.mark.parametrize("size", [17, 84])
def test_a_crop_of_any_size_stays_within_the_image(size):
    image = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    for crop in range(5):
        part = cropped(image, crop)
        assert part.shape == image.shape
        assert image.min() <= part.min() <= part.max() <= image.max()


@pytest.mark.parametrize("crops", CROPS)
@pytest.mark.parametrize("orientations", [1, 2])
def test_the_mean_is_that_of_the_looks_one_by_one(crops, orientations):
    one = built(0, stages=True)[1].eval()
    several = built(crops, stages=True, orientations=orientations)[1].eval()
    images = some_images()
    with torch.inference_mode():
        normalised = (images.float() - one.mean) / one.std
        each = [one(look * one.std + one.mean) for look in looks(normalised, orientations, crops)]
        assert len(each) == orientations * (1 + crops)
        torch.testing.assert_close(several(images), sum(each) / len(each), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(several.folded()(images), several(images), atol=1e-4, rtol=1e-4)


def test_training_sees_whole_images():
    one, several = (built(count)[1].train() for count in (0, 5))
    images = some_images()
    torch.testing.assert_close(several(images), one(images))
    several.eval().averages = False
    torch.testing.assert_close(several(images), one.eval()(images))


def test_a_checkpoint_brings_the_crops_back(tmp_path):
    spec, backbone = built(5)
    network = Network(spec, backbone, Head(backbone.features, normalised=True)).eval()
    save_network(network, tmp_path / "weights.safetensors")
    again = load_network(tmp_path / "weights.safetensors")
    assert again.spec.crops == again.backbone.crops == 5
    with torch.inference_mode():
        torch.testing.assert_close(again(some_images()), network(some_images()))


@pytest.mark.parametrize("count", [-1, 2, 4, 10])
def test_other_numbers_are_refused(count):
    with pytest.raises(ConfigError, match=f"model.crops is {count}: choose one of 0, 1, 5"):
        built(count)
