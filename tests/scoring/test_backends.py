import logging
import shutil
import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from anomalymatch.backbones import openvino
from anomalymatch.backbones.inference import Inference
from anomalymatch.backbones.network import Head, Network, anomaly_logit, build_backbone
from anomalymatch.errors import ConfigError
from anomalymatch.scoring import backends
from anomalymatch.scoring.backends import find_batch_size, make_scorer

FP32 = Inference("cpu", "fp32")
needs_openvino = pytest.mark.skipif(find_spec("openvino") is None, reason="openvino is not installed")
STAGES_MIRRORED = {"stages": True, "orientations": 2}
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")


def images(count, seed=0, size=32):
    rng = np.random.default_rng(seed)
    smooth = rng.integers(0, 256, (count, size // 4, size // 4, 3), dtype=np.uint8).repeat(4, axis=1).repeat(4, axis=2)
    return torch.from_numpy(smooth).permute(0, 3, 1, 2)


def scores(scorer, batches):
    return np.concatenate([scorer(batch) for batch in batches])


def network_of(name, **options):
    spec, backbone = build_backbone(name=name, weights="none", channels=3, image_size=32, **options)
    head = Head(backbone.features, normalised=True, stage_features=backbone.stage_features)
    return Network(spec, backbone, head).eval()


def check_ranking(network, backend, precision):
    size = network.spec.input_size
    batches = [images(16, seed, size) for seed in range(12)] + [images(5, 99, size)]  # the last one is not full
    _, plain = make_scorer(network, FP32, backend="torch", count=1, batch_size=16, features=True)
    name, other = make_scorer(
        network, Inference("cpu", precision), backend=backend, count=1, batch_size=16, features=True
    )
    expected, got = scores(plain, batches), scores(other, batches)
    assert name == backend
    assert expected.shape == got.shape == (197, 1 + network.backbone.features)
    assert spearmanr(expected[:, 0], got[:, 0]).statistic > (0.999 if precision == "fp32" else 0.98)
    if precision == "fp32":
        np.testing.assert_allclose(got, expected, atol=1e-4)
        with torch.inference_mode():
            np.testing.assert_allclose(expected[:16, 0], anomaly_logit(network(batches[0])).numpy(), atol=1e-4)


@pytest.mark.parametrize(
    ("backend", "precision", "name", "options"),
    [
        pytest.param(
            "openvino", "fp32", "test_efficientnet", {"stages": True, "orientations": 2}, marks=needs_openvino
        ),
        pytest.param("openvino", "fp32", "test_efficientnet+test_resnet", {}, marks=needs_openvino),
        pytest.param("openvino", "fp32", "test_efficientnet", {"stages": True, "tiles": 2}, marks=needs_openvino),
        pytest.param("openvino", "bf16", "test_efficientnet", {}, marks=needs_openvino),
        ("torch", "bf16", "test_efficientnet", {}),
    ],
)
def test_all_backends_give_the_same_ranking(backend, precision, name, options):
    check_ranking(network_of(name, **options), backend, precision)


@pytest.mark.parametrize("backend", ["torch", pytest.param("openvino", marks=needs_openvino)])
def test_two_networks_that_are_averaged_are_scored_together(backend):
    network = network_of("test_efficientnet", **STAGES_MIRRORED)
    network.second = network_of("test_efficientnet", **STAGES_MIRRORED)
    check_ranking(network, backend, "fp32")


@needs_compiler
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_compiled_network_gives_the_same_ranking():
    """Run this file as a script: a compiler that crashes fails this test alone."""
    ended = subprocess.run([sys.executable, __file__], capture_output=True, text=True, timeout=550)
    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize("backend", ["openvino", "compile"])
def test_missing_backend_is_an_error(tiny_network, monkeypatch, backend):
    monkeypatch.setattr(openvino, "has_openvino", lambda: False)
    monkeypatch.setattr(backends, "_has_compiler", lambda: False)
    with pytest.raises(ConfigError, match=f"scoring.backend={backend}"):
        make_scorer(tiny_network, FP32, backend=backend, count=1, batch_size=4, features=False)


@needs_openvino
def test_auto_falls_back_to_pytorch_if_openvino_cannot_convert_the_model(tiny_network, monkeypatch):
    import openvino as ov

    def fail(model):
        logging.getLogger().setLevel(logging.ERROR)  # as a failed conversion does
        raise RuntimeError("unknown operator")

    monkeypatch.setattr(torch.export, "export", lambda module, example: module)
    monkeypatch.setattr(ov, "convert_model", fail)
    monkeypatch.setattr(backends, "fastest_backend", lambda *args, **options: "openvino")
    options = {"count": 1, "batch_size": 4, "features": False}
    root = logging.getLogger()
    logged = root.level, root.filters[:], root.handlers[:]
    name, scorer = make_scorer(tiny_network, FP32, backend="auto", **options)
    assert name == "torch"
    assert (root.level, root.filters, root.handlers) == logged
    plain = make_scorer(tiny_network, FP32, backend="torch", **options)[1]
    np.testing.assert_array_equal(scorer(images(4)), plain(images(4)))
    with pytest.raises(ConfigError, match="unknown operator"):
        make_scorer(tiny_network, FP32, backend="openvino", **options)


def test_batch_size_on_a_cpu_follows_from_the_image_size(tiny_network):
    assert find_batch_size(tiny_network, Inference("cpu", batch_pixels=32 * 32 * 24)) == 24


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("backend", ["torch", "compile"])
def test_gpu_gives_the_same_ranking(tiny_network, backend):
    batches = [images(16, seed) for seed in range(12)]
    _, plain = make_scorer(tiny_network, FP32, backend="torch", count=1, batch_size=16, features=False)
    expected = scores(plain, batches)
    gpu = Inference("cuda", "fp32")
    assert find_batch_size(tiny_network, gpu) >= 32
    _, other = make_scorer(tiny_network, gpu, backend=backend, count=1, batch_size=16, features=False)
    assert spearmanr(expected[:, 0], scores(other, batches)[:, 0]).statistic > 0.999


if __name__ == "__main__":
    check_ranking(network_of("test_efficientnet"), "compile", "fp32")
