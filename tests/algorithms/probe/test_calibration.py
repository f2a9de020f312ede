import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.special import expit

from anomalymatch.algorithms.probe.regression import platt


def test_is_the_minimum_of_platts_loss_written_out():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=300) * 3
    targets = rng.random(300) < expit(0.7 * logits - 1.5)

    def loss(parameters):
        slope, offset = parameters
        total, positive = 0.0, int(targets.sum())
        for value, rare in zip(logits, targets, strict=True):
            certain = (positive + 1) / (positive + 2) if rare else 1 / (300 - positive + 2)
            p = 1 / (1 + np.exp(-(slope * value + offset)))
            total -= certain * np.log(p) + (1 - certain) * np.log(1 - p)
        return total

    best = minimize(loss, [1.0, 0.0], method="Nelder-Mead", options={"xatol": 1e-6, "fatol": 1e-9}).x
    assert platt(logits, targets) == pytest.approx(best, abs=1e-3)


def test_recovers_a_sigmoid():
    rng = np.random.default_rng(1)
    logits = rng.normal(size=100_000) * 2 + 1
    targets = rng.random(len(logits)) < expit(0.5 * logits - 2.0)
    assert platt(logits, targets) == pytest.approx((0.5, -2.0), abs=0.05)


def test_labels_that_are_separated_leave_some_doubt():
    slope, offset = platt(np.array([-2.0, -1.0, 1.0, 2.0]), np.array([False, False, True, True]))
    assert expit(slope * 1.0 + offset) < 0.9
    assert 0 < slope < 10


def test_the_mean_is_the_share_of_the_targets():
    rng = np.random.default_rng(2)
    logits = rng.normal(size=50)
    targets = logits + rng.normal(size=50) > 1.5
    slope, offset = platt(logits, targets)
    positive, negative = targets.sum(), (~targets).sum()
    certain = positive * (positive + 1) / (positive + 2) + negative / (negative + 2)
    assert expit(slope * logits + offset).sum() == pytest.approx(certain, abs=1e-3)


@given(st.floats(1e-3, 1e3), st.floats(-100, 100))
def test_a_change_of_scale_is_undone(scale, shift):
    logits = np.array([-3.0, -1.0, -0.5, 0.0, 0.7, 1.0, 2.5])
    targets = np.array([False, False, True, False, False, True, True])
    slope, offset = platt(logits, targets)
    other, moved = platt(scale * logits + shift, targets)
    assert other * (scale * logits + shift) + moved == pytest.approx(slope * logits + offset, abs=0.02)
