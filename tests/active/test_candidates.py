"""Runs whose cycles rank only the neighbours of the labelled anomalies."""

import csv
import math

import numpy as np
import pytest

import anomalymatch as am
from anomalymatch.active.audit import left_unranked
from anomalymatch.active.candidates import NeighbourCandidates
from anomalymatch.active.oracles import PaperOracle
from anomalymatch.active.run_folder import CANDIDATES, RunReader
from anomalymatch.active.strategies import Top
from anomalymatch.checksums import damaged_files
from anomalymatch.data.task import make_task
from anomalymatch.types import Label

A, N = Label.ANOMALY, Label.NORMAL
RNG = np.random.default_rng(0)


@pytest.fixture
def choice_of(make_embedding):
    def make(task, count):
        return NeighbourCandidates(make_embedding(task.source, pool=task.pool), count)

    return make


@pytest.fixture
def near_loop(task, loop_of, choice_of):
    """A loop with five neighbours of each anomaly."""

    def make(count=5, **spec):
        loop = loop_of(task, **spec)
        loop.candidates = choice_of(task, count)
        return loop

    return make


def test_candidates_are_the_nearest_unlabelled_images_of_the_pool(task, choice_of):
    rare, common = ([i for i in task.pool if (i in task.anomalies) == kind] for kind in (True, False))
    labels = {rare[0]: A, rare[1]: A, rare[2]: N, common[0]: N, common[1]: Label.UNSURE}
    choice = choice_of(task, 7)
    found = choice.choose(labels, 1, RNG)
    features = choice.embedding.features
    free = [id_ for id_ in task.pool if id_ not in labels]
    products = features.take(free) @ features.take([rare[0], rare[1]]).T
    expected = {free[i] for column in products.T for i in np.argsort(-column)[:7]}
    assert set(found.ids) == expected
    assert found.ids == [id_ for id_ in task.source.ids if id_ in expected]
    assert found.random == 0


def test_unreadable_images_are_no_candidates_and_have_none(make_source, choice_of):
    bad = ["im000010", "im000013"]
    task = make_task(make_source(60, size=16, unreadable=bad), anomaly="rare", holdout=0.0)
    choice = choice_of(task, 100)
    assert choice.choose({"im000010": A, "im000001": N}, 5, RNG) is None
    found = choice.choose({"im000010": A, "im000020": A, "im000001": N}, 5, RNG)
    assert set(found.ids) == set(task.pool) - {"im000020", "im000001", *bad}


def test_random_images_fill_up_too_few_neighbours(task, choice_of):
    rare = [id_ for id_ in task.pool if id_ in task.anomalies]
    choice = choice_of(task, 3)
    near = choice.choose({rare[0]: A}, 3, RNG)
    first, again, other = (choice.choose({rare[0]: A}, 10, np.random.default_rng(seed)) for seed in (0, 0, 1))
    assert first == again != other
    assert (len(near.ids), near.random, len(first.ids), first.random) == (3, 0, 10, 7)
    assert set(near.ids) < set(first.ids) < set(task.pool) - {rare[0]}
    every = choice.choose({rare[0]: A}, 1000, RNG)
    assert set(every.ids) == set(task.pool) - {rare[0]}


def test_only_candidates_are_ranked_and_asked_and_the_last_cycle_ranks_all(task, near_loop, run_in, tmp_path, events):
    loop = near_loop(budget=3)
    rows, tracker = run_in(loop, tmp_path / "run")
    reader, log = RunReader(tmp_path / "run"), events(tmp_path / "run")
    for cycle in (1, 2):
        before = {e.id: e.label for e in log if e.cycle < cycle}
        chosen = set(loop.candidates.choose(before, 3, RNG).ids)
        assert set(reader.ranking(cycle).ids) == chosen | set(before) | set(task.holdout)
        asked = {e.id for e in log if e.cycle == cycle}
        assert len(asked) == 3
        assert asked == set(reader.ranking(cycle).restrict(chosen).top(3))
        assert reader.ranked_candidates(cycle)
        assert (rows[cycle - 1]["images"], rows[cycle - 1]["rejects"]) == (len(chosen), 0)
    assert set(reader.ranking(3).ids) == {*task.pool, *task.holdout}
    assert not reader.ranked_candidates(3)
    assert [math.isnan(row["ap"]) for row in rows] == [True, True, False]
    assert not any(math.isnan(row["heldout_ap"]) for row in rows)
    assert [points.recall.size > 0 for points in tracker.points] == [False, False, True]


def test_labels_that_fill_up_are_told_and_random(near_loop, run_in, tmp_path, caplog):
    caplog.set_level("INFO")
    run_in(near_loop(count=1, budget=8), tmp_path / "run")
    assert "drawn at random, because there are too few neighbours" in caplog.text
    assert (tmp_path / "run" / "cycles" / "01" / CANDIDATES).read_text().startswith("8 unlabelled images")


def test_the_paper_oracle_chooses_among_the_candidates(near_loop, run_in, tmp_path, task, events):
    loop = near_loop(count=20, pool_size=10, budget=4)
    loop.oracle = PaperOracle(task, Top())
    run_in(loop, tmp_path / "run")
    log = events(tmp_path / "run")
    for cycle in (1, 2):
        before = {e.id: e.label for e in log if e.cycle < cycle}
        asked = [e for e in log if e.cycle == cycle]
        assert {e.id for e in asked} <= set(loop.candidates.choose(before, 4, RNG).ids)
        assert [e.label for e in asked].count(N) == 2


