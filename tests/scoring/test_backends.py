import logging
import shutil
import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from anomalymatch.algorithms.fixmatch.loss import anomaly_logit
from anomalymatch.backbones.inference import Inference
from anomalymatch.backbones.network import Head, Network, build_backbone
from anomalymatch.errors import ConfigError
from anomalymatch.scoring import backends
from anomalymatch.scoring.backends import find_batch_size, make_scorer

FP32 = Inference("cpu", "fp32")
needs_openvino = pytest.mark.skipif(find_spec("openvino") is None, reason="openvino is not installed")
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")
OTHERS = [
    pytest.param("openvino", "fp32", marks=needs_openvino),
    pytest.param("openvino", "bf16", marks=needs_openvino),
    pytest.param("torch", "bf16"),
]


def images(count, seed=0):
    rng = np.random.default_rng(seed)
    smooth = rng.integers(0, 256, (count, 8, 8, 3), dtype=np.uint8).repeat(4, axis=1).repeat(4, axis=2)
    return torch.from_numpy(smooth).permute(0, 3, 1, 2)


def scores(scorer, batches):
    return np.concatenate([scorer(batch) for batch in batches])


def check_ranking(network, backend, precision):
    batches = [images(16, seed) for seed in range(12)] + [images(5, 99)]  # the last one is not full
    _, plain = make_scorer(network, FP32, backend="torch", count=1, batch_size=16, features=True)
    name, other = make_scorer(
        network, Inference("cpu", precision), backend=backend, count=1, batch_size=16, features=True
    )
    expected, got = scores(plain, batches), scores(other, batches)
    assert name == backend
    assert expected.shape == got.shape == (197, 257)
    assert spearmanr(expected[:, 0], got[:, 0]).statistic > (0.999 if precision == "fp32" else 0.98)
    if precision == "fp32":
        np.testing.assert_allclose(got, expected, atol=1e-4)


@pytest.mark.parametrize(("backend", "precision"), OTHERS)
def test_all_backends_give_the_same_ranking(tiny_network, backend, precision):
    check_ranking(tiny_network, backend, precision)


@needs_compiler
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_compiled_network_gives_the_same_ranking():
    """In a process of its own, this file as a script: a compiler that dies fails this test and takes no other along."""
    ended = subprocess.run([sys.executable, __file__], capture_output=True, text=True, timeout=550)
    assert ended.returncode == 0, ended.stderr


@needs_openvino
def test_backends_agree_on_a_network_that_sees_all_stages_and_orientations():
    spec, backbone = build_backbone(
        name="test_efficientnet", weights="none", channels=3, image_size=32, stages=True, orientations=8
    )
    head = Head(backbone.features, normalised=True, stage_features=backbone.stage_features)
    network = Network(spec, backbone, head).eval()
    batch = images(16)
    plain, converted = (
        make_scorer(network, FP32, backend=name, count=1, batch_size=16, features=False)[1](batch)
        for name in ("torch", "openvino")
    )
    np.testing.assert_allclose(converted, plain, atol=1e-4)
    with torch.inference_mode():
        np.testing.assert_allclose(plain[:, 0], anomaly_logit(network(batch)).numpy(), atol=1e-4)


def test_features_are_left_out_where_nobody_wants_them(tiny_network):
    _, scorer = make_scorer(tiny_network, FP32, backend="torch", count=1, batch_size=4, features=False)
    _, both = make_scorer(tiny_network, FP32, backend="torch", count=1, batch_size=4, features=True)
    assert scorer(images(4)).shape == (4, 1)
    np.testing.assert_array_equal(scorer(images(4)), both(images(4))[:, :1])


