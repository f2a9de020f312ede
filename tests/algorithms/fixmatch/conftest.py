"""Fixtures of the FixMatch tests."""

import pytest
import torch


def _images(count, generator):
    return torch.randint(0, 256, (count, 3, 32, 32), generator=generator, dtype=torch.uint8)


@pytest.fixture
def batch():
    """Function that makes the `MixedBatch` of a seed."""
    from anomalymatch.algorithms.fixmatch.batches import MixedBatch

    def make(seed=0, labelled=4, unlabelled=6):
        generator = torch.Generator().manual_seed(seed)
        weak, strong = (_images(unlabelled, generator) for _ in range(2))
        return MixedBatch(
            _images(labelled, generator), torch.arange(labelled) % 2, weak, strong, torch.arange(unlabelled)
        )

    return make


@pytest.fixture
def opinionated(tiny_network, batch):
    """Network whose logits spread, so that some images pass the threshold and some do not, as both classes."""
    network = tiny_network.eval()
    images = torch.cat([batch(seed).x_ulb_w for seed in range(4)])
    with torch.no_grad():
        features = torch.nn.functional.normalize(network.backbone(images))
        direction = features[1] - features[0]
        network.head.set_probe(40 * direction, float(-40 * (features @ direction).median()))
        odds = network(images).diff(dim=1).flatten()
        scale = 1.5 / odds.std()
        network.head.linear.weight.mul_(scale)
        network.head.linear.bias.mul_(scale)
    return network.train()
