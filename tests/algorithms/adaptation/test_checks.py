import math

import pytest
import torch

from anomalymatch.algorithms.adaptation.checks import (
    Agreement,
    compare_agreement,
    instance_accuracy,
    neighbours_agree,
    spread,
)


def features(count=40, width=6, seed=0):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cosine(a, b):
    return float(a @ b / (a.norm() * b.norm()))


def test_instance_accuracy_is_that_of_a_slow_twin():
    a, b = features(), features() + 0.8 * features(seed=1)
    hits = [max(range(len(b)), key=lambda j: cosine(row, b[j])) == i for i, row in enumerate(a)]
    assert instance_accuracy(a, b) == pytest.approx(sum(hits) / len(a))
    assert 0.2 < instance_accuracy(a, b) < 0.95
    assert instance_accuracy(a, a * torch.rand(40, 1)) == 1.0  # lengths do not matter


def test_collapsed_features_recognise_nothing_and_have_no_spread():
    collapsed = torch.ones(10, 4) * torch.arange(1, 11)[:, None]
    assert instance_accuracy(collapsed, collapsed) == 0.0
    assert spread(collapsed) == pytest.approx(0.0, abs=1e-6)


def test_spread_by_hand_and_against_a_slow_twin():
    assert spread(torch.tensor([[2.0, 0.0], [-1.0, 0.0]])) == 1.0
    assert spread(torch.tensor([[1.0, 0.0], [0.0, 3.0]])) == pytest.approx(math.sqrt(0.5))
    unit = [row / row.norm() for row in features()]
    mean = sum(unit) / len(unit)
    assert spread(features()) == pytest.approx(math.sqrt(sum(float((u - mean) @ (u - mean)) for u in unit) / len(unit)))


def test_neighbours_agree_as_in_a_slow_twin():
    rows, anomaly = features(), torch.arange(40) % 4 == 0
    expected = []
    for i, row in enumerate(rows):
        nearest = max((j for j in range(40) if j != i), key=lambda j: cosine(row, rows[j]))
        expected.append(bool(anomaly[nearest] == anomaly[i]))
    assert neighbours_agree(rows, anomaly).tolist() == expected
    assert 0 < sum(expected) < 40


def test_agreement_by_hand():
    anomaly = torch.tensor([True, True, False, False, False, False])
    before = torch.tensor([True, False, True, True, True, False])
    after = torch.tensor([True, True, True, True, False, False])
    found = compare_agreement(before, after, anomaly)
    assert (found.before, found.after) == (pytest.approx((1 / 2 + 3 / 4) / 2), pytest.approx((1 + 1 / 2) / 2))
    # Differences (0, 1) of the anomalies and (0, 0, -1, 0) of the normals: variances 1/4 and 3/16.
    assert found.error == pytest.approx(math.sqrt(1 / 4 / 2 + 3 / 16 / 4) / 2)
    assert not found.is_worse
    assert compare_agreement(after, torch.zeros(6, dtype=torch.bool), anomaly).is_worse
    assert not compare_agreement(before, before, anomaly).is_worse
    assert Agreement(0.6, 0.5, 0.05).is_worse
    assert not Agreement(0.6, 0.56, 0.05).is_worse
