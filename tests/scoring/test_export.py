"""Command `python -m anomalymatch.export`: the files are read by the programs that they are for."""

import base64
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import ClassVar

import huggingface_hub.constants
import numpy as np
import onnxruntime
import onnxscript  # noqa: F401 (imported here, the run-time type checks do not compile it, which takes long)
import openvino as ov
import pytest
import torch
import yaml
from networks import network_of, some_images

import anomalymatch as am
from anomalymatch import export as module
from anomalymatch.backbones.checkpoint import describe_input, load_network, save_network
from anomalymatch.data.rendering import Rendering
from anomalymatch.errors import ConfigError, DownloadError, StorageError
from anomalymatch.scoring import export as scoring_export


@pytest.fixture
def call(call_in_folder):
    return call_in_folder(module.main)


def onnx(folder, images):
    return onnxruntime.InferenceSession(folder / "model.onnx").run(["logit"], {"images": images})[0]


def openvino(folder, images):
    return ov.Core().compile_model(folder / "model.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(images)["logit"]


def torchscript(folder, images):
    return torch.jit.load(folder / "model.pt")(torch.from_numpy(images)).numpy()


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
@pytest.mark.parametrize(
    ("program", "files"),
    [(onnx, {"model.onnx"}), (openvino, {"model.xml", "model.bin"}), (torchscript, {"model.pt"})],
)
def test_other_programs_compute_the_same_scores_for_any_number_of_images(program, files, save_run, make_source, call):
    limits = {name: [0.0, 60_000.0] for name in ("red", "green", "blue")}
    run = save_run(make_source(rendering=Rendering(limits=limits, fit="pad")))
    code, out, err = call(f"run={run}", f"format={program.__name__}", "output=model")
    assert (code, out) == (0, ""), err
    assert "largest difference to PyTorch" in err
    folder = Path("model")
    assert {path.name for path in folder.iterdir()} == files | {"model.json", "README.md"}

    described = json.loads((folder / "model.json").read_text())
    batch, *shape = described["input"]["shape"]
    assert (batch, shape, described["input"]["type"]) == ("batch", [3, 32, 32], "uint8")
    assert described["input"]["channels"] == ["red", "green", "blue"]
    assert described["input"]["rendering"]["limits"]["red"] == [0.0, 60_000.0]
    assert described["input"]["rendering"]["fit"] == "pad"
    assert described["run"].startswith("run/01-")

    network = load_network(run / "cycles" / "01" / "weights.safetensors")
    for count in (1, 5):
        images = np.random.default_rng(count).integers(0, 256, (count, *shape), dtype=np.uint8)
        with torch.inference_mode():
            logits = network(torch.from_numpy(images)).numpy()
        np.testing.assert_allclose(program(folder, images), logits[:, 1] - logits[:, 0], atol=1e-4)


@pytest.mark.parametrize("seen", [{"crops": 1}, {"orientations": 2}, {"tiles": 2}])
def test_all_that_a_network_sees_of_an_image_is_written(seen, make_source, tmp_path):
    network = network_of(**seen).eval()
    path = tmp_path / "run" / "cycles" / "01"
    path.mkdir(parents=True)
    save_network(network, path / "weights.safetensors", input=describe_input(make_source()))
    folder = module.export(f"run={tmp_path / 'run'}", "format=openvino", f"output={tmp_path / 'model'}")
    _, _, *sides = json.loads((folder / "model.json").read_text())["input"]["shape"]
    assert sides == [network.spec.input_size] * 2
    images = some_images(3, size=network.spec.input_size)
    with torch.inference_mode():
        logits = network(images).numpy()
    np.testing.assert_allclose(openvino(folder, images.numpy()), logits[:, 1] - logits[:, 0], atol=1e-4)


def test_wrong_words_are_one_sentence(save_run, tmp_path, monkeypatch):
    run = save_run()
    with pytest.raises(ConfigError, match="format is 'onx': choose one of onnx, openvino, torchscript"):
        module.export(f"run={run}", "format=onx")
    with pytest.raises(StorageError, match=r"no cycle=7 with weights, choose one of 1"):
        module.export(f"run={run}", "cycle=7")
    with pytest.raises(StorageError, match="has other files: choose another folder"):
        module.export(f"run={run}", f"output={tmp_path}")
    monkeypatch.setattr(scoring_export, "find_spec", lambda package: None)
    with pytest.raises(ConfigError, match=r'needs the package onnx: pip install "anomalymatch\[onnx\]"'):
        module.export(f"run={run}")


def test_a_file_with_other_scores_is_refused_and_not_left(save_run, tmp_path, monkeypatch):
    monkeypatch.setattr(scoring_export, "_read", lambda path, images, kind: np.zeros(len(images), np.float32))
    monkeypatch.setattr(scoring_export, "_write", lambda module, example, path, kind: path.write_bytes(b""))
    with pytest.raises(ConfigError, match="gives other scores: the log-odds differ by"):
        module.export(f"run={save_run()}", "format=torchscript", f"output={tmp_path / 'out'}")
    assert not (tmp_path / "out").exists()


def test_the_card_says_what_it_was_trained_on_and_how_well_it_ranked(probe_job, tmp_path, without_pictures):
    rows = am.run(*probe_job, "al.cycles=2", folder=tmp_path / "run")
    folder = module.export(f"run={tmp_path / 'run'}", "cycle=1", "format=torchscript", f"output={tmp_path / 'out'}")
    card = (folder / "README.md").read_text()
    header = yaml.safe_load(card.split("---")[1])
    assert header["library_name"] == "anomalymatch"
    assert "| Labels | 3 anomaly, 10 normal |" in card
    assert "| Data set | demo |" in card
    assert "| Algorithm | probe |" in card
    assert f"| heldout_ap | {rows[0]['heldout_ap']:.4g} |" in card
    assert "| Network | test_efficientnet, starting from " in card
    assert str(tmp_path) not in card


def test_the_card_of_a_strangers_run_is_no_markup(save_run, tmp_path):
    run = save_run()
    (run / "config.yaml").write_text("dataset: {name: '</td><script>[x](y)', anomaly: null}\nalgorithm: {name: a|b}\n")
    card = (module.export(f"run={run}", "format=torchscript", f"output={tmp_path / 'out'}") / "README.md").read_text()
    assert "| Data set | \\</td\\>\\<script\\>\\[x\\](y) |" in card
    assert "| Algorithm | a\\|b |" in card
    assert "Unknown: the true classes" in card


class Hub(BaseHTTPRequestHandler):
    """The part of the hub's protocol that an upload needs."""

    made: ClassVar[list[dict]] = []
    files: ClassVar[dict[str, bytes]] = {}
    status: ClassVar[int] = 200

    def do_HEAD(self):
        self.answer({})

    def do_GET(self):
        self.answer({"sha": "0" * 40, "siblings": []})

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        if self.path == "/api/repos/create":
            self.made.append(json.loads(body))
            self.answer({"url": "http://127.0.0.1/me/lenses"})
        elif "/preupload/" in self.path:
            asked = json.loads(body)["files"]
            files = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in asked]
            self.answer({"files": files})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.answer({"commitOid": "1" * 40, "commitUrl": "http://127.0.0.1/me/lenses/commit/1", "hookOutput": ""})
        else:
            self.answer({})

    def answer(self, value):
        data = json.dumps(value).encode()
        self.send_response(self.status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(monkeypatch):
    """Server that plays the hub for uploads."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    for name, value in (("made", []), ("files", {}), ("status", 200)):
        monkeypatch.setattr(Hub, name, value)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_TOKEN", "hf_anything")
    yield Hub
    server.shutdown()
    server.server_close()


def test_a_network_is_pushed_with_its_card_to_a_private_repository(hub, save_run, tmp_path):
    words = (f"run={save_run()}", "format=torchscript", f"output={tmp_path / 'out'}")
    module.export(*words, "push=me/lenses")
    (made,) = hub.made
    assert (made["name"], made["organization"]) == ("lenses", "me")
    assert made.get("private") or made.get("visibility") == "private"  # of older and of newer clients
    assert hub.files == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with pytest.raises(ConfigError, match="'lenses' is no repository of the hub: its name must be OWNER/NAME"):
        module.export(*words, "push=lenses")
    hub.status = 401
    with pytest.raises(DownloadError, match=r"cannot upload to me/lenses on the hub \(no such repository"):
        module.export(*words, "push=me/lenses")
