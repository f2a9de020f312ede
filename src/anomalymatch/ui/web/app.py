"""The server: one line with its address, the page on it, and an end at Ctrl-C."""

import errno
import gc
import os
import secrets
import socket
import threading
import webbrowser
from collections.abc import Callable
from types import FrameType
from typing import Any
from urllib.parse import urlencode

import uvicorn
from fastapi import FastAPI
from nicegui import ui
from starlette.types import ASGIApp

from anomalymatch.errors import ConfigError
from anomalymatch.ui.web.page import build_page
from anomalymatch.ui.web.routes import LIMITS, routes
from anomalymatch.ui.web.security import Guard, Names, check_token, is_loopback, names_of


def listen(host: str, port: int) -> socket.socket:
    """A socket that is bound to `host` and `port`.

    Raises:
        ConfigError: if that is impossible, with the reason.
    """
    if not 0 <= port <= 65_535:
        raise ConfigError(f"{port} is no port: ports go from 1 to 65,535, and 0 takes any that is free")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"{host} is no address of this machine: {error}") from None
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        if os.name == "posix":  # start again at once after a crash; elsewhere it would share a port that is in use
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(128)  # two servers that start at once must not both believe to have the port
    except OSError as error:
        listening.close()
        raise ConfigError(_refused(error, host, port)) from None
    return listening


def address_of(host: str, address: str, port: int, token: str | None) -> str:
    """What to type into a browser."""
    name = socket.gethostname() if address in ("0.0.0.0", "::") else host
    query = "" if token is None else "?" + urlencode({"token": token})
    return f"http://{f'[{name}]' if ':' in name else name}:{port}/{query}"


def _refused(error: OSError, host: str, port: int) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {port} of {host} is taken: choose another one, or port 0 for any that is free"
    if error.errno == errno.EACCES:
        return f"port {port} is not for everyone: choose one from 1024 on"
    if error.errno == errno.EADDRNOTAVAIL:
        return f"{host} is no address of this machine: choose 127.0.0.1, or 0.0.0.0 for all that it has"
    return f"nothing can listen on port {port} of {host}: {error.strerror}"


RECONNECT_S = 30.0  # a page that was out of reach for less goes on where it was: a closed lid, a weak network
GRACE_S = 2  # what an answer under way gets at the end


def serve(service: Any, *, host: str, port: int, token: str | None, show: bool) -> None:
    """Serve the page until Ctrl-C (or SIGTERM), then return; closing the service is left to the caller.

    Args:
        service: a `LabelService`.
        host: name or address to listen on.
        port: to listen on; 0 for any that is free.
        token: secret to ask for; None makes one up, unless only this machine can reach the page.
        show: open it in a browser.

    Raises:
        ConfigError: if nothing can listen there, or the token is too short.
    """
    if token is not None:
        check_token(token)
    with listen(host, port) as listening:
        address, port = listening.getsockname()[:2]
        if token is None and not is_loopback(address):
            token = secrets.token_urlsafe(32)
        url = address_of(host, address, port, token)
        app = build_app(service, names=names_of(host, address), token=token, cookie=f"anomalymatch_{port}")

        def ready() -> None:
            print(f"{service.name}: {url}", flush=True)
            if show:
                threading.Thread(target=webbrowser.open, args=(url,), daemon=True).start()

        # What exists now stays until the end. Besides, NiceGUI looks through all objects that can be collected, and
        # some of PyTorch's warn when they are looked at.
        gc.freeze()
        try:
            _Server(_settings(app), ready).run(sockets=[listening])
        finally:
            gc.unfreeze()


def build_app(service: Any, *, names: Names, token: str | None, cookie: str = "anomalymatch") -> ASGIApp:
    """Everything that is served, with the guard around it. NiceGUI is one per process, so call it once in each."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.router.routes.extend(routes(service))
    build_page(service)
    ui.run_with(
        app,
        title=f"{service.name} · anomalymatch",
        favicon="🔭",
        dark=None,
        language="en-US",
        reconnect_timeout=RECONNECT_S,
        message_history_length=100,
        show_welcome_message=False,
    )
    return Guard(app, names=names, token=token, cookie=cookie, limits=LIMITS)


def _settings(app: ASGIApp) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        log_config=None,  # what it logs goes where everything else does
        log_level="warning",
        access_log=False,  # it would show the token
        ws="wsproto",
        ws_max_size=2 << 20,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=GRACE_S,
    )


class _Server(uvicorn.Server):
    """A server that says when it is ready, and returns at Ctrl-C instead of passing the signal on."""

    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if not self.should_exit:
            self._ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:  # asked for the second time
            self.force_exit = True
        self.should_exit = True
