"""Models of the hub and of folders: a local server plays the hub, with tiny random models."""

import json
import os
import shutil
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import ClassVar
from urllib.parse import unquote

import huggingface_hub.constants
import pytest
import timm
import torch
from networks import built, network_of, some_images
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf

from anomalymatch.backbones.architectures import find_origin, split_names
from anomalymatch.backbones.checkpoint import load_network, save_network
from anomalymatch.backbones.network import image_classifier
from anomalymatch.build import make_learner
from anomalymatch.config import compose
from anomalymatch.errors import ConfigError, DownloadError
from anomalymatch.run import main as run_main
from anomalymatch.score import main as score_main

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SMALL = {"depth": 3, "embed_dim": 32, "num_heads": 2, "reg_tokens": 2, "class_token": True}
"""Arguments with which `test_vit` is built otherwise than timm does by its name."""


class Hub(BaseHTTPRequestHandler):
    """The part of the hub's protocol that a download needs; `files` are the repositories by name."""

    files: ClassVar[dict[str, dict[str, bytes]]] = {}
    status: ClassVar[dict[str, tuple[int, str]]] = {}
    """Repositories that answer with an error."""

    def do_HEAD(self):
        self.do_GET(head=True)

    def do_GET(self, head=False):
        repository, _, rest = unquote(self.path).lstrip("/").partition("/resolve/")
        name = rest.partition("/")[2]
        code, error = self.status.get(repository, (200, ""))
        if self.path != "/" and code == 200:
            code, error = (200, "") if repository in self.files else (404, "RepoNotFound")
            if code == 200 and name not in self.files[repository]:
                code, error = 404, "EntryNotFound"
        data = self.files.get(repository, {}).get(name, b"") if code == 200 else b""
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hash(data):x}"')
        if error:
            self.send_header("X-Error-Code", error)
        self.end_headers()
        if not head:
            self.wfile.write(data)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Server that plays the hub, and an empty cache; returns the repositories that it has."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(Hub, "files", {})
    monkeypatch.setattr(Hub, "status", {})
    monkeypatch.setattr(Hub, "address", address, raising=False)
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    yield Hub.files
    server.shutdown()
    server.server_close()


