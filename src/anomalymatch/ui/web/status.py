"""Status line with the last labels and the offer of a new order; `status.js` is its browser side."""

from nicegui import ui

from anomalymatch.ui.web.session import Session


class StatusBar(ui.element, component="status.js"):
    """Bar with what happened last and with which image, the last labels, and the offer of a new order.

    Args:
        session: the session, whose `status`, `recent` and `has_new_order` it shows.
        version: version of the images, for the browser's cache.
    """

    def __init__(self, session: Session, version: str) -> None:
        super().__init__()
        self.session = session
        self._props["version"] = version
        self.on("take", lambda: session.rerank())
        self.on("pick", lambda event: session.go_to(str(event.args["id"])))
        session.on_status.append(self.refresh)
        self.refresh()

    def refresh(self) -> None:
        """Show the status of the session."""
        session, (text, is_error, image, label) = self.session, self.session.status
        self._props.update({"text": text, "isError": is_error, "image": image, "label": label})
        self._props["recent"] = [{"id": id_, "label": str(given)} for id_, given in session.recent.items()]
        self._props["offered"] = session.has_new_order
        self.update()
