"""The training as a whole: a continued one equals a whole one, and harm is noticed."""

import csv
import json
import math
import os
from functools import cache

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch import nn

from anomalymatch.algorithms.adaptation import training
from anomalymatch.algorithms.adaptation.module import AdaptationSpec, warm_cosine
from anomalymatch.backbones.embedding import Embedding
from anomalymatch.build import build_adaptation, build_embedding
from anomalymatch.config import compose
from anomalymatch.data.task import make_task
from anomalymatch.errors import ConfigError, DataError, StorageError, TrainingError

SMALL = """dataset=demo augment=texture model.name=test_efficientnet model.weights=none model.image_size=32
    adapt.epochs=3 adapt.batch_size=16 adapt.held_out=16 adapt.collapse=0.0 adapt.method.hidden=16
    adapt.method.projection=8 inference.device=cpu inference.precision=fp32 inference.workers=1
    trainer.lightning.accelerator=cpu logger=none"""
FEW = ["adapt.method.prototypes=20"]


@cache
def composed(*words):
    return compose(*SMALL.split(), *words, name="adapt")


@pytest.fixture
def run(task, tmp_path):
    """Function that adapts the tiny network to eighty images in a folder, with further words."""

    def adapt(folder, *words, of=task, **options):
        return build_adaptation(composed(*words), of)(tmp_path / folder, **options)

    return adapt


def results(adapted):
    """Return weights, metrics without times, and the agreement."""
    rows = [{k: v for k, v in row.items() if k != "seconds" and v == v} for row in adapted.rows]
    return load_file(adapted.weights), rows, adapted.agreement


def assert_same(one, other):
    (weights, *rest), (others, *other_rest) = results(one), results(other)
    assert rest == other_rest
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[name], others[name]) for name in weights)


class KilledError(Exception):
    """Stand-in for the kill of a process."""


def kill_at(step):
    """Make a listener that ends the training at a step."""
    steps = []

    def listen(row):
        steps.append(row)
        if len(steps) == step:
            raise KilledError

    return listen


@pytest.fixture
def with_dropout(monkeypatch):
    """Give every backbone a dropout, so that the training draws random numbers."""
    real = Embedding.backbone

    def backbone(self):
        made = real(self)
        made.body.global_pool = nn.Sequential(made.body.global_pool, nn.Dropout(0.2))
        return made

    monkeypatch.setattr(Embedding, "backbone", backbone)


CONTINUED = {
    "simclr": [],
    "vicreg": ["optimizer=lion"],
    "byol": ["optimizer=sgd", "adapt.freeze_batch_norm=false"],
    "dino": FEW,
}


@pytest.mark.parametrize("method", CONTINUED)
def test_a_continued_training_equals_a_whole_one(run, with_dropout, method):
    words = [f"adapt={method}", *CONTINUED[method]]
    whole = run("whole", *words)
    assert [row["epoch"] for row in whole.rows] == [0, 1, 2, 3]
    with pytest.raises(KilledError):  # in the third of four steps of the second epoch
        run("part", *words, on_step=kill_at(7))
    assert json.loads((whole.weights.parents[1] / "part" / "weights.json").read_text())["epochs"] == 1
    assert_same(whole, run("part", *words))
    again = run("part", *words)  # there is nothing left to do
    assert_same(whole, again)
    assert not list(whole.weights.parent.glob("checkpoint*"))


@pytest.mark.slow
def test_a_training_can_be_killed_at_any_write(run, monkeypatch):
    whole, real = run("whole", "adapt.epochs=2"), os.replace
    for at in range(1, 30):
        count = iter(range(1, 99))

        def replace(source, target, at=at, count=count):
            if next(count) == at:
                raise KilledError
            real(source, target)

        monkeypatch.setattr(os, "replace", replace)
        try:
            run(f"killed{at}", "adapt.epochs=2")
            break  # there were fewer writes
        except KilledError:
            monkeypatch.setattr(os, "replace", real)
            assert_same(whole, run(f"killed{at}", "adapt.epochs=2"))
    assert at > 8


