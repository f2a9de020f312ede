"""Histogram of the scores in the side panel, which is also a brush for the score filter."""

from nicegui import ui
from nicegui.events import GenericEventArguments

from anomalymatch.ui.views import UNFILTERED
from anomalymatch.ui.web import charts
from anomalymatch.ui.web.session import Session

DECIMALS = 2
"""Decimals of a brushed range, as many as the slider has."""


def brushed(start: float, end: float) -> tuple[float, float] | None:
    """Return the score range of a drag from `start` to `end`; None if it is too short to be one."""
    low, high = (round(min(max(score, 0.0), 1.0), DECIMALS) for score in sorted((start, end)))
    return (low, high) if low < high else None


class ScoreHistogram:
    """Histogram of the scores. Dragging over it sets the score filter, and a double click clears it.

    Attributes:
        plot: the element.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        self._range = (session.query.low, session.query.high)
        self.plot = ui.plotly(charts.histogram(None)).classes("am-chart").props("data-testid=histogram")
        self.plot.on("plotly_selected", self._brush, ["range"])
        self.plot.on("plotly_deselect", self._clear, [])
        session.on_summary.append(lambda _: self._draw())
        session.on_query.append(self._follow)

    def _draw(self) -> None:
        summary = self.session.summary
        self.plot.update_figure(charts.histogram(None if summary is None else summary.histogram, self._range))

    def _follow(self) -> None:
        """Show the score filter, unless it is shown already."""
        now = (self.session.query.low, self.session.query.high)
        if now != self._range:
            self._range = now
            self._draw()

    async def _brush(self, event: GenericEventArguments) -> None:
        limits = (event.args.get("range") or {}).get("x") if isinstance(event.args, dict) else None
        scores = limits and brushed(*map(float, limits))
        if scores and scores != self._range:
            await self.session.change(low=scores[0], high=scores[1])
        else:
            self._draw()  # without the frame that the drag has left

    async def _clear(self) -> None:
        await self.session.change(low=UNFILTERED["low"], high=UNFILTERED["high"])
