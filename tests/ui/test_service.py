import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
from pictures import png

from anomalymatch.active.run_folder import SCORES
from anomalymatch.backbones.checkpoint import save_network
from anomalymatch.data.label_log import LabelLog, import_csv
from anomalymatch.data.restore import restore_log
from anomalymatch.errors import ConfigError, DataError, LabelError, StorageError
from anomalymatch.types import Label
from anomalymatch.ui.views import FirstOrder, Query, Show, Sort

A, N, U, X = Label
BAD = "im000007"
COUNT = 300
RARE = [f"im{i:06d}" for i in range(0, COUNT, 10)]


@pytest.fixture
def open_service(make_service):
    def open_it(**options):
        return make_service(COUNT, unreadable={BAD}, **options)

    return open_it


@pytest.fixture
def service(open_service):
    return open_service()


def ids(page):
    return [tile.id for tile in page.tiles]


def all_ids(service):
    return ids(service.page(Query(size=200))) + ids(service.page(Query(size=200, page=1)))


def novelty_by_position():
    values = np.arange(COUNT, dtype=np.float32)
    values[int(BAD[2:])] = np.nan
    return values


@pytest.mark.parametrize("low", [-0.1, 0.9])
def test_wrong_queries(low):
    for wrong in ({"size": 11}, {"size": 201}, {"page": -1}, {"low": low, "high": 0.5}):
        with pytest.raises(ConfigError):
            Query(**wrong)


def test_first_order_diverse(service):
    first = service.page(Query(size=200))
    assert str(FirstOrder.DIVERSE) in first.note
    assert sorted(all_ids(service)) == sorted(service.source.ids)
    assert first.pages == 2
    assert all(tile.score is None and tile.rank is None for tile in first.tiles)
    assert {service.source.truth[id_] for id_ in ids(first)[:2]} == {"rare", "common"}


def test_first_order_novel_until_the_first_ranking(open_service):
    service = open_service(novelty=novelty_by_position())
    page = service.page(Query(size=12))
    assert str(FirstOrder.NOVEL) in page.note
    expected = [id_ for id_ in reversed(service.source.ids) if id_ != BAD][:12]
    assert ids(page) == ids(service.page(Query(size=12, sort=Sort.NOVELTY))) == expected
    assert page.total == COUNT  # unreadable images come last
    service.label([RARE[0]], A, "ada")
    service.rerank()
    assert service.page(Query(size=12)).note == ""
    assert ids(service.page(Query(size=12))) != expected
    assert ids(service.page(Query(size=12, sort=Sort.NOVELTY))) == [i for i in expected if i != RARE[0]]


def test_first_order_mixed_and_random(open_service):
    both = open_service(novelty=novelty_by_position(), first=FirstOrder.MIXED)
    page = both.page(Query(size=12))
    assert str(FirstOrder.MIXED) in page.note
    assert ids(page)[::2] == ids(both.page(Query(size=12, sort=Sort.NOVELTY)))[:6]
    diverse = open_service(first=FirstOrder.DIVERSE)
    assert ids(page)[1::2] == ids(diverse.page(Query(size=12)))[:6]
    assert sorted(all_ids(both)) == sorted(both.source.ids)
    random = open_service(novelty=novelty_by_position(), first=FirstOrder.RANDOM)
    assert str(FirstOrder.RANDOM) in random.page(Query(size=12)).note
    assert ids(random.page(Query(size=12))) == ids(random.page(Query(size=12, sort=Sort.AUDIT)))


def test_page_of_a_group(service):
    service.label(RARE[:6], A, "ada")
    service.groups.make("anomalies", 2)
    page = service.page(Query(group=1, show=Show.ALL, size=12))
    assert ids(page) == RARE[1:6:2]
    assert page.total == 3
    assert service.page(Query(group=1, size=12)).total == 0  # all are labelled
    with pytest.raises(DataError, match="no group 3"):
        service.page(Query(group=2))


