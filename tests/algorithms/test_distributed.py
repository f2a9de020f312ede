"""Tests of training by two processes on two CPUs; run as a script, this file is the program that trains."""

import csv
import hashlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pytorch_lightning import Callback

from anomalymatch.algorithms.lightning import StepFile
from anomalymatch.backbones.embedding import Embedding
from anomalymatch.backbones.inference import Inference
from anomalymatch.build import build_learner
from anomalymatch.config import compose
from anomalymatch.data.source import ImageSource
from anomalymatch.data.task import initial_labels, make_task
from anomalymatch.errors import AnomalyMatchError, UnreadableImageError

STEPS, LABELLED = 4, 16
TINY = (
    "algorithm.learner.batch.unlabelled_ratio=1",
    f"algorithm.learner.batch.labelled={LABELLED}",
    f"trainer.iterations={STEPS}",
    "algorithm.learner.optimizer.lr=0.02",
    "algorithm.learner.batch.candidate_share=0.0",  # so that no image comes twice
    "algorithm.learner.refit=false",  # so that what trained is what comes back
    "algorithm.learner.average_with_probe=false",
    "trainer.lightning.accelerator=cpu",
    "augment=objects",  # views as of galaxies make the pseudo-labels of so few steps collapse
)
TWO = ("trainer.lightning.devices=2", "trainer.lightning.strategy=ddp_spawn")
MOVING = ("algorithm.learner.loss.freeze_batch_norm=false", "algorithm.learner.loss.teacher=student")
LOW = "algorithm.learner.loss.threshold=0.5"
ALIGNED = "algorithm.learner.loss.alignment.prior=0.1"
ADAPTIVE = ("weights.weighting.", "weights.alignment.")
FAST = "algorithm.learner.loss.weighting.momentum=0.5"
JOBS = {
    "one": ("algorithm=flexmatch", LOW, ALIGNED),
    "one freematch": ("algorithm=freematch", "algorithm.learner.loss.weighting.fairness=5.0", FAST),
    "one softmatch": ("algorithm=softmatch", ALIGNED, FAST),
}
JOBS |= {name.replace("one", "two"): (*words, *TWO) for name, words in JOBS.items()}
JOBS |= {"moving": (*JOBS["two"], *MOVING), "broken": (*JOBS["two"], "algorithm.learner.start=cold")}
"""FlexMatch trains with everything that FixMatch has, so it stands for both."""


class Galaxies(ImageSource):
    """Source that a spawned process can import."""

    def __init__(self, count=150, readable=True):
        ids = [f"im{i:03d}" for i in range(count)]
        truth = {id_: "rare" if i % 10 == 0 else "common" for i, id_ in enumerate(ids)}
        super().__init__(name="galaxies", ids=ids, bands=("r", "g", "b"), fingerprint="galaxies", truth=truth)
        self.parent, self.readable = os.getpid(), readable

    def load(self, position):
        if not self.readable and os.getpid() != self.parent:  # only the processes that train meet it
            raise UnreadableImageError("the disk is gone")
        image = np.random.default_rng(position).integers(0, 120, (32, 32, 3), dtype=np.uint8)
        if position % 10 == 0:
            image[8:16, 8:16] = 250
        return image


class Recorder(Callback):
    """Callback that saves the batches and the final weights of each process."""

    def __init__(self, folder):
        self.folder, self.seen = folder, {"i_ulb": [], "y_lb": [], "x_lb": [], "x_ulb": []}

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.seen["i_ulb"].append(batch.i_ulb.numpy())
        self.seen["y_lb"].append(batch.y_lb.numpy())
        for name, views in (("x_lb", batch.x_lb), ("x_ulb", batch.x_ulb_s)):
            self.seen[name].append([hashlib.sha256(view.numpy().tobytes()).hexdigest() for view in views])

    def on_train_end(self, trainer, module):
        weights = {f"weights.{name}": value.numpy() for name, value in module.state_dict().items()}
        seen = {name: np.stack(values) for name, values in self.seen.items()}
        np.savez(self.folder / f"rank{trainer.global_rank}.npz", **weights, **seen, seed=torch.initial_seed())


