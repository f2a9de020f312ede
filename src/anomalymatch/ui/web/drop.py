"""A place to drop files on."""

import json
from collections.abc import Callable
from typing import Any

from nicegui import ui
from nicegui.events import GenericEventArguments

from anomalymatch.ui.web.looks import many


class DropZone(ui.element, component="drop.js"):
    """Sends files to a route of the server, which limits their size while they come in.

    Args:
        name: of its test ids, `NAME-drop` and `NAME-file`.
        url: of the route.
        text: what it says.
        accept: file types, as in HTML.
        multiple: whether several files are taken at once.
        everywhere: whether files may be dropped anywhere on the page.
        on_sent: called with whether it went well, and what to tell.
    """

    def __init__(
        self,
        *,
        name: str,
        url: str,
        text: str,
        accept: str,
        multiple: bool,
        everywhere: bool,
        on_sent: Callable[[bool, str], Any],
    ) -> None:
        super().__init__()
        self._props.update({"name": name, "url": url, "text": text, "accept": accept, "annotator": "me"})
        self._props.update({"multiple": multiple, "everywhere": everywhere})
        self.on("sent", lambda event: on_sent(*_outcome(event)))

    def set_annotator(self, name: str) -> None:
        """Say who sends the files."""
        self._props["annotator"] = name
        self.update()


def _outcome(event: GenericEventArguments) -> tuple[bool, str]:
    went_well, text = bool(event.args["ok"]), str(event.args["message"])
    try:
        answer = json.loads(text)
    except ValueError:
        return went_well, text
    if "labels" in answer:
        return True, f"{many(answer['labels'], 'label')} came in."
    added, refused = len(answer.get("added", ())), answer.get("refused", ())
    words = [f"{many(added, 'example')} came in."] if added else []
    words += [f"{item['name']}: {item['reason']}" for item in refused[:3]]
    words += [f"… and {len(refused) - 3} more were refused."] * (len(refused) > 3)
    return not refused, " ".join(words)