def test_page_ranked_for_a_kind(service):
    number = service.groups.add("bright")
    with pytest.raises(DataError, match="labelled anomaly"):
        service.page(Query(kind=number))
    with pytest.raises(DataError, match="no group 2"):
        service.label_kind(RARE[:2], number + 1, "ada")
    assert not service.labels
    assert service.label_kind(RARE[:2], number, "ada") == 2
    assert service.labels == dict.fromkeys(RARE[:2], A)
    dark = [f"im{i:06d}" for i in range(1, COUNT, 50)]
    service.label_kind(dark, service.groups.add("dark"), "ada")
    assert set(ids(service.page(Query(kind=0, size=24)))) <= set(RARE[2:])
    assert not set(ids(service.page(Query(kind=1, size=24)))) & set(RARE)
    shown = service.page(Query(kind=0, size=24, show=Show.ALL))
    assert set(ids(shown)) <= set(RARE)
    assert shown.total == COUNT - 1  # all but the unreadable one


def test_undo_and_redo_of_a_kind(service, open_service):
    number = service.groups.add("ring")
    service.label_kind(RARE[:1], number, "ada")
    service.label_kind(RARE[:2], service.groups.add("arc"), "ada", key="k")

    def state(service):
        return service.labels, service.groups.names()

    first = {RARE[0]: A}, {RARE[0]: "ring"}
    both = dict.fromkeys(RARE[:2], A), dict.fromkeys(RARE[:2], "arc")
    assert state(service) == both
    assert service.label_kind(RARE[:2], number + 1, "ada", key="k") == 2  # a repeated key
    assert service.undo("ada") == dict.fromkeys(RARE[:2], A)
    assert state(service) == first
    assert service.undo("ada") == {RARE[0]: A}
    assert state(service) == ({}, {})
    assert service.redo("ada") == {RARE[0]: A}
    assert state(service) == first
    assert service.redo("ada") == dict.fromkeys(RARE[:2], A)
    again = open_service()
    assert state(again) == both
    again.undo("ada")
    assert state(again) == first
    again._log.undo(annotator="ada")  # as if the process were killed before the move
    assert state(open_service()) == ({}, {})


def test_training_without_labels_gives_the_novelty(open_service, finish_training):
    service = open_service(novelty=novelty_by_position(), needs_labels=False)
    service.training._check()
    known = [id_ for id_ in service.source.ids if id_ != BAD]
    finish_training(service.run, 1, known, -np.arange(len(known)), cold=True)
    finish_training(service.run, 2, known, np.arange(len(known)) % 17)
    service._update_training()
    again = open_service(novelty=novelty_by_position())
    for one in (service, again):
        assert ids(one.page(Query(sort=Sort.NOVELTY, size=12))) == known[:12]
        one.rank_by("trained")
        assert ids(one.page(Query()))[0] == known[16]
        assert np.isnan(one.novelty[int(BAD[2:])])


def test_a_label_changes_the_ranking(service, wait_for):
    changes = []
    service.subscribe(changes.append)
    assert service.label([RARE[0]], A, "ada") == 1
    wait_for(lambda: any(change.kind == "ranking" for change in changes))
    assert changes[0] == ("labels", (RARE[0],), "ada")
    page = service.page(Query(size=29))
    assert set(ids(page)) == set(RARE[1:])
    assert page.note == ""
    assert page.total == COUNT - 1
    assert [tile.rank for tile in page.tiles][:2] != [None, None]
    assert page.tiles[0].score > 0.5


def test_labels_are_on_disk_with_their_scores(service):
    service.label([RARE[0], "im000001"], A, "ada")
    other = LabelLog(service.run / "labels.sqlite")
    assert other.current() == {RARE[0]: A, "im000001": A}
    other.close()
    assert service.events[0].score is None
    service.rerank()
    (tile,) = service.tiles([RARE[1]])
    service.label([RARE[1]], A, "ada")
    assert service.events[-1].score == pytest.approx(tile.score)


