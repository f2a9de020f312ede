import math
import shutil

import pyarrow.parquet as pq
import pytest

from anomalymatch.active.oracles import PaperOracle, TopKOracle
from anomalymatch.active.run_folder import RunReader
from anomalymatch.active.strategies import Top
from anomalymatch.backbones.checkpoint import load_input, load_tensors
from anomalymatch.checksums import damaged_files
from anomalymatch.data.label_log import LabelLog, import_csv
from anomalymatch.data.task import make_task
from anomalymatch.errors import ConfigError, LabelError, StorageError
from anomalymatch.ranking import Ranking
from anomalymatch.types import Label


def test_each_cycle_trains_on_the_labels_given_before_it(task, loop_of, run_in, tmp_path):
    loop = loop_of(task, cycles=3, budget=5, anomalies=2, normals=6)
    rows, tracker = run_in(loop, tmp_path / "run")
    ranked = Ranking.read(tmp_path / "run" / "cycles" / "01" / "scores.parquet")
    assert set(ranked.ids) == {*task.pool, *task.holdout}
    calls = loop.learner.calls
    assert [len(call["labels"]) for call in calls] == [row["labels"] for row in rows] == [8, 13, 18]
    assert list(calls[0]["labels"].values()) == [Label.ANOMALY] * 2 + [Label.NORMAL] * 6
    assert all(label == task.label(id_) for id_, label in calls[2]["labels"].items())
    assert [row["found"] for row in rows] == [
        sum(label == Label.ANOMALY for label in call["labels"].values()) for call in calls
    ]
    for call in calls:
        assert not set(call["labels"]) & set(call["pool"])
        assert not {*call["labels"], *call["pool"]} & set(task.holdout)
    assert [cycle for cycle, _ in tracker.steps] == [cycle for cycle, _ in tracker.cycles] == [1, 2, 3]


def test_scores_are_read_by_a_resumed_run_only(task, loop_of, run_in, tmp_path, monkeypatch):
    read = []
    from_file = Ranking.read
    monkeypatch.setattr(Ranking, "read", lambda path: read.append(path.parent.name) or from_file(path))
    run_in(loop_of(task, cycles=3, budget=5), tmp_path / "run")
    assert read == []
    run_in(loop_of(task, cycles=5, budget=5), tmp_path / "run")
    assert read == ["03"]


def test_the_label_log_records_annotator_cycle_and_score(task, loop_of, run_in, tmp_path, events):
    run_in(loop_of(task, cycles=3, budget=5), tmp_path / "run")
    log = events(tmp_path / "run")
    assert [(e.annotator, e.cycle) for e in log] == [("start", 0)] * 8 + [("oracle", 1)] * 5 + [("oracle", 2)] * 5
    assert len({e.id for e in log}) == 18  # never twice
    assert {e.id for e in log} <= set(task.pool)
    assert all(e.score is None for e in log[:8])
    for cycle, asked in ((1, log[8:13]), (2, log[13:])):
        ranking = Ranking.read(tmp_path / "run" / "cycles" / f"{cycle:02d}" / "scores.parquet")
        before = {e.id for e in log if e.cycle < cycle}
        rest = ranking.restrict(id_ for id_ in task.pool if id_ not in before)
        assert [e.id for e in asked] == rest.top(5)
        assert {e.id: e.score for e in asked} == rest.score_of(rest.top(5))
    labels = import_csv(tmp_path / "run" / "labels.csv", set(task.pool))
    assert labels == {e.id: e.label for e in log}


def test_the_oracle_receives_the_labels_of_its_last_query_and_the_number_that_remains(
    task, loop_of, run_in, tmp_path, events
):
    loop = loop_of(task, cycles=4, budget=5)
    heard, left = [], []

    def listen(*args, last, remaining, **kwargs):
        heard.append(dict(last))
        left.append(remaining)
        return TopKOracle(task, Top())(*args, last=last, remaining=remaining, **kwargs)

    loop.oracle = listen
    run_in(loop, tmp_path / "run")
    given = events(tmp_path / "run")
    assert heard == [{}, *({e.id: e.label for e in given if e.cycle == cycle} for cycle in (1, 2))]
    assert left == [10, 5, 0]
    assert [len(last) for last in heard] == [0, 5, 5]


