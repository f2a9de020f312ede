import pytest
import torch
from networks import built
from torch import nn

from anomalymatch.backbones.fuse_batch_norm import fuse_batch_norms
from anomalymatch.backbones.weights import fingerprint


def randomised(model, seed=0):
    """Give every batch norm random statistics and weights; those of a new one would hide errors."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3, generator=generator)
            module.running_var.uniform_(0.5, 2.0, generator=generator)
            with torch.no_grad():
                module.weight.uniform_(0.5, 1.5, generator=generator)
                module.bias.normal_(0, 0.3, generator=generator)
    return model


def count(model):
    return sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())


def images(channels=3, size=64):
    return torch.randn(3, channels, size, size, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "resnet18", "test_efficientnet", "test_byobnet"])
def test_same_outputs_without_batch_norms(name):
    bundled = name == "tf_efficientnet_lite0"
    body = built(name, weights="bundled" if bundled else "none", image_size=64)[1].body
    body = body if bundled else randomised(body)
    body.train()
    before, trained = fingerprint(body), [m.training for m in body.modules()]
    fused = fuse_batch_norms(body)
    # The original is untouched.
    assert fingerprint(body) == before
    assert [m.training for m in body.modules()] == trained
    assert count(body) > 5
    assert count(fused) == 0
    body.eval()
    with torch.inference_mode():
        expected, got = body(images()), fused(images())
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


class DataDependent(nn.Module):
    """Model that branches on its input and cannot be traced."""

    def __init__(self):
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.norm(self.convolution(x)) if x.sum() > 0 else x.mean((2, 3))


class Shared(nn.Module):
    """The convolution's output is used twice: its norm must not be fused into it."""

    def __init__(self):
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)

    def forward(self, x):
        y = self.convolution(x)
        return self.norm(y) + y


class Twice(nn.Module):
    """Model that calls one convolution twice, with two norms."""

    def __init__(self):
        super().__init__()
        self.convolution, self.first, self.second = nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.second(self.convolution(self.first(self.convolution(x))))


class OneNorm(nn.Module):
    """Model with one norm after two convolutions and an addition."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.norm = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.norm(self.norm(self.first(x)) + self.norm(self.second(x)))


@pytest.mark.parametrize("kind", [DataDependent, Shared, Twice, OneNorm])
def test_special_models_give_the_same_outputs(kind):
    model = randomised(kind())
    fused = fuse_batch_norms(model)
    assert fused is not model
    with torch.inference_mode():
        torch.testing.assert_close(fused(images().abs()), model.eval()(images().abs()), rtol=1e-4, atol=1e-4)


def test_transformer_gives_the_same_outputs():
    body = built("test_vit")[1].body.eval()
    with torch.inference_mode():
        torch.testing.assert_close(fuse_batch_norms(body)(images(size=32)), body(images(size=32)))
