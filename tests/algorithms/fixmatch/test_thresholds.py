import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from anomalymatch.algorithms.fixmatch.loss import pseudo_labels
from anomalymatch.algorithms.fixmatch.thresholds import (
    UNUSED,
    align,
    fairness,
    flexmatch_thresholds,
    freematch_thresholds,
    gaussian_weights,
    rampup,
)

LABELS = st.lists(st.integers(-1, 2), min_size=1, max_size=40)
LOGITS = hnp.arrays(np.float64, st.tuples(st.integers(1, 12), st.just(3)), elements=st.floats(-8, 8))
SHARES = st.lists(st.floats(0.01, 1.0), min_size=3, max_size=3)


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


# --- FlexMatch --------------------------------------------------------------------------------------------------


def slow_flexmatch(labels, classes, threshold):
    won = [sum(label == c for label in labels) for c in range(classes)]
    unused = sum(label == UNUSED for label in labels)
    denominator = max([*won, unused])
    return [threshold * (beta := count / denominator) / (2 - beta) for count in won]


@given(LABELS, st.floats(0.1, 1.0))
def test_flexmatch_thresholds_are_the_definition(labels, threshold):
    fast = flexmatch_thresholds(torch.tensor(labels, dtype=torch.int8), 3, threshold)
    assert fast.tolist() == pytest.approx(slow_flexmatch(labels, 3, threshold), rel=1e-5)


def test_flexmatch_by_hand():
    labels = torch.tensor([0] * 8 + [1] * 2 + [UNUSED] * 4)
    # beta = 8/8 and 2/8, the convex map of 1/4 is (1/4) / (7/4) = 1/7.
    assert flexmatch_thresholds(labels, 2, 0.95).tolist() == pytest.approx([0.95, 0.95 / 7])
    # While most images are unused, they are the denominator: beta = 8/32 and 2/32.
    warming = torch.cat([labels, torch.full((28,), UNUSED)])
    assert flexmatch_thresholds(warming, 2, 0.95).tolist() == pytest.approx([0.95 / 7, 0.95 / 31])


def test_flexmatch_begins_with_nothing_and_ends_with_the_threshold():
    assert flexmatch_thresholds(torch.full((9,), UNUSED), 2, 0.9).tolist() == [0.0, 0.0]
    assert flexmatch_thresholds(torch.tensor([0, 1, 0, 1]), 2, 0.9).tolist() == pytest.approx([0.9, 0.9])
    assert flexmatch_thresholds(torch.empty(0, dtype=torch.int8), 2, 0.9).tolist() == [0.0, 0.0]


# --- FreeMatch --------------------------------------------------------------------------------------------------


def test_freematch_thresholds_by_hand():
    thresholds = freematch_thresholds(torch.tensor(0.8), torch.tensor([0.9, 0.1]))
    assert thresholds.tolist() == pytest.approx([0.8, 0.8 / 9])


@given(SHARES, st.floats(0.34, 1.0), st.floats(0.1, 10.0))
def test_freematch_thresholds_are_relative_to_the_largest_class(means, confidence, factor):
    thresholds = freematch_thresholds(tensor(confidence)[0], tensor(*means))
    assert thresholds.tolist() == pytest.approx([confidence * mean / max(means) for mean in means])
    scaled = freematch_thresholds(tensor(confidence)[0], factor * tensor(*means))
    assert scaled.tolist() == pytest.approx(thresholds.tolist())


def slow_fairness(means_s, histogram_s, means, histogram):
    expected = [m / h for m, h in zip(means, histogram, strict=True)]
    batch = [m / h if h else 0.0 for m, h in zip(means_s, histogram_s, strict=True)]
    terms = zip(expected, batch, strict=True)
    return sum(e / sum(expected) * math.log(b / sum(batch)) for e, b in terms if b)


@given(SHARES, SHARES, SHARES, SHARES, st.booleans())
def test_fairness_is_the_definition(means_s, histogram_s, means, histogram, missing):
    if missing:
        histogram_s = [0.0, *histogram_s[1:]]
    values = [means_s, histogram_s, means, histogram]
    fast = fairness(*(tensor(*value) for value in values)).item()
    assert fast == pytest.approx(slow_fairness(*values), rel=1e-9, abs=1e-12)
    assert fast <= 1e-12


def test_fairness_by_hand():
    # Expected: (0.8 / 0.8, 0.2 / 0.1) = (1, 2) -> (1/3, 2/3); batch: (0.6 / 0.6, 0.3 / 0.1) = (1, 3) -> (1/4, 3/4).
    term = fairness(tensor(0.6, 0.3), tensor(0.6, 0.1), tensor(0.8, 0.2), tensor(0.8, 0.1))
    assert term.item() == pytest.approx(math.log(1 / 4) / 3 + 2 * math.log(3 / 4) / 3)


