import pytest
import torch

from anomalymatch.algorithms.layer_groups import freeze_lower_groups
from anomalymatch.backbones import inference as inference_module
from anomalymatch.backbones.frozen_stages import FrozenStages, Shortcut, accelerate_frozen_stages, count_frozen_stages
from anomalymatch.backbones.inference import Inference
from anomalymatch.backbones.network import build_backbone
from anomalymatch.backbones.openvino import has_openvino
from anomalymatch.errors import ConfigError

needs_openvino = pytest.mark.skipif(not has_openvino(), reason="needs OpenVINO")
OPENVINO = Inference("cpu", "bf16", backend="openvino")


def backbone_of(name="tf_efficientnet_lite0", *, learning=4, stages=True, channels=3):
    """In training mode, its batch norms frozen, as `FixMatch` trains it."""
    weights = "bundled" if "lite0" in name else "none"
    _, backbone = build_backbone(name=name, weights=weights, channels=channels, image_size=64, stages=stages)
    freeze_lower_groups(backbone.body, learning)
    backbone.train()
    for module in backbone.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    return backbone


def images(count=7, channels=3):
    return torch.randint(0, 256, (count, channels, 64, 64), generator=torch.Generator().manual_seed(3)).byte()


def features_and_gradients(backbone, pixels):
    backbone.zero_grad()
    features = backbone(pixels)
    weights = torch.linspace(-1, 1, features.shape[1])
    (features @ weights).square().sum().backward()
    return features.detach(), [p.grad for p in backbone.parameters() if p.requires_grad]


def apart(*backbones, inference=OPENVINO, device="cpu", count=10**6):
    return accelerate_frozen_stages(
        backbones, inference, device=torch.device(device), size=64, batch_size=4, count=count
    )


@pytest.mark.parametrize(
    ("name", "learning", "frozen"),
    [
        ("tf_efficientnet_lite0", 4, 3),
        ("tf_efficientnet_lite0", 1, 6),
        ("tf_efficientnet_lite0", 0, 7),
        ("tf_efficientnet_lite0", 7, 0),  # the stem alone is frozen
        ("tf_efficientnet_lite0", None, 0),
        ("resnet18", 1, 0),
    ],
)
def test_which_stages_are_frozen(name, learning, frozen):
    assert count_frozen_stages(backbone_of(name, learning=learning).body) == frozen


@pytest.mark.parametrize("stages", [True, False])
@pytest.mark.parametrize("learning", [4, 0])
def test_steps_above_the_frozen_stages_are_those_of_timm(learning, stages):
    """Compute both ways with PyTorch: an exact comparison with the installed version of timm."""
    backbone = backbone_of("test_efficientnet", learning=learning, stages=stages)
    lower = FrozenStages(backbone, count_frozen_stages(backbone.body))
    with torch.no_grad():
        shape = lower.maps(images())[-1].shape[1:]
        shortcut = Shortcut(backbone, lower.count, shape, lambda pixels: lower(pixels).numpy())
        assert lower.count > 0
        torch.testing.assert_close(shortcut(images()), backbone(images()))


@needs_openvino
@pytest.mark.parametrize(
    ("learning", "stages", "channels"), [(4, True, 3), (4, False, 3), (1, True, 3), (2, True, 5), (6, True, 1)]
)
def test_features_and_gradients_are_the_same(learning, stages, channels):
    backbone = backbone_of(learning=learning, stages=stages, channels=channels)
    pixels = images(channels=channels)  # the second batch of four is not full
    features, gradients = features_and_gradients(backbone, pixels)
    with apart(backbone):
        assert backbone.shortcut is not None
        other, others = features_and_gradients(backbone, pixels)
    assert not torch.equal(other, features)  # another library has computed them
    torch.testing.assert_close(other, features, rtol=1e-3, atol=1e-3)
    for one, another in zip(gradients, others, strict=True):
        torch.testing.assert_close(another, one, rtol=1e-2, atol=1e-3 * float(one.abs().max()))


@needs_openvino
def test_without_anything_that_learns_the_features_are_the_same():
    backbone = backbone_of(learning=0)
    with torch.no_grad():
        features = backbone(images())
        with apart(backbone):
            torch.testing.assert_close(backbone(images()), features, rtol=1e-3, atol=1e-3)


@needs_openvino
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_another_precision_learns_too(dtype):
    backbone = backbone_of()
    features, _ = features_and_gradients(backbone, images())
    with apart(backbone):
        other, gradients = features_and_gradients(backbone.to(dtype), images())
    assert {gradient.dtype for gradient in gradients} == {dtype}
    assert torch.corrcoef(torch.stack([features.flatten(), other.flatten()]))[0, 1] > 0.99


@needs_openvino
def test_each_goes_on_with_stages_of_its_own():
    student, average = backbone_of(), backbone_of()
    average.averages = False
    average.eval()
    with torch.no_grad():
        average.body.conv_head.weight.mul_(2)
        expected = [backbone(images()) for backbone in (student, average)]
        with apart(student, average):
            got = [backbone(images()) for backbone in (student, average)]
    assert not torch.allclose(expected[0], expected[1])
    for one, another in zip(expected, got, strict=True):
        torch.testing.assert_close(another, one, rtol=1e-3, atol=1e-3)


@needs_openvino
def test_predicting_does_not_use_it():
    backbone = backbone_of().eval()
    with torch.no_grad():
        predicted = backbone(images())
        with apart(backbone):
            assert torch.equal(backbone(images()), predicted)


@needs_openvino
def test_it_ends_with_the_block_even_by_an_error():
    backbone = backbone_of()

    def interrupted():
        with apart(backbone):
            raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError, match="interrupted"):
        interrupted()
    assert backbone.shortcut is None


@pytest.mark.parametrize(
    ("backend", "learning", "device", "count"),
    [
        ("torch", 4, "cpu", 10**6),
        ("auto", 4, "cpu", 100),  # too few images
        ("auto", None, "cpu", 10**6),  # all learn
        ("openvino", 4, "cuda", 10**6),  # which has precisions of its own
    ],
)
def test_where_it_does_not_pay_all_is_as_it_was(backend, learning, device, count):
    if backend == "openvino" and not has_openvino():
        pytest.skip("needs OpenVINO")
    backbone = backbone_of(learning=learning)
    with apart(backbone, inference=Inference("cpu", backend=backend), device=device, count=count):
        assert backbone.shortcut is None


def test_what_cannot_be_converted_is_computed_by_pytorch(monkeypatch):
    def fail(module, **_):
        raise ConfigError("an unknown operator")

    monkeypatch.setattr(inference_module, "openvino_forward", fail)
    monkeypatch.setattr(inference_module, "has_openvino", lambda: True)
    backbone = backbone_of()
    with apart(backbone, inference=Inference("cpu")):
        assert backbone.shortcut is None
