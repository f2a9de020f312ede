"""Web server of the page: prints its address, serves until Ctrl-C."""

import asyncio
import errno
import gc
import os
import secrets
import socket
import threading
import webbrowser
from collections.abc import Callable
from types import FrameType
from urllib.parse import urlencode

import h11
import uvicorn
from fastapi import FastAPI
from nicegui import app as nicegui_app
from nicegui import ui
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from anomalymatch.checks import check_range
from anomalymatch.errors import ConfigError
from anomalymatch.text import printable
from anomalymatch.ui.service import LabelService
from anomalymatch.ui.sky import check_survey, origin_of
from anomalymatch.ui.web.page import build_page
from anomalymatch.ui.web.routes import LIMITS, routes
from anomalymatch.ui.web.security import (
    ANY_NAME,
    Guard,
    HostNames,
    Passes,
    check_prefix,
    check_token,
    host_names,
    is_loopback,
)


def listen(host: str, port: int) -> socket.socket:
    """Open a socket on `host` and `port`.

    Raises:
        ConfigError: with the reason, if that is impossible.
    """
    check_range("ui.port", port, low=0, high=65_535)
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"ui.host is {host}, which is not an address of this machine: {error}") from None
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        if os.name == "posix":  # restart at once after a crash; on other systems this would share a port in use
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(128)  # two servers that start together must not both get the port
    except OSError as error:
        listening.close()
        raise ConfigError(_listen_error(error, host, port)) from None
    return listening


def address_of(host: str, address: str, port: int, token: str | None) -> str:
    """Return the URL of the page."""
    name = socket.gethostname() if address in ("0.0.0.0", "::") else host
    query = "" if token is None else "?" + urlencode({"token": token})
    return f"http://{f'[{name}]' if ':' in name else name}:{port}/{query}"


def _listen_error(error: OSError, host: str, port: int) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"ui.port is {port}, which is in use on {host}: choose another one, or 0 for any free port"
    if error.errno == errno.EACCES:
        return f"ui.port is {port}, which needs administrator rights: choose one from 1024"
    if error.errno == errno.EADDRNOTAVAIL:
        return f"ui.host is {host}, which is not an address of this machine: choose 127.0.0.1, or 0.0.0.0 for all"
    return f"cannot listen on port {port} of {host}: {error.strerror}"


RECONNECT_S = 30.0  # a page that was disconnected for less time continues: a closed lid, a weak network
HEADERS_S = 20.0  # longest wait for the headers of a request
GRACE_S = 2  # time that a running response gets at the end


def serve(
    service: LabelService,
    *,
    host: str,
    port: int,
    token: str | None,
    show: bool,
    frames: bool = False,
    survey: str | None = None,
    prefix: str | None = None,
) -> None:
    """Serve the page until Ctrl-C or SIGTERM; the caller closes the service.

    Args:
        service: what the page shows.
        host: name or address to listen on.
        port: port to listen on; 0 takes any free one.
        token: secret that visitors need; None generates one, unless only this machine can reach the page.
        show: open the page in a browser.
        frames: let notebooks on this machine show the page in a frame.
        survey: address of a HiPS cut-out service for survey pictures; None offers none.
        prefix: path of a reverse proxy that shows the page and removes the path, in which PORT stands for the port.
            Then the token is always needed, and the address is a path. None without a proxy.

    Raises:
        ConfigError: if the port is not available, the token is too short, `survey` is no address or `prefix` no path.
    """
    if token is not None:
        check_token(token)
    if survey is not None:
        check_survey(survey)
    with listen(host, port) as listening:
        address, port = listening.getsockname()[:2]
        path = "" if prefix is None else check_prefix(prefix, port)
        if token is None and (path or not is_loopback(address)):
            token = secrets.token_urlsafe(32)
        url = f"{path}/?{urlencode({'token': token})}" if path else address_of(host, address, port, token)
        app = build_app(
            service,
            names=ANY_NAME if path else host_names(host, address),
            token=token,
            frames=frames,
            cookie=f"anomalymatch_{port}",
            survey=survey,
            prefix=path,
        )

        def ready() -> None:
            print(f"{printable(service.name)}: {url}", flush=True)
            if show and not path:
                threading.Thread(target=webbrowser.open, args=(url,), daemon=True).start()

        # All present objects live until the end. NiceGUI inspects all collectable objects, and some of PyTorch's emit
        # warnings when inspected.
        gc.freeze()
        try:
            _Server(_settings(app), ready).run(sockets=[listening])
        finally:
            gc.unfreeze()


def build_app(
    service: LabelService,
    *,
    names: HostNames,
    token: str | None,
    frames: bool = False,
    cookie: str = "anomalymatch",
    survey: str | None = None,
    prefix: str = "",
) -> ASGIApp:
    """Build the guarded ASGI application. Call it once per process, since NiceGUI is global."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.router.routes.extend(routes(service))
    passes = Passes()
    build_page(service, survey=survey, passes=passes)
    nicegui_app.config.quasar_config["loadingBar"]["skipHijack"] = True  # a bar at each request tells nothing
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
    images = "" if survey is None else origin_of(survey)
    return Guard(
        app,
        names=names,
        token=token,
        cookie=cookie,
        limits=LIMITS,
        frames=frames,
        images=images,
        passes=passes,
        prefix=prefix,
    )


class _Connection(H11Protocol):
    """HTTP connection that is closed if the headers of a request do not arrive in time."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop()

    def _watch(self) -> None:
        """Start the timer while headers are incomplete, and stop it once they are there."""
        if self.conn.their_state is not h11.IDLE or (self.cycle and not self.cycle.response_complete):
            self._stop()
        elif self._timer is None:
            self._timer = self.loop.call_later(HEADERS_S, self.transport.close)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def _settings(app: ASGIApp) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=_Connection,
        log_config=None,  # its log goes to the common handlers
        log_level="warning",
        access_log=False,  # it would contain the token
        ws="wsproto",
        ws_max_size=2 << 20,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=GRACE_S,
    )


class _Server(uvicorn.Server):
    """Server that calls `ready` when it listens, and returns at Ctrl-C instead of passing the signal on."""

    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if not self.should_exit:
            self._ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:  # second signal
            self.force_exit = True
        self.should_exit = True
