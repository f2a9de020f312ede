"""Small networks and images that several tests share."""

from typing import Any

import torch

from anomalymatch.backbones.network import Backbone, Head, Network, NetworkSpec, build_backbone


def built(name: str = "test_efficientnet", **changes: Any) -> tuple[NetworkSpec, Backbone]:
    """Build a backbone with random weights for images of 32 px."""
    return build_backbone(**{"name": name, "weights": "none", "channels": 3, "image_size": 32} | changes)


def network_of(name: str = "test_efficientnet", **changes: Any) -> Network:
    """Build a backbone with a cold head on normalised features."""
    spec, backbone = built(name, **changes)
    generator = torch.Generator().manual_seed(0)
    return Network(spec, backbone, Head(backbone.features, normalised=True, generator=generator))


def some_images(count: int = 4, channels: int = 3, size: int = 32, seed: int = 0) -> torch.Tensor:
    """Draw 8-bit images."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, channels, size, size), generator=generator, dtype=torch.uint8)
