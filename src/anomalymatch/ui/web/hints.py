"""Sentences above the images: how they were chosen, and what is missing for a ranking."""

from anomalymatch.types import Label
from anomalymatch.ui.audit import AuditProgress, describe_audit
from anomalymatch.ui.service import LabelService
from anomalymatch.ui.views import Page, Query, Show, Sort, Summary

FIRST_HINT = "There are no labels yet. Press a on rare images and n on a few normal ones, and the ranking follows"
ANOMALY_HINT = "Nothing is ranked yet, because an anomaly is missing: label one anomaly (a)"
DROP_HINT = ", or drop images of what you look for anywhere on this page."
NORMAL_HINT = "No image is labelled normal yet: label one normal image (n), which a training needs."
RANKED_HINT = "The images are ranked now: press r to see the highest scores first."
AREA_NOTE = "The gallery shows an area of the map. Shift with a, n, u or x labels all images that are found there."
SECOND_NOTE = "One other person has labelled these images. Their label shows once you have given yours."
EMPTY = {
    Show.UNLABELLED: "Every image has a label.",
    Show.ALL: "The archive is empty.",
    Show.LABELLED: "No image has a label yet: show the unlabelled ones and press a, n, u or x.",
    Show.CONFLICTS: "There are no conflicts: all annotators agree.",
    Show.REVIEW: "There is nothing to review: no image is in conflict or unsure.",
    Show.SECOND: "No image waits for your second opinion.",
    Show.STARRED: "No image has a star yet: s gives one.",
    Show.NOTED: "No image has a note yet: write one in the large view.",
}


def empty_text(query: Query, progress: AuditProgress | None = None) -> str:
    """Say why a query finds no image."""
    if query.is_narrowed:
        return "No image matches these filters."
    if query.show is Show.UNLABELLED and query.audit and progress is not None and progress.is_done:
        return f"The audit is complete: {progress.advice}."
    if query.show is Show.UNLABELLED and query.share != (1, 1):
        return "Every image of this part has a label."
    return EMPTY.get(query.show, f"No image is labelled {query.show} yet.")


def note(
    service: LabelService,
    query: Query,
    page: Page | None,
    summary: Summary | None,
    progress: AuditProgress | None = None,
) -> str:
    """Say how the images of a page were chosen, and what is missing for a ranking."""
    if query.audit and progress is not None:
        return f"Random audit, {progress.labelled:,} of {progress.goal:,}. {describe_audit(progress)}"
    if query.show is Show.SECOND:
        return SECOND_NOTE
    obstacle = service.preparation.obstacle
    is_unranked = bool(page and page.note)
    needs = is_unranked or query.like is not None or query.sort in (Sort.NOVELTY, Sort.DIVERSE)
    missing = f"{obstacle[:1].upper()}{obstacle[1:]}." if obstacle and needs and query.group is None else ""
    return f"{missing} {_order_note(service, query, page, summary)}".strip()


def _order_note(service: LabelService, query: Query, page: Page | None, summary: Summary | None) -> str:
    if query.group is not None:
        return _group_note(service, query.group)
    if query.area:
        return _area_note(service)
    if page is None or not page.total or query.like or summary is None:
        return ""
    if query.sort is not Sort.SCORE or query.show is not Show.UNLABELLED:
        return page.note
    is_ranked, hint = summary.histogram is not None, ""
    if not any(summary.counts.values()):
        hint = FIRST_HINT + DROP_HINT
    elif not is_ranked:
        hint = ANOMALY_HINT + DROP_HINT
    elif page.note:
        hint = RANKED_HINT
    elif summary.counts.get(Label.ANOMALY) and not summary.counts.get(Label.NORMAL):
        hint = NORMAL_HINT
    return hint if is_ranked else f"{page.note} {hint}".strip()


def _group_note(service: LabelService, number: int) -> str:
    groups = service.groups.all()
    if number >= len(groups):
        return ""
    text = f"{groups[number].name}, group {number + 1} of {len(groups)}: the most typical images come first."
    return f"{text} Shift with a, n, u or x labels the whole group; g shows the next one."


def _area_note(service: LabelService) -> str:
    if service.map.points is None:
        service.map.request()
        return service.map.message
    return AREA_NOTE