@pytest.fixture
def saved(tmp_path):
    """Function that saves a random model as timm does for the hub, and returns model and folder."""

    def save(name="test_vit", folder="a model", *, safe=True, **arguments):
        torch.manual_seed(1)
        model = timm.create_model(name, **arguments)
        path = tmp_path / folder
        save_for_hf(model, path, safe_serialization=safe)
        return model, path

    return save


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("prefix", ["hf_hub:", "hf-hub:"])
@pytest.mark.parametrize("safe", [True, False])  # Zoobot's encoders have pytorch_model.bin alone
def test_model_of_the_hub_has_its_architecture_weights_and_statistics(hub, saved, prefix, safe):
    model, folder = saved(safe=safe, **SMALL)
    description = json.loads((folder / "config.json").read_text())
    description["pretrained_cfg"] |= {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    (folder / "config.json").write_text(json.dumps(description))
    hub["someone/tiny"] = contents(folder)
    spec, backbone = built(f"{prefix}someone/tiny", weights="auto", image_size=160)
    assert (spec.weights, spec.mean, spec.std) == ("hub someone/tiny", (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert spec.architectures[0].name == "test_vit"
    assert spec.architectures[0].arguments.items() >= SMALL.items()
    own, expected = backbone.body.state_dict(), model.state_dict()
    assert own.keys() == {name for name in expected if not name.startswith("head.")}
    assert all(torch.equal(tensor, expected[name]) for name, tensor in own.items())
    assert backbone.features == 2 * SMALL["embed_dim"]


def test_cache_is_used_without_a_hub(hub, saved, monkeypatch):
    hub["someone/tiny"] = contents(saved(**SMALL)[1])
    name = "hf_hub:someone/tiny"
    first = built(name, weights="hub")[1]
    hub.clear()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    again = built(name, weights="hub")[1]
    torch.testing.assert_close(again.eval()(some_images()), first.eval()(some_images()))


def test_revision(hub, saved):
    hub["someone/tiny"] = contents(saved(**SMALL)[1])
    assert find_origin("hf_hub:someone/tiny@v2").architecture.name == "test_vit"


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (
            (403, "GatedRepo"),
            r"cannot fetch someone/tiny .*gated.*accept its conditions at http.*/someone/tiny, then log",
        ),
        ((401, "GatedRepo"), r"cannot fetch someone/tiny .*gated"),
        ((404, "RepoNotFound"), r"cannot fetch someone/tiny .*no such repository.*check the name"),
        ((401, ""), r"cannot fetch someone/tiny .*log in"),
        ((403, ""), r"cannot fetch someone/tiny .*log in"),
        ((404, "RevisionNotFound"), r"cannot fetch someone/tiny@v2 .*no revision v2"),
    ],
)
def test_gated_and_missing_repositories(hub, answer, message):
    Hub.status["someone/tiny"] = answer
    with pytest.raises(DownloadError, match=message):
        find_origin("hf_hub:someone/tiny" + ("@v2" if "Revision" in answer[1] else ""))


def test_offline_without_a_cache(hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        DownloadError, match=r"cannot fetch someone/tiny .*HF_HUB_OFFLINE is set, and it is not in the c"
    ):
        find_origin("hf_hub:someone/tiny")


def test_no_network(hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(DownloadError, match=r"cannot fetch someone/tiny .*ConnectionError.*check the network"):
        find_origin("hf_hub:someone/tiny")


def test_no_bundled_weights_for_a_repository_with_the_same_architecture(hub, saved):
    hub["someone/lite"] = {"config.json": contents(saved("tf_efficientnet_lite0")[1])["config.json"]}
    Hub.status["someone/lite"] = (200, "")
    for weights in ("auto", "bundled"):
        with pytest.raises(
            ConfigError, match=r"someone/lite on the hub has no model.safetensors|bundled has weights for"
        ):
            built("hf_hub:someone/lite", weights=weights)


@pytest.mark.parametrize("name", ["hf_hub:tiny/", "hf_hub:a/b/c", "hf_hub:", "hf_hub:a b/c"])
def test_name_that_is_no_repository(hub, name):
    with pytest.raises(ConfigError, match="OWNER/NAME"):
        find_origin(name)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "does not describe one"),
        ("[1]", "does not describe one"),
        ('{"model_type": "vit", "architectures": ["ViTModel"]}', "holds no model of timm"),
        ('{"architecture": "vit_of_tomorrow"}', "'vit_of_tomorrow', unknown to timm"),
        ('{"architecture": "test_vit", "mean": 3}', "does not describe one"),
        ('{"architecture": "test_vit", "std": [1, 1, 0]}', r"std is 0\.0"),
        ('{"architecture": "test_vit", "model_args": {"in_chans": "x"}}', "input_size is x"),
        ('{"architecture": "test_vit", "model_args": {"checkpoint_path": "/etc/passwd"}}', "checkpoint_path="),
        ('{"architecture": "test_vit", "model_args": {"pretrained": true}}', "pretrained=True"),
        ('{"architecture": "test_vit", "model_args": {"depth": 1e9}}', "depth="),
        ('{"architecture": "test_vit", "model_args": {"norm_layer": {"_target_": "os.system"}}}', "norm_layer="),
        (
            '{"architecture": "test_vit", "model_args": {"no_such_argument": 1}}',
            "cannot build test_vit: .*no_such_argument",
        ),
    ],
)
def test_wrong_description_of_a_model(tmp_path, config, message):
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(ConfigError, match=message):
        built(f"local-dir:{tmp_path}")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-9]), "cannot be read as plain tensors .*undamaged"),
        (lambda path: path.write_bytes(b""), "cannot be read as plain tensors"),
        (lambda path: path.unlink(), "has no weights: expected model.safetensors or pytorch_model.bin"),
        (
            lambda path: save_file(timm.create_model("test_resnet").state_dict(), path),
            "do not fit test_vit: Missing key",
        ),
        (
            lambda path: save_file(load_file(path) | {"more": torch.ones(1)}, path),
            'do not fit test_vit: Unexpected .*"more"',
        ),
    ],
)
def test_wrong_weights(saved, damage, message):
    folder = saved()[1]
    damage(folder / "model.safetensors")
    with pytest.raises(ConfigError, match=message):
        built(f"local-dir:{folder}", weights="auto")


