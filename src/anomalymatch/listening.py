"""Socket and address of the labelling page, and its answer to browsers while the images are being opened."""

import errno
import logging
import os
import re
import secrets
import socket
import threading
import time
import webbrowser
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from types import TracebackType
from urllib.parse import urlencode

from anomalymatch.checks import check_range
from anomalymatch.errors import ConfigError

logger = logging.getLogger(__name__)
MIN_TOKEN = 16
OPENING_S = 2.0
"""Time to find a mistake in the command before a browser is opened."""
SLOW_CLIENT_S = 5.0
_PREFIX = re.compile(r"(/[\w.~%@+-]+)+", re.ASCII)
_OPENING = """<!doctype html><html lang="en"><meta charset="utf-8"><meta http-equiv="refresh" content="1">
<meta name="viewport" content="width=device-width"><meta name="color-scheme" content="light dark">
<title>anomalymatch</title>
<style>body {{ font: 1.2rem system-ui, sans-serif; display: grid; place-content: center; min-height: 90vh }}</style>
<p role="status">Opening the images … {seconds} s</p></html>
"""


@dataclass(frozen=True)
class Site:
    """Socket and address of the page.

    Attributes:
        listening: the socket.
        host: name that was asked for.
        address: address of the socket.
        port: its port.
        token: secret that visitors need; None if only this machine can reach the page.
        path: path of a reverse proxy; empty without one.
    """

    listening: socket.socket
    host: str
    address: str
    port: int
    token: str | None
    path: str

    @property
    def url(self) -> str:
        """URL of the page; with a reverse proxy, the path alone."""
        query = "" if self.token is None else "?" + urlencode({"token": self.token})
        if self.path:
            return f"{self.path}/{query}"
        name = socket.gethostname() if self.address in ("0.0.0.0", "::") else self.host
        return f"http://{f'[{name}]' if ':' in name else name}:{self.port}/{query}"

    def open_browser(self) -> None:
        """Open the page in a browser, and go on: some browsers return only when they are closed."""
        threading.Thread(target=webbrowser.open, args=(self.url,), daemon=True).start()


def open_site(host: str, port: int, *, token: str | None, prefix: str | None = None) -> Site:
    """Listen for browsers. The caller closes the socket.

    Args:
        host: name or address to listen on.
        port: port to listen on; 0 takes any free one.
        token: secret that visitors need; None generates one, unless only this machine can reach the page.
        prefix: path of a reverse proxy that shows the page and removes the path, in which PORT stands for the port.
            Then the token is always needed, and the address is a path. None without a proxy.

    Raises:
        ConfigError: if the port is not available, the token is too short, or `prefix` is no path.
    """
    if token is not None:
        check_token(token)
    listening = listen(host, port)
    try:
        address, port = listening.getsockname()[:2]
        path = "" if prefix is None else check_prefix(prefix, port)
    except ConfigError:
        listening.close()
        raise
    if token is None and (path or not is_loopback(address)):
        token = secrets.token_urlsafe(32)
    return Site(listening, host, address, port, token, path)


class OpeningPage:
    """Page for browsers while the images are being opened, which reloads itself until the true page is there.

    Within the block, after `OPENING_S`, a browser is opened if `show` is set, and the address is logged. The page says
    nothing of the images and needs no token.

    Attributes:
        is_shown: True once a browser has been opened.
    """

    def __init__(self, site: Site, *, show: bool) -> None:
        self.is_shown = False
        self._site, self._show, self._begin = site, show and not site.path, time.monotonic()
        self._server: ThreadingHTTPServer | None = None
        self._timer = threading.Timer(OPENING_S, self._start)
        self._timer.daemon = True

    def __enter__(self) -> "OpeningPage":
        self._timer.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._timer.cancel()
        self._timer.join()
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()

    def _start(self) -> None:
        begin = self._begin

        class Answer(BaseHTTPRequestHandler):
            timeout = SLOW_CLIENT_S

            def do_GET(self) -> None:
                body = _OPENING.format(seconds=round(time.monotonic() - begin)).encode()
                self.send_response(503)
                for name, value in {
                    "content-type": "text/html; charset=utf-8",
                    "content-length": str(len(body)),
                    "content-security-policy": "default-src 'none'; style-src 'unsafe-inline'",
                    "cache-control": "no-store",
                    "retry-after": "1",
                }.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                """Log nothing: the address has the token."""

        self._server = ThreadingHTTPServer(("", 0), Answer, bind_and_activate=False)
        self._server.socket.close()
        self._server.socket = self._site.listening.dup()
        threading.Thread(target=self._server.serve_forever, args=(0.1,), daemon=True).start()
        logger.info("The page opens at %s", self._site.url)
        if self._show:
            self.is_shown = True
            self._site.open_browser()


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


def is_loopback(address: str) -> bool:
    """Return True if only this machine can reach `address`."""
    return ip_address(address.split("%")[0]).is_loopback


def check_prefix(prefix: str, port: int) -> str:
    """Return the path of a reverse proxy with its port, and without a slash at its end.

    Raises:
        ConfigError: if it is not a path.
    """
    path = re.sub(r"\bPORT\b", str(port), prefix.rstrip("/"))
    if not _PREFIX.fullmatch(path):
        raise ConfigError(f"ui.prefix is {prefix}: it needs a path such as /user/me/proxy/PORT, or null")
    return path


def check_token(token: str) -> str:
    """Check the length of a token and return it.

    Raises:
        ConfigError: if it is too short.
    """
    if len(token) < MIN_TOKEN:
        raise ConfigError(f"ui.token has {len(token)} characters: it needs at least {MIN_TOKEN}")
    return token


def _listen_error(error: OSError, host: str, port: int) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"ui.port is {port}, which is in use on {host}: choose another one, or 0 for any free port"
    if error.errno == errno.EACCES:
        return f"ui.port is {port}, which needs administrator rights: choose one from 1024"
    if error.errno == errno.EADDRNOTAVAIL:
        return f"ui.host is {host}, which is not an address of this machine: choose 127.0.0.1, or 0.0.0.0 for all"
    return f"cannot listen on port {port} of {host}: {error.strerror}"