@pytest.mark.parametrize(
    ("seconds_a_batch", "count", "installed", "compiler", "expected"),
    [
        (0.01, 100, True, True, "torch"),
        (0.16, 10_000, True, True, "openvino"),
        (0.16, 10_000, False, True, "torch"),
        (0.16, 1_000_000, False, True, "compile"),
        (0.16, 1_000_000, False, False, "torch"),
    ],
)
def test_auto_takes_what_is_done_first(
    tiny_network, monkeypatch, seconds_a_batch, count, installed, compiler, expected
):
    clock = iter([0.0, seconds_a_batch])
    monkeypatch.setattr(backends.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(backends, "has_openvino", lambda: installed)
    monkeypatch.setattr(backends, "_has_compiler", lambda: compiler)
    chosen = backends._choose(lambda batch: None, tiny_network, torch.device("cpu"), count)
    assert chosen == expected


def test_auto_on_a_gpu(tiny_network, monkeypatch):
    monkeypatch.setattr(backends, "_has_compiler", lambda: True)
    cuda = torch.device("cuda")
    assert backends._choose(lambda batch: None, tiny_network, cuda, 1000) == "torch"
    assert backends._choose(lambda batch: None, tiny_network, cuda, 100_000_000) == "compile"


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        ("tpu", "scoring.backend is 'tpu': choose one of auto, torch, compile, openvino"),
        ("openvino", r'scoring.backend=openvino needs: pip install "anomalymatch\[openvino\]"'),
        ("compile", r"scoring.backend=compile needs a C\+\+ compiler"),
    ],
)
def test_what_is_not_there_is_one_clear_error(tiny_network, monkeypatch, backend, message):
    monkeypatch.setattr(backends, "has_openvino", lambda: False)
    monkeypatch.setattr(backends, "_has_compiler", lambda: False)
    with pytest.raises(ConfigError, match=message):
        make_scorer(tiny_network, FP32, backend=backend, count=1, batch_size=4, features=False)


@needs_openvino
def test_what_openvino_cannot_convert_is_left_to_pytorch_unless_it_is_asked_for(monkeypatch):
    spec, backbone = build_backbone(name="test_vit", weights="none", channels=3, image_size=32)
    network = Network(spec, backbone, Head(backbone.features, normalised=True)).eval()
    options = {"count": 1_000_000, "batch_size": 4, "features": False}
    monkeypatch.setattr(backends, "_choose", lambda *args: "openvino")
    root = logging.getLogger()
    logged = root.level, root.filters[:], root.handlers[:]
    name, scorer = make_scorer(network, FP32, backend="auto", **options)
    assert name == "torch"
    assert (root.level, root.filters, root.handlers) == logged
    np.testing.assert_array_equal(
        scorer(images(4)), make_scorer(network, FP32, backend="torch", **options)[1](images(4))
    )
    with pytest.raises(ConfigError, match=r"scoring\.backend=openvino cannot convert this model, take torch: "):
        make_scorer(network, FP32, backend="openvino", **options)


def test_the_batch_size_on_a_processor_follows_from_the_image_size(tiny_network):
    assert find_batch_size(tiny_network, Inference("cpu", batch_pixels=32 * 32 * 24)) == 24


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("backend", ["torch", "compile"])
def test_a_gpu_gives_the_same_ranking(tiny_network, backend):
    batches = [images(16, seed) for seed in range(12)]
    _, plain = make_scorer(tiny_network, FP32, backend="torch", count=1, batch_size=16, features=False)
    expected = scores(plain, batches)
    gpu = Inference("cuda", "fp32")
    assert find_batch_size(tiny_network, gpu) >= 32
    _, other = make_scorer(tiny_network, gpu, backend=backend, count=1, batch_size=16, features=False)
    assert spearmanr(expected[:, 0], scores(other, batches)[:, 0]).statistic > 0.999


if __name__ == "__main__":
    SPEC, BACKBONE = build_backbone(name="test_efficientnet", weights="none", channels=3, image_size=32)
    check_ranking(Network(SPEC, BACKBONE, Head(BACKBONE.features, normalised=True)), "compile", "fp32")
