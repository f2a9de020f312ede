"""What W&B is told: read back from the file that an offline run leaves."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import wandb
import yaml
from omegaconf import OmegaConf
from wandb.proto import wandb_internal_pb2
from wandb.sdk.internal.datastore import DataStore

import anomalymatch as am
from anomalymatch.active.tracking import NoTracker, Tracker, WandbTracker
from anomalymatch.build import build_tracker
from anomalymatch.config import compose, config_folder
from anomalymatch.errors import ConfigError

OFFLINE = ("logger=wandb", "logger.mode=offline", "logger.project=trial", "logger.tags=[tiny]", "logger.group=trials")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:wandb", "ignore::ResourceWarning")


@pytest.fixture(autouse=True)
def nobody(monkeypatch, tmp_path):
    """No key, no terminal, and nothing of the user's own W&B."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_RUN_ID", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def records(path):
    """All records of the .wandb files below `path`, oldest file first."""
    found = []
    for file in sorted(Path(path).glob("wandb/offline-run-*/*.wandb")):
        store = DataStore()
        store.open_for_scan(str(file))
        while (data := store.scan_data()) is not None:
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            found.append(record)
        store._fp.close()
    return found


def history(path):
    """The logged rows, as dictionaries with dotted keys."""
    rows = [record.history for record in records(path) if record.WhichOneof("record_type") == "history"]
    return [{"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in row.item} for row in rows]


def value(row, key):
    return row[key] if key in row else {k: v for k, v in row.items() if k.startswith(f"{key}/")}


@pytest.mark.slow
def test_an_offline_run_has_everything_and_a_resumed_one_goes_on(tiny_job, tmp_path):
    job = [word for word in tiny_job if word != "logger=none"]
    folder = tmp_path / "run"
    am.run(*job, *OFFLINE, "al.cycles=1", folder=folder)
    rows = history(folder)

    steps = [row for row in rows if "train/loss" in row]
    assert [row["train/step"] for row in steps] == [0, 1]
    assert {"train/loss", "train/loss_lb", "train/loss_ulb", "train/pass_rate", "train/cycle"} <= set(steps[0])

    (cycle,) = [row for row in rows if "cycle/cycle" in row]
    metrics = OmegaConf.load(folder / "cycles" / "01" / "metrics.json")
    assert cycle["cycle/heldout_ap"] == pytest.approx(metrics.heldout_ap)
    assert cycle["cycle/found"] == 3
    for name in ("pr", "roc", "discovery", "scores", "training", "top64", "false_positives"):
        picture = cycle[f"figures/{name}"]
        assert picture["_type"] == "image-file"
        assert (next(folder.glob("wandb/offline-run-*")) / "files" / picture["path"]).stat().st_size > 1000
    assert cycle["labels"]["_type"] == "table-file"
    assert (cycle["labels"]["nrows"], cycle["labels"]["ncols"]) == (13, 6)
    for chart in ("Precision and recall", "ROC"):
        table = cycle[f"curves/{chart}_table"]
        assert table["_type"] == "table-file"
        content = json.loads((next(folder.glob("wandb/offline-run-*")) / "files" / table["path"]).read_text())
        assert len(content["columns"]) == 2
        assert all(0 <= number <= 1 for point in content["data"] for number in point)

    (artifact,) = [r.request for r in records(folder) if r.request.WhichOneof("request_type") == "log_artifact"] or [
        r for r in records(folder) if r.WhichOneof("record_type") == "artifact"
    ]
    assert "weights.safetensors" in str(artifact)
    assert "cycle-1" in str(artifact)

    (run,) = [r.run for r in records(folder) if r.WhichOneof("record_type") == "run"]
    assert (run.project, list(run.tags), run.run_group, run.display_name) == ("trial", ["tiny"], "trials", "run")
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert config["algorithm"]["learner"]["batch"]["labelled"] == 2
    assert config["model"]["image_size"] == 32

    am.run(*job, *OFFLINE, "al.cycles=2", folder=folder)
    runs = [r.run for r in records(folder) if r.WhichOneof("record_type") == "run"]
    assert {r.run_id for r in runs} == {(folder / "wandb_run_id").read_text()}
    assert len(runs) == 2
    later = history(folder)[len(rows) :]
    assert [row["train/step"] for row in later if "train/loss" in row] == [2, 3]
    assert [row["cycle/cycle"] for row in later if "cycle/cycle" in row] == [1, 2]


SCRIPT = """
import sys
from pathlib import Path
from anomalymatch.build import build_tracker
from anomalymatch.config import compose
tracker = build_tracker(compose("logger=wandb"), Path(sys.argv[1]))
tracker.finish()
"""


@pytest.mark.slow
def test_without_a_key_and_a_terminal_nothing_asks_and_nothing_is_said(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, tmp_path], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert done.stdout == ""
    assert "wandb" not in done.stderr


@pytest.mark.parametrize(
    ("mode", "key", "variable", "expected"),
    [
        ("auto", False, None, "offline"),
        ("auto", True, None, "online"),
        ("auto", True, "disabled", "disabled"),
        ("offline", True, None, "offline"),
        ("online", False, None, "online"),
    ],
)
def test_the_mode_follows_the_key_unless_it_is_set(mode, key, variable, expected, monkeypatch, tmp_path):
    asked = {}

    class Run:
        id = "x"

        def define_metric(self, name, step_metric):
            asked.setdefault("metrics", []).append((name, step_metric))

    monkeypatch.setattr(wandb, "login", lambda **options: asked.update(login=options) or key)
    monkeypatch.setattr(wandb, "init", lambda **options: asked.update(options) or Run())
    if variable:
        monkeypatch.setenv("WANDB_MODE", variable)
    tracker = build_tracker(compose("logger=wandb", f"logger.mode={mode}"), tmp_path)
    assert isinstance(tracker, Tracker)
    assert asked["mode"] == expected
    assert asked["resume"] == "allow"
    assert asked["id"] == (tmp_path / "wandb_run_id").read_text()
    assert asked.get("login", {}) in ({}, {"prompt": False})
    assert asked["metrics"] == [("train/*", "train/step"), ("cycle/*", "cycle/cycle")]


def test_a_wrong_mode_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="logger.mode is 'loud': choose one of auto, online, offline"):
        build_tracker(compose("logger=wandb", "logger.mode=loud"), tmp_path)


def test_no_tracker_tracks_nothing(tmp_path):
    tracker = build_tracker(compose("logger=none"), tmp_path)
    assert isinstance(tracker, NoTracker)
    assert isinstance(tracker, Tracker)
    tracker.log_step(1, {"loss": 1.0})
    tracker.finish()
    assert list(tmp_path.iterdir()) == []
    assert not issubclass(NoTracker, WandbTracker)


# --- the sweep -------------------------------------------------------------------------------------------------


@pytest.fixture
def sweep():
    return yaml.safe_load((config_folder() / "sweep" / "fixmatch.yaml").read_text(encoding="utf-8"))


def test_the_sweep_sets_keys_that_exist_to_values_that_fit(sweep):
    assert sweep["method"] in {"grid", "random", "bayes"}
    for key, parameter in sweep["parameters"].items():
        values = parameter["values"] if "values" in parameter else [parameter["min"], parameter["max"]]
        for value in values:
            assert OmegaConf.select(compose(f"{key}={value}"), key) == value
        if "distribution" in parameter:
            assert parameter["distribution"] == "log_uniform_values"
            assert 0 < parameter["min"] < parameter["max"]


def test_the_sweep_optimises_what_a_run_logs(sweep, task):
    import numpy as np

    from anomalymatch.active.evaluate import cycle_row
    from anomalymatch.ranking import Ranking

    ids = [*task.pool, *task.holdout]
    row = cycle_row(1, task, {}, Ranking(ids, np.arange(float(len(ids)))), None)
    assert sweep["metric"]["name"] in {f"cycle/{key}" for key in row}
    assert sweep["metric"]["goal"] == "maximize"
    assert sweep["early_terminate"]["type"] == "hyperband"


def test_the_agent_of_the_sweep_calls_our_command(sweep):
    """As `wandb agent` builds it: macros stand alone, and each argument is KEY=VALUE without hyphens."""
    from wandb.wandb_agent import Agent

    text = Path(sys.modules[Agent.__module__].__file__).read_text(encoding="utf-8")
    assert all(f'"{macro[2:-1]}"' in text for macro in sweep["command"] if macro.startswith("${"))
    assert sweep["command"][-4:] == ["${interpreter}", "-m", "${program}", "${args_no_hyphens}"]
    assert sweep["program"] == "anomalymatch.run"
