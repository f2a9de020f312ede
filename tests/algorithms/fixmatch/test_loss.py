import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from anomalymatch.algorithms.fixmatch.loss import (
    PseudoLabels,
    consistency_loss,
    cosine_7_16,
    pass_counts,
    pass_rates,
    pseudo_labels,
    squared_error,
)

LOGITS = hnp.arrays(np.float64, st.tuples(st.integers(1, 12), st.just(2)), elements=st.floats(-8, 8))
PAIRS = hnp.arrays(np.float64, st.tuples(st.integers(1, 12), st.just(4)), elements=st.floats(-8, 8))


def slow_softmax(row):
    powers = [math.exp(value) for value in row]
    return [power / sum(powers) for power in powers]


def slow_pseudo_labels(logits, threshold):
    labels = []
    for row in logits.tolist():
        probabilities = slow_softmax(row)
        best = max(range(len(row)), key=lambda k: probabilities[k])
        labels.append((best, probabilities[best] >= threshold))
    return labels


def slow_consistency_loss(logits_w, logits_s, threshold):
    total = 0.0
    for (target, passes), row in zip(slow_pseudo_labels(logits_w, threshold), logits_s.tolist(), strict=True):
        if passes:
            total += -math.log(slow_softmax(row)[target])
    return total / len(logits_s)


def log_odds(probability):
    """Make two logits whose softmax is (1 - probability, probability)."""
    return [0.0, math.log(probability / (1 - probability))]


@given(LOGITS, st.floats(0.4, 0.99))
def test_pseudo_labels_are_the_definition(logits, threshold):
    pseudo = pseudo_labels(torch.from_numpy(logits), threshold)
    slow = slow_pseudo_labels(logits, threshold)
    for row, target, mask, (slow_target, slow_mask) in zip(
        logits, *map(torch.Tensor.tolist, pseudo), slow, strict=True
    ):
        probabilities = slow_softmax(row)
        if abs(probabilities[0] - probabilities[1]) > 1e-12:  # a tie may go either way
            assert target == slow_target
        if abs(max(probabilities) - threshold) > 1e-12:
            assert mask == slow_mask


@given(PAIRS, st.floats(0.4, 0.99))
def test_consistency_loss_is_the_definition(logits, threshold):
    weak, strong = torch.from_numpy(logits[:, :2]), torch.from_numpy(logits[:, 2:])
    odds = (weak[:, 0] - weak[:, 1]).abs()
    if odds.min() < 1e-9 or (torch.sigmoid(odds) - threshold).abs().min() < 1e-9:
        return  # on the edge itself rounding decides
    loss = consistency_loss(strong, pseudo_labels(weak, threshold))
    assert loss.item() == pytest.approx(slow_consistency_loss(weak, strong, threshold), rel=1e-9, abs=1e-12)


def test_by_hand():
    weak = torch.tensor([log_odds(0.97), log_odds(0.02), log_odds(0.6), log_odds(0.5)])
    strong = torch.tensor([log_odds(0.5), log_odds(0.75), log_odds(0.9), log_odds(0.9)])
    pseudo = pseudo_labels(weak, 0.95)
    assert pseudo.targets[:3].tolist() == [1, 0, 1]
    assert pseudo.mask.tolist() == [True, True, False, False]
    # -log 0.5 for the first, -log(1 - 0.75) for the second, nothing for the others; a quarter of the sum.
    assert consistency_loss(strong, pseudo).item() == pytest.approx((math.log(2) + math.log(4)) / 4)


def test_without_passing_images_loss_and_gradient_are_zero():
    strong = torch.randn(5, 2, generator=torch.Generator().manual_seed(0), requires_grad=True)
    loss = consistency_loss(strong, pseudo_labels(torch.zeros(5, 2), 0.95))
    loss.backward()
    assert loss.item() == 0.0
    assert strong.grad.abs().max().item() == 0.0


def test_equal_to_the_threshold_passes():
    half = torch.zeros(1, 2, dtype=torch.float64)  # softmax is exactly one half
    assert pseudo_labels(half, 0.5).mask.tolist() == [True]
    assert pseudo_labels(half, math.nextafter(0.5, 1)).mask.tolist() == [False]
    sure = torch.tensor([[0.0, 1000.0]])  # and exactly one
    assert pseudo_labels(sure, 1.0).mask.tolist() == [True]


