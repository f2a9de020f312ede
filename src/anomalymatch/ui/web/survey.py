"""Picture of a sky survey beside the image of the large view, requested only while it is switched on."""

from typing import Any
from urllib.parse import urlsplit

from nicegui import ui

from anomalymatch.types import Orientation
from anomalymatch.ui.sky import SURVEYS, Coordinates, field_of_view, is_mirrored, survey_picture
from anomalymatch.ui.web.session import Session
from anomalymatch.ui.web.theme import drop_down

KEPT = "survey"
"""Key of the chosen survey in the browser's storage."""


class SurveyPicture:
    """Picture of a survey at the position of an image, with the image's scale and directions if they are known.

    Args:
        session: the session, whose browser remembers the survey.
        service: address of a HiPS cut-out service; None offers no pictures.
    """

    def __init__(self, session: Session, service: str | None) -> None:
        self.session, self.service = session, service
        self._target: tuple[Coordinates, Orientation | None, tuple[int, int] | None] | None = None
        self._address = ""

    def add_switch(self) -> None:
        """Create the switch, off; without a service it is hidden."""
        self.switch = ui.switch("survey", on_change=self._draw).props("dense data-testid=survey")
        self.switch.tooltip(f"Picture of a sky survey (v). The position is sent to {self._host}.")
        self.switch.set_visibility(self.service is not None)

    def add_pane(self) -> None:
        """Create the place of the picture, which is hidden while there is none."""
        with ui.element("div").classes("am-survey").props("data-testid=survey-pane") as self._pane:
            with ui.element("div").classes("am-survey-frame"):
                self._picture = ui.element("img").props("data-testid=survey-picture draggable=false")
                self._picture.on("load", lambda: self._tell(""))
                broken = "(event) => emit(event.target.getAttribute('src'))"
                self._picture.on("error", lambda event: self._fail(event.args), js_handler=broken)
            with ui.element("div").classes("am-survey-bar"):
                self._choice = drop_down(list(SURVEYS), next(iter(SURVEYS)), "survey", "survey-name", self._chosen)
            self._message = ui.label().classes("am-survey-message").props("role=status data-testid=survey-message")
            self._caption = ui.label().classes("am-survey-caption").props("data-testid=survey-caption")
        self._draw()

    def toggle(self) -> None:
        """Switch the picture on or off."""
        if self.service is not None:
            self.switch.value = not self.switch.value

    def show(
        self, coordinates: Coordinates | None, orientation: Orientation | None, size: tuple[int, int] | None
    ) -> None:
        """Take over the position of an image, its scale and directions, and its size in pixels; None hides."""
        self._target = None if coordinates is None else (coordinates, orientation, size)
        self._draw()

    def restore(self, kept: dict[str, Any]) -> None:
        """Restore the survey of the last visit; the picture stays off."""
        if kept.get(KEPT) in SURVEYS:
            self._choice.value = kept[KEPT]

    @property
    def _host(self) -> str:
        return urlsplit(self.service or "").netloc

    def _chosen(self) -> None:
        self.session.gallery.remember(KEPT, str(self._choice.value))
        self._draw()

    def _draw(self) -> None:
        is_shown = self.service is not None and self.switch.value and self._target is not None
        self._pane.set_visibility(is_shown)
        if not is_shown or self.service is None or self._target is None:
            self._use("")
            return
        coordinates, orientation, size = self._target
        field = field_of_view(orientation, size, sides=1.0)
        turn = ""
        if orientation is not None:
            turn = f"rotate({orientation.north:.2f}deg) scaleX({-1 if is_mirrored(orientation) else 1})"
        self._picture.style(replace=f"transform: {turn or 'none'}")
        directions = "turned like the image" if turn else "north is up, east is left"
        self._caption.text = f"{self._choice.value}, {arc_length(field)} wide, {directions}. From {self._host}."
        self._picture.props["alt"] = f"{self._choice.value} at this position"
        self._use(survey_picture(self.service, str(self._choice.value), coordinates, field))

    def _use(self, address: str) -> None:
        if address != self._address:
            self._address = address
            if address:
                self._picture.props["src"] = address
            else:
                self._picture.props.pop("src", None)
            self._picture.update()
            self._tell("Loading …" if address else "")

    def _fail(self, address: str) -> None:
        if address == self._address:
            self._tell(f"The survey picture cannot be loaded: {self._host} does not answer, or has no such picture.")

    def _tell(self, text: str) -> None:
        self._message.text = text
        self._message.set_visibility(bool(text))


def arc_length(degrees: float) -> str:
    """Write an angle in degrees, minutes or seconds of arc: "1.5°", "12″"."""
    for unit, per_degree in (("°", 1), ("\N{PRIME}", 60)):
        if degrees * per_degree >= 1:
            return f"{degrees * per_degree:.3g}{unit}"
    return f"{degrees * 3600:.3g}″"
