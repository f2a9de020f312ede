import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anomalymatch.algorithms.fixmatch.batches import BatchSpec, balanced_draws, epoch_draws, pool_draws, pool_weights


def test_both_classes_come_equally_often():
    targets = np.repeat([1, 0], [5, 495])
    draws = balanced_draws(targets, 20_000, np.random.default_rng(0))
    anomalies = (targets[draws] == 1).sum()
    assert (anomalies - 10_000) ** 2 / 10_000 + (20_000 - anomalies - 10_000) ** 2 / 10_000 < 10.8  # chi-square, 0.1 %
    counts = np.bincount(draws, minlength=500)
    for members, size in ((counts[:5], 5), (counts[5:], 495)):
        expected = 10_000 / size
        chi_square = ((members - expected) ** 2 / expected).sum()
        assert abs(chi_square - (size - 1)) < 4 * np.sqrt(2 * size)


@given(st.integers(1, 40), st.integers(1, 200), st.integers(0, 5))
def test_no_image_of_the_pool_comes_twice_before_all_came_once(pool, count, seed):
    draws = epoch_draws(pool, count, np.random.default_rng(seed))
    assert len(draws) == count
    counts = np.bincount(draws, minlength=pool)
    assert len(counts) == pool
    assert counts.max() - counts.min() <= 1
    for start in range(0, count, pool):
        one = draws[start : start + pool]
        assert len(set(one.tolist())) == len(one)


def test_every_pass_over_the_pool_has_an_order_of_its_own():
    draws = epoch_draws(50, 100, np.random.default_rng(0))
    assert draws[:50].tolist() != draws[50:].tolist() != list(range(50))


@given(st.integers(5, 40), st.integers(1, 4), st.sampled_from([0.25, 0.5, 1.0]), st.integers(0, 5))
def test_candidates_fill_their_share_of_every_batch_and_the_pool_the_rest(pool, count, share, seed):
    spec = BatchSpec(labelled=4, unlabelled_ratio=2, iterations=6, candidates=count, candidate_share=share)
    candidates = np.arange(count) * (pool // count)
    rng = np.random.default_rng(seed)
    draws = pool_draws(pool, candidates, spec, rng).reshape(6, 8)
    own = round(share * 8)
    counts = np.bincount(draws[:, :own].ravel(), minlength=pool)[candidates]
    assert np.isin(draws[:, :own], candidates).all()
    assert counts.max() - counts.min() <= 1
    plain = epoch_draws(pool, 48, np.random.default_rng(seed)).reshape(6, 8)
    assert (draws[:, own:] == plain[:, own:]).all()


def test_a_fifth_of_a_small_pool_are_candidates():
    spec = BatchSpec(candidates=1000)
    pools = {10**6: 1000, 5001: 1000, 5000: 1000, 4999: 1000, 4995: 999, 11: 3, 1: 1, 0: 0}
    assert {pool: spec.candidates_of(pool) for pool in pools} == pools
    assert BatchSpec().candidates_of(10**6) == 0


def test_without_candidates_the_draws_are_those_of_the_pool():
    spec = BatchSpec(labelled=4, unlabelled_ratio=2, iterations=6, candidates=3, candidate_share=0.5)
    none = np.array([], dtype=np.int64)
    draws = pool_draws(30, none, spec, np.random.default_rng(1))
    assert draws.tolist() == epoch_draws(30, 48, np.random.default_rng(1)).tolist()


@settings(deadline=None, max_examples=25)  # 160,000 draws each: fewer would be too few for the tolerance
@given(st.integers(5, 60), st.integers(0, 4), st.sampled_from([0.0, 0.25, 0.5, 0.75]), st.integers(0, 5))
def test_with_its_weights_a_mean_over_the_batches_is_one_over_the_pool(pool, count, share, seed):
    spec = BatchSpec(labelled=4, unlabelled_ratio=2, iterations=20000, candidates=count, candidate_share=share)
    candidates = np.arange(count) * (pool // max(count, 1))
    draws = pool_draws(pool, candidates, spec, np.random.default_rng(seed))
    weights = pool_weights(pool, candidates, spec)[draws]
    assert weights.mean() == pytest.approx(1.0, abs=0.02)
    counts = np.bincount(draws, weights=weights, minlength=pool) / weights.sum()
    np.testing.assert_allclose(counts, 1 / pool, rtol=0.2)


def test_the_weights_of_a_pool_by_hand():
    spec = BatchSpec(labelled=4, unlabelled_ratio=2, candidates=2, candidate_share=0.75)  # six of eight are candidates
    weights = pool_weights(10, np.array([3, 7]), spec)
    assert weights[3] == weights[7] == pytest.approx(1 / (0.75 * 5 + 0.25))
    assert np.delete(weights, [3, 7]).tolist() == [4.0] * 8
    assert pool_weights(10, np.array([], dtype=np.int64), spec).tolist() == [1.0] * 10
