import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.metrics import auc, average_precision_score, precision_recall_curve, roc_auc_score, roc_curve
from torchmetrics.functional.classification import binary_precision_recall_curve, binary_roc

from anomalymatch.data.task import make_task
from anomalymatch.errors import DataError
from anomalymatch.evaluation.metrics import (
    MEASURES,
    ascending,
    curves,
    cycle_metrics,
    evaluate,
    ranking_metrics,
    yield_per_label,
)
from anomalymatch.ranking import Ranking
from anomalymatch.types import Label, Reject


@st.composite
def rankings(draw):
    """Scores with many ties, and a truth that holds both classes."""
    size = draw(st.integers(2, 60))
    scores = draw(hnp.arrays(np.float64, size, elements=st.integers(-8, 8).map(float)))
    truth = draw(hnp.arrays(bool, size))
    truth[:2] = True, False
    return scores, truth


def same(first, second):
    return first.as_dict() == pytest.approx(second.as_dict(), nan_ok=True)


def test_by_hand():
    # Ranking: A n A n. AUROC: 3 of 4 pairs. AP: (1/1 + 2/3) / 2. Top 1 % of four images is one image.
    metrics = ranking_metrics(np.array([4.0, 3.0, 2.0, 1.0]), np.array([True, False, True, False]))
    assert metrics.auroc == pytest.approx(0.75)
    assert metrics.ap == pytest.approx(5 / 6)
    # Trapezoids in recall: from (0, 1) to (0.5, 1), down to (0.5, 1/2), to (1, 2/3).
    assert metrics.auprc == pytest.approx(0.5 + 0.5 * (1 / 2 + 2 / 3) / 2)
    assert (metrics.precision_at_1pct, metrics.recall_at_1pct) == (1.0, 0.5)
    assert (metrics.images, metrics.anomalies, metrics.undefined) == (4, 2, {})


@given(rankings())
@settings(deadline=None, max_examples=50)
def test_agrees_with_scikit_learn(ranking):
    scores, truth = ranking
    metrics = ranking_metrics(scores, truth)
    precision, recall, _ = precision_recall_curve(truth, scores)
    assert metrics.auroc == pytest.approx(roc_auc_score(truth, scores), abs=1e-6)
    assert metrics.ap == pytest.approx(average_precision_score(truth, scores), abs=1e-6)
    assert metrics.auprc == pytest.approx(auc(recall, precision), abs=1e-6)


@given(rankings(), st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=50)
def test_only_the_order_of_the_scores_matters(ranking, random):
    scores, truth = ranking
    expected = ranking_metrics(scores, truth)
    shuffle = list(range(scores.size))
    random.shuffle(shuffle)
    assert same(ranking_metrics(scores[shuffle], truth[shuffle]), expected)
    assert same(ranking_metrics(np.exp(scores) * 100 - 40, truth), expected)
    assert same(ranking_metrics(1 / (1 + np.exp(-scores)), truth), expected)
    assert same(ranking_metrics(scores.astype(np.int32), truth), expected)


def test_large_logits_are_not_merged():
    # A sigmoid in float32 or float64 turns all of these into 1.0, and the AUROC into 0.5.
    scores = np.linspace(50, 100, 1000)
    truth = np.arange(1000) >= 990
    assert ranking_metrics(scores, truth).auroc == pytest.approx(1.0)
    assert ranking_metrics(np.where(truth, np.inf, scores), truth).ap == pytest.approx(1.0)


def test_top_fractions():
    truth = np.zeros(10_000, dtype=bool)
    truth[[0, 5, 50, 99, 100, 5000]] = True
    metrics = ranking_metrics(-np.arange(10_000), truth)
    assert (metrics.precision_at_0_1pct, metrics.recall_at_0_1pct) == pytest.approx((2 / 10, 2 / 6))
    assert (metrics.precision_at_1pct, metrics.recall_at_1pct) == pytest.approx((4 / 100, 4 / 6))


