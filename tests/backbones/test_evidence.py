"""Evidence maps: exact sums, values by hand, symmetry, and a defect that lights up where it is."""

import logging

import numpy as np
import pytest
import torch
from networks import built, network_of, some_images
from torch import nn

from anomalymatch.algorithms.probe.regression import fit_logistic
from anomalymatch.backbones.evidence import evidence_map, locate_evidence, write_evidence_sheet
from anomalymatch.backbones.features import normalise_last
from anomalymatch.backbones.network import Backbone, Head, Network, NetworkSpec, anomaly_logit
from anomalymatch.backbones.stages import stage_evidence, stage_statistics
from anomalymatch.backbones.tta import ORIENTATIONS, cropped, reoriented, restored
from anomalymatch.errors import ConfigError


def with_random_head(spec, backbone, *, normalised=True, seed=0):
    head = Head(backbone.features, normalised=normalised, stage_features=backbone.stage_features)
    generator = torch.Generator().manual_seed(seed)
    head.set_probe(torch.randn(backbone.width, generator=generator), 0.7)
    return Network(spec, backbone, head).eval()


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("test_efficientnet", {"stages": True, "orientations": 8, "crops": 5}),
        ("test_efficientnet", {"orientations": 2, "crops": 1}),
        ("test_efficientnet+test_resnet", {"orientations": 2, "crops": 1}),
        ("test_convnext", {"stages": True}),
        ("test_resnet", {"stages": True, "crops": 5}),
        ("test_vit", {"stages": True, "orientations": 4}),
        ("test_vit2", {"stages": True, "crops": 1}),
        ("test_efficientnet", {"stages": True, "orientations": 2, "crops": 1, "tiles": 2}),
        ("test_vit", {"tiles": 2}),
        ("test_efficientnet+test_resnet", {"tiles": 2}),
    ],
)
@pytest.mark.parametrize("normalised", [True, False])
def test_parts_add_up_to_the_log_odds(name, changes, normalised):
    network = with_random_head(*built(name, **changes), normalised=normalised)
    side = network.spec.input_size
    for image in some_images(2, size=side):
        with torch.inference_mode():
            logit = anomaly_logit(network(image[None])).item()
        found = locate_evidence(network, image)
        assert found.cells.shape == (side, side)
        assert found.cells.sum(dtype=np.float64) + found.rest + found.intercept == pytest.approx(logit, abs=2e-4)
        assert found.logit == pytest.approx(logit, abs=2e-4)
        assert found.local.mean(dtype=np.float64) == pytest.approx(logit, abs=1e-3)
        assert found.intercept == pytest.approx(0.7)
        # Only a class token has no place; patch tokens, as other cells, explain everything.
        assert (abs(found.rest) < 1e-4) == (name != "test_vit")


def test_the_evidence_of_two_networks_that_are_averaged_is_the_mean_of_theirs():
    words = {"stages": True, "orientations": 2, "crops": 1}
    network, second = (with_random_head(*built("test_efficientnet", **words), seed=seed) for seed in (0, 1))
    (image,) = some_images(1)
    apart = [locate_evidence(each, image) for each in (network, second)]
    network.second = second
    both = locate_evidence(network, image)
    np.testing.assert_allclose(both.cells, (apart[0].cells + apart[1].cells) / 2, atol=1e-6)
    with torch.inference_mode():
        assert both.logit == pytest.approx(anomaly_logit(network(image[None])).item(), abs=2e-4)


class TwoByTwo(nn.Module):
    """Body whose last map is the image, and whose features are the means of its channels."""

    num_features = 2

    def forward(self, x):
        return x.mean((2, 3))

    forward_head = forward

    def forward_intermediates(self, x, indices):
        return x, [x]


def toy(body, size=2):
    backbone = Backbone(body, mean=[0.0, 0.0], std=[1 / 255, 1 / 255])  # pixels stay as they are
    spec = NetworkSpec("toy", (), 2, size, None, (0.0, 0.0), (1.0, 1.0), "none", False, 1, 0)
    head = Head(2, normalised=True)
    head.set_probe(torch.tensor([1.0, -2.0]), 0.5)
    return Network(spec, backbone, head).eval()


def test_values_by_hand():
    image = torch.tensor([[[12, 0], [0, 0]], [[4, 4], [4, 4]]], dtype=torch.uint8)  # means 3 and 4, norm 5
    found = locate_evidence(toy(TwoByTwo()), image)
    np.testing.assert_allclose(found.cells, np.array([[12 - 8, -8], [-8, -8]]) / 5 / 4, atol=1e-6)
    assert (found.rest, found.intercept) == (pytest.approx(0, abs=1e-6), 0.5)
    assert found.logit == pytest.approx((3 - 8) / 5 + 0.5)
    np.testing.assert_allclose(found.local, found.cells * 4 + 0.5, atol=1e-6)


def test_a_cell_is_spread_over_its_pixels():
    image = torch.zeros(2, 4, 4, dtype=torch.uint8)
    image[:, :2, 2:] = 1

    class Coarse(TwoByTwo):
        def forward_intermediates(self, x, indices):
            return nn.functional.avg_pool2d(x, 2), [x]

    found = locate_evidence(toy(Coarse(), 4), image)
    assert np.ptp(found.cells[:2, 2:]) < 1e-7
    assert (found.cells != 0).sum() == 4


