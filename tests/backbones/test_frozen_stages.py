import pytest
import torch
from networks import built, some_images

from anomalymatch.algorithms.layer_groups import freeze_lower_groups
from anomalymatch.backbones import inference as inference_module
from anomalymatch.backbones.frozen_stages import accelerate_frozen_stages, count_frozen_stages
from anomalymatch.backbones.inference import Inference
from anomalymatch.backbones.openvino import has_openvino

needs_openvino = pytest.mark.skipif(not has_openvino(), reason="needs OpenVINO")


def backbone_of(name="test_efficientnet", *, learning=2, stages=True, channels=3):
    """Build a backbone in training mode with frozen batch norms, as FixMatch trains it."""
    backbone = built(name, channels=channels, stages=stages)[1]
    freeze_lower_groups(backbone.body, learning)
    backbone.train()
    for module in backbone.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    return backbone


def features_and_gradients(backbone, pixels):
    backbone.zero_grad()
    features = backbone(pixels)
    weights = torch.linspace(-1, 1, features.shape[1])
    (features @ weights).square().sum().backward()
    return features.detach(), [p.grad for p in backbone.parameters() if p.requires_grad]


def accelerated(*backbones, backend="auto", device="cpu", count=10**6):
    options = {"size": 32, "batch_size": 4, "count": count}
    inference = Inference("cpu", backend=backend)
    return accelerate_frozen_stages(backbones, inference, device=torch.device(device), **options)


@pytest.fixture
def converted_by_torch(monkeypatch):
    """Let PyTorch stand in for OpenVINO: an exact comparison with the steps of the installed version of timm."""

    def convert(module, **_):
        def forward(pixels):
            with torch.no_grad():
                return module(pixels).numpy()

        return forward

    monkeypatch.setattr(inference_module, "openvino_forward", convert)
    monkeypatch.setattr(inference_module, "has_openvino", lambda: True)


@pytest.mark.parametrize(
    ("name", "learning", "frozen"),
    [
        ("tf_efficientnet_lite0", 4, 3),
        ("tf_efficientnet_lite0", 1, 6),
        ("tf_efficientnet_lite0", 0, 7),
        ("tf_efficientnet_lite0", 7, 0),  # the stem alone is frozen
        ("test_efficientnet", None, 0),
        ("test_resnet", 1, 0),
    ],
)
def test_count_of_frozen_stages(name, learning, frozen):
    assert count_frozen_stages(backbone_of(name, learning=learning).body) == frozen


@needs_openvino
@pytest.mark.parametrize(("learning", "stages", "channels"), [(2, True, 5), (1, False, 3)])
def test_openvino_gives_the_same_features_and_gradients(learning, stages, channels):
    backbone = backbone_of(learning=learning, stages=stages, channels=channels)
    pixels = some_images(7, channels)  # the second batch of four is not full
    features, gradients = features_and_gradients(backbone, pixels)
    with accelerated(backbone, backend="openvino"):
        assert backbone.shortcut is not None
        other, others = features_and_gradients(backbone, pixels)
    assert not torch.equal(other, features)  # another library has computed them
    torch.testing.assert_close(other, features, rtol=1e-3, atol=1e-3)
    for one, another in zip(gradients, others, strict=True):
        torch.testing.assert_close(another, one, rtol=1e-2, atol=1e-3 * float(one.abs().max()))


@pytest.mark.parametrize("stages", [True, False])
@pytest.mark.parametrize("learning", [3, 2, 1])
def test_steps_above_the_frozen_stages_are_those_of_timm(converted_by_torch, learning, stages):
    backbone = backbone_of(learning=learning, stages=stages)
    features, gradients = features_and_gradients(backbone, some_images(7))
    with accelerated(backbone):
        other, others = features_and_gradients(backbone, some_images(7))
    torch.testing.assert_close(other, features, rtol=1e-4, atol=1e-4)
    for one, another in zip(gradients, others, strict=True):
        torch.testing.assert_close(another, one, rtol=1e-3, atol=1e-3 * float(one.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_upper_stages_may_have_another_precision(converted_by_torch, dtype):
    backbone = backbone_of()
    features, _ = features_and_gradients(backbone, some_images(7))
    with accelerated(backbone):
        other, gradients = features_and_gradients(backbone.to(dtype), some_images(7))
    assert {gradient.dtype for gradient in gradients} == {dtype}
    assert torch.corrcoef(torch.stack([features.flatten(), other.flatten()]))[0, 1] > 0.99


def test_each_backbone_has_its_own_upper_stages_and_prediction_is_unchanged(converted_by_torch):
    student, average, predicting, frozen = backbone_of(), backbone_of(), backbone_of().eval(), backbone_of(learning=0)
    average.averages = False
    average.eval()
    with torch.no_grad():
        average.body.conv_head.weight.mul_(2)
        expected = [backbone(some_images(7)) for backbone in (student, average, predicting, frozen)]
        with accelerated(student, average, predicting), accelerated(frozen):
            got = [backbone(some_images(7)) for backbone in (student, average, predicting, frozen)]
    assert not torch.allclose(expected[0], expected[1])
    assert torch.equal(got[2], expected[2])
    for one, another in zip(expected, got, strict=True):
        torch.testing.assert_close(another, one, rtol=1e-4, atol=1e-4)


def test_acceleration_ends_with_the_block_even_after_an_error(converted_by_torch):
    backbone = backbone_of()

    def interrupted():
        with accelerated(backbone):
            assert backbone.shortcut is not None
            raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError, match="interrupted"):
        interrupted()
    assert backbone.shortcut is None


@pytest.mark.parametrize(
    ("change", "learning"),
    [
        ({"backend": "torch"}, 2),
        ({"count": 100}, 2),  # too few images
        ({}, None),  # no stage is frozen
        ({"device": "cuda"}, 2),
    ],
)
def test_nothing_changes_where_it_does_not_pay(converted_by_torch, change, learning):
    backbone = backbone_of(learning=learning)
    with accelerated(backbone, **change):
        assert backbone.shortcut is None