@pytest.mark.parametrize(
    ("truth", "reason"),
    [([], "no images to rank"), ([False] * 3, "no anomaly among the 3 images"), ([True] * 2, "no normal image")],
)
def test_one_class_is_undefined_with_a_reason_and_never_zero(truth, reason):
    scores, truth = np.arange(len(truth), dtype=np.float64), np.array(truth, dtype=bool)
    metrics = ranking_metrics(scores, truth)
    assert set(metrics.undefined) == set(MEASURES)
    for name in MEASURES:
        assert math.isnan(metrics.as_dict()[name])
        assert reason in metrics.undefined[name]
    assert (metrics.images, metrics.anomalies) == (truth.size, int(truth.sum()))
    undefined = curves(scores, truth)
    assert undefined.fpr.size == undefined.recall.size == 0
    assert math.isnan(undefined.auroc)


def test_nan_scores_are_refused():
    for function in (ranking_metrics, curves):
        with pytest.raises(ValueError, match="1 of 2 scores are NaN"):
            function(np.array([np.nan, 1.0]), np.array([True, False]))


@given(rankings())
@settings(deadline=None, max_examples=50)
def test_curves_are_those_of_scikit_learn(ranking):
    scores, truth = ranking
    result = curves(scores, truth)
    fpr, tpr, _ = roc_curve(truth, scores, drop_intermediate=False)
    precision, recall, _ = precision_recall_curve(truth, scores)
    np.testing.assert_allclose(result.fpr, fpr, atol=1e-6)
    np.testing.assert_allclose(result.tpr, tpr, atol=1e-6)
    np.testing.assert_allclose(result.recall, recall[::-1], atol=1e-6)
    np.testing.assert_allclose(result.precision, precision[::-1], atol=1e-6)
    assert result.prevalence == truth.mean()


@pytest.mark.parametrize("levels", [2, 7, 10**9])
def test_the_curves_of_a_ranking_are_those_of_torchmetrics_on_its_scores(task, levels):
    """Exactly, also with ties: nothing changes because the images come sorted."""
    ids, rng = [*task.pool, *task.holdout], np.random.default_rng(levels)
    scores, truth = rng.integers(0, levels, len(ids)) / levels, task.truth(ids)
    result = curves(*ascending(Ranking(ids, scores), task))
    plain = torch.from_numpy(scores), torch.from_numpy(truth.astype(np.int64))
    expected = [*binary_roc(*plain)[:2], *(values.flip(0) for values in binary_precision_recall_curve(*plain)[1::-1])]
    found = (result.fpr, result.tpr, result.recall, result.precision)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs.numpy())
    assert evaluate(Ranking(ids, scores), task) == ranking_metrics(scores, truth)


def test_thinned_curves_keep_their_shape():
    rng = np.random.default_rng(0)
    truth = rng.random(50_000) < 0.05
    scores = rng.normal(size=50_000) + 2 * truth
    thinned = curves(scores, truth, max_points=300)
    assert 100 < thinned.fpr.size <= 302
    assert (thinned.fpr[0], thinned.tpr[0], thinned.fpr[-1], thinned.tpr[-1]) == (0, 0, 1, 1)
    assert (thinned.recall[0], thinned.precision[0], thinned.recall[-1]) == (0, 1, 1)
    assert auc(thinned.fpr, thinned.tpr) == pytest.approx(thinned.auroc, abs=0.003)
    assert np.trapezoid(thinned.precision, thinned.recall) == pytest.approx(thinned.ap, abs=0.02)


# --- the metrics of a cycle ---------------------------------------------------------------------------------------


def scored(task, seed):
    ids = [*task.pool, *task.holdout]
    return Ranking(ids, np.random.default_rng(seed).normal(size=len(ids)))


def test_evaluate_needs_a_truth(make_source):
    task = make_task(make_source(20, truth=None))
    with pytest.raises(DataError, match=r"dataset\.anomaly=CLASS"):
        evaluate(scored(task, 0), task)


