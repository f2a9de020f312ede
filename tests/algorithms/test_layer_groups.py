"""Layer groups of a backbone: which of them learn, and with which learning rate and weight decay."""

from itertools import pairwise

import pytest
from networks import built, network_of
from torch import nn

from anomalymatch.algorithms.layer_groups import freeze_lower_groups, layerwise_groups, parameter_groups


def test_freeze_lower_groups():
    body = built()[1].body
    every = {name for name, _ in body.named_parameters()}

    def learning_of(groups):
        freeze_lower_groups(body, groups)
        return {name for name, p in body.named_parameters() if p.requires_grad}

    assert learning_of(None) == every
    last, two = learning_of(1), learning_of(2)
    assert last == {name for name in every if name.startswith(("blocks.4", "conv_head", "bn2"))}
    assert two == {name for name in every if name.startswith(("blocks.3", "blocks.4", "conv_head", "bn2"))}
    assert learning_of(0) == set()
    assert learning_of(99) == every  # and unfreezes again


@pytest.mark.parametrize("name", ["test_efficientnet", "test_vit"])
def test_normalisation_layers_have_no_weight_decay(name):
    network = network_of(name)
    decay, rest = parameter_groups(network, 0.01)
    assert (decay["weight_decay"], rest["weight_decay"]) == (0.01, 0.0)
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d | nn.LayerNorm)]
    exempt = {id(p) for m in norms for p in m.parameters()}
    assert {id(p) for p in rest["params"]} == exempt
    assert {id(p) for p in decay["params"]} == {id(p) for p in network.parameters()} - exempt
    assert any(p is network.head.linear.weight for p in decay["params"])


def test_frozen_parameters_are_in_no_group(tiny_network):
    freeze_lower_groups(tiny_network.backbone.body, 1)
    ids = [id(p) for group in parameter_groups(tiny_network, 0.1) for p in group["params"]]
    assert set(ids) == {id(p) for p in tiny_network.parameters() if p.requires_grad}
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("name", ["test_efficientnet", "test_vit"])
def test_learning_rate_decays_with_each_layer_group_below_the_head(name):
    network = network_of(name)
    groups = layerwise_groups(network, 0.01, 0.5)
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    plain = {id(p): g["weight_decay"] for g in parameter_groups(network, 0.01) for p in g["params"]}
    assert decays == plain
    assert sum(len(group["params"]) for group in groups) == len(plain)
    assert scale[id(network.head.linear.weight)] == 1.0
    blocks = [{scale[id(p)] for p in block.parameters()} for block in network.backbone.body.blocks]
    assert all(len(scales) == 1 for scales in blocks)
    order = [next(iter(scales)) for scales in blocks]
    assert order[-1] == 0.5
    assert [low / high for low, high in pairwise(order)] == [0.5] * (len(order) - 1)
    assert max(scale[id(p)] for n, p in network.backbone.body.named_parameters() if "blocks" not in n) <= 0.5