def test_the_pool_is_drawn_for_each_cycle_from_the_seed(task, loop_of, run_in, tmp_path, comparable):
    first, again, other = (loop_of(task, pool_size=20, seed=seed) for seed in (0, 0, 1))
    for number, loop in enumerate((first, again, other)):
        run_in(loop, tmp_path / str(number))
    pools = [[call["pool"] for call in loop.learner.calls] for loop in (first, again, other)]
    assert all(len(set(pool)) == 20 for pool in pools[0])
    assert pools[0] == pools[1]
    assert len({tuple(pool) for pool in (*pools[0], *pools[2])}) == 6
    assert comparable(tmp_path / "0") == comparable(tmp_path / "1") != comparable(tmp_path / "2")


def test_the_paper_oracle_labels_images_that_the_cycle_trained_on(task, loop_of, run_in, tmp_path, events):
    loop = loop_of(task, pool_size=30, budget=5, oracle=PaperOracle)
    run_in(loop, tmp_path / "run")
    log = events(tmp_path / "run")
    for cycle, call in enumerate(loop.learner.calls[:-1], 1):
        assert {e.id for e in log if e.cycle == cycle} <= set(call["pool"])
    assert [e.label for e in log if e.cycle == 1].count(Label.NORMAL) == 2


def test_the_loop_continues_after_all_anomalies_are_found(task, loop_of, run_in, tmp_path):
    loop = loop_of(task, budget=16, oracle=PaperOracle, cycles=4)
    rows, tracker = run_in(loop, tmp_path / "run")
    assert [row["found"] for row in rows] == [2, 8, 8, 8]
    assert [math.isnan(row["ap"]) for row in rows] == [False, True, True, True]
    assert not math.isnan(rows[-1]["heldout_ap"])
    assert [points.recall.size > 0 for points in tracker.points] == [True, False, False, False]
    assert (tmp_path / "run" / "metrics.csv").read_text().count("\n") == 5


def test_a_pool_smaller_than_the_budget_ends_the_run_early(task, loop_of, run_in, tmp_path, caplog):
    loop = loop_of(task, budget=70, cycles=5)
    rows, _ = run_in(loop, tmp_path / "run")
    assert [row["labels"] for row in rows] == [8, 78]
    assert [len(call["pool"]) for call in loop.learner.calls] == [72, 2]
    assert "All images are labelled after cycle 2: there is nothing left to find" in caplog.text
    assert set(import_csv(tmp_path / "run" / "labels.csv", set(task.pool))) == set(task.pool)


@pytest.mark.parametrize(
    ("key", "value"), [("cycles", 0), ("budget", 0), ("pool_size", 0), ("audit", -1), ("audit_tops", (20, 0))]
)
def test_a_wrong_protocol_is_refused(task, loop_of, key, value):
    with pytest.raises(ConfigError, match=rf"al\.{key} is (0|-1)"):
        loop_of(task, **{key: value})


def test_unreadable_images_are_listed_and_never_queried(make_source, loop_of, run_in, tmp_path, events, caplog):
    bad = ["im000003", "im000010"]
    task = make_task(make_source(100, size=16, unreadable=bad), anomaly="rare", holdout=0.0)
    loop = loop_of(task, budget=30)
    rows, _ = run_in(loop, tmp_path / "run")
    rejects = pq.read_table(tmp_path / "run" / "rejects.parquet").to_pylist()
    assert rejects == [{"id": id_, "reason": "the file is truncated"} for id_ in bad]
    assert [row["rejects"] for row in rows] == [2, 2, 2]
    assert "Images that cannot be read: 2, as im000003 (the file is truncated); " in caplog.text
    asked = {e.id for e in events(tmp_path / "run") if e.annotator == "oracle"}
    assert len(asked) == 60
    assert not asked & set(bad)


# --- a person's own labels -------------------------------------------------------------------------------------


@pytest.fixture
def own(make_source):
    """Images of which nothing is known."""
    return make_task(make_source(40, truth=None))


GIVEN = {"im000000": Label.ANOMALY, "im000001": Label.NORMAL, "im000002": Label.UNSURE}


