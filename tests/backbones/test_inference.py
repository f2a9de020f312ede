from importlib.util import find_spec

import numpy as np
import pytest
import torch

from anomalymatch.backbones import inference as inference_module
from anomalymatch.backbones import openvino
from anomalymatch.backbones.inference import Inference, fastest_backend
from anomalymatch.errors import ConfigError

needs_openvino = pytest.mark.skipif(find_spec("openvino") is None, reason="openvino is not installed")
FP32 = Inference(device="cpu", precision="fp32", batch_pixels=32 * 32 * 8, workers=2)


def collected(inference, module, source, ids):
    forward = inference.prepare(module, size=32, count=len(ids))
    batches = list(inference.run(forward, source, ids, size=32))
    outputs = np.concatenate([batch.outputs for batch in batches])
    return [id_ for batch in batches for id_ in batch.ids], outputs, [r for batch in batches for r in batch.rejects]


def slow_outputs(module, source, ids):
    """One image after the other, with nothing fused."""
    with torch.inference_mode():
        return np.concatenate(
            [module.eval()(torch.from_numpy(source.read([i])[0]).permute(2, 0, 1)[None]) for i in ids]
        )


def test_outputs_are_those_of_the_module(make_source, tiny_network):
    source = make_source(20, unreadable={"im000003", "im000011"})
    ids, outputs, rejects = collected(FP32, tiny_network, source, source.ids)
    assert ids == [id_ for id_ in source.ids if id_ not in source.unreadable]
    assert [reject.id for reject in rejects] == ["im000003", "im000011"]
    assert outputs.dtype == np.float32
    np.testing.assert_allclose(outputs, slow_outputs(tiny_network, source, ids), rtol=1e-3, atol=1e-4)


def test_module_is_not_changed(make_source, tiny_network):
    source = make_source(10)
    tiny_network.train()
    before = {name: tensor.clone() for name, tensor in tiny_network.state_dict().items()}
    collected(FP32, tiny_network, source, source.ids)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny_network.state_dict().items())
    assert all(module.training for module in tiny_network.modules())
    assert all(parameter.requires_grad for parameter in tiny_network.parameters())


def test_scores_do_not_depend_on_the_batch(make_source, tiny_network):
    source = make_source(21)
    one = collected(Inference("cpu", "fp32", 1, 1), tiny_network, source, source.ids)
    many = collected(Inference("cpu", "fp32", 32 * 32 * 16, 3), tiny_network, source, source.ids)
    assert one[0] == many[0]
    np.testing.assert_allclose(one[1], many[1], rtol=1e-4, atol=1e-5)


def test_bf16_is_close(make_source, tiny_backbone):
    _, backbone = tiny_backbone
    source = make_source(6)
    _, exact, _ = collected(FP32, backbone, source, source.ids)
    _, rough, _ = collected(Inference("cpu", "bf16"), backbone, source, source.ids)
    assert rough.dtype == np.float32
    assert 0 < np.abs(rough - exact).max() < 0.1 * np.abs(exact).max()


@needs_openvino
def test_openvino_gives_the_same_outputs(make_source, tiny_network):
    source = make_source(21, unreadable={"im000003"})
    converted = Inference("cpu", "fp32", 32 * 32 * 8, backend="openvino")
    exact, other = (collected(i, tiny_network, source, source.ids) for i in (FP32, converted))
    assert (exact[0], exact[2]) == (other[0], other[2])
    assert not np.array_equal(exact[1], other[1])  # another library has computed them
    np.testing.assert_allclose(other[1], exact[1], atol=1e-4)


@needs_openvino
@pytest.mark.parametrize(("count", "size", "converts"), [(4096, 128, True), (4095, 128, False), (100_000, 32, True)])
def test_auto_converts_where_there_are_many_pixels(tiny_network, monkeypatch, count, size, converts):
    def converted(images):
        raise NotImplementedError

    def prepare(**changes):
        return Inference("cpu", **changes).prepare(tiny_network, size=size, count=count)

    monkeypatch.setattr(inference_module, "openvino_forward", lambda module, **_: converted)
    assert (prepare() is converted) is converts
    assert prepare(backend="openvino") is converted
    assert prepare(backend="torch") is not converted
    monkeypatch.setattr(inference_module, "has_openvino", lambda: False)
    assert prepare() is not converted


