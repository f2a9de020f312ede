import json

import pytest
import torch
from networks import built, some_images
from safetensors import SafetensorError, safe_open
from torch import nn

from anomalymatch.backbones import checkpoint
from anomalymatch.backbones.architectures import find_origin
from anomalymatch.backbones.checkpoint import load_network, load_state, save_network
from anomalymatch.backbones.network import Head, Network
from anomalymatch.backbones.weights import fingerprint, pretrained_model
from anomalymatch.errors import ConfigError, StorageError


@pytest.fixture
def saved(tiny_network, tmp_path):
    path = tmp_path / "cycle" / "weights.safetensors"
    save_network(tiny_network, path, algorithm="fixmatch", anomaly="merger")
    return tiny_network, path


@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize(
    ("name", "channels", "options"),
    [
        ("test_efficientnet", 5, {"bn_momentum": 0.01, "stages": True, "orientations": 8, "crops": 5}),
        ("test_vit", 1, {}),
        ("test_efficientnet+test_vit", 3, {}),
    ],
)
def test_loaded_network_gives_the_same_logits(tmp_path, name, channels, options, normalised):
    spec, backbone = built(name, channels=channels, **options)
    head = Head(backbone.features, normalised=normalised, stage_features=backbone.stage_features)
    network = Network(spec, backbone, head)
    network.train()(some_images(4, channels))  # changes the statistics of the batch norms
    save_network(network, tmp_path / "w.safetensors")
    loaded = load_network(tmp_path / "w.safetensors")
    assert loaded.spec == spec
    assert loaded.head.normalised is normalised
    assert not any(m.training for m in loaded.modules())
    assert fingerprint(loaded) == fingerprint(network)
    assert torch.equal(loaded(some_images(4, channels)), network.eval()(some_images(4, channels)))
    momenta = {m.momentum for m in loaded.modules() if isinstance(m, nn.BatchNorm2d)}
    assert "bn_momentum" not in options or momenta == {options["bn_momentum"]}


def test_two_networks_that_are_averaged_are_loaded_together(tmp_path):
    spec, backbone = built("test_efficientnet", stages=True, orientations=2)
    head = {"normalised": True, "stage_features": backbone.stage_features}
    network, second = (
        Network(spec, each, Head(backbone.features, **head))
        for each in (backbone, built("test_efficientnet", stages=True, orientations=2)[1])
    )
    network.second = second
    images = some_images(4)
    with torch.inference_mode():
        expected = (network.eval().alone()(images) + second(images)) / 2
        assert torch.equal(network(images), expected)
        torch.testing.assert_close(network.fused()(images), expected, atol=1e-4, rtol=1e-4)
        save_network(network, tmp_path / "w.safetensors")
        loaded = load_network(tmp_path / "w.safetensors")
        assert torch.equal(loaded(images), expected)
        assert not torch.equal(loaded.alone()(images), expected)
    assert loaded.pixels_per_pixel == 2 * loaded.alone().pixels_per_pixel == 4


def test_description_beside_the_weights(saved):
    network, path = saved
    description = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    assert description["classes"] == ["normal", "anomaly"]
    assert description["network"]["mean"] == [0.485, 0.456, 0.406]
    assert (description["algorithm"], description["anomaly"]) == ("fixmatch", "merger")
    assert sorted(p.name for p in path.parent.iterdir()) == ["weights.json", "weights.safetensors"]
    with safe_open(path, "pt") as file:  # and so nothing is pickled
        assert set(file.keys()) == set(network.state_dict())


def cut(path):
    path.write_bytes(path.read_bytes()[:-7])


def flip_header(path):
    data = bytearray(path.read_bytes())
    data[20] ^= 0xFF
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.unlink(),
        lambda path: path.with_suffix(".json").unlink(),
        lambda path: path.write_bytes(b""),
        cut,
        flip_header,
        lambda path: path.with_suffix(".json").write_text("{"),
        lambda path: path.with_suffix(".json").write_text("[1]"),
        lambda path: path.with_suffix(".json").write_text('{"network": {}}'),
        lambda path: path.with_suffix(".json").write_text('{"network": {"mean": 3}}'),
        lambda path: path.with_suffix(".json").write_bytes(b"\xff\xfe\0"),
    ],
)
def test_missing_or_corrupt_files_are_errors(saved, damage):
    _, path = saved
    damage(path)
    with pytest.raises(StorageError, match=r"weights\.safetensors (is|are) missing or corrupt"):
        load_network(path)


@pytest.mark.parametrize(
    "words",
    [
        {"image_size": -1},
        {"image_size": 32.5},
        {"image_size": "32"},
        {"image_size": 10**6},
        {"channels": 0},
        {"channels": 10**6},
        {"orientations": 10**6},
        {"crops": -1},
        {"bn_momentum": float("nan")},
        {"mean": [0.5]},
        {"mean": [0.5, 0.5, float("inf")]},
        {"std": [0.5, 0.5, 0.0]},
        {"architectures": [{"name": "test_efficientnet", "arguments": {}}] * 100},
        {"architectures": [{"name": "hf_hub:nobody/nothing", "arguments": {}}]},
        {"architectures": [{"name": "test_vit", "arguments": {"depth": 10**9}}]},
        {"architectures": [{"name": "test_vit", "arguments": {"checkpoint_path": "stolen.pth"}}]},
        {"architectures": [{"name": "test_vit", "arguments": {"pretrained": True}}]},
        {"architectures": [{"name": "test_vit", "arguments": {"norm_layer": {"run": "me"}}}]},
        {"architectures": [{"name": "test_vit", "arguments": {"no_such": 1}}]},
        {"stages": "yes"},
        {"features": 10**9},
        {"stage_features": -1},
    ],
    ids=str,
)
def test_absurd_descriptions_are_refused_at_once(saved, words):
    _, path = saved
    description = json.loads(path.with_suffix(".json").read_text())
    for part in ("network", "head"):
        description[part] |= {key: value for key, value in words.items() if key in description[part]}
    path.with_suffix(".json").write_text(json.dumps(description))
    with pytest.raises(
        StorageError, match=rf"weights\.safetensors is missing or corrupt \(.*({next(iter(words))}|hf_hub|argument)"
    ):
        load_network(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(saved, value):
    network, path = saved
    with torch.no_grad():
        network.head.linear.weight[1, 3] = value
    save_network(network, path)
    with pytest.raises(StorageError, match=r"head\.linear\.weight has numbers that are not finite"):
        load_network(path)
    with pytest.raises(ConfigError, match=r"head\.linear\.weight has numbers that are not finite"):
        pretrained_model(find_origin("test_efficientnet"), str(path))


def test_weights_of_another_architecture_are_an_error(saved):
    _, path = saved
    with pytest.raises(StorageError, match="missing or corrupt"):
        load_state(nn.Linear(3, 2), path)


def test_full_disk_keeps_the_old_weights(saved, monkeypatch):
    network, path = saved
    before = path.read_bytes()

    def full(tensors, file):
        file.write_bytes(b"half")
        raise SafetensorError("IoError: No space left on device (os error 28)")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(StorageError, match=r"cannot write .*weights\.safetensors.*No space left"):
        save_network(network, path)
    assert path.read_bytes() == before
    assert len(list(path.parent.iterdir())) == 2
