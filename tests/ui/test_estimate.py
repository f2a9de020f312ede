import math

import numpy as np
import pytest
from scipy.special import expit

from anomalymatch.ui.estimate import estimate_left


def draw(rng, n, slope=1.2, intercept=-1.0):
    """Logits, and whether each is an anomaly, by a logistic law."""
    logits = rng.normal(-4, 2.5, n)
    return logits, rng.random(n) < expit(intercept + slope * logits)


def test_it_finds_the_number_though_only_the_top_was_looked_at():
    hits = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        logits, anomalous = draw(rng, 20_000)
        top = np.argsort(-logits)[:200]
        rest = np.setdiff1d(np.arange(20_000), top)
        left = estimate_left(logits[top], anomalous[top], logits[rest], seed=0)
        hits += left.low <= anomalous[rest].sum() <= left.high
    assert hits >= 30  # 36 expected of a perfect 90 % interval


def test_an_audit_narrows_it():
    rng = np.random.default_rng(0)
    logits, anomalous = draw(rng, 20_000)
    top = np.argsort(-logits)[:100]
    both = np.union1d(top, rng.choice(20_000, 400, replace=False))
    rest = np.setdiff1d(np.arange(20_000), both)
    narrow, wide = (estimate_left(logits[seen], anomalous[seen], logits[rest], seed=0) for seen in (both, top))
    assert narrow.high - narrow.low < wide.high - wide.low


def test_separable_labels_stay_finite():
    found = estimate_left([5.0] * 6 + [-5.0] * 6, [True] * 6 + [False] * 6, np.linspace(-9, 2, 1000), seed=0)
    assert 0 <= found.low <= found.left <= found.high < 1000
    assert found.reason == ""


def test_unreadable_images_do_not_count():
    seen = np.array([3.0, 2.0, 1.0, 0.0, -1.0, -2.0, -3.0, -4.0, -5.0, -6.0])
    said = np.array([True] * 5 + [False] * 5)
    rest = np.linspace(-9, 2, 1000)
    with_nan = np.concatenate([rest, np.full(50, np.nan)])
    assert estimate_left(seen, said, rest, seed=1) == estimate_left(seen, said, with_nan, seed=1)


def test_a_ranking_that_is_worse_than_chance_is_not_turned_around():
    found = estimate_left([3.0] * 10 + [-3.0] * 10, [False] * 10 + [True] * 10, np.full(100, -3.0), seed=0)
    assert found.left == pytest.approx(50, abs=10)


@pytest.mark.parametrize(("rare", "others"), [(4, 50), (50, 4), (0, 0)])
def test_too_little_to_say_anything(rare, others):
    found = estimate_left([1.0] * (rare + others), [True] * rare + [False] * others, np.zeros(10), seed=0)
    assert math.isnan(found.left)
    assert math.isnan(found.low)
    assert math.isnan(found.high)
    assert f"has {rare} and {others}" in found.reason
