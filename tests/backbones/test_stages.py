"""Features of a network's stages: values, width, and an unchanged last layer."""

import numpy as np
import pytest
import torch
from networks import built, some_images

from anomalymatch.backbones.network import Head
from anomalymatch.backbones.stages import patch_levels, stage_options, stage_statistics, stage_width

NAMES = ["test_efficientnet", "mobilenetv3_small_050", "test_resnet", "test_convnext", "test_vit"]


def test_statistics_by_hand():
    first = torch.tensor([[[[1.0, 3.0], [1.0, 3.0]], [[0.0, 0.0], [0.0, 4.0]]]])  # deviations 1 and 3 ** 0.5
    second = torch.full((1, 1, 1, 1), -2.0)
    found = stage_statistics([first, second])[0]
    expected = [0.5, 3**0.5 / 2, 0.6, 0.8, 1.0, -1.0]
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_constant_map_has_a_gradient():
    maps = torch.ones(2, 3, 4, 4, requires_grad=True)
    stage_statistics([maps]).sum().backward()
    assert maps.grad is not None
    assert bool(maps.grad.isfinite().all())


def test_statistics_do_not_depend_on_position_and_brightness():
    maps = torch.rand(2, 5, 6, 6, generator=torch.Generator().manual_seed(0))
    for other in (maps.flip(2), maps.rot90(1, (2, 3)), maps.roll(2, 3), 7 * maps):
        torch.testing.assert_close(stage_statistics([other]), stage_statistics([maps]))


@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_the_last_layer_followed_by_the_stages(name):
    spec, backbone = built(name, stages=True)
    plain = built(name, stages=False)[1].eval()
    images = some_images(3)
    with torch.inference_mode():
        outputs, last, fused = backbone.eval()(images), plain(images), backbone.fused()(images)
    assert spec.stages
    assert backbone.stage_features > 0 == plain.stage_features
    assert outputs.shape == (3, backbone.features + backbone.stage_features)
    torch.testing.assert_close(outputs[:, : backbone.features], last)
    torch.testing.assert_close(outputs, fused, atol=1e-4, rtol=1e-4)
    again = backbone.with_body(backbone.body, stages=True).eval()
    with torch.inference_mode():
        torch.testing.assert_close(again(images), outputs)


def test_all_stages_of_an_efficientnet_and_a_few_of_a_transformer():
    assert stage_options(built("tf_efficientnet_lite0", stages=True)[1].body)["indices"] == [1, 2, 3, 4, 5, 6, 7]
    assert built("tf_efficientnet_lite0", stages=True)[1].stage_features == 2 * (16 + 24 + 40 + 80 + 112 + 192 + 320)
    assert stage_options(built("vit_tiny_patch16_224")[1].body)["indices"] == [2, 5, 8]
    assert stage_options(built("test_vit")[1].body)["indices"] == [0, 2, 3]  # of six blocks


@pytest.mark.parametrize(
    ("name", "levels"),
    [
        ("tf_efficientnet_lite0", [3, 4]),  # 1/16 and 1/32 of the image's side
        ("test_resnet", [3, 4]),
        ("test_convnext", [2, 3]),
        ("vit_tiny_patch16_224", [5, 8]),
    ],
)
def test_levels_of_the_patches(name, levels):
    assert patch_levels(built(name)[1].body) == levels


def test_model_without_stages():
    body = torch.nn.Linear(2, 2)
    assert stage_options(body) == {}
    assert stage_width(body, 3, 32) == 0


def test_stage_width_keeps_the_mode_of_the_model():
    body = built("test_resnet", stages=True)[1].body
    for training in (True, False):
        body.train(training)
        stage_width(body, 3, 32)
        assert body.training is training


def test_head_normalises_the_last_layer_alone():
    head = Head(3, normalised=True, stage_features=2)
    rows = torch.tensor([[3.0, 0.0, 4.0, 0.6, 0.8]])
    expected = head.linear(torch.tensor([[0.6, 0.0, 0.8, 0.6, 0.8]]))
    torch.testing.assert_close(head(rows), expected)
    torch.testing.assert_close(Head(3, normalised=False, stage_features=2)(rows).shape, expected.shape)