def test_weights_of_a_stranger_run_no_code(tmp_path, saved):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "ran"),))

    folder = saved(safe=False)[1]
    torch.save({"head.bias": Evil()}, folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="cannot be read as plain tensors"):
        built(f"local-dir:{folder}", weights="auto")
    assert not (tmp_path / "ran").exists()


def test_missing_folder(tmp_path):
    with pytest.raises(ConfigError, match=r"no config\.json in that folder"):
        find_origin(f"local-dir:{tmp_path / 'nowhere'}")
    with pytest.raises(ConfigError, match=r"timm has no model 'someone/tiny': write hf_hub:someone/tiny .* local-dir:"):
        find_origin("someone/tiny")


ODD = "it's [a] {mödel}, +1=x: 'ß'  (v2)"


def test_folder_with_odd_characters_in_all_ways_in(saved, task, tmp_path, monkeypatch):
    model, folder = saved("test_efficientnet", folder=ODD)
    name = f"local-dir:{folder}"
    assert compose(f"model.name={name}").model.name == name
    learner = make_learner("probe", task, f"model.name={name}", "model.image_size=32", f"data.cache_dir={tmp_path}/c")
    assert learner.embedding.spec.architectures[0].name == "test_efficientnet"
    classifier = image_classifier(name)
    assert classifier.spec.weights == str(folder / "model.safetensors")
    both = built(f"test_resnet+{name}+test_vit", weights="none")[0]
    assert [each.name for each in both.architectures] == ["test_resnet", "test_efficientnet", "test_vit"]
    monkeypatch.chdir(folder.parent)
    assert split_names("local-dir:a+b+test_vit.r160_in1k+local-dir:c+hf_hub:d/e") == [
        "local-dir:a+b",
        "test_vit.r160_in1k",
        "local-dir:c",
        "hf_hub:d/e",
    ]
    torch.testing.assert_close(
        built(f"local-dir:{ODD}", weights="hub")[1].body.conv_stem.weight, model.conv_stem.weight
    )


