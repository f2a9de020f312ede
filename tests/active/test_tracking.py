"""Values logged to W&B."""

import socket
import time
from types import SimpleNamespace

import numpy as np
import pytest
import requests
import wandb
import yaml
from omegaconf import OmegaConf
from PIL import Image
from wandb.sdk.launch.sweeps import utils as sweep_utils

import anomalymatch as am
from anomalymatch.active.tracking import _run_id
from anomalymatch.build import build_tracker
from anomalymatch.config import check_overrides, compose, config_folder
from anomalymatch.errors import ConfigError
from anomalymatch.evaluation.metrics import cycle_metrics
from anomalymatch.ranking import Ranking

OFFLINE = (
    "logger=wandb",
    *(f"logger.wandb.{word}" for word in ("mode=offline", "project=trial", "tags=[tiny]", "group=trials")),
)
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:wandb", "ignore::ResourceWarning")


@pytest.fixture(autouse=True)
def nobody(monkeypatch, tmp_path):
    """No key, no terminal, and nothing of the user's own W&B."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_RUN_ID", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


@pytest.fixture
def fake(monkeypatch):
    """Replace the run of W&B by one that records its settings, logged rows and artifacts."""

    class FakeRun:
        id, url, dir = "x", None, "wandb/offline-run-x/files"

        def __init__(self):
            self.rows, self.artifacts, self.settings, self.metrics = [], [], [], []

        def init(self, **settings):
            self.settings.append(settings)
            return self

        def define_metric(self, name, step_metric):
            self.metrics.append((name, step_metric))

        def log(self, row):
            self.rows.append(row)

        def log_artifact(self, artifact, aliases):
            self.artifacts.append((artifact, aliases))

        def finish(self):
            pass

    run = FakeRun()
    monkeypatch.setattr(wandb, "init", run.init)
    monkeypatch.setattr(requests, "get", lambda url, timeout: None)
    return run


def test_a_run_logs_everything_and_a_resumed_one_continues_it(fake, tiny_job, tmp_path):
    job = [*(word for word in tiny_job if word != "logger=none"), *OFFLINE]
    folder = tmp_path / "run"
    am.run(*job, "al.cycles=1", folder=folder)
    steps = [row for row in fake.rows if "train/loss" in row]
    assert [row["train/step"] for row in steps] == [0, 1]
    assert {"train/loss", "train/loss_lb", "train/loss_ulb", "train/pass_rate", "train/cycle"} <= set(steps[0])

    (cycle,) = [row for row in fake.rows if "cycle/cycle" in row]
    metrics = OmegaConf.load(folder / "cycles" / "01" / "metrics.json")
    assert cycle["cycle/heldout_ap"] == pytest.approx(metrics.heldout_ap)
    assert cycle["cycle/found"] == 3
    assert "cycle/left" not in cycle  # there is no audit: it would be drawn as NaN
    names = ("pr", "roc", "discovery", "scores", "training", "top64", "top_evidence", "false_positives")
    pictures = {f"figures/{name}" for name in names}
    assert all(isinstance(cycle[name], wandb.Image) for name in pictures)
    assert (len(cycle["labels"].data), len(cycle["labels"].columns)) == (13, 6)
    for chart in ("Precision and recall", "ROC"):
        points = cycle[f"curves/{chart}"].table.data
        assert all(0 <= number <= 1 for point in points for number in point)
        assert {len(point) for point in points} == {2}

    ((weights, aliases),) = fake.artifacts
    assert set(weights.manifest.entries) == {"weights.safetensors", "weights.json"}
    assert (weights.type, set(aliases)) == ("model", {"latest", "cycle-1"})
    assert weights.metadata["heldout_ap"] == pytest.approx(metrics.heldout_ap)

    (settings,) = fake.settings
    expected = {"project": "trial", "tags": ["tiny"], "group": "trials", "name": "run", "mode": "offline"}
    assert {key: settings[key] for key in expected} == expected
    assert settings["config"]["algorithm"]["learner"]["batch"]["labelled"] == 2
    assert settings["config"]["model"]["image_size"] == 32

    before = len(fake.rows)
    am.run(*job, "al.cycles=2", folder=folder)
    assert {settings["id"] for settings in fake.settings} == {(folder / "wandb_run_id").read_text()}
    later = fake.rows[before:]
    assert [row["train/step"] for row in later if "train/loss" in row] == [2, 3]
    assert [row["cycle/cycle"] for row in later if "cycle/cycle" in row] == [1, 2]


@pytest.mark.slow
def test_without_a_key_there_is_no_prompt_and_no_output(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("sys.stdin", None)
    tracker = build_tracker(compose("logger=wandb"), tmp_path)
    tracker.log_step(1, {"loss": 0.125})
    tracker.finish()
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    until = time.monotonic() + 20
    while b"train/loss" not in file.read_bytes():  # W&B's own process writes it
        assert time.monotonic() < until
        time.sleep(0.1)
    out, err = capfd.readouterr()
    assert (out, "wandb:" in err) == ("", False)


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
def test_the_mode_follows_the_key_unless_it_is_set(mode, key, variable, expected, fake, monkeypatch, tmp_path):
    logins = []
    monkeypatch.setattr(wandb, "login", lambda **options: logins.append(options) or key)
    if variable:
        monkeypatch.setenv("WANDB_MODE", variable)
    build_tracker(compose("logger=wandb", f"logger.wandb.mode={mode}"), tmp_path)
    (settings,) = fake.settings
    assert settings["mode"] == expected
    assert settings["resume"] == "allow"
    assert settings["id"] == (tmp_path / "wandb_run_id").read_text()
    assert logins in ([], [{"prompt": False}])
    assert fake.metrics == [("train/*", "train/step"), ("cycle/*", "cycle/cycle")]


@pytest.fixture
def server(fake, monkeypatch):
    """A server with a key at a local port: nothing listens there, or something that never answers."""
    get = requests.api.get
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        settings = SimpleNamespace(base_url=f"http://127.0.0.1:{listener.getsockname()[1]}", api_key="0" * 40)
        monkeypatch.setattr(wandb, "setup", lambda: SimpleNamespace(settings=settings))
        monkeypatch.setattr(wandb, "login", lambda **options: pytest.fail("W&B tries for minutes"))
        monkeypatch.setattr(requests, "get", get)
        yield listener, settings.base_url


@pytest.mark.timeout(30)
@pytest.mark.parametrize("listens", [False, True])
@pytest.mark.parametrize("mode", ["auto", "online"])
def test_a_server_out_of_reach_makes_the_run_offline(server, fake, tmp_path, caplog, listens, mode):
    listener, url = server
    if listens:
        listener.listen()
    tracker = build_tracker(compose("logger=wandb", f"logger.wandb.mode={mode}", "logger.wandb.timeout=0.3"), tmp_path)
    assert fake.settings[-1]["mode"] == "offline"
    assert url in caplog.text
    tracker.log_step(1, {"loss": 1.0})
    assert fake.rows


def test_an_error_of_the_server_makes_the_run_offline(fake, monkeypatch, tmp_path, caplog):
    start = wandb.init

    def refuse(**settings):
        if settings["mode"] == "online":
            raise wandb.errors.CommError("the server is full")
        return start(**settings)

    monkeypatch.setattr(wandb, "init", refuse)
    build_tracker(compose("logger=wandb", "logger.wandb.mode=online"), tmp_path)
    assert fake.settings[-1]["mode"] == "offline"
    assert "the server is full" in caplog.text


def test_the_address_or_how_to_upload_is_told(fake, tmp_path, caplog):
    caplog.set_level("INFO")
    build_tracker(compose("logger=wandb", "logger.wandb.mode=offline"), tmp_path).finish()
    assert "wandb sync wandb/offline-run-x" in caplog.text
    fake.url = "https://server/run"
    caplog.clear()
    build_tracker(compose("logger=wandb", "logger.wandb.mode=online"), tmp_path).finish()
    assert "https://server/run" in caplog.text
    assert "wandb sync" not in caplog.text


def test_pictures_can_be_kept_here(fake, probe_job, tmp_path):
    job = [*(word for word in probe_job if word != "logger=none"), *OFFLINE]
    am.run(*job, "al.cycles=1", "logger.wandb.media=false", folder=tmp_path / "run")
    (cycle,) = fake.rows
    assert not any(isinstance(value, wandb.Image) for value in cycle.values())
    assert {"labels", "cycle/ap", "curves/ROC"} <= set(cycle)


def test_jobs_of_a_sweep_are_named_by_their_arguments_and_grouped(fake, command, probe_job, tmp_path):
    words = [*(word for word in probe_job if word != "logger=none"), "logger=wandb", "logger.wandb.mode=offline"]
    outcome = command("-m", *words, "al.cycles=1", "seed=0,1", "hydra.sweep.dir=sweep")
    assert outcome.code == 0, outcome.err
    assert [settings["group"] for settings in fake.settings] == ["sweep", "sweep"]
    assert [settings["name"] for settings in fake.settings] == ["seed=0", "seed=1"]


def test_groups_are_logged_as_table_and_pictures(fake, tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "group-000.png")
    tracker = build_tracker(compose(*OFFLINE), tmp_path)
    tracker.log_groups([{"group": 0, "images": 3}, {"group": 1, "images": 2}], [tmp_path / "group-000.png"])
    (logged,) = fake.rows
    assert logged["groups/table"].columns == ["group", "images"]
    assert logged["groups/table"].data == [[0, 3], [1, 2]]
    assert isinstance(logged["groups/group-000"], wandb.Image)


def test_a_wrong_mode_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"logger\.wandb\.mode is 'loud': choose one of auto, online, offline"):
        build_tracker(compose("logger=wandb", "logger.wandb.mode=loud"), tmp_path)


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
