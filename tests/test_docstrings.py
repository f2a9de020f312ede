"""Run the example in the docstring of every public name, on few images."""

import doctest
import inspect
from importlib import import_module
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from tiny_clip import write_tiny_clip

import anomalymatch as am

FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
NEEDS = {"label": pytest.mark.slow, "adapt": pytest.mark.slow, "run": pytest.mark.slow}
"""Examples that take more than a few seconds."""
PAGE = Path(__file__).parents[1] / "docs" / "reference" / "api.md"


@pytest.fixture(scope="module")
def names(tmp_path_factory, tiny_job):
    """The names that the API page defines before its examples, in a folder with photos, a run and a model."""
    folder = tmp_path_factory.mktemp("examples")
    (folder / "photos").mkdir()
    for number, image in enumerate(np.random.default_rng(0).integers(0, 255, (20, 32, 32, 3), dtype=np.uint8)):
        Image.fromarray(image).save(folder / "photos" / f"{number:03d}.png")
    rows = [f"{number:03d}.png,{'normal' if number else 'anomaly'}" for number in range(5)]
    (folder / "photos" / "labels.csv").write_text("\n".join(["filename,label", *rows]))
    write_tiny_clip(folder / "models" / "mine")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("ANOMALYMATCH_CACHE", str(folder / "cache"))
        job = [word for word in tiny_job if not word.startswith("algorithm")]
        am.run(*job, "algorithm=probe", "al.cycles=1", folder="runs/mine")
        task = am.open_task("demo", "dataset.source.count=200", "dataset.source.rare_fraction=0.1")
        labels = am.initial_labels(task, anomalies=5, normals=30, seed=0)
        yield {
            "am": am,
            "task": task,
            "labels": labels,
            "np": np,
            "pd": pd,
            "torch": torch,
            "nn": torch.nn,
            "Path": Path,
        }


def documented(name):
    """The function or class that a public name stands for; the commands are modules that can be called."""
    value = getattr(am, name)
    return getattr(import_module(value.__name__), name) if inspect.ismodule(value) else value


@pytest.mark.parametrize("name", [pytest.param(name, marks=NEEDS.get(name, ())) for name in am.__all__])
@pytest.mark.filterwarnings("ignore::UserWarning:pytorch_lightning")
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
def test_the_example_of_a_public_name_runs(name, names):
    test = doctest.DocTestParser().get_doctest(inspect.getdoc(documented(name)), dict(names), name, None, None)
    assert test.examples, f"{name} has no example"
    said = []
    outcome = doctest.DocTestRunner(optionflags=FLAGS).run(test, out=said.append)
    assert not outcome.failed, "".join(said)


def test_the_reference_has_every_public_name():
    text = PAGE.read_text(encoding="utf-8")
    missing = [name for name in am.__all__ if f".{name}\n" not in text]
    assert missing == []
