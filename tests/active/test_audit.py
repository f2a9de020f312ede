import csv
import math

import numpy as np
import pytest

from anomalymatch.active.audit import left_by_rank, left_in_all, sealed_labels
from anomalymatch.data.task import make_task
from anomalymatch.evaluation.discovery import anomalies_among, audit_order
from anomalymatch.evaluation.plots import left_figure
from anomalymatch.ranking import Ranking
from anomalymatch.types import Label


def table(path, cycle):
    with (path / "cycles" / f"{cycle:02d}" / "left.csv").open(newline="") as file:
        return {row["what"]: row for row in csv.DictReader(file)}


def test_the_audit_depends_on_pool_and_seed_only(task):
    audit = sealed_labels(task, 30, seed=1)
    assert len(audit) == 30
    assert set(audit) <= set(task.pool)
    assert all(label == task.label(id_) for id_, label in audit.items())
    assert list(sealed_labels(task, 20, seed=1)) == list(audit)[:20]  # a larger audit goes on
    assert set(sealed_labels(task, 30, seed=2)) != set(audit)
    assert set(sealed_labels(task, 10**6, seed=1)) == set(task.pool)
    assert sealed_labels(task, 0, seed=1) == {}


def test_remaining_anomalies_are_estimated_by_rank():
    ids = [f"i{n:04d}" for n in range(1500)]
    rest = Ranking(ids[::-1], np.linspace(-8, 4, 1500))  # i0000 ranks first
    sealed = dict.fromkeys(ids[::10], Label.NORMAL) | {ids[0]: Label.ANOMALY, ids[30]: Label.ANOMALY, "gone": "anomaly"}
    rows = {row["what"]: row for row in left_by_rank(rest, sealed, [20, 100, 1000], 0.1)}
    assert list(rows) == ["top 20", "top 100", "top 1000", "score above 0.1", "all"]
    assert [rows[what]["audited"] for what in rows if what != "score above 0.1"] == [2, 10, 100, 150]
    assert [rows[what]["audited_anomalies"] for what in rows] == [1, 2, 2, 2, 2]
    above = int((rest.scores > 0.1).sum())
    assert rows["score above 0.1"]["images"] == above
    assert rows["score above 0.1"]["lowest_score"] > 0.1
    assert rows["top 100"]["lowest_score"] == rest.scores[1500 - 100]
    for row in rows.values():
        expected = anomalies_among(row["images"], row["audited"], row["audited_anomalies"])
        assert (row["left"], row["left_low"], row["left_high"]) == expected


def test_an_audit_of_all_images_is_exact(task, loop_of, run_in, tmp_path):
    rows, _ = run_in(loop_of(task, audit=80), tmp_path / "run")
    for row in rows:
        assert row["left"] == row["left_low"] == row["left_high"] == 8 - row["found"]
        assert row["audited"] == 80 - row["labels"]
    assert (tmp_path / "run" / "audit.csv").read_text().count("\n") == 81


def test_an_audit_does_not_change_the_search(task, loop_of, run_in, tmp_path, comparable):
    loops = loop_of(task), loop_of(task, audit=40)
    for number, loop in enumerate(loops):
        run_in(loop, tmp_path / str(number))
    without, with_audit = (comparable(tmp_path / name) for name in "01")
    metrics = [run.pop("metrics") for run in (without, with_audit)]
    assert without == with_audit
    assert [row["left"] for row in metrics[0]] == ["nan"] * 3
    assert [row["left"] for row in metrics[1]] != ["nan"] * 3
    assert {row["audited"] for row in metrics[0]} == {"0"}
    assert table(tmp_path / "1", 2)["all"]["left"] == metrics[1][1]["left"]
    assert not (tmp_path / "0" / "audit.csv").exists()


def test_advice_is_logged_after_each_cycle(task, loop_of, run_in, tmp_path, caplog):
    caplog.set_level("INFO")
    run_in(loop_of(task), tmp_path / "0")
    assert "Cycle" not in caplog.text
    run_in(loop_of(task, audit=80, cycles=10, budget=10), tmp_path / "1")
    assert "Cycle 1: about 6 are left (90 %: 6 to 6)" in caplog.text
    assert "going on at the present rate finds one in" in caplog.text
    assert "no anomaly is left: stop labelling" in caplog.text


# --- a person's audit -----------------------------------------------------------------------------------------


@pytest.fixture
def archive(make_source):
    return make_task(make_source(200, truth=None))


def ranking_of(task, bad=()):
    ids = [id_ for id_ in task.pool if id_ not in bad]
    return Ranking(ids, np.zeros(len(ids)))


def test_labels_in_the_random_order_of_the_page_are_the_audit(archive):
    order = [archive.source.ids[i] for i in audit_order(200, 7)]
    bad = order[3]
    labels = {id_: Label.NORMAL for id_ in order[:40] if id_ != bad}
    labels |= {order[5]: Label.ANOMALY, order[60]: Label.ANOMALY}
    row = left_in_all(archive, labels, ranking_of(archive, {bad}), seed=7)
    total = anomalies_among(199, 39, 1)
    assert row["audited"] == 39
    assert (row["left_low"], row["left_high"]) == (max(0, total.low - 2), total.high - 2)
    less = left_in_all(archive, {id_: labels[id_] for id_ in order[:19] if id_ != bad}, ranking_of(archive), seed=7)
    assert less["audited"] == 3
    assert math.isnan(less["left"])


def test_labels_of_a_person_give_an_estimate(archive, loop_of, run_in, tmp_path):
    order = [archive.source.ids[i] for i in audit_order(200, 0)]
    labels = dict.fromkeys(order[:50], Label.NORMAL) | {order[1]: Label.ANOMALY}
    rows, _ = run_in(loop_of(archive, given=labels, cycles=1), tmp_path / "run")
    assert rows[0]["audited"] == 50
    assert 0 <= rows[0]["left_low"] < rows[0]["left"] < rows[0]["left_high"] < 150
    assert float(table(tmp_path / "run", 1)["all"]["left"]) == rows[0]["left"]


# --- its picture ----------------------------------------------------------------------------------------------


def test_the_figure_shows_found_and_remaining_anomalies():
    rows = [
        {"labels": 100, "found": 5, "left": 20.0, "left_low": 8.0, "left_high": 60.0},
        {"labels": 120, "found": 15, "left": float("nan"), "left_low": float("nan"), "left_high": float("nan")},
        {"labels": 140, "found": 22, "left": 9.0, "left_low": 2.0, "left_high": 40.0},
    ]
    axes = left_figure(rows, total=40).axes[0]
    names = [text.get_text() for text in axes.get_legend().get_texts()]
    assert names == ["90 % interval", "found + left", "found", "all 40 anomalies"]
    both = axes.get_lines()[0].get_ydata()
    np.testing.assert_allclose(both, [25, math.nan, 31])
    assert left_figure(rows[:1]).axes[0].containers  # one cycle: a bar, for a band has no width
    assert left_figure([{"labels": 1, "found": 1}]).axes
