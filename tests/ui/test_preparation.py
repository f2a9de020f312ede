"""Tests of the page while the features of its images are computed in the background."""

import threading
from contextlib import suppress

import numpy as np
import pytest

from anomalymatch.errors import ConfigError, DownloadError, LabelError
from anomalymatch.progress import CancelledError, ProgressMeter
from anomalymatch.types import Label
from anomalymatch.ui import FirstOrder, LiveRanking, build_feature_store
from anomalymatch.ui.views import Query, Show, Sort

A, N = Label.ANOMALY, Label.NORMAL
COUNT = 60
RARE = [f"im{i:06d}" for i in range(0, COUNT, 10)]


class Steps:
    """Preparation that the test drives: it computes the features image by image, each after a call of `go`."""

    def __init__(self, make_features, spec, folder):
        self.make_features, self.spec, self.folder = make_features, spec, folder
        self.ids = [f"im{i:06d}" for i in range(COUNT)]
        brightness = np.where(np.arange(COUNT) % 10 == 0, 1.0, 0.1)
        self.rows = np.stack([brightness, 1 - brightness], axis=1)
        self.allowed, self.error, self.stopped = threading.Semaphore(0), None, False

    def go(self, steps=COUNT):
        for _ in range(steps):
            self.allowed.release()

    def live(self, count):
        features = self.make_features(self.rows[:count], self.ids[:count], shard=20)
        options = {"compression": "exact", "dimensions": 2, "folder": self.folder, "is_part": count < COUNT}
        store = build_feature_store(features, self.ids, **options)
        return LiveRanking(store, self.spec, seed=0, first=FirstOrder.DIVERSE)

    def __call__(self, show, use):
        try:
            with show("Features", COUNT) as advance:
                for done in range(COUNT):
                    self.allowed.acquire()
                    if self.error:
                        raise self.error
                    advance()
                    if done + 1 == 20:
                        use(self.live(20))
        except CancelledError:
            self.stopped = True
            raise
        return self.live(COUNT)


@pytest.fixture
def steps(make_features, spec, tmp_path):
    steps = Steps(make_features, spec, tmp_path)
    yield steps
    steps.go()


@pytest.fixture
def service(make_service, steps):
    return make_service(COUNT, prepare=steps)


def shown(service, **query):
    return [tile.id for tile in service.page(Query(size=60, **query)).tiles]


def test_images_are_shown_and_labelled_before_there_are_features(service, steps):
    changes = []
    service.subscribe(lambda change: changes.append(change.kind))
    page = service.page(Query(size=60))
    assert [tile.id for tile in page.tiles] == steps.ids
    assert "order of the archive" in page.note
    assert all(tile.score is None for tile in page.tiles)
    service.label(RARE[:1], A, "ada")
    service.label(["im000001"], N, "ada")
    assert shown(service) == [id_ for id_ in steps.ids if id_ not in (RARE[0], "im000001")]
    assert service.labels == {RARE[0]: A, "im000001": N}
    assert service.undo("ada") == {"im000001": N}
    assert service.summary().counts[A] == 1
    assert service.summary().unreadable == 0
    assert "ranking" not in changes
    steps.go()
    service.preparation.wait()
    assert changes[-2:] == ["ranking", "features"]
    assert service.page(Query()).note == ""
    assert shown(service)[:5] == RARE[1:]  # the labels given meanwhile rank


def test_what_needs_features_says_so_and_works_afterwards(service, steps):
    service.label(RARE[:3], A, "ada")
    refused = [
        service.rerank,
        lambda: service.add_example("a.png", b"", "ada"),
        lambda: service.groups.make("anomalies", 2),
        lambda: service.heat_map(RARE[0], stretch="as trained", channel=None),
        service.training.start,
    ]
    for call in refused:
        with pytest.raises(LabelError, match="features of the images are still being computed"):
            call()
    assert service.neighbours(RARE[0], 5) == []
    assert "still being computed" in service.preparation.obstacle
    assert shown(service, sort=Sort.NOVELTY) == shown(service, sort=Sort.DIVERSE) == shown(service)
    steps.go()
    service.preparation.wait()
    service.rerank()
    service.groups.make("anomalies", 2)
    assert {tile.id for tile in service.neighbours(RARE[0], 5)} == set(RARE[1:])
    assert service.preparation.obstacle == ""
    assert service.heat_map(RARE[0], stretch="as trained", channel=None).startswith(b"\x89PNG")


def test_the_first_images_are_ranked_while_the_others_are_computed(service, steps, wait_for):
    service.label(RARE[:1], A, "ada")
    service.label(["im000001"], N, "ada")
    steps.go(20)
    wait_for(lambda: service.ranking is not None, 10)
    assert set(service.ranking.ids) == set(steps.ids[:20])
    assert shown(service)[0] == RARE[1]
    assert service.summary().unreadable == 0
    assert sorted(shown(service, show=Show.ALL)) == steps.ids  # the others come last
    steps.go()
    service.preparation.wait()
    assert set(service.ranking.ids) == set(steps.ids)


def test_the_audit_of_a_part_is_that_of_the_archive(service, steps, wait_for):
    steps.go(20)
    wait_for(lambda: service._state.live is not None, 10)
    order = shown(service, sort=Sort.AUDIT)
    service.label(order[:30], N, "ada")
    assert service.audit_progress(50).sample == 30


def test_progress_with_rate_and_time_left(service, steps, wait_for):
    steps.go(15)
    wait_for(lambda: service.preparation.status().progress.done == 15, 10)
    progress = service.preparation.status().progress
    assert (progress.description, progress.total) == ("Features", COUNT)
    assert progress.left == pytest.approx((COUNT - 15) / progress.rate)


def test_a_failure_is_said_once_and_r_tries_again(service, steps, caplog):
    steps.error = DownloadError("the hub does not answer")
    steps.go(1)
    service.preparation.wait()
    assert service.preparation.status().state == "failed"
    assert "the hub does not answer" in service.preparation.obstacle
    service.label(RARE[:2], A, "ada")
    with pytest.raises(LabelError, match="the hub does not answer"):
        service.groups.make("anomalies", 2)
    assert not caplog.records  # no traceback for what the page says
    steps.error = None
    steps.go()
    with suppress(LabelError):  # the features are computed again
        service.rerank()
    service.preparation.wait()
    assert shown(service)[:4] == RARE[2:]


def test_closing_stops_the_work_and_keeps_the_labels(service, steps, make_service):
    steps.go(5)
    service.label(RARE[:1], A, "ada")
    threading.Timer(0.1, steps.go).start()
    service.close()
    assert steps.stopped
    assert make_service(COUNT).labels == {RARE[0]: A}


def test_a_wrong_setting_refuses_the_command(make_service, steps):
    steps.error = ConfigError("model.name=nonsense")
    service = make_service(COUNT, prepare=steps)
    steps.go(1)
    service.preparation.wait()
    with pytest.raises(ConfigError, match="nonsense"):
        service.preparation.settle(10.0)


def test_meter_forgets_finished_work():
    meter = ProgressMeter()
    with meter.show("Features", 4) as advance:
        advance(3)
        assert meter.status()[:3] == ("Features", 3, 4)
    assert meter.status()[:3] == ("", 0, 0)


def test_cancelled_work_ends_at_its_next_step_or_at_its_next_start():
    meter = ProgressMeter()
    with meter.show("Features", 4) as advance:
        meter.cancel()
        with pytest.raises(CancelledError):
            advance()
    with pytest.raises(CancelledError), meter.show("Novelty", 4):
        pytest.fail("a cancelled meter begins no further work")
