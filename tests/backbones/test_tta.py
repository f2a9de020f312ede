"""Test-time augmentation: orientations, crops, and the mean of their features."""

import pytest
import torch
from networks import built, some_images

from anomalymatch.backbones.tta import CROPS, ORIENTATIONS, cropped, reoriented, tta_inputs
from anomalymatch.errors import ConfigError


def test_there_are_eight_orientations():
    image = torch.arange(9.0).view(1, 1, 3, 3)
    found = {tuple(reoriented(image, i).flatten().tolist()) for i in range(8)}
    expected = {
        tuple(turned.flatten().tolist())
        for k in range(4)
        for turned in (image.rot90(k, (2, 3)), image.rot90(k, (2, 3)).flip(3))
    }
    assert found == expected
    assert len(found) == 8


@pytest.mark.parametrize("count", ORIENTATIONS)
def test_averaged_features_do_not_depend_on_the_orientation(count):
    backbone = built(orientations=count, stages=True)[1].eval()
    images = some_images()
    with torch.inference_mode():
        plain = backbone(images)
        same = [torch.allclose(backbone(reoriented(images, i)), plain, atol=1e-4) for i in range(8)]
    assert same == [i < count for i in range(8)]


@pytest.mark.parametrize(
    ("crop", "middle"), [(0, (15.5, 15.5)), (1, (11.5, 11.5)), (2, (11.5, 19.5)), (3, (19.5, 11.5)), (4, (19.5, 19.5))]
)
def test_crop_shows_three_quarters_of_the_side_around_its_middle(crop, middle):
    rows = torch.arange(32.0).view(1, 1, 32, 1).expand(1, 1, 32, 32)
    down, right = cropped(rows, crop), cropped(rows.transpose(2, 3), crop)
    assert down.shape == rows.shape
    assert (down.mean().item(), right.mean().item()) == pytest.approx(middle)
    assert down[0, 0, :, 0].diff()[4:-4].tolist() == pytest.approx([0.75] * 23)  # magnified by 4/3


@pytest.mark.parametrize("size", [17, 84])
def test_crop_stays_within_the_image(size):
    image = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    for crop in range(5):
        part = cropped(image, crop)
        assert part.shape == image.shape
        assert image.min() <= part.min() <= part.max() <= image.max()


@pytest.mark.parametrize(
    ("crops", "orientations"), [*((crops, 2) for crops in CROPS), *((0, count) for count in ORIENTATIONS), (5, 1)]
)
def test_features_are_the_mean_over_the_inputs(crops, orientations):
    one = built(stages=True)[1].eval()
    several = built(stages=True, crops=crops, orientations=orientations)[1].eval()
    images = some_images()
    with torch.inference_mode():
        normalised = (images.float() - one.mean) / one.std
        each = [one(x * one.std + one.mean) for x in tta_inputs(normalised, orientations, crops)]
        assert len(each) == several.pixels_per_pixel == orientations * (1 + crops)
        torch.testing.assert_close(several(images), sum(each) / len(each), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(several.fused()(images), several(images), atol=1e-4, rtol=1e-4)


def test_training_takes_images_as_they_are():
    one, several = built()[1].train(), built(crops=5, orientations=8)[1].train()
    images = some_images()
    torch.testing.assert_close(several(images), one(images))
    several.eval().averages = False
    torch.testing.assert_close(several(images), one.eval()(images))


@pytest.mark.parametrize(
    ("change", "allowed"),
    [({"orientations": n}, "1, 2, 4, 8") for n in (0, 3, 16)] + [({"crops": n}, "0, 1, 5") for n in (-1, 2, 10)],
)
def test_other_numbers_are_errors(change, allowed):
    ((key, value),) = change.items()
    with pytest.raises(ConfigError, match=rf"model\.{key} is {value}: .*{allowed}"):
        built(**change)[1]
