"""Estimate of the anomalies left in the side panel, and the guided random audit that it needs."""

import math

from nicegui import ui

from anomalymatch.ui.audit import GOAL, AuditProgress, explain_goal
from anomalymatch.ui.views import MAX_AUDIT, UNFILTERED, Estimate, Show, Sort, Summary
from anomalymatch.ui.web.session import Session


class AuditPanel:
    """Estimate with advice, and the random audit: start, goal, progress, and advice at the goal.

    The audit is on while the query has a size for it. What it has shown stands above the images, see `hints`.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        self._last: AuditProgress | None = None
        self._estimate = ui.label().classes("am-hint").props("data-testid=estimate")
        self._advice = ui.label().classes("am-hint").props("data-testid=advice")
        with ui.element("div").classes("am-audit").props("data-testid=audit"):
            with ui.row().classes("am-line") as self._off:
                start = ui.button("Random audit", on_click=self._begin)
                start.props("dense outline no-caps size=sm data-testid=audit-start")
                ui.label("of").classes("am-hint")
                self._goal = ui.number(value=GOAL, min=1, max=MAX_AUDIT, precision=0, on_change=self._explain)
                self._goal.props("dense borderless aria-label='images of the audit' data-testid=audit-goal")
                self._goal.classes("am-number-field")
                ui.label("images").classes("am-hint")
            self._why = ui.label(explain_goal(GOAL)).classes("am-hint").props("data-testid=audit-why")
            with ui.element("div").classes("am-stack") as self._on:
                with ui.row().classes("am-line"):
                    self._count = ui.label().classes("am-grow am-title").props("data-testid=audit-count")
                    self._more = ui.button(on_click=self._extend)
                    self._more.props("dense outline no-caps size=sm data-testid=audit-more")
                    stop = ui.button("Leave", on_click=lambda: session.change(audit=0))
                    stop.props("dense outline no-caps size=sm data-testid=audit-stop")
                self._bar = ui.linear_progress(value=0, show_value=False).props("aria-label='progress of the audit'")
                self._verdict = ui.label().classes("am-title").props("data-testid=audit-advice")
        self._show_query()
        session.on_query.append(self._show_query)
        session.on_summary.append(self._show)

    def _show_query(self) -> None:
        is_on = bool(self.session.query.audit)
        for element in (self._estimate, self._off, self._why):
            element.set_visibility(not is_on)
        self._advice.set_visibility(not is_on and bool(self._advice.text))
        self._on.set_visibility(is_on)

    def _explain(self) -> None:
        self._why.text = explain_goal(self._size)

    @property
    def _size(self) -> int:
        return max(1, int(self._goal.value or GOAL))

    async def _begin(self) -> None:
        goal = min(self._size, self.session.service.total)
        await self.session.change(**UNFILTERED | {"audit": goal, "sort": Sort.SCORE, "show": Show.UNLABELLED})

    async def _extend(self) -> None:
        await self.session.change(audit=min(self.session.query.audit + GOAL, self.session.service.total))

    def _show(self, summary: Summary) -> None:
        self._estimate.text = _estimate_text(summary.estimate)
        self._advice.text = summary.estimate.advice[:1].upper() + summary.estimate.advice[1:]
        self._show_query()
        progress, before, self._last = self.session.progress, self._last, self.session.progress
        if progress is None:
            return
        self._count.text = f"{progress.labelled:,} of {progress.goal:,}"
        self._bar.value = progress.labelled / max(1, progress.goal)
        self._verdict.text = f"{progress.advice[:1].upper()}{progress.advice[1:]}."
        self._verdict.set_visibility(progress.is_done)
        self._more.text = f"{GOAL} more"
        self._more.set_visibility(progress.is_done and progress.goal < progress.images)
        if progress.is_done and before is not None and not before.is_done:
            self.session.say(f"The audit is complete: {progress.advice}.")


def _estimate_text(estimate: Estimate) -> str:
    if math.isnan(estimate.left):
        return f"Anomalies left: {estimate.reason}"
    low, high = f"{estimate.low:,.0f}", f"{estimate.high:,.0f}"
    return f"About {estimate.left:,.0f} anomalies are left (90 %: {low} to {high})"
