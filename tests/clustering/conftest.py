"""Patches of tiny images by a tiny network."""

from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def make_patches(make_source: Any, tmp_path: Path) -> Any:
    """Patches of an in-memory source: levels 2 and 3 of the tiny network, 4 x 4 of them."""
    from anomalymatch.backbones.embedding import Embedding
    from anomalymatch.backbones.inference import Inference
    from anomalymatch.clustering.patches import PatchEmbedding, PatchSpec

    def make(source: Any = None, **options: Any) -> PatchEmbedding:
        values = {"levels": [2, 3], "grid": None, "components": None, "whitening": 0.5} | options
        name = values.pop("name", "test_efficientnet")
        embedding = Embedding(
            name=name,
            weights="none",
            image_size=values.pop("image_size", 32),
            bn_momentum=None,
            source=make_source() if source is None else source,
            cache_dir=tmp_path / "cache",
            inference=Inference("cpu", "fp32", workers=1),
        )
        return PatchEmbedding(embedding, PatchSpec(**values))

    return make


@pytest.fixture
def spec() -> Any:
    """The defaults, with small groups."""
    from anomalymatch.clustering.analysis import ClusterSpec

    return ClusterSpec(tau=0.1, references=None, method="ward", criterion="silhouette", most_groups=6, smallest_group=3)
