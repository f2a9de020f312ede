import copy
import math

import pytest
import timm
import torch
from networks import built, network_of, some_images
from sklearn.linear_model import LogisticRegression
from torch import nn

from anomalymatch.algorithms.fixmatch.loss import pseudo_labels
from anomalymatch.backbones.network import Backbone, Head, Network, anomaly_logit, build_backbone, empty_backbone
from anomalymatch.backbones.weights import fingerprint
from anomalymatch.errors import ConfigError

CUT = 0.95


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def pooled_features(count, width):
    """Draw features like those of a backbone with ImageNet weights: not negative, sparse, of norm 13 for 1280."""
    return torch.randn(count, width, generator=seeded(1)).relu() * 0.5


@pytest.mark.parametrize("normalised", [True, False])
def test_no_image_passes_the_threshold_with_a_new_head(normalised):
    features = pooled_features(2000, 1280)
    for seed in range(5):
        head = Head(1280, normalised=normalised, generator=seeded(seed))
        assert pseudo_labels(head(features), CUT).mask.float().mean() < 0.001


def test_head_follows_its_generator():
    first, again, other = (Head(64, normalised=True, generator=seeded(seed)) for seed in (3, 3, 4))
    assert torch.equal(first.linear.weight, again.linear.weight)
    assert not torch.equal(first.linear.weight, other.linear.weight)
    assert not first.linear.bias.any()
    assert first.linear.weight.abs().max() <= 1 / math.sqrt(64)


