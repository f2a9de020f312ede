from datetime import UTC, datetime

import numpy as np
import pytest
from scipy.stats import rankdata, zscore

from anomalymatch.data.label_log import LabelEvent
from anomalymatch.errors import ConfigError
from anomalymatch.types import Label
from anomalymatch.ui.state import ScoreIndex, mean_logits, recent_yield


def test_available_rankings_and_the_chosen_one():
    scores, live, trained = ScoreIndex(), np.array([1, 2], np.float32), np.array([2, 1], np.float32)
    assert scores.logits() is None
    assert scores.modes == ("live",)
    with pytest.raises(ConfigError, match="'trained'"):
        scores.choose("trained")
    scores.trained = trained
    assert scores.logits() is trained
    assert (scores.mode, scores.modes) == ("trained", ("trained",))
    scores.live = live
    assert (scores.mode, scores.modes) == ("both", ("live", "trained", "both"))
    np.testing.assert_array_equal(scores.logits(), mean_logits(live, trained))
    for mode, expected in (("trained", trained), ("live", live)):
        scores.choose(mode)
        assert scores.logits() is expected
    scores.trained = None
    assert scores.logits() is live


def test_mean_logits_equals_the_mean_of_z_scores_on_the_live_scale():
    rng = np.random.default_rng(0)
    live, trained = rng.normal(-3, 2, 500).astype(np.float32), rng.normal(10, 50, 500).astype(np.float32)
    both = mean_logits(live, trained)
    expected = zscore(live) + zscore(trained)
    np.testing.assert_array_equal(rankdata(both), rankdata(expected.astype(np.float32)))
    assert both.mean() == pytest.approx(live.mean(), abs=1e-3)
    np.testing.assert_allclose(mean_logits(live, live * 7 - 3), live, atol=1e-4)


def test_mean_logits_of_unreadable_and_constant_scores():
    live = np.array([1, np.nan, 3], np.float32)
    np.testing.assert_array_equal(np.isnan(mean_logits(live, np.ones(3, np.float32))), [False, True, False])
    assert mean_logits(live, np.full(3, np.nan, np.float32)) is live


def test_images_that_the_training_did_not_rank_keep_their_live_logits():
    live = np.array([1, 2, 3, 4, np.nan], np.float32)
    trained = np.array([np.nan, 30, 10, np.nan, np.nan], np.float32)
    both = mean_logits(live, trained)
    np.testing.assert_array_equal(both[[0, 3]], live[[0, 3]])
    np.testing.assert_array_equal(both[1:3], mean_logits(live[1:3], trained[1:3]))
    assert np.isnan(both[4])


def events(*labels):
    return [LabelEvent(n, f"i{n}", label, "ada", datetime.now(UTC), 0, None) for n, label in enumerate(labels)]


def test_recent_yield_counts_the_last_labels_without_the_audit():
    labelled = events(*[Label.ANOMALY] * 5, *[Label.NORMAL] * 30, *[Label.ANOMALY] * 3)
    assert recent_yield(labelled, {}, 40) == (5 + 3, 38)
    audit = {f"i{n}": Label.NORMAL for n in range(30, 36)} | {"i0": Label.ANOMALY}
    assert recent_yield(labelled, audit, 40) == (6, 31)
    assert recent_yield(events(*[Label.ANOMALY] * 50, *[Label.NORMAL] * 39), {}, 40) == (1, 40)
    assert recent_yield([], {}, 40) == (0, 0)
