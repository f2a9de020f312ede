"""Values logged to W&B, read back from the file of an offline run."""

import json
import struct
from pathlib import Path

import pytest
import wandb
import yaml
from omegaconf import OmegaConf
from wandb.proto import wandb_internal_pb2
from wandb.sdk.launch.sweeps import utils as sweep_utils

import anomalymatch as am
from anomalymatch.active.tracking import NoTracker, Tracker, WandbTracker, _run_id
from anomalymatch.build import build_tracker
from anomalymatch.config import check_overrides, compose, config_folder
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


def entries(data):
    """The entries of a .wandb file: LevelDB's log format behind a header of seven bytes.

    Blocks of 32 KiB; in each, pieces with a header of checksum (4 bytes), length (2) and kind (1: whole, 2: first,
    3: middle, 4: last); what is shorter than a header at the end of a block is padding.
    """
    assert data[:4] == b":W&B"
    at, entry = 7, b""
    while at + 7 <= len(data):
        room = 32768 - at % 32768
        if room < 7:
            at += room
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        entry += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield entry
            entry = b""


def records(path):
    """All records of the .wandb files below `path`, oldest file first."""
    files = sorted(Path(path).glob("wandb/offline-run-*/*.wandb"), key=lambda file: file.stat().st_mtime_ns)
    return [wandb_internal_pb2.Record.FromString(entry) for file in files for entry in entries(file.read_bytes())]


def history(path):
    """The logged rows; what W&B keeps in pieces is a dictionary again."""
    rows = []
    for record in records(path):
        if record.WhichOneof("record_type") == "history":
            rows.append({})
            for item in record.history.item:
                *parents, last = list(item.nested_key) or [item.key]
                node = rows[-1]
                for parent in parents:
                    node = node.setdefault(parent, {})
                node[last] = json.loads(item.value_json)
    return rows


@pytest.mark.slow
def test_an_offline_run_has_all_logs_and_a_resumed_one_continues_it(tiny_job, tmp_path):
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
    assert "cycle/left" not in cycle  # there is no audit: it would be drawn as NaN
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

    artifacts = [r.artifact for r in records(folder) if r.WhichOneof("record_type") == "artifact"]
    (weights,) = [artifact for artifact in artifacts if artifact.type == "model"]
    assert {content.path for content in weights.manifest.contents} == {"weights.safetensors", "weights.json"}
    assert set(weights.aliases) == {"latest", "cycle-1"}
    assert json.loads(weights.metadata)["heldout_ap"] == pytest.approx(metrics.heldout_ap)

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


@pytest.mark.slow
def test_without_a_key_there_is_no_prompt_and_no_output(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("sys.stdin", None)
    build_tracker(compose("logger=wandb"), tmp_path).finish()
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert capfd.readouterr() == ("", "")


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


def test_groups_are_logged_as_table_and_pictures(monkeypatch, tmp_path):
    from PIL import Image

    logged = {}

    class Run:
        id = "x"
        log = staticmethod(logged.update)

        def define_metric(self, name, step_metric):
            pass

    monkeypatch.setattr(wandb, "init", lambda **options: Run())
    Image.new("RGB", (4, 4)).save(tmp_path / "group-000.png")
    tracker = build_tracker(compose(*OFFLINE), tmp_path)
    tracker.log_groups([{"group": 0, "images": 3}, {"group": 1, "images": 2}], [tmp_path / "group-000.png"])
    assert logged["groups/table"].columns == ["group", "images"]
    assert logged["groups/table"].data == [[0, 3], [1, 2]]
    assert isinstance(logged["groups/group-000"], wandb.Image)


def test_a_wrong_mode_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"logger\.mode is 'loud': choose one of auto, online, offline"):
        build_tracker(compose("logger=wandb", "logger.mode=loud"), tmp_path)


def test_no_tracker_logs_nothing(tmp_path):
    tracker = build_tracker(compose("logger=none"), tmp_path)
    assert isinstance(tracker, NoTracker)
    assert isinstance(tracker, Tracker)
    tracker.log_step(1, {"loss": 1.0})
    tracker.log_groups([{"group": 0, "images": 3}], [])
    tracker.finish()
    assert list(tmp_path.iterdir()) == []
    assert not issubclass(NoTracker, WandbTracker)


# --- the sweep -------------------------------------------------------------------------------------------------


@pytest.fixture
def sweep():
    return yaml.safe_load((config_folder() / "sweep" / "fixmatch.yaml").read_text(encoding="utf-8"))


def test_the_sweep_sets_existing_keys_to_valid_values(sweep):
    assert sweep["method"] in {"grid", "random", "bayes"}
    for key, parameter in sweep["parameters"].items():
        values = parameter["values"] if "values" in parameter else [parameter["min"], parameter["max"]]
        config = check_overrides([f"{key}={','.join(map(str, values))}"], multirun=True)
        assert OmegaConf.select(config, key) == values[0]
        if "distribution" in parameter:
            assert parameter["distribution"] == "log_uniform_values"
            assert 0 < parameter["min"] < parameter["max"]


def test_the_sweep_optimises_a_logged_metric(sweep, task):
    import numpy as np

    from anomalymatch.active.metrics import cycle_metrics
    from anomalymatch.ranking import Ranking

    ids = [*task.pool, *task.holdout]
    row = cycle_metrics(1, task, {}, Ranking(ids, np.arange(float(len(ids)))), None)
    assert sweep["metric"]["name"] in {f"cycle/{key}" for key in row}
    assert sweep["metric"]["goal"] == "maximize"
    assert sweep["early_terminate"]["type"] == "hyperband"


def test_the_agent_of_the_sweep_calls_the_command_with_valid_overrides(sweep):
    """As `wandb agent` builds it: each macro stands alone and is replaced by a list of words."""
    args = {"algorithm.learner.optimizer.lr": {"value": 0.0021}, "seed": {"value": 2}}
    macros = sweep_utils.create_sweep_command_args({"args": args})
    macros |= {"env": ["/usr/bin/env"], "interpreter": ["python"], "program": [sweep["program"]]}
    words = []
    for word in sweep_utils.create_sweep_command(sweep["command"]):
        words += macros[word[2:-1]] if word.startswith("${") else [word]
    assert words[:4] == ["/usr/bin/env", "python", "-m", "anomalymatch.run"]
    config = compose(*words[4:])
    assert (config.seed, config.algorithm.learner.optimizer.lr) == (2, 0.0021)


def test_the_agent_of_a_sweep_chooses_the_id_of_its_run(monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_RUN_ID", "chosen")
    assert _run_id(tmp_path) == "chosen"
    monkeypatch.delenv("WANDB_RUN_ID")
    assert _run_id(tmp_path) == "chosen"
    (tmp_path / "other").mkdir()
    assert _run_id(tmp_path / "other") != "chosen"
