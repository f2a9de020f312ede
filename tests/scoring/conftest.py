"""A trained run to score with: the tiny network, saved as a run saves it."""

from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def save_run(tiny_network: Any, make_source: Any, tmp_path: Path) -> Any:
    """Save the tiny network as cycle 1 of a run, trained on the bands and rendering of `source`."""
    from anomalymatch.backbones.checkpoint import describe_input, save_network

    def save(source: Any = None, cycle: int = 1, folder: str = "run") -> Path:
        path = tmp_path / folder / "cycles" / f"{cycle:02d}"
        path.mkdir(parents=True)
        described = describe_input(make_source() if source is None else source)
        save_network(tiny_network, path / "weights.safetensors", input=described)
        return tmp_path / folder

    return save


@pytest.fixture
def spec() -> Any:
    """The defaults for a small archive: parts of 8 images, batches of 3."""
    from anomalymatch.scoring.spec import ScoringSpec

    return ScoringSpec(
        engine="local",
        backend="torch",
        batch_size=3,
        part_images=8,
        decode="cpu",
        shard="1/1",
        top=5,
        features=False,
        actors=None,
        ray_address=None,
    )


@pytest.fixture
def cpu() -> Any:
    """Inference in single precision on the processor."""
    from anomalymatch.backbones.inference import Inference

    return Inference("cpu", "fp32", workers=2)
