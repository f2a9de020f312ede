"""int8: what is quantised, how the agreement is measured, and when it is taken."""

import logging
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from anomalymatch.backbones import inference as inference_module
from anomalymatch.backbones import int8
from anomalymatch.backbones.features import FeatureCache, probe_scores
from anomalymatch.backbones.inference import Inference
from anomalymatch.backbones.int8 import (
    Agreement,
    agreement,
    full_batches,
    has_nncf,
    int8_forward,
    quantise,
    quantised_model,
)
from anomalymatch.backbones.openvino import openvino_model
from anomalymatch.cache import Cache
from anomalymatch.errors import ConfigError

needs_nncf = pytest.mark.skipif(not has_nncf() or find_spec("openvino") is None, reason="nncf is not installed")
FP32 = Inference("cpu", "fp32", backend="torch")


def test_agreement_by_hand():
    expected = np.array([[5.0], [4.0], [3.0], [2.0], [1.0]])
    assert agreement(expected, 7 * expected + 1) == (pytest.approx(1), 1.0)
    got = expected[[1, 0, 2, 3, 4]]  # the first two change places: 1 - 6 * 2 / (5 * 24) = 0.9, and another is on top
    assert agreement(expected, got) == (pytest.approx(0.9), 0.0)
    assert agreement(np.hstack([expected, expected]), np.hstack([expected, got])) == (pytest.approx(0.9), 0.0)


def test_agreement_equals_the_obvious_computation():
    rng = np.random.default_rng(0)
    expected = rng.normal(size=(400, 3))
    got = expected + 0.1 * rng.normal(size=expected.shape)
    tops = [[set(sorted(range(400), key=lambda i: -rows[i, k])[:4]) for k in range(3)] for rows in (expected, got)]
    overlaps = [len(a & b) / 4 for a, b in zip(*tops, strict=True)]
    correlations = [spearmanr(expected[:, k], got[:, k]).statistic for k in range(3)]
    assert agreement(expected, got) == (pytest.approx(min(correlations)), min(overlaps))


@pytest.mark.parametrize(
    ("change", "suffices"),
    [({}, True), ({"spearman": 0.9989}, False), ({"overlap": 0.979}, False), ({"speedup": 0.99}, False)],
)
def test_auto_takes_int8_only_if_all_agrees_and_it_is_faster(change, suffices):
    assert Agreement(0.999, 0.98, 1.01, 2048)._replace(**change).suffices is suffices
    assert not Agreement(float("nan"), 1.0, 2.0, 2048).suffices


def test_probes_of_features_do_not_depend_on_the_length_of_the_last_layer():
    rng = np.random.default_rng(0)
    outputs = rng.normal(size=(60, 6)).astype(np.float32)
    scaled = outputs * np.where(np.arange(6) < 4, rng.uniform(1, 9, (60, 1)), 1.0).astype(np.float32)
    scores = probe_scores(outputs, 4)
    np.testing.assert_allclose(scores, probe_scores(scaled, 4), atol=1e-5)
    assert scores.shape == (60, 16)
    assert not np.allclose(scores, probe_scores(scaled, 6), atol=1e-2)


class Unwanted(torch.nn.Module):
    """Module whose conversion fails the test."""

    def forward(self, images):
        raise AssertionError("it must not be converted again")


@needs_nncf
def test_int8_model_is_stored_once_and_close_to_the_model(tiny_backbone, make_source, tmp_path, capsys):
    _, backbone = tiny_backbone
    source, cache = make_source(60, unreadable=["im000003"]), Cache(tmp_path)
    usual = logging.getLoggerClass()
    options = {
        "size": 32,
        "batch_size": 16,
        "bf16": False,
        "scores": lambda rows: probe_scores(rows, backbone.features),
    }
    found = quantise(backbone.fused(), source, cache, **options)
    assert logging.getLoggerClass() is usual
    assert capsys.readouterr().out == ""
    assert found.images == 30  # half of the 59 that can be read
    assert 0.5 < found.spearman <= 1
    assert quantise(Unwanted(), source, cache, **options) == found
    images = torch.from_numpy(np.stack(source.read(source.ids[4:24]))).permute(0, 3, 1, 2)
    got, expected = int8_forward(cache)(images), FP32.prepare(backbone, size=32, count=1)(images)
    assert got.shape == expected.shape
    cosines = (got * expected).sum(1) / np.linalg.norm(got, axis=1) / np.linalg.norm(expected, axis=1)
    assert 0.95 < cosines.min() < 0.999999
    np.testing.assert_array_equal(got, int8_forward(Cache(tmp_path))(images))


