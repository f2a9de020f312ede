"""A trained run to score with: the tiny network, saved as a run saves it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def save_run(tiny_network: Any, make_source: Any, tmp_path: Path) -> Any:
    """Save the tiny network as cycle 1 of a run, trained on the bands and rendering of `source`."""
    from anomalymatch.backbones.checkpoint import describe_input, save_network

    def save(source: Any = None, cycle: int = 1) -> Path:
        path = tmp_path / "run" / "cycles" / f"{cycle:02d}"
        path.mkdir(parents=True)
        described = describe_input(make_source() if source is None else source)
        save_network(tiny_network, path / "weights.safetensors", input=described)
        return tmp_path / "run"

    return save


@pytest.fixture
def spec() -> Any:
    """The defaults for a small archive: parts of 8 images, batches of 3."""
    from anomalymatch.build_images import build
    from anomalymatch.config import compose

    return build(
        compose(
            *("run=any", "scoring.backend=torch", "scoring.batch_size=3", "scoring.part_images=8", "scoring.top=5"),
            name="score",
        ).scoring
    )


@pytest.fixture
def run_scoring(save_run: Any, spec: Any, tmp_path: Path) -> Callable[..., bool]:
    """Function that scores a source into a folder of `tmp_path`, with changed settings, in single precision."""
    from anomalymatch.backbones.inference import Inference
    from anomalymatch.scoring import find_model, run_job

    def run(source: Any, folder: str = "out", **changes: Any) -> bool:
        path = tmp_path / "run" if (tmp_path / "run").exists() else save_run()
        return run_job(
            find_model(path), source, replace(spec, **changes), Inference("cpu", "fp32", workers=2), tmp_path / folder
        )

    return run