def test_own_labels_give_one_cycle_and_more_labels_give_the_next(own, loop_of, run_in, tmp_path, caplog, events):
    rows, tracker = run_in(loop_of(own, given=GIVEN), tmp_path / "run")
    assert [(row["labels"], row["found"]) for row in rows] == [(3, 1)]
    assert tracker.points == [None]
    assert "No new labels since cycle 1 and nobody to ask: label more images, then resume this run" in caplog.text
    more = GIVEN | {"im000010": Label.ANOMALY, "im000002": Label.NORMAL}
    rows, _ = run_in(loop_of(own, given=more, cycles=2), tmp_path / "run")
    assert [(row["labels"], row["found"]) for row in rows] == [(3, 1), (4, 2)]
    assert {(e.id, e.label, e.cycle) for e in events(tmp_path / "run")[3:]} == {
        ("im000010", Label.ANOMALY, 1),
        ("im000002", Label.NORMAL, 1),
    }


def test_labels_given_during_a_training_start_the_next_cycle(own, loop_of, run_in, tmp_path):
    """Such labels carry the number of the ranking that was on screen, the one before that training."""
    loop = loop_of(own, given=GIVEN, cycles=1)
    fit = loop.learner.fit

    def fit_while_somebody_labels(labels, **options):
        log = LabelLog(tmp_path / "run" / "labels.sqlite")
        log.append({"im000010": Label.ANOMALY}, annotator="ada", cycle=0)
        log.close()
        fit(labels, **options)

    loop.learner.fit = fit_while_somebody_labels
    run_in(loop, tmp_path / "run")
    later = loop_of(own, given=GIVEN, cycles=3)
    rows, _ = run_in(later, tmp_path / "run")
    assert [row["labels"] for row in rows] == [3, 4]
    assert later.learner.calls[0]["labels"] == GIVEN | {"im000010": Label.ANOMALY}


def test_labels_of_deleted_images_rest(make_source, loop_of, run_in, tmp_path, caplog, events):
    given = {"im000000": Label.ANOMALY, "im000001": Label.NORMAL, "im000039": Label.NORMAL}
    run_in(loop_of(make_task(make_source(40), anomaly=None), cycles=1, given=given), tmp_path / "run")
    fewer = loop_of(make_task(make_source(39), anomaly=None), cycles=2, given=given | {"im000002": Label.NORMAL})
    rows, _ = run_in(fewer, tmp_path / "run")
    assert "1 labelled images are not in array" in caplog.text
    assert [row["cycle"] for row in rows] == [1, 2]
    assert set(fewer.learner.calls[-1]["labels"]) == {"im000000", "im000001", "im000002"}
    assert {event.id for event in events(tmp_path / "run")} == {*given, "im000002"}
    (again, _) = run_in(loop_of(fewer.task, cycles=3, given=given), tmp_path / "run")
    assert len(again) == 2, "a resting label is no new one"


def test_a_labels_file_does_not_overrule_a_person(own, loop_of, run_in, tmp_path):
    run_in(loop_of(own, given=GIVEN, cycles=1), tmp_path / "run")
    log = LabelLog(tmp_path / "run" / "labels.sqlite")
    log.append({"im000000": Label.NORMAL, "im000001": Label.ANOMALY}, annotator="ada", cycle=0)
    log.close()
    later = loop_of(own, given=GIVEN, cycles=2)
    run_in(later, tmp_path / "run")
    assert later.learner.calls[0]["labels"] == GIVEN | {"im000000": Label.NORMAL, "im000001": Label.ANOMALY}


def test_resuming_without_new_labels_changes_nothing(own, loop_of, run_in, tmp_path, caplog, comparable):
    run_in(loop_of(own, given=GIVEN, cycles=1), tmp_path / "run")
    before = comparable(tmp_path / "run")
    loop = loop_of(own, given=GIVEN, cycles=2)
    rows, _ = run_in(loop, tmp_path / "run")
    assert len(rows) == 1
    assert loop.learner.calls == []
    assert "No new labels since cycle 1" in caplog.text
    assert comparable(tmp_path / "run") == before


def test_resuming_a_finished_run_suggests_more_cycles(task, loop_of, run_in, tmp_path, caplog):
    caplog.set_level("INFO")
    run_in(loop_of(task, cycles=1), tmp_path / "run")
    assert "cycles are done" not in caplog.text
    run_in(loop_of(task, cycles=1), tmp_path / "run")
    assert "al.cycles=2" in caplog.text


