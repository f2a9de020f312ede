"""Line in the header with the progress of the features, from which the ranking is made."""

import math

from nicegui import ui

from anomalymatch.progress import rate_text
from anomalymatch.ui.preparation import PreparationStatus
from anomalymatch.ui.web.session import Session

REFRESH_S = 1.0


class PreparationLine:
    """Line with progress, rate and time left; it disappears when the ranking of all images is there."""

    def __init__(self, session: Session) -> None:
        self._preparation = session.service.preparation
        self._line = ui.label().classes("am-hint am-preparation").props("data-testid=preparation")
        self._timer = ui.timer(REFRESH_S, self.refresh, immediate=False)
        session.watchers.append(lambda kinds, _: self.refresh() if "features" in kinds else None)
        self.refresh()

    def refresh(self) -> None:
        """Show the current status."""
        status = self._preparation.status()
        self._line.text = status_text(status)
        self._line.props["title"] = status.message
        self._line.classes(**{"add" if status.state == "failed" else "remove": "am-error"})
        self._line.set_visibility(status.state != "ready")
        self._timer.active = status.state == "working"


def status_text(status: PreparationStatus) -> str:
    """Describe the status in a few words."""
    progress = status.progress
    if status.state == "failed":
        return "No features, no ranking: r tries again"
    if status.state == "ready" or not progress.total:
        return "" if status.state == "ready" else "Loading the model …"
    words = [f"{progress.description}: {progress.done:,} of {progress.total:,}"]
    if not math.isnan(progress.rate):
        words += [f"{progress.rate:,.0f}/s" if progress.rate >= 10 else f"{rate_text(progress.rate)}/s"]
        words += [f"{time_text(progress.left)} left"]
    return " · ".join(words)


def time_text(seconds: float) -> str:
    """Return a time in seconds, minutes or hours."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
