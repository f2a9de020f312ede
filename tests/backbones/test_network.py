import math
from itertools import pairwise

import pytest
import timm
import torch
from sklearn.linear_model import LogisticRegression
from torch import nn

from anomalymatch.algorithms.fixmatch.loss import anomaly_logit, pseudo_labels
from anomalymatch.algorithms.layer_groups import freeze_lower_groups, layerwise_groups, parameter_groups
from anomalymatch.backbones.network import Backbone, Head, Network, build_backbone, empty_backbone
from anomalymatch.backbones.weights import fingerprint
from anomalymatch.errors import ConfigError

CUT = 0.95


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def noise(count=4, channels=3, size=32, seed=0):
    return torch.randint(0, 256, (count, channels, size, size), generator=seeded(seed), dtype=torch.uint8)


def tiny(name="test_efficientnet", *, channels=3, image_size=32, bn_momentum=None):
    return build_backbone(name=name, weights="none", channels=channels, image_size=image_size, bn_momentum=bn_momentum)


def pooled_features(count, width):
    """What a backbone with ImageNet weights gives: not negative, sparse, of norm 13 for 1280 of them."""
    return torch.randn(count, width, generator=seeded(1)).relu() * 0.5


@pytest.mark.parametrize("normalised", [True, False])
def test_a_cold_head_lets_no_image_pass_the_cut(normalised):
    features = pooled_features(2000, 1280)
    for seed in range(5):
        head = Head(1280, normalised=normalised, generator=seeded(seed))
        assert pseudo_labels(head(features), CUT).mask.float().mean() < 0.001


def test_timm_initialises_a_two_class_head_so_that_images_pass_at_once():
    # The trap: the same check on the head that timm makes. Uniform with bound 1 / sqrt(2), 25 times ours.
    with torch.random.fork_rng():
        torch.manual_seed(0)
        classifier = timm.create_model("tf_efficientnet_lite0", num_classes=2).get_classifier()
    cold = Head(1280, normalised=False, generator=seeded())
    ratio = classifier.weight.std() / cold.linear.weight.std()
    assert ratio.item() == pytest.approx(25, rel=0.1)
    passing = pseudo_labels(classifier(pooled_features(2000, 1280)), CUT).mask.float().mean()
    assert passing > 0.5


def test_the_head_follows_its_generator():
    first, again, other = (Head(64, normalised=True, generator=seeded(seed)) for seed in (3, 3, 4))
    assert torch.equal(first.linear.weight, again.linear.weight)
    assert not torch.equal(first.linear.weight, other.linear.weight)
    assert not first.linear.bias.any()
    assert first.linear.weight.abs().max() <= 1 / math.sqrt(64)