def test_fairness_of_one_class_or_none_is_zero_and_teaches_nothing():
    for histogram in (tensor(0.9, 0.0), tensor(0.0, 0.0)):
        means = tensor(0.8, 0.1).requires_grad_()
        term = fairness(means, histogram, tensor(0.8, 0.2), tensor(0.9, 0.1))
        term.backward()
        assert term.item() == 0.0
        assert not means.grad.any()


def test_fairness_is_finite_where_a_class_was_never_predicted():
    assert fairness(tensor(0.8, 0.1), tensor(0.9, 0.1), tensor(0.8, 0.2), tensor(1.0, 0.0)).isfinite()


# --- SoftMatch --------------------------------------------------------------------------------------------------


def test_gaussian_weights_by_hand():
    confidence = tensor(0.95, 0.8, 0.7, 0.5)
    weights = gaussian_weights(confidence, tensor(0.8)[0], tensor(0.01)[0], 1.0)
    assert weights.tolist() == pytest.approx([1.0, 1.0, math.exp(-0.5), math.exp(-4.5)])
    narrower = gaussian_weights(confidence, tensor(0.8)[0], tensor(0.01)[0], 2.0)
    assert narrower.tolist() == pytest.approx([1.0, 1.0, math.exp(-2.0), math.exp(-18.0)])


@given(st.lists(st.floats(0.5, 1.0), min_size=1, max_size=12), st.floats(0.5, 1.0), st.floats(1e-4, 1.0))
def test_gaussian_weights_rise_with_the_confidence(confidences, mean, variance):
    weights = gaussian_weights(tensor(*sorted(confidences)), tensor(mean)[0], tensor(variance)[0], 2.0).tolist()
    assert all(0 <= earlier <= later <= 1 for earlier, later in pairwise([0.0, *weights, 1.0]))
    for confidence, weight in zip(sorted(confidences), weights, strict=True):
        slow = 1.0 if confidence >= mean else math.exp(-((confidence - mean) ** 2) / (2 * variance / 4))
        assert weight == pytest.approx(slow, abs=1e-12)


def test_gaussian_weights_without_variance_are_a_step():
    weights = gaussian_weights(tensor(0.8, 0.79), tensor(0.8)[0], tensor(0.0)[0], 2.0)
    assert weights.tolist() == [1.0, 0.0]
    assert gaussian_weights(tensor(0.5, 0.9), tensor(0.8)[0], tensor(0.1)[0], 0.0).tolist() == [1.0, 1.0]


# --- distribution alignment -------------------------------------------------------------------------------------


def slow_align(logits, means, prior):
    rows = []
    for row in logits:
        powers = [math.exp(value) for value in row]
        scaled = [power / sum(powers) * p / m for power, p, m in zip(powers, prior, means, strict=True)]
        rows.append([value / sum(scaled) for value in scaled])
    return rows


@given(LOGITS, SHARES, SHARES)
def test_alignment_is_the_definition(logits, means, prior):
    aligned = align(torch.from_numpy(logits), tensor(*means), tensor(*prior)).softmax(dim=-1)
    np.testing.assert_allclose(aligned.numpy(), slow_align(logits.tolist(), means, prior), rtol=1e-9, atol=1e-12)


def test_alignment_by_hand():
    # Probabilities (0.7, 0.3) times (0.99 / 0.9, 0.01 / 0.1) = (0.77, 0.03): the anomaly falls from 0.3 to 3/80.
    aligned = align(tensor(0.7, 0.3).log()[None], tensor(0.9, 0.1), tensor(0.99, 0.01))
    assert aligned.softmax(dim=-1)[0].tolist() == pytest.approx([77 / 80, 3 / 80])


def test_alignment_keeps_the_order_of_the_images():
    logits = torch.stack([torch.zeros(9), torch.linspace(-40, 40, 9)], dim=1)
    aligned = align(logits, torch.tensor([0.5, 0.5]), torch.tensor([0.99, 0.01]))
    assert (aligned.diff(dim=1).flatten().diff() > 0).all()


# --- mean teacher -----------------------------------------------------------------------------------------------


def test_the_ramp_by_hand():
    assert [rampup(step, 10.0) for step in (0, 5, 10, 99)] == pytest.approx([math.exp(-5), math.exp(-1.25), 1.0, 1.0])
    assert rampup(0, 0.0) == 1.0
    assert all(rampup(step, 7.5) < rampup(step + 1, 7.5) for step in range(7))


# --- thresholds in use ------------------------------------------------------------------------------------------


def test_each_class_has_its_own_threshold():
    logits = tensor(0.9, 0.1, 0.7, 0.3, 0.4, 0.6, 0.1, 0.9).reshape(4, 2).log()
    pseudo = pseudo_labels(logits, torch.tensor([0.8, 0.5]))
    assert pseudo.targets.tolist() == [0, 0, 1, 1]
    assert pseudo.mask.tolist() == [True, False, True, True]
    assert torch.equal(pseudo_labels(logits, torch.tensor([0.65, 0.65])).mask, pseudo_labels(logits, 0.65).mask)
