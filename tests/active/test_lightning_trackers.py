"""Values logged through the loggers of Lightning, read back from the files that they write."""

import csv
import json
import shutil
from contextlib import closing

import pytest
import pytorch_lightning.loggers  # noqa: F401 (otherwise the run-time type checks compile it, which takes long)
import torch.utils.tensorboard  # noqa: F401
from omegaconf import OmegaConf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import anomalymatch as am
from anomalymatch.active import lightning_trackers
from anomalymatch.active.run_folder import RunFolder
from anomalymatch.build import build_tracker
from anomalymatch.config import compose, resumed
from anomalymatch.errors import AnomalyMatchError, ConfigError


def rows_of(path):
    with path.open(newline="") as file:
        return [{name: float(text) for name, text in row.items() if text} for row in csv.DictReader(file)]


@pytest.fixture
def run_loop(loop_of, task, image_folder, without_pictures, tmp_path):
    """Function that runs the loop of a scripted learner, one step a cycle, with the given loggers and one picture."""
    folder, picture = tmp_path / "run", next(image_folder(1).iterdir())

    def run(cycles, *words):
        config = compose(*words)
        tracker = build_tracker(config, folder)
        with closing(RunFolder(folder)) as run_folder:
            run_folder.plots.mkdir(exist_ok=True)
            shutil.copy(picture, run_folder.plots / "roc.png")
            loop_of(task, cycles=cycles).run(run_folder, tracker)
        tracker.finish()
        return folder

    return run


def test_csv_and_tensorboard_have_the_numbers_of_the_run_folder_also_after_a_resume(run_loop):
    folder = run_loop(2, "logger=[csv,tensorboard]", "model.image_size=48")
    metrics = [json.loads((folder / "cycles" / cycle / "metrics.json").read_text()) for cycle in ("01", "02")]
    known = [{name: value for name, value in row.items() if value is not None and value == value} for row in metrics]
    file = folder / "csv" / "version_0" / "metrics.csv"
    first, text = rows_of(file), file.read_text()
    assert [(row["step"], row["train/loss_lb"]) for row in first if "train/loss_lb" in row] == [(0, 1.0), (1, 0.5)]
    cycles = [row for row in first if "cycle/cycle" in row]
    for row, expected in zip(cycles, known, strict=True):
        assert {name: row[f"cycle/{name}"] for name in expected} == pytest.approx(expected)
        assert "cycle/left" not in row  # there is no audit: it would be NaN
    assert "image_size: 48" in (folder / "csv" / "version_0" / "hparams.yaml").read_text()

    run_loop(3, "logger=[csv,tensorboard]")
    assert file.read_text() == text
    later = rows_of(folder / "csv" / "version_1" / "metrics.csv")
    assert [row["step"] for row in later if "train/loss_lb" in row] == [2]
    assert [row["cycle/cycle"] for row in later if "cycle/cycle" in row] == [2, 3]

    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    losses = events.Scalars("train/loss_lb")
    assert [(event.step, event.value) for event in losses] == [(0, 1.0), (1, 0.5), (2, pytest.approx(1 / 3))]
    assert {event.step for event in events.Scalars("cycle/heldout_ap")} == {1, 2, 3}
    assert events.Tags()["images"] == ["figures/roc"]
    assert "hp_metric" not in events.Tags()["scalars"]


@pytest.mark.parametrize("media", [True, False])
def test_tensorboard_has_groups_as_a_table_and_pictures_unless_they_stay_here(media, image_folder, tmp_path):
    picture = next(image_folder(1).iterdir())
    tracker = build_tracker(compose("logger=tensorboard", f"logger.tensorboard.media={media}".lower()), tmp_path)
    tracker.log_groups([{"group": 0, "images": 3}, {"group": 1, "images": 2}], [picture])
    tracker.finish()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    (table,) = events.Tensors("groups/table/text_summary")
    assert "| 1 | 2 |" in table.tensor_proto.string_val[0].decode()
    assert events.Tags()["images"] == ([f"groups/{picture.stem}"] if media else [])