def test_a_probe_in_the_head_is_the_probe():
    features = nn.functional.normalize(torch.randn(60, 16, generator=seeded(2), dtype=torch.float64), dim=1)
    targets = (features[:, 0] > 0).long().numpy()
    probe = LogisticRegression(C=10, class_weight="balanced").fit(features.numpy(), targets)
    head = Head(16, normalised=True).double()
    head.set_probe(torch.from_numpy(probe.coef_[0]), float(probe.intercept_[0]))
    logits = head(features * 7.3)  # the head normalises
    expected = torch.from_numpy(probe.decision_function(features.numpy()))
    torch.testing.assert_close(anomaly_logit(logits), expected, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(logits.softmax(1)[:, 1], expected.sigmoid(), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("normalised", [True, False])
def test_logits_are_not_rounded_to_half_precision(normalised):
    head = Head(64, normalised=normalised, generator=torch.Generator().manual_seed(0))
    features = torch.randn(500, 64, generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", torch.bfloat16):
        logits = head(features.bfloat16())
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, head(features.bfloat16().float()))
    assert len(anomaly_logit(logits).unique()) > 495


def test_images_are_normalised_as_the_weights_were_trained():
    spec, backbone = tiny()
    config = timm.create_model("test_efficientnet").pretrained_cfg
    assert (spec.mean, spec.std) == (config["mean"], config["std"])
    backbone.body = nn.Flatten()
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (config["mean"], config["std"]))
    images = noise()
    expected = ((images / 255.0 - mean) / std).flatten(1)
    torch.testing.assert_close(backbone(images), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(backbone(images.float()), backbone(images))
    middle = (mean * 255).expand(1, 3, 8, 8)
    assert backbone(middle).abs().max() < 1e-5


def test_other_models_bring_other_statistics():
    spec, backbone = tiny("test_resnet")
    assert spec.mean == spec.std == (0.5, 0.5, 0.5)
    assert backbone.mean.flatten().tolist() == backbone.std.flatten().tolist() == [127.5] * 3


def first_convolution(backbone):
    return next(m for m in backbone.body.modules() if isinstance(m, nn.Conv2d))


def test_one_channel_gives_what_three_equal_ones_gave():
    _, three = tiny()
    spec, one = tiny(channels=1)
    torch.testing.assert_close(first_convolution(one).weight, first_convolution(three).weight.sum(1, keepdim=True))
    assert spec.mean == (pytest.approx((0.485 + 0.456 + 0.406) / 3),)
    assert spec.std == (pytest.approx((0.229 + 0.224 + 0.225) / 3),)
    same = Backbone(three.body, [spec.mean[0]] * 3, [spec.std[0]] * 3).eval()
    grey = noise(channels=1)
    torch.testing.assert_close(one.eval()(grey), same(grey.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-5)


def test_five_channels():
    spec, five = tiny(channels=5)
    _, three = tiny()
    weight = first_convolution(three).weight
    torch.testing.assert_close(first_convolution(five).weight, weight[:, [0, 1, 2, 0, 1]] * 3 / 5)
    assert len(spec.mean) == len(spec.std) == five.mean.numel() == 5
    assert five.eval()(noise(channels=5)).shape == (4, 256)


@pytest.mark.parametrize(
    ("name", "channels", "size", "features"),
    [("resnet18", 3, 64, 512), ("test_vit", 3, 48, 64), ("test_vit", 2, 32, 64), ("test_convnext", 4, 32, 64)],
)
def test_any_timm_model_at_any_size(name, channels, size, features):
    spec, backbone = tiny(name, channels=channels, image_size=size)
    assert backbone.features == features
    assert spec.weights == "random initialisation"
    network = Network(spec, backbone, Head(features, normalised=True)).eval()
    assert network(noise(3, channels, size)).shape == (3, 2)


@pytest.mark.parametrize("name", ["test_vit.r160_in1k", "test_efficientnet.r160_in1k"])
def test_a_name_may_say_which_weights(name):
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
def test_a_wrong_name_is_told_with_the_nearest_right_ones(name, message):
    with pytest.raises(ConfigError, match=message):
        build_backbone(name=name, weights="none", channels=3, image_size=32)


def test_the_same_name_without_weights_is_the_same_network_in_any_state_of_the_generator():
    _, first = tiny()
    torch.rand(17)
    before = torch.get_rng_state()
    _, second = tiny()
    assert fingerprint(first) == fingerprint(second)
    assert before.numel() == torch.get_rng_state().numel()


@pytest.mark.parametrize("momentum", [0.01, 0.3])
def test_bn_momentum_is_really_applied(momentum):
    _, backbone = tiny(bn_momentum=momentum)
    norms = [m for m in backbone.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms
    assert {m.momentum for m in norms} == {momentum}
    images, seen = noise(8), []
    norms[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    backbone.train()(images)
    expected = (1 - momentum) * 0 + momentum * seen[0].mean((0, 2, 3))
    torch.testing.assert_close(norms[0].running_mean, expected)


def test_bn_momentum_none_keeps_the_models_own():
    _, backbone = tiny()
    own = timm.create_model("test_efficientnet")
    expected = {m.momentum for m in own.modules() if isinstance(m, nn.BatchNorm2d)}
    assert {m.momentum for m in backbone.modules() if isinstance(m, nn.BatchNorm2d)} == expected


def learning(body):
    return {name.rsplit(".", 1)[0] for name, p in body.named_parameters() if p.requires_grad}


def test_freeze_lower_groups_freezes_what_it_says():
    _, backbone = tiny()
    body, every = backbone.body, sum(p.numel() for p in backbone.parameters())
    assert freeze_lower_groups(body, None) == every
    last = freeze_lower_groups(body, 1)
    assert 0 < last < every
    assert all(name.startswith(("blocks.4", "conv_head", "bn2")) for name in learning(body))
    assert {"conv_head", "bn2"} <= learning(body)
    two = freeze_lower_groups(body, 2)
    assert last < two < every
    assert all(name.startswith(("blocks.3", "blocks.4", "conv_head", "bn2")) for name in learning(body))
    assert freeze_lower_groups(body, 0) == 0
    assert not learning(body)
    assert freeze_lower_groups(body, 99) == every  # and thaws again


def test_freeze_lower_groups_of_the_papers_backbone():
    body = timm.create_model("tf_efficientnet_lite0", num_classes=0)
    freeze_lower_groups(body, 2)
    stages = {".".join(name.split(".")[:2]) for name in learning(body) if name.startswith("blocks")}
    assert stages == {"blocks.5", "blocks.6"}
    assert {"conv_head", "bn2"} <= learning(body)


def test_freeze_lower_groups_refuses_a_negative_number():
    with pytest.raises(ConfigError, match="trainable_groups is -1"):
        freeze_lower_groups(tiny()[1].body, -1)


@pytest.mark.parametrize("name", ["test_efficientnet", "test_vit"])
def test_parameter_groups_spare_normalisation_layers(name):
    spec, backbone = tiny(name)
    network = Network(spec, backbone, Head(backbone.features, normalised=True))
    decay, rest = parameter_groups(network, 0.01)
    assert (decay["weight_decay"], rest["weight_decay"]) == (0.01, 0.0)
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d | nn.LayerNorm)]
    exempt = {id(p) for m in norms for p in m.parameters()}
    assert {id(p) for p in rest["params"]} == exempt
    assert {id(p) for p in decay["params"]} == {id(p) for p in network.parameters()} - exempt
    assert any(p is network.head.linear.weight for p in decay["params"])


def test_parameter_groups_leave_out_what_is_frozen(tiny_network):
    freeze_lower_groups(tiny_network.backbone.body, 1)
    ids = [id(p) for group in parameter_groups(tiny_network, 0.1) for p in group["params"]]
    assert set(ids) == {id(p) for p in tiny_network.parameters() if p.requires_grad}
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("name", ["test_efficientnet", "test_vit"])
def test_layerwise_groups_slow_each_layer_group_below_the_head(name):
    spec, backbone = tiny(name)
    network = Network(spec, backbone, Head(backbone.features, normalised=True))
    groups = layerwise_groups(network, 0.01, 0.5)
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    plain = {id(p): g["weight_decay"] for g in parameter_groups(network, 0.01) for p in g["params"]}
    assert decays == plain
    assert sum(len(group["params"]) for group in groups) == len(plain)
    assert scale[id(network.head.linear.weight)] == 1.0
    blocks = [{scale[id(p)] for p in block.parameters()} for block in backbone.body.blocks]
    assert all(len(scales) == 1 for scales in blocks)
    order = [next(iter(scales)) for scales in blocks]
    assert order[-1] == 0.5
    assert [low / high for low, high in pairwise(order)] == [0.5] * (len(order) - 1)
    assert max(scale[id(p)] for n, p in backbone.body.named_parameters() if "blocks" not in n) <= 0.5


def test_fused_networks_share_nothing_with_the_original(tiny_network):
    fused = tiny_network.fused().eval()
    own = {t.data_ptr() for t in tiny_network.state_dict().values()}
    assert not own & {t.data_ptr() for t in fused.state_dict().values()}
    assert all(m.training for m in tiny_network.modules())
    images = noise()
    torch.testing.assert_close(fused(images), tiny_network.eval()(images), rtol=1e-4, atol=1e-4)


def test_an_empty_backbone_has_the_same_tensors():
    spec, backbone = tiny(channels=2, bn_momentum=0.02)
    empty = empty_backbone(spec)
    empty.load_state_dict(backbone.state_dict())
    assert fingerprint(empty) == fingerprint(backbone)
    assert {m.momentum for m in empty.modules() if isinstance(m, nn.BatchNorm2d)} == {0.02}


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("tf_efficientnet_light0", 32, "no model 'tf_efficientnet_light0'"),
        ("efficientnet_lite0x", 32, "did you mean efficientnet_lite0, "),
        ("resnet18", 8, "image_size is 8: it must be at least 16"),
    ],
)
def test_refusals(name, size, message):
    with pytest.raises(ConfigError, match=message):
        tiny(name, image_size=size)