def test_head_with_a_probe_gives_the_logits_of_the_probe():
    features = nn.functional.normalize(torch.randn(60, 16, generator=seeded(2), dtype=torch.float64), dim=1)
    targets = (features[:, 0] > 0).long().numpy()
    probe = LogisticRegression(C=10, class_weight="balanced").fit(features.numpy(), targets)
    head = Head(16, normalised=True).double()
    head.set_probe(torch.from_numpy(probe.coef_[0]), float(probe.intercept_[0]))
    logits = head(features * 7.3)  # the head normalises
    expected = torch.from_numpy(probe.decision_function(features.numpy()))
    torch.testing.assert_close(anomaly_logit(logits), expected, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(logits.softmax(1)[:, 1], expected.sigmoid(), rtol=1e-6, atol=1e-8)


def test_anomaly_logit_is_the_log_odds_and_keeps_the_order_where_the_softmax_saturates():
    logits = torch.randn(20, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    probabilities = logits.softmax(1)
    torch.testing.assert_close(anomaly_logit(logits), (probabilities[:, 1] / probabilities[:, 0]).log())
    saturated = torch.tensor([[0.0, 40.0], [0.0, 60.0]])
    assert saturated.softmax(1)[:, 1].unique().numel() == 1
    assert anomaly_logit(saturated).tolist() == [40.0, 60.0]


@pytest.mark.parametrize("normalised", [True, False])
def test_logits_are_not_rounded_to_half_precision(normalised):
    head = Head(64, normalised=normalised, generator=torch.Generator().manual_seed(0))
    features = torch.randn(500, 64, generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", torch.bfloat16):
        logits = head(features.bfloat16())
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, head(features.bfloat16().float()))
    assert len(anomaly_logit(logits).unique()) > 495


@pytest.mark.parametrize("name", ["test_efficientnet", "test_resnet"])  # with other statistics
def test_images_are_normalised_with_the_statistics_of_the_weights(name):
    spec, backbone = built(name)
    config = timm.create_model(name).pretrained_cfg
    assert (spec.mean, spec.std) == (config["mean"], config["std"])
    backbone.body = nn.Flatten()
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (config["mean"], config["std"]))
    images = some_images()
    expected = ((images / 255.0 - mean) / std).flatten(1)
    torch.testing.assert_close(backbone(images), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(backbone(images.float()), backbone(images))
    middle = (mean * 255).expand(1, 3, 8, 8)
    assert backbone(middle).abs().max() < 1e-5


def first_convolution(backbone):
    return next(m for m in backbone.body.modules() if isinstance(m, nn.Conv2d))


def test_one_channel_gives_what_three_equal_ones_gave():
    _, three = built()
    spec, one = built(channels=1)
    torch.testing.assert_close(first_convolution(one).weight, first_convolution(three).weight.sum(1, keepdim=True))
    assert spec.mean == (pytest.approx((0.485 + 0.456 + 0.406) / 3),)
    assert spec.std == (pytest.approx((0.229 + 0.224 + 0.225) / 3),)
    same = Backbone(three.body, [spec.mean[0]] * 3, [spec.std[0]] * 3).eval()
    grey = some_images(channels=1)
    torch.testing.assert_close(one.eval()(grey), same(grey.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-5)


def test_five_channels():
    spec, five = built(channels=5)
    _, three = built()
    weight = first_convolution(three).weight
    torch.testing.assert_close(first_convolution(five).weight, weight[:, [0, 1, 2, 0, 1]] * 3 / 5)
    assert len(spec.mean) == len(spec.std) == five.mean.numel() == 5
    assert five.eval()(some_images(channels=5)).shape == (4, 256)


@pytest.mark.parametrize(
    ("name", "channels", "size", "features"),
    [("resnet18", 3, 64, 512), ("test_vit", 3, 48, 128), ("test_vit", 2, 32, 128), ("test_convnext", 4, 32, 64)],
)
def test_any_timm_model_at_any_size(name, channels, size, features):
    spec, backbone = built(name, channels=channels, image_size=size)
    assert backbone.features == features
    assert spec.weights == "random initialisation"
    network = Network(spec, backbone, Head(features, normalised=True)).eval()
    assert network(some_images(3, channels, size)).shape == (3, 2)


@pytest.mark.parametrize("name", ["test_vit.r160_in1k", "test_efficientnet.r160_in1k"])
def test_name_may_include_the_weights_tag(name):
    spec, backbone = build_backbone(name=name, weights="none", channels=3, image_size=32)
    assert spec.name == name
    again = empty_backbone(spec)
    assert again.state_dict().keys() == backbone.state_dict().keys()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("test_vit.r16_in1k", r"timm has no weights 'r16_in1k' of test_vit; did you mean test_vit\.r160_in1k"),
        ("resnet188", r"timm has no model 'resnet188'; did you mean resnet18"),
        ("0000", r"timm has no model '0000': timm\.list_models\(\) gives all names"),
    ],
)
def test_wrong_name_is_an_error_with_the_most_similar_names(name, message):
    with pytest.raises(ConfigError, match=message):
        build_backbone(name=name, weights="none", channels=3, image_size=32)


def test_random_network_depends_on_the_name_alone():
    _, first = built()
    torch.rand(17)
    before = torch.get_rng_state()
    _, second = built()
    assert fingerprint(first) == fingerprint(second)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("momentum", [0.01, 0.3])
def test_bn_momentum_is_applied(momentum):
    _, backbone = built(bn_momentum=momentum)
    norms = [m for m in backbone.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms
    assert {m.momentum for m in norms} == {momentum}
    images, seen = some_images(8), []
    norms[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    backbone.train()(images)
    expected = (1 - momentum) * 0 + momentum * seen[0].mean((0, 2, 3))
    torch.testing.assert_close(norms[0].running_mean, expected)


def test_bn_momentum_none_keeps_that_of_the_model():
    _, backbone = built()
    own = timm.create_model("test_efficientnet")
    expected = {m.momentum for m in own.modules() if isinstance(m, nn.BatchNorm2d)}
    assert {m.momentum for m in backbone.modules() if isinstance(m, nn.BatchNorm2d)} == expected


def test_fused_network_shares_no_tensor_with_the_original(tiny_network):
    fused = tiny_network.fused().eval()
    own = {t.data_ptr() for t in tiny_network.state_dict().values()}
    assert not own & {t.data_ptr() for t in fused.state_dict().values()}
    assert all(m.training for m in tiny_network.modules())
    images = some_images()
    torch.testing.assert_close(fused(images), tiny_network.eval()(images), rtol=1e-4, atol=1e-4)


def test_too_small_images_are_an_error():
    with pytest.raises(ConfigError, match="image_size is 8"):
        built(image_size=8)
    with pytest.raises(ConfigError, match="image_size is 20, too small for test_convnext"):
        built("test_convnext", image_size=20, stages=True)


@pytest.mark.parametrize("changed", ["blocks.2", "blocks.1", "blocks.0", "conv_stem", None])
@pytest.mark.parametrize(
    "options", [{}, {"stages": True, "orientations": 2, "crops": 1}, {"stages": True, "tiles": 2}, {"channels": 5}]
)
def test_stages_that_two_networks_share_are_computed_once(changed, options):
    spec, backbone = built("test_efficientnet", **options)
    head = Head(backbone.features, normalised=True, stage_features=backbone.stage_features, generator=seeded())
    network = Network(spec, backbone, head).eval()
    second = copy.deepcopy(network)
    with torch.no_grad():
        second.head.linear.weight.mul_(-2.0)
        for name, parameter in second.backbone.body.named_parameters():
            if changed is not None and name.startswith(changed):
                parameter.mul_(1.5)
    images = some_images(5, spec.channels, spec.input_size)
    with torch.inference_mode():
        expected = backbone(images), (network(images) + second(images)) / 2
        network.second = second
        torch.testing.assert_close(network.features_and_logits(images), expected)
        fused = network.fused()
        ran = []
        for body in (fused.backbone.body, fused.second.backbone.body):
            for name in ("conv_stem", *(f"blocks.{i}" for i in range(len(body.blocks))), "conv_head"):
                body.get_submodule(name).register_forward_hook(lambda *_, name=name: ran.append(name))
        torch.testing.assert_close(fused.features_and_logits(images), expected, atol=1e-4, rtol=1e-4)
    once = {name for name in ran if ran.count(name) * 2 == ran.count("conv_head")}
    shared = {"blocks.2": 2, "blocks.1": 1}.get(changed, 0 if changed else 5)
    assert once == ({"conv_stem", *(f"blocks.{i}" for i in range(shared))} if shared else set())


def test_other_models_share_no_stages():
    network = network_of("test_resnet").eval()
    network.second = copy.deepcopy(network)
    images = some_images()
    with torch.inference_mode():
        torch.testing.assert_close(network.fused()(images), network.second(images), atol=1e-4, rtol=1e-4)