@given(LOGITS, st.floats(-50, 50))
def test_a_constant_added_to_all_logits_changes_nothing(logits, constant):
    logits = logits.round(3)
    plain, moved = (pseudo_labels(torch.from_numpy(values), 0.8123) for values in (logits, logits + constant))
    differ = np.abs(logits[:, 0] - logits[:, 1]) > 1e-9
    assert torch.equal(plain.targets[differ], moved.targets[differ])
    assert torch.equal(plain.mask, moved.mask)


def test_more_than_two_classes():
    pseudo = pseudo_labels(torch.tensor([[0.0, 9.0, 0.0], [1.0, 1.0, 1.1]]), 0.95)
    assert pseudo.targets.tolist() == [1, 2]
    assert pseudo.mask.tolist() == [True, False]


def test_squared_error_by_hand():
    weak = torch.tensor([log_odds(0.9), log_odds(0.5), log_odds(0.2)], requires_grad=True)
    strong = torch.tensor([log_odds(0.6), log_odds(0.7), log_odds(0.2)])
    everything = PseudoLabels(torch.tensor([1, 0, 0]), torch.ones(3))
    # Both classes differ by 0.3, 0.2 and 0: the mean over the classes is the square of one.
    assert squared_error(strong, weak, everything).item() == pytest.approx((0.09 + 0.04) / 3)
    half = PseudoLabels(everything.targets, torch.tensor([0.5, 0.0, 1.0]))
    assert squared_error(strong, weak, half).item() == pytest.approx(0.5 * 0.09 / 3)
    assert not squared_error(strong, weak, everything).requires_grad  # nothing flows back to the teacher


def test_soft_weights_scale_the_loss_of_their_image():
    strong = torch.tensor([log_odds(0.5), log_odds(0.75)])
    pseudo = PseudoLabels(torch.tensor([1, 0]), torch.tensor([0.5, 0.25]))
    assert consistency_loss(strong, pseudo).item() == pytest.approx((0.5 * math.log(2) + 0.25 * math.log(4)) / 2)


def test_pass_rates_by_hand():
    pseudo = PseudoLabels(torch.tensor([0, 0, 0, 1, 1]), torch.tensor([True, True, False, True, True]))
    truth = torch.tensor([False, True, False, True, False])
    rates = pass_rates(pass_counts(pseudo, truth))
    assert {name: value.item() for name, value in rates.items()} == pytest.approx(
        {
            "pass_rate": 4 / 5,
            "pass_rate_normal": 2 / 5,
            "pass_rate_anomaly": 2 / 5,
            "pseudo_precision": 2 / 4,
            "pseudo_precision_normal": 1 / 2,
            "pseudo_precision_anomaly": 1 / 2,
        }
    )
    assert set(pass_rates(pass_counts(pseudo, None))) == {"pass_rate", "pass_rate_normal", "pass_rate_anomaly"}


def test_pass_rates_of_fractional_masks():
    pseudo = PseudoLabels(torch.tensor([0, 0, 1]), torch.tensor([1.0, 0.5, 0.25]))
    rates = pass_rates(pass_counts(pseudo, torch.tensor([False, True, True])))
    assert rates["pass_rate"].item() == pytest.approx(1.75 / 3)
    assert rates["pseudo_precision_normal"].item() == pytest.approx(1.0 / 1.5)
    assert rates["pseudo_precision_anomaly"].item() == 1.0


@pytest.mark.parametrize(
    ("step", "factor"),
    [(0, 1.0), (400, math.cos(math.pi * 7 * 400 / 16_000)), (1000, 0.19509032), (500, 0.7730104534)],
)
def test_cosine_7_16(step, factor):
    assert cosine_7_16(step, 1000) == pytest.approx(factor)


def test_cosine_7_16_falls_and_stays_positive():
    factors = [cosine_7_16(step, 80) for step in range(81)]
    assert all(later < earlier for earlier, later in pairwise(factors))
    assert factors[-1] == pytest.approx(math.sin(math.pi / 16))
    assert cosine_7_16(0, 0) == 1.0
    assert {cosine_7_16(step, 80) for step in (80, 81, 240, 10**6)} == {factors[-1]}  # never backwards
