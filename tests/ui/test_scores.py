import numpy as np
import pytest
from scipy.stats import rankdata, zscore

from anomalymatch.errors import ConfigError
from anomalymatch.ui.state import Scores, mean_logits


def test_what_is_there_ranks():
    scores, live, trained = Scores(), np.array([1, 2], np.float32), np.array([2, 1], np.float32)
    assert scores.logits() is None
    assert scores.modes == ("live",)
    scores.trained = trained
    assert scores.logits() is trained
    assert (scores.mode, scores.modes) == ("trained", ("trained",))
    scores.live = live
    assert (scores.mode, scores.modes) == ("both", ("live", "trained", "both"))
    np.testing.assert_array_equal(scores.logits(), mean_logits(live, trained))
    scores.choose("trained")
    assert scores.logits() is trained
    scores.choose("live")
    assert scores.logits() is live
    scores.trained = None
    assert scores.logits() is live


def test_a_mode_that_is_not_there():
    with pytest.raises(ConfigError, match="cannot rank by 'trained' now: choose one of live"):
        Scores().choose("trained")


def test_the_mean_is_that_of_standard_scores_on_the_scale_of_the_live_one():
    rng = np.random.default_rng(0)
    live, trained = rng.normal(-3, 2, 500).astype(np.float32), rng.normal(10, 50, 500).astype(np.float32)
    both = mean_logits(live, trained)
    expected = zscore(live) + zscore(trained)
    np.testing.assert_array_equal(rankdata(both), rankdata(expected.astype(np.float32)))
    assert both.mean() == pytest.approx(live.mean(), abs=1e-3)
    np.testing.assert_allclose(mean_logits(live, live * 7 - 3), live, atol=1e-4)


def test_the_mean_of_unreadable_and_constant_scores():
    live = np.array([1, np.nan, 3], np.float32)
    np.testing.assert_array_equal(np.isnan(mean_logits(live, np.ones(3, np.float32))), [False, True, False])
    nothing = np.full(3, np.nan, np.float32)
    assert mean_logits(live, nothing) is live