def test_cycle_metrics_cover_unlabelled_images_held_out_split_and_probe(task):
    ranking, probe = scored(task, 1), scored(task, 2)
    rare = [id_ for id_ in task.pool if id_ in task.anomalies]
    labels = {rare[0]: Label.ANOMALY, rare[1]: Label.UNSURE, task.pool[1]: Label.NORMAL}
    row = cycle_metrics(4, task, labels, ranking, probe)
    assert (row["cycle"], row["labels"], row["found"], row["rejects"]) == (4, 3, 1, 0)
    rest = [id_ for id_ in task.pool if id_ not in labels]
    logit = dict(zip(ranking.ids, ranking.logits, strict=True))
    expected = ranking_metrics(np.array([logit[id_] for id_ in rest]), task.truth(rest))
    assert {key: row[key] for key in expected.as_dict()} == expected.as_dict()
    assert row["images"] == 77
    held = ranking_metrics(np.array([logit[id_] for id_ in task.holdout]), task.truth(task.holdout))
    assert row["heldout_ap"] == held.ap
    assert row["heldout_anomalies"] == held.anomalies == 2
    assert row["probe_heldout_ap"] == evaluate(probe.restrict(task.holdout), task).ap != held.ap
    assert row["probe_auroc"] == evaluate(probe.restrict(rest), task).auroc != row["auroc"]


def test_cycle_metrics_are_nan_once_all_anomalies_are_found(task):
    labels = {id_: Label.ANOMALY for id_ in task.pool if id_ in task.anomalies}
    row = cycle_metrics(2, task, labels, scored(task, 1), None)
    assert math.isnan(row["auroc"])
    assert math.isnan(row["precision_at_1pct"])
    assert row["anomalies"] == 0
    assert 0 <= row["heldout_auroc"] <= 1
    assert not any(key.startswith("probe_") for key in row)


def test_metrics_of_a_pool_that_was_not_ranked_completely_are_undefined(task):
    ranked = [*task.pool[5:30], *task.holdout]
    ranking, probe = (scored(task, seed).restrict(ranked) for seed in (1, 2))
    row = cycle_metrics(1, task, {task.pool[5]: Label.NORMAL}, ranking, probe, complete=False)
    pool = [row[key] for name in MEASURES for key in (name, f"probe_{name}")]
    assert len(pool) == 14
    assert all(math.isnan(value) for value in pool)
    assert (row["images"], row["anomalies"]) == (24, int(task.truth(task.pool[6:30]).sum()))
    assert row["heldout_ap"] == evaluate(ranking.restrict(task.holdout), task).ap
    assert row["probe_heldout_ap"] == evaluate(probe.restrict(task.holdout), task).ap


def test_cycle_metrics_without_truth_are_counts(make_source):
    task = make_task(make_source(20, truth=None))
    ranking = Ranking(task.pool[1:], np.zeros(19), [Reject(task.pool[0], "the file is empty")])
    labels = {task.pool[1]: Label.ANOMALY, task.pool[2]: Label.NORMAL, task.pool[3]: Label.ARTEFACT}
    assert cycle_metrics(1, task, labels, ranking, None) == {"cycle": 1, "labels": 3, "found": 1, "rejects": 1}


def test_cycle_metrics_without_held_out_split_lack_its_columns(make_source):
    task = make_task(make_source(50), anomaly="rare", holdout=0.0)
    assert not any("heldout" in key for key in cycle_metrics(1, task, {}, scored(task, 0), None))


def test_yield_counts_from_the_start():
    rows = [{"found": 5, "labels": 100}, {"found": 15, "labels": 120}, {"found": 16, "labels": 140}]
    nothing, first, second = yield_per_label(rows)
    assert math.isnan(nothing)
    assert (first, second) == (10 / 20, 11 / 40)


@pytest.mark.parametrize(("found", "labels"), [(2, 10), (4, 10), (3, 9)])
def test_yield_after_corrections_is_undefined(found, labels):
    rows = [{"found": 3, "labels": 10}, {"found": found, "labels": labels}]
    assert math.isnan(yield_per_label(rows)[1])