def fit(folder, name):
    """Train a job; write the records of each process, and the steps and weights that the parent got."""
    folder.mkdir()
    task = make_task(Galaxies(readable=name != "broken"), anomaly="rare")
    inference = Inference(device="cpu", precision="fp32", workers=1)
    embedding = Embedding(
        name="test_efficientnet",
        weights="none",
        image_size=32,
        bn_momentum=0.1,
        source=task.source,
        cache_dir=folder.parent / "cache",
        inference=inference,
    )
    learner = build_learner(compose(*TINY, *JOBS[name]), task, embedding)
    plain, steps = learner.recipe.trainer, StepFile(folder / "steps.jsonl")

    def recording(**options):
        return plain(**options | {"callbacks": [*options["callbacks"], Recorder(folder)]})

    learner.recipe, learner.on_step = replace(learner.recipe, trainer=recording), steps
    error = None
    try:
        learner.fit(initial_labels(task, anomalies=4, normals=12, seed=0), pool=task.pool)
        np.save(folder / "logits.npy", learner.rank(task.holdout).logits)
        networks = {"network": learner._student, "ema.network": learner._average}
        state = {f"weights.{n}.{k}": v.numpy() for n, net in networks.items() for k, v in net.state_dict().items()}
        np.savez(folder / "parent.npz", **state)
    except AnomalyMatchError as raised:
        error = f"{type(raised).__name__}: {raised}"
    left = {"rows": steps.rows(), "error": error, "port": os.environ.get("MASTER_PORT")}
    (folder / "left.json").write_text(json.dumps(left))


if __name__ == "__main__":
    for job in JOBS:
        fit(Path(sys.argv[1]) / job, job)


# --- the tests ---------------------------------------------------------------------------------------------------


def call(*words, **options):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, env=environment, **options)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    call(__file__, str(folder))
    return folder


def recorded(folder, name, rank=0):
    with np.load(folder / name / f"rank{rank}.npz") as file:
        return dict(file)


def weights(arrays):
    return {name: value for name, value in arrays.items() if name.startswith("weights.")}


def left_by(folder, name):
    return json.loads((folder / name / "left.json").read_text())


pytestmark = pytest.mark.slow


