"""Go-to field of the page."""

from nicegui import ui

from anomalymatch.ui.goto import find_target
from anomalymatch.ui.web.session import Session

HINT = "12: page 12 · #1234: rank 1234 in this order · an id, or its end"


class GoTo:
    """Dialog with one field that leads to a page, a rank or an image."""

    def __init__(self, session: Session) -> None:
        self.session = session
        # Without a transition, during which keys would be lost.
        self._dialog = ui.dialog().props("position=bottom transition-duration=0 aria-label='Go to'")
        with self._dialog, ui.card().classes("am-ask am-goto"):
            self._text = ui.input(placeholder="go to").classes("am-number-field am-whole")
            self._text.props("dense borderless autofocus aria-label='page, rank or id' data-testid=goto")
            self._text.on("keydown.enter", self._go)
            ui.label(HINT).classes("am-hint")

    def open(self) -> None:
        """Ask where to go."""
        self._text.value = ""
        self._dialog.open()

    async def _go(self) -> None:
        text, session = (self._text.value or "").strip(), self.session
        self._dialog.close()
        target = await session.call(find_target, session.service, session.query, text) if text else None
        if target is None:
            return
        if target.page is not None:
            await session.change(page=target.page)
            if session.viewed() and session.gallery.ids:
                session.view(session.gallery.ids[0])
        elif target.image is not None:
            await self._show(target.image)

    async def _show(self, id_: str) -> None:
        """Go to an image on its page, and in the large view if that is open or no page shows the image."""
        session = self.session
        place = await session.call(session.service.place, session.query, id_)
        if id_ in session.gallery.ids:
            session.gallery.point(id_)
        elif place is not None:
            await session.change(page=place // session.query.size, at=id_)
        else:
            session.say(f"{id_} is not among the images shown; here it is in the large view.", image=id_)
        if session.viewed() or id_ not in session.gallery.ids:
            session.view(id_)
