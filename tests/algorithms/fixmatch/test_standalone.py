"""FixMatch and its batches by themselves: a plain Trainer, a network of one's own, several epochs."""

from dataclasses import fields
from functools import partial

import pytest
import timm
import torch
from hydra.utils import instantiate
from pytorch_lightning import Callback, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import anomalymatch as am
from anomalymatch.backbones import hub
from anomalymatch.config import compose
from anomalymatch.errors import ConfigError

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),  # Lightning's own, with a new torch
    pytest.mark.filterwarnings("ignore::UserWarning:pytorch_lightning"),  # of the average in evaluation mode
]
EPOCHS, STEPS = 3, 4
QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}


class Record(Callback):
    """Callback that keeps rates, positions and losses of each step."""

    def __init__(self):
        self.rates, self.positions, self.losses = [], [], []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])
        self.positions.append(tuple(batch.i_ulb.tolist()))

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.losses.append(float(outputs["loss"]))


@pytest.fixture
def data(make_source):
    source = make_source(60, size=32)
    labels = dict.fromkeys(source.ids[:50:10], "anomaly") | dict.fromkeys(source.ids[1:9], "normal")
    pool = [id_ for id_ in source.ids if id_ not in labels]
    return am.MixedBatches(source, labels, pool, image_size=32, spec=am.BatchSpec(labelled=4, iterations=STEPS))


@pytest.fixture
def images(data):
    return torch.stack([torch.from_numpy(image).permute(2, 0, 1) for image in data.source.read(data.source.ids)])


def own_network():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(8, 2))


def trainer_of(tmp_path, *callbacks, **options):
    settings = {"max_epochs": EPOCHS, "callbacks": [*callbacks], "default_root_dir": tmp_path}
    return Trainer(**settings | QUIET | options)


@pytest.mark.parametrize("make", [own_network, partial(timm.create_model, "test_resnet", num_classes=2)])
def test_any_network_trains_for_several_epochs(data, images, make, tmp_path):
    record, model = Record(), am.FixMatch(make(), am.FixMatchSpec(schedule="cosine_7_16", rampup=0.5))
    trainer = trainer_of(tmp_path, record, enable_checkpointing=False)
    trainer.fit(model, data)
    steps = EPOCHS * STEPS
    assert record.rates[0] == pytest.approx(0.0075)
    assert record.rates == sorted(record.rates, reverse=True)
    assert record.rates[-1] > 0.19 * record.rates[0]  # of the whole training, not of each epoch
    assert len(set(record.positions)) == steps
    assert all(loss == loss for loss in record.losses)
    rows = torch.cat(trainer.predict(model, DataLoader(TensorDataset(images), batch_size=16)))
    logits = model.eval()(images)
    torch.testing.assert_close(rows, (logits[:, 1] - logits[:, 0]).detach(), rtol=1e-4, atol=1e-4)
    assert torch.equal(logits, model.ema.network(images.float()))
    targets = torch.tensor([id_ in data.source.ids[::10] for id_ in data.source.ids]).long()
    (row,) = trainer.validate(model, DataLoader(TensorDataset(images, targets), batch_size=16), verbose=False)
    assert set(row) == {"val_loss", "val_ap"}
    assert row["val_loss"] == pytest.approx(nn.functional.cross_entropy(logits, targets).item(), rel=1e-4)
    assert 0 < row["val_ap"] <= 1


def test_validation_during_a_training(data, images, tmp_path):
    held_out = DataLoader(TensorDataset(images, (torch.arange(60) % 10 == 0).long()), batch_size=20)
    trainer = trainer_of(tmp_path, enable_checkpointing=False, num_sanity_val_steps=0)
    trainer.fit(am.FixMatch(own_network()), data.train_dataloader(), held_out)
    assert {"val_loss", "val_ap", "loss", "pass_rate"} <= set(trainer.callback_metrics)


def test_a_classifier_of_timm_gets_normalised_images(images):
    network = timm.create_model("test_resnet", num_classes=2).eval()
    mean, std = (torch.tensor(network.pretrained_cfg[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
    expected = network((images / 255 - mean) / std)
    torch.testing.assert_close(am.FixMatch(network).eval()(images), expected, rtol=1e-3, atol=1e-4)


def test_the_name_of_a_timm_model_is_built_with_pretrained_weights(monkeypatch, images):
    def refuse():
        raise ConnectionError("offline")

    monkeypatch.setattr(hub, "require_hub", refuse)
    model = am.FixMatch("tf_efficientnet_lite0").eval()
    assert model.network.spec.weights != "random initialisation"
    assert model(images[:2]).shape == (2, 2)


def test_hyper_parameters_are_plain_and_a_checkpoint_of_lightning_restores(data, images, tmp_path):
    model = am.FixMatch(own_network(), am.FixMatchSpec(ema_decay=0.5), optimizer=partial(torch.optim.AdamW, lr=1e-3))
    assert model.hparams["ema_decay"] == 0.5
    assert (model.hparams["optimizer"], model.hparams["optimizer.lr"]) == ("AdamW", 1e-3)
    assert {type(value) for value in model.hparams.values()} <= {str, int, float, bool, type(None)}
    trainer = trainer_of(tmp_path)
    trainer.fit(model, data)
    trainer.save_checkpoint(tmp_path / "own.ckpt")
    stored = torch.load(tmp_path / "own.ckpt", weights_only=True)
    assert stored["hyper_parameters"] == dict(model.hparams)
    again = am.FixMatch(own_network())
    again.load_state_dict(stored["state_dict"])
    assert torch.equal(again.eval()(images), model.eval()(images))


def test_a_schedule_needs_an_end(data, tmp_path):
    model = am.FixMatch(own_network(), am.FixMatchSpec(schedule="cosine_7_16"))
    with pytest.raises(ConfigError, match="iterations"):
        trainer_of(tmp_path, enable_checkpointing=False, max_epochs=-1).fit(model, data)


def test_defaults_are_those_of_the_reference_recipe():
    recipe = compose("algorithm=fixmatch_reference").algorithm.learner
    loss, views = instantiate(recipe.loss), instantiate(recipe.augmentation)
    for field in fields(am.FixMatchSpec):
        if field.name not in ("weighting", "alignment"):  # partials, which are compared by what they do
            assert getattr(am.FixMatchSpec(), field.name) == getattr(loss, field.name), field.name
    assert type(am.FixMatchSpec().make_weighting(0)) is type(loss.make_weighting(0))
    assert not loss.make_alignment().aligns
    for field in fields(am.ObjectAugmentation):
        ours, theirs = (getattr(each, field.name) for each in (am.ObjectAugmentation(), views))
        assert (list(ours) == list(theirs)) if isinstance(ours, tuple) else (ours == theirs), field.name
    batch = instantiate(recipe.batch)
    assert (batch.labelled, batch.unlabelled_ratio, batch.iterations) == (16, 5, am.BatchSpec().iterations)
    assert batch.wants_candidates is am.BatchSpec().wants_candidates is False
    optimizer = instantiate(recipe.optimizer)
    assert am.FixMatch(own_network()).make_optimizer.keywords == optimizer.keywords
