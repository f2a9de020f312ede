import threading
import time

import numpy as np
import pytest

from anomalymatch.active.run_folder import SCORES, RunFolder, to_json
from anomalymatch.algorithms.base import COLD
from anomalymatch.algorithms.probe.regression import ProbeSpec
from anomalymatch.backbones.features import Features, Shard
from anomalymatch.data.label_log import LabelLog
from anomalymatch.errors import DataError, LabelError
from anomalymatch.ranking import Ranking
from anomalymatch.types import Label, Reject
from anomalymatch.ui.features import build_bank
from anomalymatch.ui.live import LiveRanking
from anomalymatch.ui.service import LabelService
from anomalymatch.ui.views import Beginning, Query, Show, Sort

A, N, U, X = Label
BAD = "im000007"
RARE = [f"im{i:06d}" for i in range(0, 300, 10)]


def encode(images):
    """Two numbers for each image: how bright its brightest part is, and one."""
    rows = np.array([[image.max() / 100.0, 1.0] for image in images], dtype=np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def features_of(source):
    images = dict(zip(source.ids, source.read(source.ids), strict=True))
    kept = [id_ for id_, image in images.items() if not isinstance(image, Reject)]
    rows = encode([images[id_] for id_ in kept]).astype(np.float16)
    return Features([Shard(kept, rows, [item for item in images.values() if isinstance(item, Reject)])])


@pytest.fixture
def open_service(tmp_path, make_source):
    opened = []

    def open_it(count=300, novelty=None, first=Beginning.NOVEL, **options):
        source = make_source(count, size=16, unreadable={BAD})
        bank = build_bank(features_of(source), source.ids, compression="exact", dimensions=2, folder=tmp_path)
        probe = ProbeSpec(inverse_regularisation=100.0, rounds=0, confidence=0.8, weight=0.25, limit=10)
        (tmp_path / "run").mkdir(exist_ok=True)
        service = LabelService(
            tmp_path / "run",
            source,
            LiveRanking(bank, probe, seed=0, novelty=novelty, first=first),
            encode=encode,
            training_steps=7,
            cache=tmp_path / "thumbnails",
            workers=1,
            seed=0,
            needs_labels=options.pop("needs_labels", True),
            divide=lambda ids, normals, count: [ids[0::2], ids[1::2]],
            **options,
        )
        opened.append(service)
        return service

    yield open_it
    for service in opened:
        service.close()


@pytest.fixture
def service(open_service):
    return open_service()


def heard(service):
    changes = []
    return changes, service.subscribe(changes.append)


def wait_for(condition, seconds=20):
    give_up = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < give_up, "it never happened"
        time.sleep(0.01)


def ids(page):
    return [tile.id for tile in page.tiles]


def test_without_labels_it_offers_a_diverse_batch_first_and_then_all_the_rest(service):
    first = service.page(Query(size=200))
    assert "Nothing to rank by yet" in first.note
    rest = service.page(Query(size=200, page=1))
    assert sorted(ids(first) + ids(rest)) == sorted(service.source.ids)
    assert first.pages == 2
    assert all(tile.score is None and tile.rank is None for tile in first.tiles)
    assert {service.source.truth[id_] for id_ in ids(first)[:2]} == {"rare", "common"}


def novelty_by_position(count=300):
    values = np.arange(count, dtype=np.float32)
    values[int(BAD[2:])] = np.nan
    return values


def test_without_labels_what_is_novel_comes_first_until_something_ranks(open_service):
    service = open_service(novelty=novelty_by_position())
    page = service.page(Query(size=12))
    assert "the least like all others" in page.note
    expected = [id_ for id_ in reversed(service.source.ids) if id_ != BAD][:12]
    assert ids(page) == expected
    assert page.total == 300  # what cannot be read comes last
    assert ids(service.page(Query(size=12, sort=Sort.NOVELTY))) == expected
    service.label([RARE[0]], A, "ada")
    service.rerank()
    assert service.page(Query(size=12)).note == ""
    assert ids(service.page(Query(size=12))) != expected
    assert ids(service.page(Query(size=12, sort=Sort.NOVELTY))) == [i for i in expected if i != RARE[0]]


def test_without_labels_the_novel_and_the_diverse_may_take_turns(open_service):
    both = open_service(novelty=novelty_by_position(), first=Beginning.MIXED)
    page = both.page(Query(size=12))
    assert "by turns" in page.note
    assert ids(page)[::2] == ids(both.page(Query(size=12, sort=Sort.NOVELTY)))[:6]
    diverse = open_service(first=Beginning.DIVERSE)
    assert ids(page)[1::2] == ids(diverse.page(Query(size=12)))[:6]
    everything = ids(both.page(Query(size=200))) + ids(both.page(Query(size=200, page=1)))
    assert sorted(everything) == sorted(both.source.ids)


def test_without_labels_it_may_begin_at_random(open_service):
    service = open_service(novelty=novelty_by_position(), first=Beginning.RANDOM)
    page = service.page(Query(size=12))
    assert "random" in page.note
    assert ids(page) == ids(service.page(Query(size=12, sort=Sort.AUDIT)))


def test_a_group_is_shown_the_most_typical_image_first(service):
    service.label(RARE[:6], A, "ada")
    service.groups.make("anomalies", None)
    page = service.page(Query(group=1, show=Show.ALL, size=12))
    assert ids(page) == RARE[1:6:2]
    assert page.total == 3
    assert service.page(Query(group=1, size=12)).total == 0  # all of them are labelled
    with pytest.raises(DataError, match="there is no group 3"):
        service.page(Query(group=2))


def test_a_training_without_labels_says_what_is_novel(open_service):
    service = open_service(novelty=novelty_by_position(), needs_labels=False)
    service.training._check()
    known = [id_ for id_ in service.source.ids if id_ != BAD]
    finish_training(service.run, 1, known, -np.arange(len(known)), cold=True)
    finish_training(service.run, 2, known, np.arange(len(known)) % 17)
    service._training_changed()
    again = open_service(novelty=novelty_by_position())
    for one in (service, again):
        assert ids(one.page(Query(sort=Sort.NOVELTY, size=12))) == known[:12]
        one.rank_by("trained")
        assert ids(one.page(Query()))[0] == known[16]
        assert np.isnan(one.novelty[int(BAD[2:])])


def test_a_label_moves_the_ranking(service):
    changes, _ = heard(service)
    service.label([RARE[0]], A, "ada")
    wait_for(lambda: any(change.kind == "ranking" for change in changes))
    assert changes[0] == ("labels", (RARE[0],), "ada")
    page = service.page(Query(size=29))
    assert ids(page)
    assert set(ids(page)) == set(RARE[1:])
    assert page.note == ""
    assert page.total == 299
    assert [tile.rank for tile in page.tiles][:2] != [None, None]
    assert page.tiles[0].score > 0.5


def test_labels_are_on_disk_when_label_returns(service):
    service.label([RARE[0], "im000001"], A, "ada")
    other = LabelLog(service.run / "labels.sqlite")
    assert other.current() == {RARE[0]: A, "im000001": A}
    other.close()


def test_scores_at_the_time_are_kept_with_the_label(service):
    service.label([RARE[0]], A, "ada")
    assert service.events[0].score is None
    service.rerank()
    (tile,) = service.tiles([RARE[1]])
    service.label([RARE[1]], A, "ada")
    assert service.events[1].score == pytest.approx(tile.score)


def test_an_unknown_image_leaves_all_unlabelled(service):
    with pytest.raises(DataError, match="no image 'nowhere'"):
        service.label([RARE[0], "nowhere"], A, "ada")
    assert service.labels == {}
    assert service.events == []


@pytest.mark.parametrize("name", ["", "  ", "\n"])
def test_labels_need_a_name(service, name):
    with pytest.raises(LabelError, match="need the name"):
        service.label([RARE[0]], A, name)


def test_undo_brings_the_images_back(service):
    service.label([RARE[0]], A, "ada")
    service.label(["im000001", "im000002"], N, "ada")
    service.label(["im000003"], N, "bob")
    assert service.undo("ada") == ["im000001", "im000002"]
    assert service.labels == {RARE[0]: A, "im000003": N}
    assert "im000001" in ids(service.page(Query(size=200))) + ids(service.page(Query(size=200, page=1)))
    assert service.undo("ada") == [RARE[0]]
    assert service.undo("ada") == []


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


def test_neighbours_are_alike(service):
    found = service.neighbours(RARE[0], 12)
    assert len(found) == 12
    assert {tile.id for tile in found} <= set(RARE[1:])
    assert ids(service.page(Query(like=RARE[0], size=12)))[:12] == [tile.id for tile in found]
    assert service.neighbours(BAD, 5) == []


def test_details(service):
    service.label([RARE[0]], A, "ada")
    service.undo("ada")
    details = service.details(RARE[0])
    assert details.size == (16, 16)
    assert details.coordinates is None
    assert [event.undoes for event in details.history] == [None, 1]
    unreadable = service.details(BAD)
    assert unreadable.size is None
    assert "truncated" in unreadable.metadata["unreadable"]


def test_summary(service):
    before = service.summary()
    assert before.histogram is None
    assert before.images == 300
    assert before.unreadable == 1
    assert "so far 0" in before.estimate.reason
    service.label(RARE[:1], A, "ada")
    service.rerank()
    service.label(RARE[1:8], A, "ada")
    service.label([f"im{i:06d}" for i in range(11, 17)], N, "bob")
    service.rerank()
    now = service.summary()
    assert now.counts == {A: 8, N: 6, U: 0, X: 0}
    assert list(now.spent) == list(range(1, 15))
    assert list(now.found) == [*range(1, 9), *[8] * 6]
    assert now.annotators == {"ada": 8, "bob": 6}
    assert now.histogram.counts.sum() == 300 - 1 - 14
    assert len(now.histogram.labelled[A]) == 8
    assert now.seconds < 5


def test_the_audit_gives_an_estimate_of_what_is_left(service):
    for page in range(4):
        for tile in service.page(Query(sort=Sort.AUDIT, show=Show.ALL, size=12, page=page)).tiles:
            if tile.id != BAD:
                service.label([tile.id], A if tile.id in RARE else N, "ada")
    found = service.summary().counts[A]
    estimate = service.summary().estimate
    assert estimate.reason == ""
    assert estimate.low <= 30 - found <= estimate.high
    other = service.page(Query(sort=Sort.AUDIT, show=Show.UNLABELLED, size=12)).tiles
    service.label([other[5].id], A, "ada")  # further down in the audit, which is no sample yet
    assert service.summary().estimate.left == pytest.approx(estimate.left - 1, abs=1)


def test_import_says_only_what_is_new(service):
    service.label([RARE[0]], A, "ada")
    text = f"filename,label\n{RARE[0]},anomaly\n{RARE[1]},anomaly\nim000001,normal\n"
    assert service.import_csv(text, "ada") == 2
    assert service.import_csv(text, "ada") == 0
    assert service.labels == {RARE[0]: A, RARE[1]: A, "im000001": N}
    with pytest.raises(LabelError):
        service.import_csv("filename,label\nnowhere,anomaly\n", "ada")


def test_labels_that_came_with_the_images_do_not_overrule_a_person(service):
    service.take_given({RARE[0]: A, RARE[1]: A})
    service.label([RARE[0]], N, "ada")
    service.take_given({RARE[0]: A, RARE[1]: U})
    assert service.labels == {RARE[0]: N, RARE[1]: U}


def png(value):
    import io

    from PIL import Image

    data = io.BytesIO()
    Image.new("RGB", (20, 20), (value, value, value)).save(data, "PNG")
    return data.getvalue()


def test_a_dropped_example_is_enough_to_rank_by(service):
    changes, _ = heard(service)
    example = service.add_example("mine.png", png(250), "ada")
    wait_for(lambda: any(change.kind == "ranking" for change in changes))
    assert set(ids(service.page(Query(size=30)))) == set(RARE)
    assert service.example_ids() == [example]
    service.remove_example(example)
    service.rerank()
    assert service.page(Query()).tiles[0].score is None


def test_it_finds_everything_when_opened_again(service, open_service):
    service.label([RARE[0]], A, "ada")
    service.label(["im000001"], N, "bob")
    service.add_example("mine.png", png(250), "ada")
    service.rerank()
    before = ids(service.page(Query(size=50)))
    again = open_service()
    assert again.labels == {RARE[0]: A, "im000001": N}
    assert ids(again.page(Query(size=50))) == before
    assert again.example_ids() == service.example_ids()
    assert again.undo("bob") == ["im000001"]


def finish_training(run, cycle, ids, logits, cold=False):
    """What a training leaves, as far as the page reads it."""
    folder = RunFolder(run)
    with folder.write_cycle(cycle) as path:
        Ranking(ids, np.asarray(logits, dtype=np.float64)).write(path / SCORES)
        (path / "metrics.json").write_text(to_json({"cycle": cycle}))
        if cold:
            (path / COLD).touch()
    folder.close()


def test_a_training_joins_the_ranking(service, open_service):
    service.label([RARE[0]], A, "ada")
    service.rerank()
    known = [id_ for id_ in service.source.ids if id_ != BAD]
    finish_training(service.run, 1, ["deleted", *known], [99.0, *range(len(known))])
    service._training_changed()
    assert service.modes() == ("live", "trained", "both")
    assert service.summary().mode == "both"
    service.rank_by("trained")
    assert ids(service.page(Query()))[0] == known[-1]
    service.label([known[-1]], N, "ada")
    assert service.events[-1].cycle == 1
    again = open_service()
    assert again.summary().mode == "both"
    assert again.summary().cycle == 1
    again.rank_by("trained")
    assert ids(again.page(Query()))[0] == known[-2]


def test_corrupt_scores_of_a_training_are_told_and_passed_over(service, caplog):
    finish_training(service.run, 1, list(service.source.ids), range(300))
    (service.run / "cycles/01" / SCORES).write_bytes(b"no parquet")
    service._training_changed()
    assert "cannot be shown" in caplog.text
    assert service.modes() == ("live",)


def test_training_needs_both_kinds(service):
    service.label([RARE[0]], A, "ada")
    with pytest.raises(LabelError, match="none is labelled normal"):
        service.training.start()


def test_listeners_come_and_go(service):
    changes, leave = heard(service)
    leave()
    leave()
    service.label([RARE[0]], A, "ada")
    assert changes == []


def test_many_label_at_once(service):
    """Eight annotators in eight threads, with pages and re-rankings between: nothing is lost, nothing mixed up."""
    errors = []

    def work(number):
        try:
            for i in range(number, 240, 8):
                service.label([service.source.ids[i]], A if i % 10 == 0 else N, f"annotator {number}")
                service.page(Query(show=Show.UNLABELLED))
                service.summary()
            service.undo(f"annotator {number}")
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len(service.labels) == 232
    assert service.page(Query(show=Show.LABELLED)).total == 232
    log = LabelLog(service.run / "labels.sqlite")
    assert log.current() == service.labels
    log.close()