def test_labels_of_an_unknown_image_or_without_a_name(service):
    with pytest.raises(DataError, match="'nowhere'"):
        service.label([RARE[0], "nowhere"], A, "ada")
    for name in ("", "  ", "\n"):
        with pytest.raises(LabelError, match="name"):
            service.label([RARE[0]], A, name)
    assert service.labels == {}
    assert service.events == []


def test_filters_follow_labels_at_once(service):
    service.label([RARE[0]], A, "ada")
    service.label(["im000001"], X, "ada")
    assert ids(service.page(Query(show=Show.ANOMALY))) == [RARE[0]]
    assert ids(service.page(Query(show=Show.LABELLED, sort=Sort.NEWEST))) == ["im000001", RARE[0]]
    service.label([RARE[0]], N, "bob")
    assert ids(service.page(Query(show=Show.CONFLICTS))) == [RARE[0]]
    assert service.page(Query(show=Show.CONFLICTS)).tiles[0].conflict
    assert service.summary().conflicts == [RARE[0]]
    assert service.summary().agreements[0][:4] == ("ada", "bob", 1, 0.0)
    assert service.undo("bob") == {RARE[0]: N}
    assert service.page(Query(show=Show.CONFLICTS)).total == 0


def test_neighbours_and_details(service):
    found = service.neighbours(RARE[0], 12)
    assert len(found) == 12
    assert {tile.id for tile in found} <= set(RARE[1:])
    assert ids(service.page(Query(like=RARE[0], size=12)))[:12] == [tile.id for tile in found]
    assert service.neighbours(BAD, 5) == []
    service.label([RARE[0]], A, "ada")
    service.undo("ada")
    details = service.details(RARE[0])
    assert details.metadata["size"] == "16 x 16 pixels"
    assert details.coordinates is None
    assert [event.undoes for event in details.history] == [None, 1]
    unreadable = service.details(BAD)
    assert "truncated" in unreadable.metadata["unreadable"]


def test_summary(service):
    before = service.summary()
    assert (before.histogram, before.images, before.unreadable) == (None, COUNT, 1)
    assert "so far 0" in before.estimate.reason
    service.label(RARE[:1], A, "ada")
    service.rerank()
    service.label(RARE[1:8], A, "ada")
    service.label([f"im{i:06d}" for i in range(11, 17)], N, "bob")
    service.rerank()
    now = service.summary()
    assert now.counts == {A: 8, N: 6, U: 0, X: 0}
    assert list(now.found) == [*range(1, 9), *[8] * 6]
    assert now.annotators == {"ada": 8, "bob": 6}
    assert now.histogram.counts.sum() == COUNT - 1 - 14
    assert len(now.histogram.labelled[A]) == 8
    assert now.seconds < 5


def test_estimate_from_the_random_audit(service):
    audit = [tile.id for tile in service.page(Query(sort=Sort.AUDIT, show=Show.ALL, size=48)).tiles if tile.id != BAD]
    for label in (A, N):
        service.label([id_ for id_ in audit if (id_ in RARE) == (label is A)], label, "ada")
    found = service.summary().counts[A]
    estimate = service.summary().estimate
    assert estimate.reason == ""
    assert estimate.low <= 30 - found <= estimate.high
    other = service.page(Query(sort=Sort.AUDIT, show=Show.UNLABELLED, size=12)).tiles
    service.label([other[5].id], A, "ada")  # later in the audit, so not a part of the sample yet
    assert service.summary().estimate.left == pytest.approx(estimate.left - 1, abs=1)


def test_import_adds_new_labels_only(service):
    service.label([RARE[0]], A, "ada")
    text = f"filename,label\n{RARE[0]},anomaly\n{RARE[1]},anomaly\nim000001,normal\n"
    assert service.import_csv(text, "ada") == 2
    assert service.import_csv(text, "ada") == 0
    assert service.labels == {RARE[0]: A, RARE[1]: A, "im000001": N}
    with pytest.raises(LabelError):
        service.import_csv("filename,label\nnowhere,anomaly\n", "ada")


