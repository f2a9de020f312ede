"""Field in which a person describes what to look for, with the state of the order that it makes."""

from nicegui import background_tasks, ui

from anomalymatch.active.text_ranker import LONGEST
from anomalymatch.ui.description import DescriptionStatus
from anomalymatch.ui.views import Sort
from anomalymatch.ui.web.session import Session

HINT = "What you look for, in a few words, such as: a ring galaxy. It orders the images without any label."


class DescriptionPanel:
    """Field for a description, with progress and errors."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self._shown = ""
        self._waits = False
        with ui.row().classes("am-line"):
            self._text = ui.input(placeholder="describe what you look for").classes("am-grow")
            self._text.props(
                f"dense borderless clearable maxlength={LONGEST} aria-label='describe what you look for' "
                f"data-testid=description"
            )
            self._text.on("keydown.enter", lambda: self._set(self._text.value))
            self._text.on("clear", lambda: self._set(""))  # which comes before the change of the value
            self._rank = ui.button("Rank", on_click=lambda: self._set(self._text.value)).props(
                "dense unelevated no-caps size=sm data-testid=description-rank"
            )
        self._progress = ui.linear_progress(0, show_value=False, size="4px").props(
            "data-testid=description-progress aria-label='Progress of the description'"
        )
        self._state = ui.label().classes("am-hint am-wrap").props("data-testid=description-state aria-live=polite")
        session.watchers.append(lambda kinds, _: self.refresh() if "description" in kinds else None)
        self._timer = ui.timer(1.0, self.refresh, immediate=False)
        self.refresh()

    @property
    def is_available(self) -> bool:
        """True if there is a model that ranks by a description."""
        return self.session.service.description.status().state != "unavailable"

    def refresh(self) -> None:
        """Show the current state."""
        status = self.session.service.description.status()
        if status.text != self._shown:  # also of another page; what is being typed stays
            self._shown = self._text.value = status.text
        is_off = status.state == "unavailable"
        self._text.set_enabled(not is_off)
        self._rank.set_enabled(not is_off)
        self._timer.active = status.state in ("waiting", "working")
        self._progress.set_visibility(self._timer.active)
        self._progress.set_value(status.done / status.total if status.total else 0)
        self._state.text = _state(status)
        self._state.classes(**{"add" if status.state == "failed" else "remove": "am-error"})
        if self._waits and status.state in ("ready", "failed"):
            self._waits = False
            if status.state == "ready":
                background_tasks.create(self.session.change(sort=Sort.DESCRIPTION), name="order by description")

    async def _set(self, text: str | None) -> None:
        self._waits = bool((text or "").strip())
        self._shown = ""
        await self.session.call(self.session.service.description.set, text or "")
        self.refresh()


def _state(status: DescriptionStatus) -> str:
    if status.state == "waiting":
        return "The order follows when the features of the images are computed. You can label meanwhile."
    if status.state == "working":
        if not status.total:
            return "Loading the image-text model; the first time, it is downloaded. You can label meanwhile."
        return f"Reading image {status.done:,} of {status.total:,}. You can label meanwhile."
    if status.state == "ready":
        return f"The order “{Sort.DESCRIPTION}” is ready. {status.message}".strip()
    return {"unavailable": f"Not available: {status.message}.", "failed": f"{status.message}."}.get(status.state, HINT)
