"""Probes on several blocks of features: the trust in each block."""

from dataclasses import replace

import numpy as np
import pytest
from probes import SELF_TRAINING
from sklearn.metrics import average_precision_score
from sklearn.model_selection import StratifiedKFold

from anomalymatch.algorithms.probe.regression import column_gain, fit_logistic, self_train
from anomalymatch.backbones.features import Scaling

SPEC = replace(SELF_TRAINING, rounds=0)
C = {"inverse_regularisation": 10.0}


def two_blocks(*, clue=0, count=400, seed=0):
    """Make rows of 6 + 4 columns; every tenth is an anomaly, which differs in the first column of block `clue`."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(count, 10))
    rare = np.arange(count) % 10 == 0
    rows[rare, 6 * clue] += 4.0
    return rows.astype(np.float32), rare


SCALING = Scaling((slice(0, 6), slice(6, 10)), np.ones(10, np.float32))


@pytest.mark.parametrize("clue", [0, 1])
def test_informative_block_is_trusted_more(clue):
    rows, rare = two_blocks(clue=clue)
    gain = column_gain(rows[rare][:10], rows[~rare][:100], SCALING, SPEC)
    shares = gain[0], gain[6]
    assert shares[clue] > 2 * shares[1 - clue]
    assert np.hypot(*shares) == pytest.approx(1.0)
    np.testing.assert_array_equal(gain[:6], gain[0])
    np.testing.assert_array_equal(gain[6:], gain[6])


def test_trust_is_the_average_precision_out_of_fold():
    """Compare with folds that are drawn and fitted one by one."""
    rows, rare = two_blocks()
    anomalies, normals = rows[rare][:7], rows[~rare][:60]
    both, targets = np.concatenate([anomalies, normals]), np.repeat([1, 0], [7, 60])
    found = []
    for block in SCALING.blocks:
        logits = np.zeros(67)
        for train, test in StratifiedKFold(5, shuffle=True, random_state=0).split(both, targets):
            rows_, known = both[train][:, block], targets[train] == 1
            logits[test] = fit_logistic(rows_[known], rows_[~known], **C).logits(both[test][:, block])
        found.append(average_precision_score(targets, logits))
    gain = column_gain(anomalies, normals, SCALING, SPEC)
    np.testing.assert_allclose([gain[0], gain[6]], np.array(found) / np.linalg.norm(found), rtol=1e-6)


def test_trust_does_not_depend_on_the_number_of_columns():
    rows, rare = two_blocks()
    wide = np.concatenate([np.repeat(rows[:, :6], 20, axis=1) / 20**0.5, rows[:, 6:]], axis=1)
    scaling = Scaling((slice(0, 120), slice(120, 124)), np.ones(124, np.float32))
    narrow_gain = column_gain(rows[rare][:8], rows[~rare][:60], SCALING, SPEC)
    wide_gain = column_gain(wide[rare][:8], wide[~rare][:60], scaling, SPEC)
    np.testing.assert_allclose([wide_gain[0], wide_gain[120]], [narrow_gain[0], narrow_gain[6]], rtol=1e-4)


@pytest.mark.parametrize(("anomalies", "normals"), [(1, 50), (50, 1), (1, 1)])
def test_single_image_of_a_class_trusts_all_blocks_alike(anomalies, normals):
    rows, rare = two_blocks()
    gain = column_gain(rows[rare][:anomalies], rows[~rare][:normals], SCALING, SPEC)
    np.testing.assert_allclose(gain, 0.5**0.5)


def test_gain_of_one_block_is_its_scale():
    rows, rare = two_blocks()
    scaling = Scaling((slice(0, 10),), np.arange(10, dtype=np.float32))
    np.testing.assert_array_equal(column_gain(rows[rare][:5], rows[~rare][:5], scaling, SPEC), np.arange(10))


def test_gain_multiplies_the_columns_in_the_fit_alone():
    rows, rare = two_blocks()
    gain = np.linspace(0.1, 2.0, 10)
    scaled = (rows * gain).astype(np.float32)
    probe = fit_logistic(rows[rare][:9], rows[~rare][:80], **C, gain=gain)
    plain = fit_logistic(scaled[rare][:9], scaled[~rare][:80], **C)
    np.testing.assert_allclose(probe.coefficients, plain.coefficients * gain, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(probe.logits(rows), plain.logits(scaled), atol=1e-4)


def test_two_blocks_find_more_than_each_where_each_has_half_of_the_clues():
    rows, rare = two_blocks(clue=0, count=1000)
    rows[rare, 6] += np.where(np.arange(rare.sum()) % 2 == 0, 5.0, 0.0)
    rows[rare, 0] -= np.where(np.arange(rare.sum()) % 2 == 0, 4.0, 0.0)
    anomalies, normals, rest = np.flatnonzero(rare)[:20], np.flatnonzero(~rare)[:200], np.arange(300, 1000)
    pool = rows[:0]

    def ap(probe, block):
        return average_precision_score(rare[rest], probe.logits(rows[rest][:, block]))

    single = [ap(fit_logistic(rows[anomalies][:, p], rows[normals][:, p], **C), p) for p in SCALING.blocks]
    both = ap(self_train(rows[anomalies], rows[normals], pool, SPEC, SCALING).probe, slice(None))
    assert both > max(single) + 0.1
