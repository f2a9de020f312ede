"""Messages to TOPCAT, Aladin, DS9 and others by SAMP, the messaging protocol of the Virtual Observatory.

The sender is written with the standard library, since astropy gives up its own (`astropy.samp`).
"""

import http.client
import os
import threading
import xmlrpc.client
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit
from urllib.request import url2pathname
from xml.parsers.expat import ExpatError

from anomalymatch.errors import DataError
from anomalymatch.text import reason
from anomalymatch.ui.sky import Coordinates

PATIENCE_S = 10.0
"""Longest wait for an answer of the hub."""
LINGER_S = 20.0
"""Time for which a sender stays registered: a hub passes on messages of registered senders only, and may be late."""
NO_HUB = "no SAMP hub runs on the machine of the server: start TOPCAT, Aladin or DS9 there, and send again"


class Message(NamedTuple):
    """SAMP message.

    Attributes:
        kind: type of the message (MType), such as "table.load.votable".
        parameters: its parameters by name.
    """

    kind: str
    parameters: dict[str, str]


def table_message(address: str, name: str) -> Message:
    """Return the message that loads the VOTable at an address."""
    return Message("table.load.votable", {"url": address, "table-id": address, "name": name})


def image_messages(id_: str, address: str, coordinates: Coordinates | None) -> list[Message]:
    """Return the messages that load the FITS file of an image and move to its position.

    Args:
        id_: the image.
        address: address of its FITS file; empty if there is none.
        coordinates: its position, if known.

    Raises:
        DataError: if there is neither.
    """
    messages = []
    if address:
        messages.append(Message("image.load.fits", {"url": address, "image-id": id_, "name": id_}))
    if coordinates is not None:
        ra, dec = (f"{value:.6f}" for value in coordinates)
        messages.append(Message("coord.pointAt.sky", {"ra": ra, "dec": dec}))
    if not messages:
        raise DataError(f"{id_} has neither coordinates nor a FITS file to send")
    return messages


def broadcast(messages: Sequence[Message]) -> list[str]:
    """Send messages through the SAMP hub of this machine; return the names of the applications that receive one.

    Raises:
        DataError: if no hub runs, or no application takes such a message.
    """
    try:
        address, secret = _read_lock_file()
        with xmlrpc.client.ServerProxy(address, transport=_Transport()) as proxy:
            hub: Any = proxy
            key = hub.samp.hub.register(secret)["samp.private-key"]
            try:
                names = _notify(hub.samp.hub, key, messages)
            finally:
                leaving = threading.Timer(LINGER_S, _unregister, (address, key))
                leaving.daemon = True  # the end of the program does not wait for it
                leaving.start()
    except (OSError, http.client.HTTPException) as error:
        raise DataError(NO_HUB) from error
    except (xmlrpc.client.Error, ExpatError, LookupError, TypeError, ValueError) as error:
        raise DataError(f"the SAMP hub does not accept the message: {reason(error)}") from error
    if not names:
        kinds = " or ".join(message.kind for message in messages)
        raise DataError(f"no application at the SAMP hub takes {kinds}: start TOPCAT, Aladin or DS9, and send again")
    return names


def _notify(hub: Any, key: str, messages: Sequence[Message]) -> list[str]:
    hub.declareMetadata(key, {"samp.name": "anomalymatch"})
    takers: dict[str, None] = {}
    for kind, parameters in messages:
        takers |= dict.fromkeys(hub.notifyAll(key, {"samp.mtype": kind, "samp.params": parameters}))
    return [str(hub.getMetadata(key, id_).get("samp.name", id_)) for id_ in takers]


def _unregister(address: str, key: str) -> None:
    over = suppress(OSError, http.client.HTTPException, xmlrpc.client.Error, ExpatError)  # the hub may have ended
    with over, xmlrpc.client.ServerProxy(address, transport=_Transport()) as proxy:
        hub: Any = proxy
        hub.samp.hub.unregister(key)


def _read_lock_file() -> tuple[str, str]:
    """Return the address and the secret of the hub (SAMP 1.3, section 4.3)."""
    path, given = Path.home() / ".samp", os.environ.get("SAMP_HUB", "")
    if given:
        path = Path(url2pathname(urlsplit(given.removeprefix("std-lockurl:")).path))
    lines = [line.partition("=") for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    values = {key.strip(): value.strip() for key, _, value in lines}
    return values["samp.hub.xmlrpc.url"].replace("\\", ""), values["samp.secret"]  # Java writes "http\\:"


class _Transport(xmlrpc.client.Transport):
    """Transport that does not wait for ever."""

    def make_connection(self, host: Any) -> http.client.HTTPConnection:
        connection = super().make_connection(host)
        connection.timeout = PATIENCE_S
        return connection
