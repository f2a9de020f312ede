import numpy as np
import pytest
import torch

from anomalymatch.errors import ConfigError
from anomalymatch.models.inference import Inference

FP32 = Inference(device="cpu", precision="fp32", batch_pixels=32 * 32 * 8, workers=2)


def collected(inference, module, source, ids):
    batches = list(inference.run(module, source, ids, size=32))
    outputs = np.concatenate([batch.outputs for batch in batches])
    return [id_ for batch in batches for id_ in batch.ids], outputs, [r for batch in batches for r in batch.rejects]


def slow_outputs(module, source, ids):
    """One image after the other, with nothing folded."""
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


def test_the_module_is_left_as_it_was(make_source, tiny_network):
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


@pytest.mark.parametrize(
    ("pixels", "size", "images"), [(1_048_576, 224, 20), (1_048_576, 32, 512), (1, 64, 1), (64 * 64 * 3, 64, 3)]
)
def test_batch_size(pixels, size, images):
    assert Inference(batch_pixels=pixels).batch_size(size) == images


def test_devices_and_precisions(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert Inference(device="cuda:1").torch_device == torch.device("cuda", 1)
    with pytest.raises(
        ConfigError, match=r"inference.device is 'cuda:2', but this machine has no such device: take auto"
    ):
        Inference(device="cuda:2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert Inference().torch_device == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert Inference().torch_device == torch.device("cuda")
    assert Inference(precision="bf16").computes_bf16
    assert not Inference(precision="fp32").computes_bf16


@pytest.mark.parametrize(("avx512", "amx"), [(False, False), (True, False), (False, True)])
def test_auto_takes_bf16_only_where_the_processor_computes_in_it(monkeypatch, avx512, amx):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert Inference(device="cpu").computes_bf16 is (avx512 or amx)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"precision": "fp16"}, "inference.precision is 'fp16': choose one of auto, fp32, bf16"),
        ({"workers": 0}, "must be at least 1"),
        ({"batch_pixels": 0}, "must be at least 1"),
    ],
)
def test_wrong_values_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        Inference(**change)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_the_gpu_gives_the_same_outputs_and_the_module_stays_where_it_was(make_source, tiny_network):
    source = make_source(20)
    _, here, _ = collected(FP32, tiny_network, source, source.ids)
    _, there, _ = collected(Inference("cuda", "fp32"), tiny_network, source, source.ids)
    np.testing.assert_allclose(there, here, rtol=1e-2, atol=1e-3)
    assert {p.device.type for p in tiny_network.parameters()} == {"cpu"}