@pytest.mark.parametrize("when", ["fit", "rank", "save"])
@pytest.mark.parametrize("cycle", [1, 2, 3])
def test_a_resumed_run_has_the_numbers_of_an_uninterrupted_one(
    near_loop, run_in, tmp_path, killed_at, comparable, when, cycle
):
    settings = {"count": 2, "budget": 7}  # so that images are drawn at random, too
    run_in(near_loop(**settings), tmp_path / "whole")
    loop = near_loop(**settings)
    with killed_at(loop.learner, when, cycle):
        run_in(loop, tmp_path / "run")
    run_in(near_loop(**settings), tmp_path / "run")
    assert comparable(tmp_path / "run") == comparable(tmp_path / "whole")


def test_more_cycles_ask_for_the_same_labels_as_a_longer_run(near_loop, run_in, tmp_path, events):
    """The last cycle of the shorter run ranked all images, but its query has the same candidates."""
    run_in(near_loop(cycles=4), tmp_path / "whole")
    run_in(near_loop(cycles=2), tmp_path / "run")
    run_in(near_loop(cycles=4), tmp_path / "run")
    whole, run = ([(e.id, e.label, e.cycle) for e in events(tmp_path / name)] for name in ("whole", "run"))
    assert run == whole
    assert [RunReader(tmp_path / "run").ranked_candidates(cycle) for cycle in (1, 2, 3, 4)] == [
        True,
        False,
        True,
        False,
    ]


@pytest.mark.parametrize("name", ["scores.parquet", "left.csv", CANDIDATES])
def test_a_damaged_file_of_a_partial_cycle_is_written_again(near_loop, run_in, tmp_path, comparable, name):
    run_in(near_loop(audit=30), tmp_path / "run")
    before, path = comparable(tmp_path / "run"), tmp_path / "run" / "cycles" / "02" / name
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    run_in(near_loop(audit=30), tmp_path / "run")
    assert damaged_files(path.parent) == []
    assert comparable(tmp_path / "run") == before
    assert name == "scores.parquet" or path.read_bytes() == content


def test_the_audit_estimates_all_that_are_left_and_no_tops(task, near_loop, loop_of, run_in, tmp_path):
    near, every = near_loop(audit=40, audit_tops=(5,)), loop_of(task, audit=40, audit_tops=(5,))
    rows = [run_in(loop, tmp_path / name)[0][0] for loop, name in ((near, "near"), (every, "all"))]
    keys = ("audited", "left", "left_low", "left_high")
    assert [rows[0][key] for key in keys] == [rows[1][key] for key in keys]
    with (tmp_path / "near" / "cycles" / "01" / "left.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert (row["what"], row["images"], row["lowest_score"]) == ("all", "72", "nan")
    assert left_unranked(task, {}, {})["images"] == len(task.pool)
    assert math.isnan(left_unranked(task, {}, {})["left"])


def test_without_both_classes_all_images_are_ranked(task, near_loop):
    loop = near_loop()
    rare = next(iter(task.anomalies & task.members[0]))
    assert loop._candidates(1, {}) is None
    assert loop._candidates(1, {rare: A}) is None
    assert loop._candidates(1, dict.fromkeys(task.pool[1:4], N)) is None


def test_where_a_person_labels_all_images_are_ranked(make_source, loop_of, run_in, tmp_path, caplog, choice_of):
    task = make_task(make_source(40, size=16, truth=None))
    given = {"im000000": A, "im000001": N}
    plain = loop_of(task, given=given)
    loop = type(plain)(
        task, plain.learner, None, given=given, baseline=None, spec=plain.spec, seed=0, candidates=choice_of(task, 3)
    )
    assert "al.candidates=neighbours is not used" in caplog.text
    run_in(loop, tmp_path / "run")
    assert set(RunReader(tmp_path / "run").ranking(1).ids) == set(task.pool)


class Killed(BaseException):
    """Like a kill, nothing catches it."""


NEAR = ["al.candidates=neighbours", "al.neighbours=5", "oracle=top_k"]


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["probe", "fixmatch"])
def test_report_and_page_survive_a_run_that_stopped_after_a_partial_cycle(
    algorithm, tiny_job, probe_job, tmp_path, monkeypatch
):
    from anomalymatch.active.report import RunReport

    words = [*(probe_job if algorithm == "probe" else tiny_job), *NEAR, "al.cycles=3"]
    real, written = RunReport.write, []

    def stop_after_two(report):
        written.append(real(report))
        if len(written) == 2:
            raise Killed
        return written[-1]

    with monkeypatch.context() as patch:
        patch.setattr(RunReport, "write", stop_after_two)
        with pytest.raises(Killed):
            am.run(*words, folder=tmp_path / "run")
    report = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "Only neighbours of labelled anomalies were ranked in cycle 1 (" in report
    rows = am.run(*words, folder=tmp_path / "whole")
    assert [math.isnan(row["ap"]) for row in rows] == [True, True, False]
    assert [math.isnan(row["heldout_ap"]) for row in rows] == [False] * 3
    if algorithm == "fixmatch":
        assert [math.isnan(row["probe_ap"]) for row in rows] == [True, True, False]
        assert [math.isnan(row["probe_heldout_ap"]) for row in rows] == [False] * 3
    assert "Only neighbours" in (tmp_path / "whole" / "report.html").read_text(encoding="utf-8")
    resumed = am.run(*words, folder=tmp_path / "run")
    drop = ("seconds",)
    for row, other in zip(resumed, rows, strict=True):
        assert {k: v for k, v in row.items() if k not in drop and v == v} == {
            k: v for k, v in other.items() if k not in drop and v == v
        }
