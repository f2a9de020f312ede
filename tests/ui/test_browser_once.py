"""Tests of the page in a real browser while features are computed, and of a training that outlives its server."""

import signal
import time

import pytest
from browser import Command, running

pytestmark = [pytest.mark.ui, pytest.mark.slow, pytest.mark.timeout(600)]

SLOW = [  # a real network on many images: its features take longer than the test
    *("dataset=demo", "dataset.source.count=40000", "dataset.source.size=64", "algorithm=probe", "logger=none"),
    "inference.workers=1",
]


def test_images_are_labelled_while_features_are_computed(tmp_path, opened):
    words = [*SLOW, f"data.cache_dir={tmp_path / 'cache'}"]
    with running(tmp_path, *words) as command:
        page = opened(command, ready=False)
        assert "features" in page.get("note").inner_text()
        assert page.get("preparation").is_visible()
        ids = page.ids
        assert ids == sorted(ids)
        for key, label in (("a", "anomaly"), ("n", "normal")):
            page.label(key, label)
        page.until(lambda: " of 40,000" in page.get("preparation").inner_text(), "progress", 120)
        # On a fast machine, the first part of the features is there already.
        page.press("r")
        why_not = page.page.get_by_text("still being computed: try again")
        page.until(lambda: why_not.count() or page.ids != sorted(page.ids), "r says why not, or orders")
        page.press("Space")
        near = page.get("neighbours")
        page.until(lambda: "features" in near.inner_text() or page.get("neighbour").count(), "neighbours, or why not")
        page.press("Escape")
        page.until(lambda: page.counts()["anomaly"] == 1, "the label is counted")
        begin = time.monotonic()
        assert command.end(signal.SIGINT) == 0
        assert time.monotonic() - begin < 30
    again = Command(tmp_path, *words).start()
    try:
        assert opened(again, ready=False).counts()["anomaly"] == 1
    finally:
        again.end()
