"""Buttons that send the table of what was found, or one image, to other applications by SAMP."""

from collections.abc import Sequence
from urllib.parse import urlencode

from anomalymatch.text import printable
from anomalymatch.ui.originals import has_fits
from anomalymatch.ui.samp import Message, broadcast, image_messages, table_message
from anomalymatch.ui.web.security import Passes
from anomalymatch.ui.web.session import Session

TARGETS = "TOPCAT, Aladin, DS9 … on the machine of the server (SAMP)"


class Sending:
    """Sends what a page shows to other applications.

    Args:
        session: the session.
        passes: signs the addresses that the applications download.
    """

    def __init__(self, session: Session, passes: Passes) -> None:
        self.session, self._passes = session, passes

    async def send_table(self) -> None:
        """Send the labelled and top-ranked images as a VOTable."""
        message = table_message(self._address("/export/votable"), self.session.service.name)
        await self._send(f"the table of {self.session.service.name}", [message])

    async def send_image(self, id_: str) -> None:
        """Send the FITS file of an image, if there is one, and its position."""
        service = self.session.service
        is_fits = await self.session.call(has_fits, service.source, id_)
        coordinates = await self.session.call(service.pictures.coordinates, id_)
        address = self._address("/original", {"id": id_}) if is_fits else ""
        messages = await self.session.call(image_messages, id_, address, coordinates)
        if messages:
            await self._send(id_, messages)

    async def _send(self, what: str, messages: Sequence[Message]) -> None:
        names = await self.session.call(broadcast, messages)
        if names:
            listed = ", ".join(printable(name) for name in dict.fromkeys(names))
            self.session.say(f"Sent {what} to {listed}.")

    def _address(self, path: str, words: dict[str, str] | None = None) -> str:
        """Return a signed address by which applications on the machine of the server reach it."""
        host, port = self.session.client.request.scope["server"]
        signed = self._passes.sign(path, urlencode(words or {}))
        return f"http://{f'[{host}]' if ':' in host else host}:{port}{signed}"
