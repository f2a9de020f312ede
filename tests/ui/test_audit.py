"""Tests of the guided random audit: its progress, the exact interval, its words, and what it hides."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats
from visitor import on_page

from anomalymatch.types import Label
from anomalymatch.ui.audit import describe_audit, explain_goal, measure_audit, percent
from anomalymatch.ui.gallery import CODES
from anomalymatch.ui.veil import Veil
from anomalymatch.ui.views import UNFILTERED, Query, Show, Sort

A, N, U = CODES[Label.ANOMALY], CODES[Label.NORMAL], CODES[Label.UNSURE]


def codes(images, *labels):
    """Return labels of `images` images, those of the first ones given."""
    return np.array([*labels, *[0] * (images - len(labels))], dtype=np.int8)


def test_progress_counts_all_labels_but_the_sample_ends_at_the_first_open_image():
    marks = codes(50, A, N, U, 0, A, N)
    progress = measure_audit(marks, 5)
    assert (progress.goal, progress.labelled, progress.sample) == (5, 4, 3)
    assert (progress.anomalies, progress.unsure, progress.found, progress.images) == (1, 1, 2, 50)
    assert not progress.is_done
    marks[3] = N
    progress = measure_audit(marks, 5)
    assert progress.is_done
    assert progress.sample == 6, "labels beyond the goal tell more"
    assert measure_audit(marks, 1000).goal == 50


def test_the_interval_is_the_exact_binomial_one_for_a_large_archive():
    progress = measure_audit(codes(1_000_000, *[A] * 2, *[N] * 58), 200)
    expected = stats.binomtest(2, 60).proportion_ci(0.9, "exact")
    assert progress.total.low / 1e6 == pytest.approx(expected.low, rel=2e-3)
    assert progress.total.high / 1e6 == pytest.approx(expected.high, rel=2e-3)
    small = measure_audit(codes(80, *[A] * 2, *[N] * 58), 60)
    assert small.total.high / 80 < expected.high, "a sample of most of the archive knows more"
    assert (small.total.low, small.left.low) == (2, 0)
    whole = measure_audit(codes(60, *[A] * 2, *[N] * 58), 60)
    assert whole.total == (2, 2, 2)


@pytest.mark.parametrize("anomalies", [0, 1, 7, 40, 200])
def test_the_interval_at_the_goal_holds_the_truth_in_at_least_90_percent_of_all_audits(anomalies):
    chances = {k: stats.hypergeom.pmf(k, 500, anomalies, 60) for k in range(min(60, anomalies) + 1)}
    totals = {k: measure_audit(codes(500, *[A] * k, *[N] * (60 - k)), 60).total for k in chances}
    assert sum(chance for k, chance in chances.items() if totals[k].low <= anomalies <= totals[k].high) >= 0.9


def test_the_words():
    progress = measure_audit(codes(6664, *[A] * 2, *[N] * 57, U), 200)
    counts = np.arange(6665)
    above, below = stats.hypergeom.sf(1, 6664, counts, 60), stats.hypergeom.cdf(2, 6664, counts, 60)
    likely = counts[(above > 0.05) & (below > 0.05)]
    assert (progress.total.low, progress.total.high) == (likely[0], likely[-1]) == (41, 672)
    assert describe_audit(progress) == (
        "Of 60 random images, 2 are anomalies and 1 unsure: that is 0.62 to 10 % of the archive, "
        "or 41 to 672 images (90 % sure)."
    )
    assert "1 is an anomaly" in describe_audit(measure_audit(codes(9, A), 9))
    assert "random" in describe_audit(measure_audit(codes(9), 9))
    shares = {0.0: "0", 0.0004: "0.04", 0.004: "0.4", 0.1153: "12", 0.999: "100", 1.0: "100"}
    assert {share: percent(share) for share in shares} == shares


@pytest.mark.parametrize("goal", [30, 200, 1000])
def test_the_goal_is_explained_by_the_rule_of_three(goal):
    limit = stats.binomtest(0, goal).proportion_ci(0.9, "exact").high
    assert 3 / goal == pytest.approx(limit, rel=0.06)
    assert f" {percent(3 / goal)} %" in explain_goal(goal)


def shown(service, query):
    """Return the ids on all pages of a query."""
    pages = range(service.page(query).pages)
    return [tile.id for number in pages for tile in service.page(replace(query, page=number)).tiles]


def test_the_audit_shows_the_first_images_of_its_order_until_they_have_labels(service):
    query = Query(audit=30, size=12)
    ids = shown(service, query)
    assert ids == shown(service, Query(sort=Sort.AUDIT, size=12))[:30]
    service.label(ids[:2], Label.ANOMALY, "ada")
    service.label(ids[5:6], Label.NORMAL, "bob")
    assert shown(service, query) == [*ids[2:5], *ids[6:]]
    progress = service.audit_progress(30)
    assert (progress.labelled, progress.sample, progress.anomalies) == (3, 2, 2)
    service.undo("ada")
    assert service.audit_progress(30).sample == 0
    assert shown(service, query) == [*ids[:5], *ids[6:]]
    assert shown(service, Query(audit=30, show=Show.ALL, size=12)) == ids


def test_an_audit_leaves_out_unreadable_images(make_service):
    service = make_service(30, unreadable={"im000007"})
    readable = [id_ for id_ in service.source.ids if id_ != "im000007"]
    assert sorted(shown(service, Query(audit=1000, size=12))) == readable
    assert service.audit_progress(1000).goal == 29


def test_an_audit_hides_scores_also_in_the_history_and_on_the_map(service):
    (tile,) = service.page(Query(size=12)).tiles[:1]
    service.label([tile.id], Label.ANOMALY, "ada")
    details = Veil(scores=True).details(service.details(tile.id))
    assert (details.tile.score, details.tile.rank, details.tile.label) == (None, None, Label.ANOMALY)
    assert [(event.score, event.label) for event in details.history] == [(None, Label.ANOMALY)]
    assert service.details(tile.id).history[0].score is not None
    positions = np.arange(60)
    scores, labels = service._state.marks(positions, Veil(scores=True))
    assert np.isnan(scores).all()
    assert labels.tolist() == service._state.marks(positions)[1].tolist()


def test_an_order_or_a_filter_ends_an_audit_and_labels_do_not():
    query = Query(audit=200, page=3, shift=2)
    for parts in ({"low": 0.5}, {"sort": Sort.LOWEST}, {"text": "m31"}, {"like": "i1"}, {"area": ((0.0, 0.0),) * 3}):
        assert query.changed(**parts) == Query(**parts), parts
    assert query.changed(show=Show.ALL, low=0.0, sort=Sort.SCORE) == Query(audit=200, show=Show.ALL)
    assert Query().changed(**UNFILTERED | {"audit": 50}) == Query(audit=50)
    assert query.changed(share=(1, 2), page=1) == Query(audit=200, share=(1, 2), page=1)
    assert Query(show=Show.REVIEW).changed(like="i1") == Query(show=Show.ALL, like="i1")
    assert Query(show=Show.ANOMALY).changed(like="i1") == Query(show=Show.ANOMALY, like="i1")


@on_page
async def test_the_page_in_an_audit(page, service):
    page.act("audit-start")
    await page.until(lambda: page.page["address"] == "audit=60" and len(page.ids) == 48)
    assert {tile["score"] for tile in page.gallery.tiles} == {None}
    assert not page.get("sort").visible
    page.send("look", id=page.ids[0])
    await page.until(lambda: "score hidden" in page.get("view-state").text)
    page.send("heat")
    assert not page.get("heat").value
    page.label(page.ids[:48], "normal")
    await page.until(lambda: "48 of 60" in page.page["note"])
    page.act("like")  # shows neighbours with their scores
    await page.until(lambda: page.page["address"].startswith("like=") and page.page["note"] == "")
    assert {tile["score"] for tile in page.gallery.tiles} != {None}
    await page.until(lambda: page.get("audit-start").visible)


def test_the_advice_at_the_goal(service):
    rule = service._state.stopping  # 3 anomalies or a tenth of those found may be left
    few = measure_audit(codes(1000, *[N] * 600), 200)
    assert few.left.high == 3  # 0.4 ** 3 > 0.05 > 0.4 ** 4
    assert "may stop" in rule.audit_advice(few.left, found=0)
    none = measure_audit(codes(5, *[N] * 5), 5)
    assert "no anomaly" in rule.audit_advice(none.left, found=0)
    many = measure_audit(codes(1000, *[A] * 50, *[N] * 150), 200)
    assert "go on with the search" in rule.audit_advice(many.left, found=50)
    unclear = measure_audit(codes(1000, *[N] * 200), 200)
    assert "audit more" in rule.audit_advice(unclear.left, found=0)