def test_processes_share_the_images_of_a_single_process(trained):
    one, *two = recorded(trained, "one"), recorded(trained, "two", 0), recorded(trained, "two", 1)
    assert not set(two[0]["i_ulb"].flat) & set(two[1]["i_ulb"].flat)
    assert len({i for rank in two for i in rank["i_ulb"].flat}) == STEPS * LABELLED
    for step in range(STEPS):
        for name in ("i_ulb", "y_lb", "x_lb", "x_ulb"):
            shares = [rank[name][step] for rank in two]
            assert [len(share) for share in shares] == [LABELLED // 2, LABELLED // 2]
            assert sorted(np.concatenate(shares)) == sorted(one[name][step])


@pytest.mark.parametrize("name", ["two", "moving"])
def test_processes_end_with_the_same_weights_and_return_them(trained, name):
    first, second = (weights(recorded(trained, name, rank)) for rank in (0, 1))
    with np.load(trained / name / "parent.npz") as file:
        parent = dict(file)
    assert first.keys() == second.keys()
    assert parent.keys() == {key for key in first if not key.startswith(ADAPTIVE)}
    assert any("running_var" in key for key in first)
    for key, value in first.items():
        np.testing.assert_array_equal(second[key], value, err_msg=key)
    for key, value in parent.items():
        np.testing.assert_array_equal(value, first[key], err_msg=key)
    start = weights(recorded(trained, "one"))
    moved = {key for key, value in first.items() if not np.array_equal(start[key], value)}
    assert any("running_mean" in key for key in moved) == (name == "moving")
    for key, value in first.items():
        if "running" in key and "ema" not in key:
            np.testing.assert_array_equal(value, first[f"weights.ema.{key.removeprefix('weights.')}"])


def test_two_processes_rank_like_one(trained):
    logits = [np.load(trained / name / "logits.npy") for name in ("one", "two", "moving")]
    np.testing.assert_allclose(logits[1], logits[0], rtol=1e-3, atol=1e-3)
    assert np.abs(logits[2] - logits[0]).max() > 1e-3


@pytest.mark.parametrize("variant", ["", " freematch", " softmatch"])
def test_weights_and_adaptive_state_and_losses_are_those_of_one_process(trained, variant):
    """Compare FlexMatch's memory, the moving averages, the mean prediction, the weights and the logged losses."""
    names = f"one{variant}", f"two{variant}"
    one, *two = (weights(recorded(trained, name, rank)) for name, rank in ((names[0], 0), (names[1], 0), (names[1], 1)))
    assert one.keys() == two[0].keys() == two[1].keys()
    assert [key for key in one if key.startswith(ADAPTIVE)]
    for key, value in one.items():
        np.testing.assert_array_equal(two[0][key], two[1][key], err_msg=key)
        np.testing.assert_allclose(two[0][key], value, rtol=1e-3, atol=1e-4, err_msg=key)
    if not variant:
        assert (one["weights.weighting.labels"] >= 0).sum() == len(set(recorded(trained, "one")["i_ulb"].flat))
    rows = [left_by(trained, name)["rows"] for name in names]
    assert [row["step"] for row in rows[1]] == list(range(STEPS))
    for row, other in zip(*rows, strict=True):
        assert list(row) == list(other)
        assert other == pytest.approx(row, rel=1e-2, abs=1e-3, nan_ok=True)


def test_random_layers_differ_between_processes(trained):
    first, second = (int(recorded(trained, "two", rank)["seed"]) for rank in (0, 1))
    assert first == int(recorded(trained, "one")["seed"])
    assert first != second


def test_an_error_in_a_process_is_raised_in_the_parent(trained):
    left = left_by(trained, "broken")
    assert left["error"].startswith("NoReadableImageError: galaxies: none of 16 images can be read")
    assert "\n" not in left["error"]
    assert not (trained / "broken" / "rank0.npz").exists()
    assert left["port"] is None


def files(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and ".hydra" not in str(path)}


def test_the_command_writes_one_folder_that_can_be_resumed(command, tiny_job, tmp_path, comparable):
    job = [*tiny_job, "trainer.lightning.accelerator=cpu"]
    assert command(*job, f"hydra.run.dir={tmp_path / 'one'}").code == 0
    folder = tmp_path / "two"
    done = call("-m", "anomalymatch.run", *job, *TWO, "al.cycles=1", f"hydra.run.dir={folder}")
    assert "Initializing distributed" not in done.stderr
    assert "Warning" not in done.stderr
    outcome = command(f"resume={folder}", "al.cycles=2")
    assert outcome.code == 0, outcome.err
    assert files(folder) == files(tmp_path / "one")
    one, two = comparable(tmp_path / "one"), comparable(folder)
    assert [event[:4] for event in two["log"]] == [event[:4] for event in one["log"]]
    for cycle in ("01", "02"):
        steps = list(csv.DictReader(two["steps"][cycle].splitlines()))
        assert [float(row["step"]) for row in steps] == [0.0, 1.0]
        assert two["scores"][cycle].keys() == one["scores"][cycle].keys()
        assert two["scores"][cycle]["id"] == one["scores"][cycle]["id"]
        np.testing.assert_allclose(two["scores"][cycle]["logit"], one["scores"][cycle]["logit"], rtol=1e-3, atol=1e-3)