def test_pytorch_computes_what_cannot_be_converted(make_source, tiny_network, monkeypatch, caplog):
    def fail(module, **_):
        raise ConfigError("an unknown operator")

    monkeypatch.setattr(inference_module, "openvino_forward", fail)
    monkeypatch.setattr(inference_module, "has_openvino", lambda: True)
    monkeypatch.setattr(inference_module, "OPENVINO_PIXELS", 1)
    source = make_source(6)
    with caplog.at_level("INFO"):
        _, outputs, _ = collected(FP32, tiny_network, source, source.ids)
    assert "an unknown operator" in caplog.text
    np.testing.assert_allclose(outputs, slow_outputs(tiny_network, source, source.ids), rtol=1e-3, atol=1e-4)
    with pytest.raises(ConfigError, match="an unknown operator"):
        Inference("cpu", backend="openvino").prepare(tiny_network, size=32, count=1)


def test_openvino_needs_its_package_and_a_cpu(monkeypatch):
    monkeypatch.setattr(openvino, "has_openvino", lambda: False)
    with pytest.raises(ConfigError, match=r'inference.backend=openvino needs: pip install "anomalymatch\[openvino\]"'):
        Inference(backend="openvino")
    monkeypatch.setattr(openvino, "has_openvino", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match=r"inference\.backend=openvino .* cuda:0"):
        Inference(device="cuda:0", backend="openvino")


@pytest.mark.parametrize(
    ("device", "pixels", "installed", "compiler", "expected"),
    [
        ("cpu", 2**26 - 1, True, True, "torch"),
        ("cpu", 2**26, True, True, "openvino"),
        ("cpu", 10 * 2**26, False, True, "compile"),
        ("cpu", 10 * 2**26 - 1, False, True, "torch"),
        ("cpu", 10 * 2**26, False, False, "torch"),
        ("cuda", 10 * 2**26, True, True, "torch"),
        ("cuda", 10**11, True, True, "compile"),
        ("mps", 10**11, True, True, "torch"),
    ],
)
def test_fastest_backend_depends_on_the_number_of_pixels(monkeypatch, device, pixels, installed, compiler, expected):
    monkeypatch.setattr(inference_module, "has_openvino", lambda: installed)
    assert fastest_backend(torch.device(device), pixels, compiler=compiler) == expected


@pytest.mark.parametrize(
    ("pixels", "size", "images"), [(1_048_576, 224, 20), (1_048_576, 32, 512), (1, 64, 1), (64 * 64 * 3, 64, 3)]
)
def test_batch_size(pixels, size, images):
    assert Inference(batch_pixels=pixels).batch_size(size) == images


def test_devices_and_precisions(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert Inference(device="cuda:1").torch_device == torch.device("cuda", 1)
    with pytest.raises(ConfigError, match=r"inference\.device is 'cuda:2'"):
        Inference(device="cuda:2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert Inference().torch_device == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert Inference().torch_device == torch.device("cuda")
    assert Inference(precision="bf16").computes_bf16
    assert not Inference(precision="fp32").computes_bf16


@pytest.mark.parametrize(("flags", "bf16"), [({"avx512f"}, False), ({"avx512_bf16"}, True), ({"amx_bf16"}, True)])
def test_auto_takes_bf16_only_where_the_cpu_computes_in_it(monkeypatch, flags, bf16):
    monkeypatch.setattr(inference_module, "_cpu_flags", lambda: flags)
    assert Inference(device="cpu").computes_bf16 is bf16


@pytest.mark.parametrize(
    "change", [{"precision": "fp16"}, {"backend": "tpu"}, {"workers": 0}, {"batch_pixels": 0}, {"device": "tpu0"}]
)
def test_wrong_values_are_errors(change):
    ((key, value),) = change.items()
    with pytest.raises(ConfigError, match=f"inference.{key} is {value!r}"):
        Inference(**change)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_gpu_gives_the_same_outputs_and_the_module_stays_where_it_was(make_source, tiny_network):
    source = make_source(20)
    _, here, _ = collected(FP32, tiny_network, source, source.ids)
    _, there, _ = collected(Inference("cuda", "fp32"), tiny_network, source, source.ids)
    np.testing.assert_allclose(there, here, rtol=1e-2, atol=1e-3)
    assert {p.device.type for p in tiny_network.parameters()} == {"cpu"}