def test_given_labels_do_not_replace_those_of_a_person(service):
    service.add_given_labels({RARE[0]: A, RARE[1]: A})
    service.label([RARE[0]], N, "ada")
    service.add_given_labels({RARE[0]: A, RARE[1]: U})
    assert service.labels == {RARE[0]: N, RARE[1]: U}


def test_ranking_by_an_example(service, wait_for):
    changes = []
    service.subscribe(changes.append)
    example = service.add_example("mine.png", png(250), "ada")
    wait_for(lambda: any(change.kind == "ranking" for change in changes))
    assert set(ids(service.page(Query(size=30)))) == set(RARE)
    assert [found.id for found in service.examples.all()] == [example]
    service.remove_example(example)
    service.rerank()
    assert service.page(Query()).tiles[0].score is None


def test_everything_is_restored_on_opening_again(service, open_service):
    service.label([RARE[0]], A, "ada")
    service.label(["im000001"], N, "bob")
    service.add_example("mine.png", png(250), "ada")
    service.rerank()
    again = open_service()
    assert again.labels == {RARE[0]: A, "im000001": N}
    assert ids(again.page(Query(size=50))) == ids(service.page(Query(size=50)))
    assert [found.id for found in again.examples.all()] == [found.id for found in service.examples.all()]
    assert list(again.undo("bob")) == ["im000001"]


def test_labels_of_deleted_images_rest(make_service, make_source, caplog):
    service = make_service(40)
    service.label(RARE[:3], A, "ada")
    service.label(["im000039"], A, "bob")
    service.groups.make("anomalies", 2)
    before = service.labels
    service.close()
    again = make_service(39)
    assert "1 labelled images are not in array" in caplog.text
    assert "im000039" in caplog.text
    assert again.labels == before  # the label is there when the image is back
    assert again.summary().counts[A] == 3
    assert [len(group.ids) for group in again.groups.all()] == [2, 1]
    again.groups.make("anomalies", 3)
    again.rerank()
    assert again.page(Query(show=Show.LABELLED)).total == 3
    for kind in ("csv", "parquet", "zip", "labelstudio"):
        again.export(kind).path.unlink()
    assert list(again.undo("bob")) == ["im000039"]


def test_one_process_has_the_page_of_a_run(service, tmp_path):
    code = "import sys, pathlib, anomalymatch.active.run_folder as m; m.page_lock(pathlib.Path(sys.argv[1]))"

    def other():
        return subprocess.run([sys.executable, "-c", code, str(service.run)], capture_output=True, text=True)

    refused = other()
    assert "StorageError: another labelling page is open on" in refused.stderr
    assert refused.returncode == 1
    service.close()
    assert other().returncode == 0


def test_closing_writes_labels_csv(service, monkeypatch, caplog):
    service.label([RARE[0]], A, "ada")
    service.close()
    assert import_csv(service.run / "labels.csv", {RARE[0]}) == {RARE[0]: A}
    assert not (service.run / "labels.sqlite-wal").exists()


def test_a_lost_log_is_no_new_log(service, open_service):
    service.label([RARE[0]], A, "ada")
    service.close()
    (service.run / "labels.sqlite").unlink()
    with pytest.raises(StorageError, match=r"anomalymatch\.data\.restore"):
        open_service()
    assert restore_log(service.run) == 1
    assert open_service().labels == {RARE[0]: A}


def test_a_training_joins_the_ranking(service, open_service, finish_training):
    service.label([RARE[0]], A, "ada")
    service.rerank()
    known = [id_ for id_ in service.source.ids if id_ != BAD]
    finish_training(service.run, 1, ["deleted", *known], [99.0, *range(len(known))])
    service._update_training()
    assert service.summary().modes == ("live", "trained", "both")
    assert service.summary().mode == "both"
    service.rank_by("trained")
    assert ids(service.page(Query()))[0] == known[-1]
    service.label([known[-1]], N, "ada")
    assert service.events[-1].cycle == 1
    again = open_service()
    assert (again.summary().mode, again.summary().cycle) == ("both", 1)
    again.rank_by("trained")
    assert ids(again.page(Query()))[0] == known[-2]