@needs_nncf
def test_nothing_that_others_print_meanwhile_is_lost(tiny_backbone, capsys):
    class Batches(list):
        def __iter__(self):
            print("the address of the page")
            return super().__iter__()

    images = torch.randint(0, 256, (32, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    plain = openvino_model(tiny_backbone[1].fused(), 3, 32, 16)
    quantised_model(plain, Batches(full_batches(images, 16)))
    assert set(capsys.readouterr().out.splitlines()) == {"the address of the page"}


@needs_nncf
def test_archive_without_readable_images_is_an_error(tiny_backbone, make_source, tmp_path):
    source = make_source(3, unreadable=["im000000", "im000001", "im000002"])
    with pytest.raises(ConfigError, match="readable images"):
        quantise(tiny_backbone[1], source, Cache(tmp_path), size=32, batch_size=2, bf16=False, scores=lambda rows: rows)


@needs_nncf
def test_features_in_int8_have_a_folder_of_their_own(tiny_backbone, make_source, tmp_path):
    spec, backbone = tiny_backbone
    source = make_source(40)
    caches = {name: FeatureCache(tmp_path, Inference("cpu", name)) for name in ("int8", "fp32")}
    features = {name: cache.features(source, spec, backbone) for name, cache in caches.items()}
    assert len({cache.key(source, spec, backbone) for cache in caches.values()}) == 2
    rows = {name: found.take(source.ids) for name, found in features.items()}
    assert not np.array_equal(rows["int8"], rows["fp32"])
    assert (rows["int8"] * rows["fp32"]).sum(1).min() > 0.95
    images = torch.from_numpy(np.stack(source.read(source.ids))).permute(0, 3, 1, 2)
    # The stored model serves any batch size.
    others = FeatureCache(tmp_path, Inference("cpu", "int8", batch_pixels=7 * 32**2)).forward(source, spec, backbone)(
        images
    )
    others /= np.linalg.norm(others, axis=1, keepdims=True)
    np.testing.assert_allclose(others, rows["int8"], atol=1e-3)


@pytest.mark.parametrize("taken", [True, False])
def test_auto_decides_once_and_keeps_features_that_exist(
    tiny_backbone, make_source, tmp_path, monkeypatch, caplog, taken
):
    spec, backbone = tiny_backbone
    source, measured = make_source(20), []
    plain = FP32.prepare(backbone, size=32, count=1)

    def measure(module, source, cache, **options):
        measured.append(options["size"])
        return Agreement(1.0 if taken else 0.99, 1.0, 2.0, 7)

    monkeypatch.setattr(inference_module, "has_nncf", lambda: True)
    monkeypatch.setattr(inference_module, "has_openvino", lambda: True)
    monkeypatch.setattr(inference_module, "quantise", measure)
    monkeypatch.setattr(inference_module, "int8_forward", lambda cache: lambda images: 2 * plain(images) + 1)
    monkeypatch.setattr(Inference, "convert", lambda *args, **options: None)
    auto = FeatureCache(tmp_path, Inference("cpu"))
    small = auto.key(source, spec, backbone)
    assert not measured  # too small an archive
    monkeypatch.setattr(inference_module, "INT8_PIXELS", 20 * 32**2)
    caplog.set_level(logging.INFO)
    assert (auto.key(source, spec, backbone) != small) is taken
    assert ("int8 is taken" if taken else "int8 is not taken") in caplog.text
    assert measured
    for other in ("fp32", "bf16"):
        measured.clear()
        FeatureCache(tmp_path, Inference("cpu", other)).key(source, spec, backbone)
        assert not measured
    own = auto.key(source, spec, backbone)
    rows = auto.features(source, spec, backbone).take(source.ids)
    exact = FeatureCache(tmp_path / "exact", FP32).features(source, spec, backbone).take(source.ids)
    assert np.allclose(rows, exact, atol=0.02) is not taken
    measured.clear()
    assert auto.key(source, spec, backbone) == own
    assert bool(measured) is taken  # features that exist in higher precision are kept


def test_int8_without_nncf_names_the_extra(monkeypatch):
    monkeypatch.setattr(int8, "has_nncf", lambda: False)
    with pytest.raises(ConfigError, match=r"inference.precision=int8 needs: pip install .*\[int8\]"):
        Inference("cpu", "int8")


def test_int8_needs_openvino_on_a_cpu(monkeypatch):
    with pytest.raises(ConfigError, match=r"inference.precision=int8.*inference.backend"):
        Inference("cpu", "int8", backend="torch")
