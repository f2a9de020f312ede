import math

import numpy as np
import pytest

from anomalymatch.active.metrics import cycle_metrics, evaluate, yield_per_label
from anomalymatch.data.task import make_task
from anomalymatch.errors import DataError
from anomalymatch.evaluation.metrics import ranking_metrics
from anomalymatch.ranking import Ranking
from anomalymatch.types import Label, Reject


def scored(task, seed):
    ids = [*task.pool, *task.holdout]
    return Ranking(ids, np.random.default_rng(seed).normal(size=len(ids)))


def test_evaluate_measures_against_the_truth(task):
    ids = task.pool[:40]
    perfect = Ranking(ids, task.truth(ids).astype(float))
    assert evaluate(perfect, task).auroc == evaluate(perfect, task).ap == 1.0
    assert evaluate(Ranking(ids, -perfect.logits), task).auroc == 0.0
    assert evaluate(perfect, task).anomalies == 4


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
    assert row["probe_auroc"] == evaluate(probe.restrict(rest), task).auroc != row["auroc"]


def test_cycle_metrics_are_nan_once_all_anomalies_are_found(task):
    labels = {id_: Label.ANOMALY for id_ in task.pool if id_ in task.anomalies}
    row = cycle_metrics(2, task, labels, scored(task, 1), None)
    assert math.isnan(row["auroc"])
    assert math.isnan(row["precision_at_1pct"])
    assert row["anomalies"] == 0
    assert 0 <= row["heldout_auroc"] <= 1
    assert not any(key.startswith("probe_") for key in row)


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