def test_images_without_a_score_of_the_last_training_come_last(service, finish_training):
    """A cycle of `al.candidates=neighbours` that is not the last ranks few images."""
    service.label([RARE[0]], A, "ada")
    service.rerank()
    few = [id_ for id_ in service.source.ids if id_ != BAD][5:9]
    finish_training(service.run, 1, few, range(len(few)))
    service._update_training()
    for mode in ("both", "trained"):
        service.rank_by(mode)
        shown = service.page(Query(size=200))
        assert shown.total == COUNT - 1
        assert service.summary().histogram is not None
    assert ids(shown)[:4] == few[::-1]
    assert [tile.score is None for tile in shown.tiles] == [False] * 4 + [True] * 196
    assert set(service.ranking.ids) == set(few)


def test_corrupt_scores_of_a_training_are_skipped(service, finish_training, caplog):
    service.label([RARE[0]], A, "ada")
    with pytest.raises(LabelError, match="normal"):
        service.training.start()  # it needs both classes
    finish_training(service.run, 1, service.source.ids, range(COUNT))
    (service.run / "cycles/01" / SCORES).write_bytes(b"no parquet")
    service._update_training()
    assert "training 1" in caplog.text
    assert service.summary().modes == ("live",)


def test_many_annotators_in_threads(service):
    def work(number):
        for i in range(number, 80, 8):
            service.label([service.source.ids[i]], A if i % 10 == 0 else N, f"annotator {number}")
            service.page(Query(show=Show.UNLABELLED))
            service.summary()
        service.undo(f"annotator {number}")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))  # raises the errors of the threads
    assert service.page(Query(show=Show.LABELLED)).total == len(service.labels) == 72
    log = LabelLog(service.run / "labels.sqlite")
    assert log.current() == service.labels
    log.close()


def test_heat_maps_are_those_of_the_ranking_in_use(open_service, tiny_network):
    service = open_service(trained=True)
    id_ = service.source.ids[1]
    draw = partial(service.heat_map, id_, stretch="as trained", channel=None)
    with pytest.raises(LabelError, match="training 1"):  # its ranking is in use, and there are no weights
        draw()
    save_network(tiny_network, service.run / "cycles" / "01" / "weights.safetensors")
    trained = draw()
    assert trained != service.pictures.full(id_)
    service.label([RARE[0]], A, "ada")
    service.rerank()
    assert service.summary().mode == "both"
    live = draw()
    assert live != trained
    service.rank_by("trained")
    assert draw() == trained
    service.rank_by("live")
    assert draw() == live


def test_a_label_waits_for_no_page_and_no_page_for_the_disk(service, monkeypatch, wait_for):
    go, busy, find = threading.Event(), threading.Event(), service._state.gallery.page

    def slowly(act):
        def slow(*args, **options):
            busy.set()
            assert go.wait(20)
            return act(*args, **options)

        return slow

    with ThreadPoolExecutor(2) as pool:
        monkeypatch.setattr(service._state.gallery, "page", slowly(find))
        waiting = [pool.submit(service.page, Query())]  # sorts a large archive
        assert busy.wait(20)
        assert service.label(RARE[:1], A, "ada") == 1
        monkeypatch.setattr(service._state.gallery, "page", find)
        busy.clear()
        monkeypatch.setattr(service._log, "append", slowly(service._log.append))
        waiting.append(pool.submit(service.label, RARE[1:2], A, "bob"))  # the disk is slow
        assert busy.wait(20)
        assert RARE[0] not in ids(service.page(Query(size=200)))
        assert service.summary().counts[A] == 1
        go.set()
        assert [each.exception() for each in waiting] == [None, None]
    assert service.labels == {RARE[0]: A, RARE[1]: A}


def test_pages_share_a_summary_until_something_changes(service):
    first = service.summary()
    assert service.summary() is first
    service.label(RARE[:1], A, "ada")
    assert service.summary().counts[A] == 1
    service.rerank()
    assert service.summary().histogram is not None
