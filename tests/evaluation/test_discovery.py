import math
from fractions import Fraction
from math import comb

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anomalymatch.evaluation.discovery import UNKNOWN, anomalies_among, anomalies_in_tops, anomalies_left, audit_order


def slow_interval(images, audited, anomalies, level=0.9):
    """All numbers that neither one-sided test rejects, by counting samples with exact fractions."""
    samples, tail = comb(images, audited), (1 - Fraction(str(level))) / 2

    def chance(total, found):
        return Fraction(comb(total, found) * comb(images - total, audited - found), samples)

    kept = []
    for total in range(images + 1):
        at_least = sum(chance(total, k) for k in range(anomalies, audited + 1))
        at_most = sum(chance(total, k) for k in range(anomalies + 1))
        if min(at_least, at_most) > tail:
            kept.append(total)
    return kept[0], kept[-1]


@given(st.data(), st.integers(1, 40), st.sampled_from([0.5, 0.9, 0.99]))
def test_interval_equals_the_slow_twin(data, images, level):
    audited = data.draw(st.integers(1, images))
    anomalies = data.draw(st.integers(0, audited))
    count = anomalies_among(images, audited, anomalies, level=level)
    assert (count.low, count.high) == slow_interval(images, audited, anomalies, level)
    assert count.low <= count.middle <= count.high


def test_a_probability_equal_to_the_tail_is_rejected():
    # Both of 2 of 16 images are anomalies: with 4 anomalies the chance of that is 6 / 120, exactly 5 %.
    assert anomalies_among(16, 2, 2)[1:] == (5, 16)
    assert slow_interval(16, 2, 2) == (5, 16)


def test_values_by_hand():
    # Half of 4 images, none anomalous: 2 anomalies are missed in 1 of 6 samples, 1 in 3 of 6, 3 always show.
    assert anomalies_among(4, 2, 0)[1:] == (0, 2)
    # 59 of very many are normal: 0.95^59 = 0.0485 refuses 5 %, 0.95^58 = 0.051 does not.
    assert anomalies_among(10**6, 58, 0).high == pytest.approx(0.0503e6, rel=0.01)
    assert anomalies_among(10**6, 59, 0).high < 0.05e6
    # Jeffreys' median of one image in two: Beta(3/2, 3/2) is symmetric.
    assert anomalies_among(100, 2, 1).middle == pytest.approx(1 + 98 / 2)


@given(st.data(), st.integers(1, 300))
def test_anomalies_and_normals_are_symmetric(data, images):
    audited = data.draw(st.integers(1, images))
    anomalies = data.draw(st.integers(0, audited))
    count = anomalies_among(images, audited, anomalies)
    normals = anomalies_among(images, audited, audited - anomalies)
    np.testing.assert_allclose(count, images - np.array(normals)[[0, 2, 1]], rtol=1e-9, atol=1e-6)


def test_limits():
    for anomalies in (0, 3, 12):  # everything is audited: nothing is left to guess
        assert anomalies_among(12, 12, anomalies) == (anomalies,) * 3
    assert all(math.isnan(value) for value in anomalies_among(12, 0, 0))
    assert anomalies_among(0, 0, 0) == (0, 0, 0)
    everything = anomalies_among(1000, 50, 50)
    assert everything.high == 1000
    assert 900 < everything.low < 1000
    nothing = anomalies_among(1000, 50, 0)
    assert nothing.low == 0
    assert 0 < nothing.high < 100


def test_archives_of_any_size():
    small, large = (anomalies_among(images, 400, 2).high / images for images in (10**6, 10**9))
    assert small == pytest.approx(large, rel=2e-3)


@pytest.mark.parametrize("wrong", [(10, 11, 0), (10, 5, 6), (10, 5, -1), (-1, 0, 0)])
def test_impossible_counts_are_refused(wrong):
    with pytest.raises(ValueError, match="0 <= anomalies <= audited <= images"):
        anomalies_among(*wrong)
    with pytest.raises(ValueError, match="level"):
        anomalies_among(10, 5, 1, level=1.0)


