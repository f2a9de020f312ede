import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from anomalymatch.evaluation.ranks import expected_hits, interleave, midranks, top_fraction_count

TIED = hnp.arrays(np.float64, st.integers(1, 40), elements=st.integers(-5, 5).map(float))


def slow_midranks(scores):
    """The definition by pairs: lower scores, plus half of the equal ones (itself included)."""
    return [sum((other < s) + 0.5 * (other == s) for other in scores) / len(scores) for s in scores]


def test_midranks_by_hand():
    np.testing.assert_array_equal(midranks(np.array([3.0, 1.0, 3.0, 2.0])), [0.75, 0.125, 0.75, 0.375])


@given(TIED)
def test_midranks_are_the_definition(scores):
    np.testing.assert_allclose(midranks(scores), slow_midranks(scores))


@given(TIED)
def test_midranks_keep_order_and_symmetry(scores):
    ranks = midranks(scores)
    np.testing.assert_array_equal(np.sign(ranks[:, None] - ranks), np.sign(scores[:, None] - scores))
    np.testing.assert_allclose(midranks(-scores), 1 - ranks)
    np.testing.assert_array_equal(midranks(np.exp(scores) - 7), ranks)


def test_midranks_of_infinities_integers_and_edge_sizes():
    np.testing.assert_allclose(midranks(np.array([np.inf, 0.0, -np.inf, np.inf])), [0.75, 0.375, 0.125, 0.75])
    np.testing.assert_array_equal(midranks(np.array([7, -2])), [0.75, 0.25])
    np.testing.assert_array_equal(midranks(np.array([-0.0, 0.0])), [0.5, 0.5])
    assert midranks(np.empty(0)).shape == (0,)
    assert midranks(np.array([5.0])).tolist() == [0.5]


def test_nan_is_refused():
    with pytest.raises(ValueError, match="1 of 2 scores are NaN"):
        midranks(np.array([0.1, np.nan]))


@pytest.mark.parametrize(
    ("n", "fraction", "count"),
    [
        (10_000, 0.001, 10),
        (10_000, 0.01, 100),
        (9_500, 0.001, 10),
        (9_400, 0.001, 9),
        (100, 0.07, 7),
        (700, 0.01, 7),
        (3, 0.01, 1),
        (1, 1.0, 1),
        (0, 0.01, 0),
    ],
)
def test_top_fraction_count(n, fraction, count):
    assert top_fraction_count(n, fraction) == count


@pytest.mark.parametrize(("n", "fraction"), [(-1, 0.5), (5, 0.0), (5, 1.1), (5, math.nan)])
def test_top_fraction_count_refuses(n, fraction):
    with pytest.raises(ValueError, match="expected n >= 0"):
        top_fraction_count(n, fraction)


def test_expected_hits_by_hand():
    scores, truth = np.array([4.0, 3.0, 3.0, 3.0, 1.0]), np.array([True, True, False, False, True])
    assert expected_hits(scores, truth, 1) == 1
    assert expected_hits(scores, truth, 2) == pytest.approx(1 + 1 / 3)
    assert expected_hits(scores, truth, 4) == 2
    assert expected_hits(scores, truth, 5) == 3


@given(TIED, st.data())
def test_expected_hits_is_the_mean_over_random_orders_of_ties(scores, data):
    truth = data.draw(hnp.arrays(bool, scores.size))
    k = data.draw(st.integers(1, scores.size))
    # By linearity: each image counts with its probability of lying in the top k.
    places = [(int((scores > s).sum()), int((scores == s).sum())) for s in scores]
    chance = [min(max(k - above, 0), tied) / tied for above, tied in places]
    assert expected_hits(scores, truth, k) == pytest.approx(np.dot(chance, truth))


@pytest.mark.parametrize("k", [0, 3])
def test_expected_hits_refuses_an_impossible_k(k):
    with pytest.raises(ValueError, match="expected 1 <= k <= 2"):
        expected_hits(np.zeros(2), np.zeros(2, dtype=bool), k)


def test_interleave_by_hand():
    np.testing.assert_array_equal(interleave(np.array([3, 1, 0, 2]), np.array([3, 0, 2, 1])), [3, 1, 0, 2])


@given(st.integers(0, 40), st.integers(0, 2**32 - 1))
def test_interleave_keeps_each_position_once_and_the_first_of_both(count, seed):
    rng = np.random.default_rng(seed)
    first, second = rng.permutation(count), rng.permutation(count)
    merged = interleave(first, second)
    assert sorted(merged) == list(range(count))
    for k in range(count // 2):
        assert {*first[:k], *second[:k]} <= {*merged[: 2 * k]}
