"""The server: one line with its address, the page on it, and an end at Ctrl-C."""

import gc
import secrets
import socket
import threading
import webbrowser
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI
from nicegui import ui
from starlette.types import ASGIApp

from anomalymatch.ui.web.binding import address_of, listen
from anomalymatch.ui.web.page import build_page
from anomalymatch.ui.web.routes import LIMITS, routes
from anomalymatch.ui.web.security import Guard, Names, check_token, is_loopback, names_of

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