@pytest.mark.parametrize(("native", "channels"), [(1, 3), (1, 1), (5, 5), (3, 1)])
def test_channels_of_the_weights_need_not_be_three(saved, native, channels):
    model, folder = saved("test_efficientnet", in_chans=native)
    spec, backbone = built(f"local-dir:{folder}", weights="auto", channels=channels)
    theirs, ours = model.conv_stem.weight, backbone.body.conv_stem.weight
    assert len(spec.mean) == channels == ours.shape[1]
    if native == channels:
        assert torch.equal(ours, theirs)
    grey = torch.rand(1, 1, 8, 8)  # equal channels give what equal channels gave
    one, other = (torch.conv2d(grey.expand(-1, w.shape[1], -1, -1), w) for w in (theirs, ours))
    if channels in (1, native) or native == 1:
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["test_vit", "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_positions_are_resampled_for_another_image_size(saved, name):
    small = {"depth": 2} if "vit" in name else {"depths": (1, 1, 1, 1), "embed_dim": 24}
    model, folder = saved(name, **small)
    backbone = built(f"local-dir:{folder}", weights="auto", image_size=64)[1]
    assert backbone.eval()(some_images(2, size=64)).isfinite().all()
    resized = backbone.body.state_dict()
    changed = {key for key, tensor in resized.items() if tensor.shape != model.state_dict()[key].shape}
    assert changed
    assert all("pos_embed" in key or "relative_position" in key for key in changed)
    # The weights of a trained run, with resampled positions, are taken for a third size.
    path = folder / "run.safetensors"
    save_file({f"backbone.body.{key}": tensor.contiguous() for key, tensor in resized.items()}, path)
    third = built(f"local-dir:{folder}", weights=str(path), image_size=96)[1]
    assert third.eval()(some_images(1, size=96)).isfinite().all()
    back = built(f"local-dir:{folder}", weights=str(path), image_size=64)[1]
    for key in resized.keys() - changed:
        assert torch.equal(back.body.state_dict()[key], resized[key])


def test_statistics_of_the_configuration_come_first(saved):
    name = f"local-dir:{saved('test_efficientnet')[1]}"
    spec, backbone = built(name, weights="auto", mean=0, std=[1.0, 0.5, 0.25])
    assert (spec.mean, spec.std) == ((0.0, 0.0, 0.0), (1.0, 0.5, 0.25))
    assert backbone.std.flatten().tolist() == [255.0, 127.5, 63.75]
    for wrong in ({"mean": float("inf")}, {"std": 0}, {"std": []}):
        with pytest.raises(ConfigError, match=f"model.{next(iter(wrong))}"):
            built(name, weights="auto", **wrong)


def test_checkpoint_needs_neither_hub_nor_folder(saved, tmp_path):
    folder = saved(**SMALL)[1]
    network = network_of(f"local-dir:{folder}+test_efficientnet", weights="none").eval()
    save_network(network, tmp_path / "w.safetensors")
    shutil.rmtree(folder)
    loaded = load_network(tmp_path / "w.safetensors")
    assert loaded.spec == network.spec
    torch.testing.assert_close(loaded(some_images()), network(some_images()))


def test_run_and_score_with_a_model_of_the_hub(hub, saved, tiny_job, call_main, image_folder, tmp_path, monkeypatch):
    hub["someone/tiny"] = contents(saved("test_efficientnet")[1])
    words = [word for word in tiny_job if not word.startswith(("model.", "algorithm"))]
    given = "model.name=hf_hub:someone/tiny", "algorithm=probe", f"hydra.run.dir={tmp_path / 'run'}"
    monkeypatch.chdir(tmp_path)
    assert call_main(run_main, *words, *given).code == 0
    hub.clear()
    shutil.rmtree(tmp_path / "hub")  # elsewhere, without the cache
    archive = image_folder(5)
    done = call_main(score_main, f"run={tmp_path / 'run'}", f"data.root={archive}", f"output={tmp_path / 'scores'}")
    assert done.code == 0, done.err
    line = call_main(run_main, *words, *given[:2]).error_line
    assert "cannot fetch someone/tiny from the hub" in line


@pytest.mark.slow
def test_endpoint_and_offline_mode_of_the_environment(hub, saved, tiny_job, tmp_path):
    hub["someone/tiny"] = contents(saved(**SMALL)[1])
    words = [word for word in tiny_job if not word.startswith(("model.", "algorithm"))]
    words += ["model.name=hf_hub:someone/tiny", "algorithm=probe", "al.cycles=1"]
    environment = os.environ | {"HF_ENDPOINT": Hub.address, "HF_HUB_CACHE": str(tmp_path / "cache of the hub")}

    def run(**more):
        command = [sys.executable, "-m", "anomalymatch.run", *words]
        return subprocess.run(
            command, cwd=tmp_path, env=environment | more, capture_output=True, text=True, timeout=250
        )

    refused = run(HF_HUB_OFFLINE="1")
    assert refused.returncode == 1
    assert "HF_HUB_OFFLINE is set" in refused.stderr.splitlines()[-1]
    done = run()
    assert done.returncode == 0, done.stderr
    hub.clear()
    again = run(HF_HUB_OFFLINE="1")
    assert again.returncode == 0, again.stderr