def test_evidence_of_stages_by_hand():
    first = torch.tensor([[[[1.0, 3.0], [1.0, 3.0]], [[0.0, 0.0], [0.0, 4.0]]]])  # deviations 1 and 3 ** 0.5
    weights = torch.tensor([1.0, 2.0, 10.0, 100.0])
    (found,) = stage_evidence([first], weights)
    equal = 0.5 / 4  # the deviation of channel 0 comes from all cells alike
    lone = 2 * 3**0.5 / 2  # of channel 1: nine of twelve parts from the last cell
    few, many = equal + lone / 12, equal + 9 * lone / 12
    expected = np.array([[few, few + 3], [few, many + 3 + 80]])  # the maxima: 10 * 0.6 in two cells, and 100 * 0.8
    np.testing.assert_allclose(found[0], expected, atol=1e-5)
    assert found.sum().item() == pytest.approx((stage_statistics([first])[0] @ weights).item())


def test_constant_maps_are_evidence_everywhere():
    (found,) = stage_evidence([torch.ones(1, 3, 2, 2)], torch.arange(6.0))
    np.testing.assert_allclose(found[0], found.mean().item(), rtol=1e-5)


@pytest.mark.parametrize("orientation", range(8))
def test_evidence_turns_with_the_image(orientation):
    network = with_random_head(*built(stages=True, orientations=8, crops=5))
    image = some_images(1)
    plain = torch.from_numpy(locate_evidence(network, image[0]).cells)[None]
    turned = torch.from_numpy(locate_evidence(network, reoriented(image, orientation)[0]).cells)[None]
    torch.testing.assert_close(restored(turned, orientation), plain, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("count", ORIENTATIONS)
def test_restored_undoes_reoriented(count):
    maps = torch.rand(2, 5, 5)
    for i in range(count):
        torch.testing.assert_close(restored(reoriented(maps[:, None], i)[:, 0], i), maps)


def test_crops_are_put_back_where_they_were_cut():
    class Brightest(TwoByTwo):
        def forward_intermediates(self, x, indices):
            return x, [x]

    image = torch.zeros(2, 16, 16, dtype=torch.uint8)
    image[0, 13, 2] = 200
    network = toy(Brightest(), 16)
    plain = network.backbone
    network.backbone = Backbone(plain.body, [0.0, 0.0], [1 / 255, 1 / 255], crops=5).eval()
    found = locate_evidence(network, image).cells
    assert np.unravel_index(found.argmax(), found.shape) == (13, 2)
    near = np.zeros_like(found, dtype=bool)
    near[11:, :5] = True
    assert np.abs(found[~near]).max() < 1e-6
    assert cropped(image[None].float(), 2).max() == 0  # the corner at the top right does not see it


def defective(rng, corner=None):
    """A noisy surface, with a dark spot in one corner or without."""
    image = np.clip(rng.normal(120, 6, (96, 96, 1)), 0, 255).astype(np.uint8).repeat(3, axis=2)
    if corner is not None:
        y, x = (12 + 60 * corner[0], 12 + 60 * corner[1])
        image[y : y + 10, x : x + 10] = 10
    return image


def test_a_defect_lights_up_its_corner():
    spec, backbone = built("tf_efficientnet_lite0", weights="bundled", image_size=96, stages=True)
    rng = np.random.default_rng(0)
    corners = [(0, 0), (0, 1), (1, 0), (1, 1)]
    images = [defective(rng, corner) for corner in corners] + [defective(rng) for _ in range(12)]
    with torch.inference_mode():
        rows = backbone.eval()(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)).numpy()
    rows = normalise_last(rows, backbone.features)
    probe = fit_logistic(rows[:4], rows[4:], inverse_regularisation=10.0)
    head = Head(backbone.features, normalised=True, stage_features=backbone.stage_features)
    head.set_probe(torch.from_numpy(probe.coefficients), probe.intercept)
    network = Network(spec, backbone, head).eval()
    for down, right in corners:
        local = evidence_map(network, defective(rng, (down, right)), "stretch")
        quadrants = local.reshape(2, 48, 2, 48).mean((1, 3))
        assert np.unravel_index(quadrants.argmax(), (2, 2)) == (down, right)
        assert quadrants[down, right] > 2 * np.delete(quadrants.flatten(), 2 * down + right).max()


def test_without_feature_maps_there_is_a_sentence_and_no_sheet(tmp_path, caplog):
    class Plain(nn.Module):
        num_features = 2

        def forward(self, x):
            return x.mean((2, 3))

    network = toy(Plain())
    with pytest.raises(ConfigError, match="no feature maps"):
        locate_evidence(network, torch.ones(2, 2, 2, dtype=torch.uint8))
    with caplog.at_level(logging.INFO):
        write_evidence_sheet(tmp_path / "a.png", network, [np.ones((2, 2, 2), np.uint8)], ["one"], "stretch")
    assert not list(tmp_path.iterdir())
    assert "a.png" in caplog.text


def test_sheet_of_any_sizes(tmp_path):
    network = network_of().eval()
    images = [np.full((20 + k, 30, 3), 7 * k, np.uint8) for k in range(26)]
    for count in (0, 1, 26):
        write_evidence_sheet(tmp_path / "a.png", network, images[:count], ["im"] * count, "pad", ["red"] * count)
        assert (tmp_path / "a.png").stat().st_size > 100
