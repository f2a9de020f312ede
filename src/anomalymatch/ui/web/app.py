"""Web server of the page: prints its address, serves until Ctrl-C."""

import asyncio
import gc
import socket
from collections.abc import Callable
from types import FrameType

import h11
import uvicorn
from fastapi import FastAPI
from nicegui import app as nicegui_app
from nicegui import ui
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from anomalymatch.listening import Site
from anomalymatch.text import printable
from anomalymatch.ui.service import LabelService
from anomalymatch.ui.sky import check_survey, origin_of
from anomalymatch.ui.web.page import build_page
from anomalymatch.ui.web.routes import LIMITS, routes
from anomalymatch.ui.web.security import ANY_NAME, Guard, HostNames, Passes, host_names

RECONNECT_S = 30.0  # a page that was disconnected for less time continues: a closed lid, a weak network
HEADERS_S = 20.0  # longest wait for the headers of a request
GRACE_S = 2  # time that a running response gets at the end


def serve(service: LabelService, site: Site, *, show: bool, frames: bool = False, survey: str | None = None) -> None:
    """Serve the page until Ctrl-C or SIGTERM; the caller closes the service and the socket.

    Args:
        service: what the page shows.
        site: its socket and address.
        show: open the page in a browser.
        frames: let notebooks on this machine show the page in a frame.
        survey: address of a HiPS cut-out service for survey pictures; None offers none.

    Raises:
        ConfigError: if `survey` is no address.
    """
    if survey is not None:
        check_survey(survey)
    app = build_app(
        service,
        names=ANY_NAME if site.path else host_names(site.host, site.address),
        token=site.token,
        frames=frames,
        cookie=f"anomalymatch_{site.port}",
        survey=survey,
        prefix=site.path,
    )

    def ready() -> None:
        print(f"{printable(service.name)}: {site.url}", flush=True)
        if show and not site.path:
            site.open_browser()

    # All present objects live until the end. NiceGUI inspects all collectable objects, and some of PyTorch's emit
    # warnings when inspected.
    gc.freeze()
    try:
        _Server(_settings(app), ready).run(sockets=[site.listening])
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