@pytest.mark.parametrize(("given", "said"), [({}, r"array.*labels\.csv.*al\.cold_start=mixed"), (None, "array")])
def test_no_labels_and_nothing_but_labels_are_reported(own, loop_of, run_in, tmp_path, given, said):
    everything = dict.fromkeys(own.pool, Label.NORMAL) | {own.pool[0]: Label.ANOMALY}
    with pytest.raises(LabelError, match=said):
        run_in(loop_of(own, given=everything if given is None else given), tmp_path / "run")


# --- interrupted runs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["fit", "rank", "save", "write_metrics", "write", "log_cycle"])
@pytest.mark.parametrize("cycle", [1, 2, 3])
def test_a_resumed_run_ends_with_the_numbers_of_an_uninterrupted_one(
    task, loop_of, run_in, tmp_path, killed_at, when, cycle, comparable
):
    from anomalymatch.active import loop as module
    from anomalymatch.active.run_folder import RunFolder

    run_in(loop_of(task, pool_size=30), tmp_path / "whole")
    loop = loop_of(task, pool_size=30)
    owner = {"write_metrics": RunFolder, "write": module.RunReport}.get(when, loop.learner)
    if when == "log_cycle":
        owner = type(run_in(loop_of(task, cycles=1), tmp_path / "other")[1])
    with killed_at(owner, when, cycle):
        run_in(loop, tmp_path / "run")
    again = loop_of(task, pool_size=30)
    rows, tracker = run_in(again, tmp_path / "run")
    assert len(rows) == 3
    assert comparable(tmp_path / "run") == comparable(tmp_path / "whole")
    assert tracker.cycles[-1][0] == 3  # also if only that was missing
    finished = cycle - (when in ("fit", "rank", "save"))
    assert [call["cycle"] for call in again.learner.calls] == list(range(finished + 1, 4))


def test_a_lost_cycle_is_computed_again(task, loop_of, run_in, tmp_path, comparable):
    run_in(loop_of(task, pool_size=30), tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "cycles" / "02")
    run_in(loop_of(task, pool_size=30), tmp_path / "run")
    assert comparable(tmp_path / "run") == comparable(tmp_path / "whole")


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("cycle", [1, 3])
@pytest.mark.parametrize(
    "name",
    ["scores.parquet", "weights.safetensors", "weights.json", "metrics.json", "labels.csv", "left.csv", "steps.csv",
     "checksums.json"],
)  # fmt: skip
def test_a_damaged_file_of_a_finished_cycle_is_noticed_and_computed_again(
    task, loop_of, run_in, tmp_path, comparable, caplog, name, cycle
):
    run_in(loop_of(task, pool_size=30), tmp_path / "run")
    before, path = comparable(tmp_path / "run"), tmp_path / "run" / "cycles" / f"{cycle:02d}" / name
    content = path.read_bytes()
    flip_a_bit(path)
    again = loop_of(task, pool_size=30)
    run_in(again, tmp_path / "run")
    assert str(path) in caplog.text or name == "checksums.json"
    assert [call["cycle"] for call in again.learner.calls] == ([] if name in ("left.csv", "steps.csv") else [cycle])
    if name == "steps.csv":  # training again would take long, and no number depends on them
        assert damaged_files(path.parent) == [name]
        path.write_bytes(content)
    assert damaged_files(path.parent) == []
    assert comparable(tmp_path / "run") == before


def test_damaged_scores_and_weights_are_not_read(task, loop_of, run_in, tmp_path):
    run_in(loop_of(task, cycles=1), tmp_path / "run")
    folder = tmp_path / "run" / "cycles" / "01"
    for path in folder.iterdir():
        if path.name != "checksums.json":
            flip_a_bit(path)
    for read in (
        lambda: RunReader(tmp_path / "run").ranking(1),
        lambda: load_tensors(folder / "weights.safetensors"),
        lambda: load_input(folder / "weights.safetensors"),
    ):
        with pytest.raises(StorageError, match="is damaged"):
            read()
    assert RunReader(tmp_path / "run").steps(1) == []