def test_a_time_limit_ends_with_an_epoch_and_the_training_goes_on(run, monkeypatch):
    whole = run("whole")
    part = run("part", "adapt.minutes=1.0e-6")
    assert [row["epoch"] for row in part.rows] == [0, 1]
    assert part.agreement is None
    assert any("the same command continues" in sentence for sentence in part.sentences())
    assert_same(whole, run("part"))


@pytest.mark.parametrize("seed", [0, 1])
def test_the_seed_determines_the_result(run, seed):
    assert_same(run("one", f"seed={seed}"), run("two", f"seed={seed}"))
    with pytest.raises(AssertionError):
        assert_same(run("one", f"seed={seed}"), run("three", "seed=2"))


def test_nothing_is_learnt_from_the_held_out_split_nor_from_the_images_kept_aside(run, task, tmp_path, monkeypatch):
    read = []
    real = task.source.read
    monkeypatch.setattr(task.source, "read", lambda ids: read.extend(ids) or real(ids))
    adapted = run("a")
    assert read
    assert not set(read) & set(task.holdout)
    facts = json.loads(adapted.weights.with_suffix(".json").read_text())
    assert facts["images"] | {"digest": ""} == {"pool": 80, "learnt": 64, "held_out": 16, "digest": ""}
    assert (facts["method"], facts["epochs"], facts["origin"]) == ("simclr", 3, "random initialisation")
    with (tmp_path / "a" / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["0", "1", "2", "3"]
    assert float(rows[-1]["accuracy"]) == adapted.rows[-1]["accuracy"] == facts["after"]["accuracy"]


def test_the_loss_falls(run):
    losses = [row["loss"] for row in run("a", "adapt.epochs=15").rows[1:]]
    assert sum(losses[-3:]) / 3 < sum(losses[:3]) / 3 - 0.3


def collapsing(monkeypatch, at):
    """Make the last layer constant before a check."""
    real, calls = training._Run._check, []

    def check(self, backbone):
        calls.append(1)
        if len(calls) == at:
            with torch.no_grad():
                backbone.body.bn2.weight.zero_()
                backbone.body.bn2.bias.fill_(1.0)
        return real(self, backbone)

    monkeypatch.setattr(training._Run, "_check", check)


def test_a_collapse_ends_the_training_and_the_last_good_weights_stay(run, tmp_path, monkeypatch):
    whole = run("whole", "adapt.collapse=0.5")
    collapsing(monkeypatch, at=3)  # after the second epoch; the first check is before the training
    with pytest.raises(TrainingError, match=r"after epoch 2, the held-out \w+ is 0.000.*weights of epoch 1 are kept"):
        run("a", "adapt.collapse=0.5")
    assert json.loads((tmp_path / "a" / "weights.json").read_text())["epochs"] == 1
    monkeypatch.undo()
    assert_same(whole, run("a", "adapt.collapse=0.5"))


def test_a_divergence_ends_the_training_before_anything_is_written(run, tmp_path):
    with pytest.raises(TrainingError, match=r"diverged.*lower adapt.optimizer.lr"):
        run("a", "optimizer=plain_sgd", "adapt.optimizer.lr=1.0e+30")
    assert not list((tmp_path / "a").glob("weights*"))


def test_weights_with_numbers_that_are_not_finite_are_never_written(run, tmp_path, monkeypatch):
    real = training._Run._check

    def check(self, backbone):
        found = real(self, backbone)
        if self.rows:
            with torch.no_grad():
                next(backbone.body.parameters())[0] = math.nan
        return found

    monkeypatch.setattr(training._Run, "_check", check)
    with pytest.raises(TrainingError, match=r"conv_stem.weight has numbers that are not finite"):
        run("a")
    assert not list((tmp_path / "a").glob("weights*"))


def test_the_guard_compares_neighbours_with_labels_and_warns(run, monkeypatch, make_source):
    adapted = run("a")
    agreement = adapted.agreement
    assert 0 < agreement.before <= 1
    assert any(f"{agreement.before:.3f} → {agreement.after:.3f}" in sentence for sentence in adapted.sentences())
    worse = adapted._replace(agreement=agreement._replace(after=0.0, error=0.01))
    assert any("less than before" in sentence for sentence in worse.sentences())
    better = adapted._replace(agreement=agreement._replace(after=1.0))
    assert not any("less than before" in sentence for sentence in better.sentences())
    assert run("unlabelled", of=make_task(make_source(80, size=16))).agreement is None


def test_labels_of_a_person_serve_the_guard_and_change_nothing_else(run, make_source):
    labels = {f"im{i:06d}": "anomaly" if i % 10 == 0 else "normal" for i in range(60)}
    labelled = run("labelled", of=make_task(make_source(80, size=16, labels=labels)))
    plain = run("plain", of=make_task(make_source(80, size=16)))
    assert labelled.agreement is not None
    assert results(labelled)[1] == results(plain)[1]


def test_frozen_layers_and_batch_statistics_stay(run, task):
    def weights(*words):
        return load_file(run("-".join(words) or "plain", *words).weights)

    before = build_embedding(composed(), task).backbone().body.state_dict()
    upper, all_learn = (
        weights("adapt.trainable_groups=1"),
        weights("adapt.freeze_batch_norm=false", "adapt.trainable_groups=null"),
    )
    assert torch.equal(upper["conv_stem.weight"], before["conv_stem.weight"])
    assert torch.equal(upper["bn2.running_mean"], before["bn2.running_mean"])
    assert not torch.equal(upper["conv_head.weight"], before["conv_head.weight"])
    assert not torch.equal(all_learn["conv_stem.weight"], before["conv_stem.weight"])
    assert not torch.equal(all_learn["bn2.running_mean"], before["bn2.running_mean"])


def test_another_archive_or_a_damaged_folder_is_refused(run, tmp_path, make_source):
    with pytest.raises(KilledError):
        run("a", on_step=kill_at(7))
    with pytest.raises(StorageError, match=r"adapted to 80 images, there are 90 now.*output="):
        run("a", of=make_task(make_source(90, size=16)))
    checkpoint = tmp_path / "a" / "checkpoint.safetensors"
    content = checkpoint.read_bytes()
    checkpoint.write_bytes(content[: len(content) // 2])
    with pytest.raises(StorageError, match=r"checkpoint.safetensors.*corrupt"):
        run("a")
    checkpoint.write_bytes(content)
    with pytest.raises(StorageError, match=r"checkpoint.safetensors is corrupt"):
        run("a", "adapt.method.hidden=12")  # heads of another width
    (tmp_path / "a" / "metrics.csv").write_text("epoch\n")
    with pytest.raises(StorageError, match=r"metrics.csv is missing or corrupt"):
        run("a")
    (tmp_path / "a" / "weights.json").write_text("[]")
    with pytest.raises(StorageError, match=r"weights.json is missing or corrupt"):
        run("a")


def test_unusable_settings_are_refused_before_anything_is_written(run, tmp_path, make_source):
    with pytest.raises(DataError, match="there are 6 images"):
        run("a", of=make_task(make_source(6, size=16)))
    with pytest.raises(ConfigError, match="adapt one model at a time"):
        run("a", "model.name=test_efficientnet+test_efficientnet")
    with pytest.raises(ConfigError, match=r"trainer.lightning asks for 2 devices"):
        run("a", "trainer.lightning.devices=2")
    assert not (tmp_path / "a").exists()


WRONG = """epochs=0 batch_size=1 image_size=8 trainable_groups=0 layer_decay=0.0 layer_decay=1.5 weight_decay=-1.0
    warmup=1.5 head_rate=0.0 held_out=1 collapse=-0.1 minutes=0.0 method.temperature=0.0 method.hidden=1
    method.projection=0"""


@pytest.mark.parametrize("word", WRONG.split())
def test_a_wrong_value_is_an_error_that_names_its_key(run, word):
    key, value = word.split("=")
    with pytest.raises(ConfigError, match=rf"adapt\.{key} is {value}"):
        run("a", f"adapt.{word}")


KNOBS = {
    "simclr": """adapt.epochs=1 adapt.batch_size=8 adapt.image_size=24 adapt.trainable_groups=1 adapt.layer_decay=0.5
        adapt.freeze_batch_norm=false adapt.weight_decay=5.0 adapt.warmup=0.9 adapt.held_out=8 adapt.optimizer.lr=2.0e-3
        adapt.adamw_lr=2.0e-3
        adapt.head_rate=2.0
        adapt.optimizer.betas=[0.5,0.9] adapt.method.hidden=12 adapt.method.projection=12
        adapt.method.temperature=1.0""",
    "vicreg": """adapt.method.hidden=12 adapt.method.projection=12 adapt.method.invariance=5.0 adapt.method.variance=5.0
        adapt.method.covariance=5.0""",
    "byol": "adapt.method.hidden=12 adapt.method.projection=12 adapt.method.momentum=0.5",
    "dino": """adapt.method.hidden=12 adapt.method.projection=12 adapt.method.prototypes=8 adapt.method.momentum=0.5
        adapt.method.student_temperature=0.3 adapt.method.teacher_temperature=0.2 adapt.method.centre_momentum=0.1""",
}
ELSEWHERE = {"minutes", "collapse"}
"""Keys that are turned in other tests."""


def keys(node, prefix=""):
    for key, value in node.items():
        if isinstance(value, dict):
            yield from keys(value, f"{prefix}{key}.")
        elif not key.startswith("_") and key != "name":
            yield f"{prefix}{key}"


@pytest.mark.parametrize("method", KNOBS)
def test_every_knob_is_turned_below(method):
    found = set(keys(OmegaConf.to_container(composed(f"adapt={method}", *FEW[: method == "dino"]).adapt)))
    shared = set(keys(OmegaConf.to_container(composed().adapt))) - {key for key in found if key.startswith("method.")}
    turned = {word.split("=")[0].removeprefix("adapt.") for word in KNOBS[method].split()}
    expected = found - ELSEWHERE if method == "simclr" else found - shared
    assert turned == expected


@pytest.fixture(scope="module")
def plain_weights():
    """Weights of each method with no knob turned, for all tests below."""
    return {}


@pytest.mark.slow
@pytest.mark.parametrize(("method", "word"), [(name, word) for name, words in KNOBS.items() for word in words.split()])
def test_every_knob_changes_the_weights(run, plain_weights, method, word):
    words = [f"adapt={method}", *FEW[: method == "dino"], "adapt.epochs=2"]
    if method not in plain_weights:
        plain_weights[method] = load_file(run("plain", *words).weights)
    plain, changed = plain_weights[method], load_file(run("other", *words, word).weights)
    assert any(not torch.equal(plain[name], changed[name]) for name in plain)


def test_the_learning_rate_rises_and_falls():
    factors = [warm_cosine(step, 20, 0.2) for step in range(20)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[4] == 1.0
    assert factors[12] == pytest.approx(0.5)
    assert factors == sorted(factors[:5]) + sorted(factors[5:], reverse=True)
    assert 0 < factors[-1] < 0.02
    assert warm_cosine(0, 20, 0.0) == 1.0
    assert AdaptationSpec.__dataclass_fields__.keys() <= set(composed().adapt)


def test_an_archive_of_five_bands_has_weights_of_its_own(run, make_source, tmp_path):
    task = make_task(make_source(80, size=16, channels=5))
    weights = run("a", "augment=galaxies", of=task).weights
    embedding = build_embedding(composed(f"model.weights={weights}"), task)
    assert torch.equal(embedding.backbone().body.conv_stem.weight, load_file(weights)["conv_stem.weight"])
    assert load_file(weights)["conv_stem.weight"].shape[1] == 5


@pytest.mark.parametrize("name", ["test_vit3", "test_convnext", "test_resnet"])
def test_other_architectures_are_adapted_too(run, name):
    words = [f"model.name={name}", "adapt.trainable_groups=null", "adapt.epochs=1"]
    adapted = run("a", *words)
    assert len(adapted.rows) == 2
    changed = load_file(adapted.weights)
    again = run("b", *words, f"model.weights={adapted.weights}")  # the weights are a start of their own
    assert load_file(again.weights).keys() == changed.keys()
    if name == "test_vit3":
        with pytest.raises(
            ConfigError, match=r"adapt.image_size is 48, but test_vit3 takes images of model.image_size=32"
        ):
            run("c", *words, "adapt.image_size=48")
