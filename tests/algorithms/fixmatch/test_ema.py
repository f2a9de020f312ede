import io

import pytest
import torch
from torch import nn

from anomalymatch.algorithms.fixmatch.module import ExponentialMovingAverage


def network(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5))


def fill(module, value):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(value)


def test_parameters_are_averaged_by_hand():
    student = network()
    fill(student, 1.0)
    ema = ExponentialMovingAverage(student, 0.75)
    for value, expected in ((3.0, 1.5), (3.0, 1.875), (-1.0, 1.15625)):
        fill(student, value)
        ema.update(student)
        assert {p.unique().item() for p in ema.network.parameters()} == {expected}
    assert {p.unique().item() for p in student.parameters()} == {-1.0}


def test_it_starts_as_a_copy_that_shares_nothing():
    student = network()
    ema = ExponentialMovingAverage(student, 0.99)
    for own, copied in zip(student.state_dict().values(), ema.network.state_dict().values(), strict=True):
        assert torch.equal(own, copied)
        assert own.data_ptr() != copied.data_ptr()
    assert not any(p.requires_grad for p in ema.network.parameters())
    assert all(p.requires_grad for p in student.parameters())


def test_buffers_are_copied():
    student = network()
    ema = ExponentialMovingAverage(student, 0.99)
    student(torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)))
    ema.update(student)
    assert ema.network[1].num_batches_tracked.item() == 1
    assert torch.equal(ema.network[1].running_mean, student[1].running_mean)
    assert ema.network[1].running_mean.any()


def test_frozen_parameters_are_passed_over():
    student = network()
    ema = ExponentialMovingAverage(student, 0.5)
    student[0].requires_grad_(False)
    start = [p.clone() for p in ema.network[0].parameters()]
    fill(student, 9.0)
    ema.update(student)
    assert all(torch.equal(p, s) for p, s in zip(ema.network[0].parameters(), start, strict=True))
    assert ema.network[1].weight.unique().item() == 5.0
    student.requires_grad_(False)
    ema.update(student)  # nothing learns: nothing to do
    assert ema.network[1].weight.unique().item() == 5.0


def test_it_only_ever_predicts():
    student = network()
    ema = ExponentialMovingAverage(student, 0.9)
    whole = nn.ModuleDict({"student": student, "ema": ema})
    whole.train()
    assert student.training
    assert not any(module.training for module in ema.modules())
    images = torch.randn(2, 3, 8, 8)
    assert torch.equal(ema.network(images), ema.network(images))


def test_it_survives_a_resume():
    student = network()
    ema = ExponentialMovingAverage(student, 0.9)
    fill(student, 2.0)
    ema.update(student)
    buffer = io.BytesIO()
    torch.save({"student": student.state_dict(), "ema": ema.state_dict()}, buffer)
    buffer.seek(0)
    stored = torch.load(buffer, weights_only=True)
    other = network(seed=1)
    resumed = ExponentialMovingAverage(other, 0.9)
    other.load_state_dict(stored["student"])
    resumed.load_state_dict(stored["ema"])
    for average, module in ((ema, student), (resumed, other)):
        fill(module, -4.0)
        average.update(module)
    assert all(torch.equal(a, b) for a, b in zip(ema.state_dict().values(), resumed.state_dict().values(), strict=True))


@pytest.mark.parametrize("decay", [-0.1, 1.0, 2.0, float("nan")])
def test_refuses_an_impossible_decay(decay):
    with pytest.raises(ValueError, match="must lie in"):
        ExponentialMovingAverage(network(), decay)


def test_refuses_another_architecture():
    ema = ExponentialMovingAverage(network(), 0.9)
    with pytest.raises(ValueError, match="shorter"):
        ema.update(nn.Sequential(nn.Conv2d(3, 4, 3)))
