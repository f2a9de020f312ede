"""Patches of tiny images by a tiny network."""

from collections.abc import Callable
from typing import Any

import pytest


@pytest.fixture
def make_patches(make_source: Callable[..., Any], make_embedding: Callable[..., Any]) -> Callable[..., Any]:
    """Patches of an in-memory source: levels 2 and 3 of the tiny network, 4 x 4 of them."""
    from anomalymatch.clustering.patches import PatchEmbedding, PatchSpec

    def make(source: Any = None, **options: Any) -> PatchEmbedding:
        values = {"levels": [2, 3], "grid": None, "average": 3, "components": None, "whitening": 0.5} | options
        network = {key: values.pop(key) for key in ("name", "image_size") if key in values}
        embedding = make_embedding(make_source() if source is None else source, bn_momentum=None, **network)
        return PatchEmbedding(embedding, PatchSpec(**values))

    return make


@pytest.fixture
def spec() -> Any:
    """The defaults, with small groups."""
    from anomalymatch.clustering import ClusterSpec

    return ClusterSpec(
        tau=0.1,
        neighbourhoods=[1, 3],
        lowest=0.3,
        references=None,
        method="ward",
        criterion="silhouette",
        most_groups=6,
        smallest_group=3,
    )
