import io
import logging

import pytest
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.utilities import rank_zero_only
from rich.console import Console

from anomalymatch import progress as progress_module
from anomalymatch.algorithms.lightning import StepLogger, StepProgress, ignore_step, relayed


def test_the_logger_passes_rows_on():
    rows = []
    logger = StepLogger(rows.append)
    logger.log_metrics({"loss": 1.5, "epoch": 0.0}, step=3)
    logger.log_metrics({"epoch": 1.0}, step=4)
    logger.log_metrics({"loss": 2.0}, step=None)
    logger.log_hyperparams({"lr": 0.1})
    assert rows == [{"step": 3.0, "loss": 1.5}, {"step": 0.0, "loss": 2.0}]
    assert (logger.name, logger.version) == ("steps", 0)


def test_only_the_first_of_several_processes_is_heard(monkeypatch):
    rows = []
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    StepLogger(rows.append).log_metrics({"loss": 1.5}, step=0)
    assert rows == []


def test_rows_are_relayed_in_order_and_all_of_them():
    rows = []
    with relayed(rows.append) as listener:
        for step in range(2000):  # more than a pipe holds
            listener({"step": float(step)})
    assert rows == [{"step": float(step)} for step in range(2000)]


def test_an_error_of_the_listener_comes_when_all_is_relayed():
    rows = []

    def full(row):
        rows.append(row)
        raise OSError("the disk is full")

    def tell():
        with relayed(full) as listener:
            for step in range(2000):
                listener({"step": float(step)})

    with pytest.raises(OSError, match="the disk is full"):
        tell()
    assert len(rows) == 1


def test_an_error_of_the_training_ends_the_relay():
    with pytest.raises(ValueError, match="the loss is not finite"), relayed(ignore_step):
        raise ValueError("the loss is not finite")


def test_nobody_has_to_listen():
    assert ignore_step({"step": 0.0}) is None


@pytest.fixture
def terminal(monkeypatch):
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    monkeypatch.setattr(progress_module, "console", console)
    return console


@pytest.fixture
def lightning(monkeypatch):
    """A trainer that has just done a step."""
    trainer = Trainer(logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False)
    monkeypatch.setattr(Trainer, "callback_metrics", {"loss": 0.5, "pass_rate": 0.25})
    return trainer, LightningModule()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_bar_shows_rate_loss_and_pass_rate(terminal, lightning):
    callback = StepProgress("Training, cycle 2", 2)
    callback.on_train_start(*lightning)
    for index in range(2):
        callback.on_train_batch_end(*lightning, None, None, index)
    callback.on_train_end(*lightning)
    text = terminal.file.getvalue()
    assert "Training, cycle 2" in text
    assert "2/2" in text
    assert "loss 0.500, pass rate 0.25" in text
    assert not terminal._live_stack


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("started", [False, True])
def test_the_bar_goes_away_when_training_breaks_off_even_before_it_began(terminal, lightning, started):
    callback = StepProgress("Training", 2)
    if started:
        callback.on_train_start(*lightning)
    callback.on_exception(*lightning, ValueError())
    assert not terminal._live_stack


def test_lightning_says_nothing_meanwhile_and_as_much_as_before_afterwards(make, small, labels):
    talk, heard = logging.getLogger("pytorch_lightning.utilities.rank_zero"), []
    ear = logging.Handler()
    ear.emit = heard.append
    talk.addHandler(ear)
    level = talk.level
    try:
        make("fixmatch").fit(labels, pool=small.pool)
        assert [record.getMessage() for record in heard] == []
        assert talk.level == level
        Trainer(accelerator="cpu", logger=False)
        assert heard
    finally:
        talk.removeHandler(ear)