def test_keys_of_a_logger_that_the_run_has_not_are_refused_on_resume(probe_job, tmp_path):
    job = [word for word in probe_job if word != "logger=none"]
    am.run(*job, "al.cycles=1", "logger=csv", folder=tmp_path)
    assert (tmp_path / "csv" / "version_0" / "metrics.csv").is_file()
    with pytest.raises(ConfigError, match=r"the run has no such logger; choose it by logger=NAME"):
        resumed(tmp_path, compose("logger.wandb.media=false"), ["logger.wandb.media=false"])
    words = ["logger=[csv,tensorboard]", "logger.tensorboard.media=false"]
    assert list(resumed(tmp_path, compose(*words), words).logger) == ["csv", "tensorboard"]
    earlier = compose(*job, "logger=none")
    earlier.logger = earlier.logger.none
    with pytest.raises(ConfigError, match="a version with a single logger: add logger=wandb"):
        build_tracker(earlier, tmp_path)


@pytest.mark.parametrize("name", ["tensorboard", "mlflow"])
def test_a_missing_package_is_one_sentence_and_leaves_nothing(name, probe_job, tmp_path, monkeypatch):
    monkeypatch.setattr(lightning_trackers, "find_spec", lambda package: None)
    job = [*(word for word in probe_job if word != "logger=none"), f"logger=[csv,{name}]"]
    with pytest.raises(ConfigError, match=rf'logger={name} needs: pip install "anomalymatch\[{name}\]"'):
        am.run(*job, folder=tmp_path / "run")
    assert not (tmp_path / "run").exists() or not any((tmp_path / "run").iterdir())


class FakeMlflow:
    """Lightning's MLFlowLogger as far as the tracker uses it."""

    def __init__(self, experiment_name, **options):
        self.experiment_name = experiment_name
        self.options, self.metrics, self.params, self.files = options, [], None, []
        self.run_id = options["run_id"] or "abc"
        self.experiment = self

    def log_hyperparams(self, params):
        self.params = params

    def log_metrics(self, metrics, step):
        self.metrics.append((metrics, step))

    def log_artifact(self, run_id, path, section):
        self.files.append((run_id, section, path.rpartition("/")[2]))

    def save(self):
        """MLflow has nothing to save."""

    def finalize(self, status):
        self.status = status


def test_mlflow_gets_numbers_labels_and_weights_and_a_resumed_folder_continues_its_run(run_loop, monkeypatch):
    made = []
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    monkeypatch.setattr(lightning_trackers, "find_spec", lambda package: True)
    monkeypatch.setattr(
        "pytorch_lightning.loggers.MLFlowLogger", lambda *a, **o: made.append(FakeMlflow(*a, **o)) or made[-1]
    )
    run_loop(1, "logger=mlflow", "logger.mlflow.media=false", "logger.mlflow.experiment=trial")
    run_loop(2, "logger=mlflow")
    first, second = made
    assert (first.options["run_id"], second.options["run_id"]) == (None, "abc")
    assert (first.experiment_name, second.experiment_name) == ("trial", "anomalymatch")
    assert first.options["tracking_uri"] == "http://127.0.0.1:1"
    assert (first.options["run_name"], first.status) == ("run", "success")
    assert first.params["model"]["image_size"] > 0
    assert second.params is None
    assert [step for metrics, step in second.metrics if "cycle/ap" in metrics] == [1, 2]
    names = {"labels.csv", "weights.safetensors", "weights.json"}
    assert set(first.files) == {("abc", "cycles/01", name) for name in names}
    assert ("abc", "figures", "roc.png") in second.files


@pytest.mark.parametrize("keys", ["tracking_uri: http://evil", "lightning: {_target_: os.system}"])
def test_a_strangers_folder_cannot_choose_where_data_go(keys, probe_job, tmp_path, monkeypatch):
    monkeypatch.setattr(lightning_trackers, "find_spec", lambda package: True)
    config = compose(*(word for word in probe_job if word != "logger=none"), "logger=mlflow")
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(config).replace("media: true", f"media: true\n    {keys}"))
    with pytest.raises((AnomalyMatchError, TypeError), match=r"tracking_uri|would run code"):
        build_tracker(resumed(tmp_path, config, []), tmp_path)


def test_a_server_that_refuses_is_one_sentence(tmp_path, monkeypatch):
    def refuse(*args, **options):
        raise RuntimeError("API request to http://127.0.0.1:1 failed")

    monkeypatch.setattr(lightning_trackers, "find_spec", lambda package: True)
    monkeypatch.setattr("pytorch_lightning.loggers.MLFlowLogger", refuse)
    with pytest.raises(ConfigError, match=r"logger=mlflow cannot use \S+: API request .*: see MLFLOW_TRACKING_URI"):
        build_tracker(compose("logger=mlflow"), tmp_path)
