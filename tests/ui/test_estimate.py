from datetime import UTC, datetime

from anomalymatch.data.label_log import LabelEvent
from anomalymatch.types import Label
from anomalymatch.ui.state import search_yield


def events(*labels):
    return [LabelEvent(n, f"i{n}", label, "ada", datetime.now(UTC), 0, None) for n, label in enumerate(labels)]


def test_the_yield_of_the_search_leaves_the_audit_out():
    standing = events(*[Label.ANOMALY] * 5, *[Label.NORMAL] * 30, *[Label.ANOMALY] * 3)
    assert search_yield(standing, {}) == (5 + 3, 38)
    audit = {f"i{n}": Label.NORMAL for n in range(30, 36)} | {"i0": Label.ANOMALY}
    assert search_yield(standing, audit) == (6, 31)


def test_the_yield_is_that_of_the_last_labels():
    assert search_yield(events(*[Label.ANOMALY] * 50, *[Label.NORMAL] * 39), {}) == (1, 40)
    assert search_yield([], {}) == (0, 0)
