import io
import logging
import pickle

import pytest
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.utilities import rank_zero_only
from rich.console import Console

from anomalymatch import progress as progress_module
from anomalymatch.algorithms.lightning import StepFile, StepLogger, StepProgress


def test_the_logger_passes_rows_on():
    rows = []
    logger = StepLogger(rows.append)
    logger.log_metrics({"loss": 1.5, "epoch": 0.0}, step=3)
    logger.log_metrics({"epoch": 1.0}, step=4)
    logger.log_metrics({"loss": 2.0}, step=None)
    logger.log_hyperparams({"lr": 0.1})
    assert rows == [{"step": 3.0, "loss": 1.5}, {"step": 0.0, "loss": 2.0}]
    assert (logger.name, logger.version) == ("steps", 0)


def test_only_rank_zero_logs(monkeypatch):
    rows = []
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    StepLogger(rows.append).log_metrics({"loss": 1.5}, step=0)
    assert rows == []


def test_a_step_file_carries_rows_from_another_process(tmp_path):
    file = StepFile(tmp_path / "steps.jsonl")
    assert file.rows() == []
    rows = [{"step": float(step), "loss": step / 3} for step in range(3)]
    for row in rows:
        pickle.loads(pickle.dumps(file))(row)
    assert file.rows() == rows


@pytest.fixture
def terminal(monkeypatch):
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    monkeypatch.setattr(progress_module, "console", console)
    return console


@pytest.fixture
def lightning(monkeypatch):
    """Trainer after one step."""
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
def test_the_bar_disappears_after_an_error(terminal, lightning, started):
    callback = StepProgress("Training", 2)
    if started:
        callback.on_train_start(*lightning)
    callback.on_exception(*lightning, ValueError())
    assert not terminal._live_stack


def test_lightning_is_quiet_only_during_a_training(make, small, labels):
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