# --- anomalies left -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rate", "audited"), [(0.02, 100), (0.05, 200), (0.3, 40), (0.002, 300)])
def test_coverage_of_anomalies_left_after_a_search(rate, audited):
    covered = []
    for seed in range(300):
        rng = np.random.default_rng(seed)
        anomalous = rng.random(2000) < rate
        sample = rng.choice(2000, audited, replace=False)
        found = anomalous & (rng.random(2000) < 0.5)
        found[sample] = anomalous[sample]
        rare = int(anomalous[sample].sum())
        unlabelled = 2000 - audited - int(np.delete(found, sample).sum())
        left = anomalies_left(2000, audited, rare, found=int(found.sum()), unlabelled=unlabelled)
        covered.append(left.low <= (anomalous & ~found).sum() <= left.high)
    assert np.mean(covered) > 0.87


def test_found_anomalies_are_subtracted():
    total = anomalies_among(1000, 100, 7)
    assert anomalies_left(1000, 100, 7, found=7, unlabelled=900) == pytest.approx([bound - 7 for bound in total])
    assert anomalies_left(1000, 100, 7, found=17, unlabelled=800).low == total.low - 17
    assert anomalies_left(1000, 100, 0, found=400, unlabelled=500) == (0, 0, 0)
    assert anomalies_left(1000, 100, 7, found=7, unlabelled=5).high == 5  # there are no more
    assert anomalies_left(12, 12, 3, found=3, unlabelled=0) == (0, 0, 0)
    assert all(math.isnan(value) for value in anomalies_left(12, 0, 0, found=3, unlabelled=5))
    with pytest.raises(ValueError, match="contradict"):
        anomalies_left(1000, 100, 7, found=6, unlabelled=900)


# --- the top of a ranking -------------------------------------------------------------------------------------


def test_anomalies_in_tops():
    rng = np.random.default_rng(0)
    audited, rare = rng.random(500) < 0.3, rng.random(500) < 0.1
    for top, count in zip((0, 20, 500), anomalies_in_tops(audited, rare, (0, 20, 500)), strict=True):
        assert count == anomalies_among(top, int(audited[:top].sum()), int((audited & rare)[:top].sum()))
    other = rare ^ ~audited  # labels outside the audit do not matter
    assert anomalies_in_tops(audited, other, (50,)) == anomalies_in_tops(audited, rare, (50,))
    assert anomalies_in_tops(np.zeros(9, bool), np.zeros(9, bool), (0, 5)) == [
        (0, 0, 0),
        pytest.approx(UNKNOWN, nan_ok=True),
    ]
    with pytest.raises(ValueError, match="tops of 0 to 500"):
        anomalies_in_tops(audited, rare, (501,))


def test_an_adaptive_search_does_not_bias_a_sealed_audit():
    held = {20: [], 100: [], 600: []}
    for seed in range(300):
        rng = np.random.default_rng(seed)
        rare = rng.random(800) < 0.05
        scores = rng.normal(size=800) + 1.5 * rare
        rest = np.argsort(-scores)[100:]  # the search labelled the top
        rest = rest[np.argsort(-(scores + rng.normal(size=800))[rest])]  # and ranked the rest again
        audited = np.isin(rest, rng.choice(800, 150, replace=False))
        for top, count in zip(held, anomalies_in_tops(audited, rare[rest], list(held)), strict=True):
            held[top].append(math.isnan(count.low) or count.low <= rare[rest][:top].sum() <= count.high)
    assert all(np.mean(values) >= 0.87 for values in held.values())


def test_audit_order_is_a_permutation_given_by_the_seed():
    order = audit_order(100, 3)
    assert sorted(order) == list(range(100))
    assert (order == audit_order(100, 3)).all()
    assert (order != audit_order(100, 4)).any()
