"""Access control of the server: host names, origins, token, body sizes, and security headers of every response.

Every other page in the browser can reach a server on this machine. Host names stop DNS rebinding, origins stop other
pages, the token stops everyone else on the network.
"""

import asyncio
import hashlib
import hmac
import math
import re
import secrets
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from ipaddress import ip_address, ip_network
from typing import NamedTuple
from urllib.parse import parse_qsl, urlencode

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import cookie_parser
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from anomalymatch.listening import check_token, is_loopback

MAX_URL = 16_384
MAX_BODY = 2 << 20  # for messages of the page; uploads have their own limits
ATTEMPTS, ATTEMPTS_S = 10, 60.0
"""Wrong tokens that a visitor may try in a time."""
MAX_VISITORS = 10_000  # whose attempts are counted
BODY_S = 20.0  # longest wait for the next part of a body

REPORT_PATH = "/report"
"""Path of the report of the run."""

_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::\d{1,5})?")
_LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
_SAFE = ("GET", "HEAD", "OPTIONS")

_QUOTED_PATH = re.compile(r"(['\"])(?:/|[A-Za-z]:[/\\]|\\\\)(?:(?!\1).)*[/\\](?=[^/\\]*\1)")
_BARE_PATH = re.compile(r"(?<![\w./\\:])(?:/|[A-Za-z]:[/\\]|\\\\)(?:[^\s'\"/\\]+[/\\])+")

# NiceGUI needs inline code and eval; everything else is limited to this server.
_PAGE_POLICY = (
    "default-src 'none'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; manifest-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_FILE_POLICY = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; sandbox"
# A run folder may come from a stranger: its report runs no code and reaches nothing.
_REPORT_POLICY = _FILE_POLICY.replace("sandbox", "img-src data:; style-src 'unsafe-inline'; sandbox")
_NOTEBOOKS = "frame-ancestors 'self' http://localhost:* http://127.0.0.1:*"
_HEADERS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}


class HostNames(NamedTuple):
    """Allowed host names, in lower case; `numbers` also allows all IP addresses, which cannot be rebound.

    `any_name` allows all names, for a server that needs a token in any case: a page that rebinds a name has no cookie.
    """

    names: frozenset[str]
    numbers: bool
    any_name: bool = False

    def __contains__(self, host: object) -> bool:
        """Return True if a `Host` header is allowed, with any port, since a tunnel changes it."""
        match = _HOST.fullmatch(host.lower()) if isinstance(host, str) else None
        if match is None:
            return False
        return self.any_name or match[1] in self.names or (self.numbers and _is_number(match[1]))


ANY_NAME = HostNames(frozenset(), numbers=True, any_name=True)
"""Names of a server behind a reverse proxy, whose name only the browser knows."""


def host_names(host: str, address: str) -> HostNames:
    """Return the names of a server that listens on `host`, which has resolved to `address`."""
    own = {host.lower(), _bracketed(host.lower()), _bracketed(address)}
    if is_loopback(address):
        return HostNames(frozenset({*own, *_LOOPBACK}), numbers=False)
    machine = socket.gethostname().lower()
    names = {*own, machine, machine.split(".")[0], f"{machine}.local"}
    if ip_address(address).is_unspecified:
        return HostNames(frozenset({*names, *_LOOPBACK}), numbers=True)
    return HostNames(frozenset(names), numbers=False)


class Passes:
    """Signatures of addresses that another application may download without the cookie, until the server ends."""

    _SIGNED = re.compile(r"(.*?)&?pass=([0-9a-f]{64})", re.DOTALL)

    def __init__(self) -> None:
        self._key = secrets.token_bytes(32)

    def sign(self, path: str, query: str = "") -> str:
        """Return the signed address of a path with a query."""
        return f"{path}?{query}{'&' * bool(query)}pass={self._signature(path, query)}"

    def allow(self, path: str, query: str) -> bool:
        """Return True if a query has the signature of its address."""
        match = self._SIGNED.fullmatch(query)
        return match is not None and hmac.compare_digest(match[2], self._signature(path, match[1]))

    def _signature(self, path: str, query: str) -> str:
        return hmac.new(self._key, _bytes(f"{path}?{query}"), hashlib.sha256).hexdigest()


class Attempts:
    """Times of the wrong tokens of each visitor; an IPv6 network of 64 bits is one visitor."""

    def __init__(self) -> None:
        self._times: dict[str, list[float]] = {}

    def wait(self, address: str) -> float:
        """Return the seconds until the visitor may try again; 0 if it may now."""
        now = time.monotonic()
        recent = [at for at in self._times.pop(_visitor(address), ()) if now - at < ATTEMPTS_S]
        if recent:
            self._times[_visitor(address)] = recent
        return recent[-ATTEMPTS] + ATTEMPTS_S - now if len(recent) >= ATTEMPTS else 0.0

    def add(self, address: str) -> None:
        """Count a wrong token."""
        self._times.setdefault(_visitor(address), []).append(time.monotonic())
        if len(self._times) > MAX_VISITORS:
            del self._times[next(iter(self._times))]


class Guard:
    """ASGI middleware that checks all requests and web sockets.

    Args:
        app: the application.
        names: allowed `Host` headers.
        token: the secret; None if none is needed.
        cookie: name of the cookie that replaces the token. Cookies ignore ports: two servers on one machine need two
            names.
        limits: largest body in bytes by path; `MAX_BODY` for other paths.
        frames: let pages on this machine, such as a notebook, show the page in a frame.
        images: scheme and host of another server whose images the page may show; empty for none.
        passes: signatures that replace the cookie for what they sign; None for none.
        prefix: path of a reverse proxy, which removes it from the addresses; empty without one.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        names: HostNames,
        token: str | None,
        cookie: str = "anomalymatch",
        limits: Mapping[str, int] | None = None,
        frames: bool = False,
        images: str = "",
        passes: Passes | None = None,
        prefix: str = "",
    ) -> None:
        self.app, self.names, self.cookie, self.limits, self.frames = app, names, cookie, dict(limits or {}), frames
        policy = _PAGE_POLICY.replace("img-src 'self'", f"img-src 'self' {images}") if images else _PAGE_POLICY
        self._policy = policy.replace("frame-ancestors 'none'", _NOTEBOOKS) if frames else policy
        self._token = None if token is None else _bytes(check_token(token))
        self._attempts, self._passes, self._prefix = Attempts(), passes, prefix

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass an allowed request on, refuse others."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        # NiceGUI puts this header before all its addresses, whoever has sent it.
        own = [(b"x-forwarded-prefix", self._prefix.encode())] if self._prefix else []
        others = [pair for pair in scope["headers"] if pair[0].lower() != b"x-forwarded-prefix"]
        scope = {**scope, "headers": [*others, *own]}
        send = self._with_headers(send, is_report=scope["path"] == REPORT_PATH)
        answer = self._refuse(scope, Headers(scope=scope))
        if answer is not None:
            await _send(answer, scope, receive, send)
        elif scope["type"] == "http":
            limit = self.limits.get(scope["path"], MAX_BODY)
            await _Limited(self.app, limit)(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    def _with_headers(self, send: Send, *, is_report: bool) -> Send:
        async def sending(message: Message) -> None:
            if message["type"] in ("http.response.start", "websocket.http.response.start"):
                message.setdefault("headers", [])
                headers = MutableHeaders(scope=message)
                is_page = headers.get("content-type", "").startswith("text/html") and not is_report
                other = _REPORT_POLICY if is_report else _FILE_POLICY
                headers["content-security-policy"] = self._policy if is_page else other
                headers.update(_HEADERS)
                if self.frames and is_page:  # the browser checks who shows it
                    del headers["x-frame-options"]
                for name in {name for name in headers if name.startswith("access-control-")}:
                    del headers[name]  # socket.io would let any page read its responses
            await send(message)

        return sending

    def _refuse(self, scope: Scope, headers: Headers) -> Response | None:
        """Return a response that ends the request; None if it is allowed."""
        if len(scope.get("raw_path") or b"") + len(scope["query_string"]) > MAX_URL:
            return refusal(414, "The address is too long.")
        hosts = headers.getlist("host")
        if len(hosts) != 1 or hosts[0] not in self.names:
            return refusal(403, "The server does not have this name: open the address that the terminal shows.")
        if not self._is_own(scope, headers, hosts[0].lower()):
            return refusal(403, "Only the page itself may request this.")
        return self._check_cookie(scope, headers)

    def _is_own(self, scope: Scope, headers: Headers, host: str) -> bool:
        """Return True if our own page sent the request, or a person opens the page."""
        origins = headers.getlist("origin")
        own = {f"http://{host}", f"https://{host}"}  # https: a proxy in front of the server
        if any(origin.lower() not in own for origin in origins) or len(origins) > 1:
            return False
        if scope["type"] == "websocket" or scope["method"] not in _SAFE:
            return bool(origins)
        if headers.get("sec-fetch-site", "none") in ("same-origin", "none"):
            return True
        shown = ("document", "iframe") if self.frames else ("document",)
        opened = headers.get("sec-fetch-mode") == "navigate" and headers.get("sec-fetch-dest") in shown
        return opened and scope["path"] == "/"  # a link to the page

    def _check_cookie(self, scope: Scope, headers: Headers) -> Response | None:
        """Exchange the token for a cookie, or refuse; None if the cookie is valid."""
        if self._token is None or self._has_pass(scope):
            return None
        cookies = [cookie_parser(line).get(self.cookie, "") for line in headers.getlist("cookie")]
        secret = hmac.new(self._token, b"cookie", hashlib.sha256).hexdigest()
        # Only at the address of the page: another one (//elsewhere/?token=…) could redirect the browser with the token.
        if scope["type"] == "http" and scope["method"] == "GET" and scope["path"] == "/":
            query = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True, errors="surrogateescape")
            tokens = [value for name, value in query if name == "token"]
            if tokens:
                address = (scope.get("client") or ("",))[0]
                if wait := self._attempts.wait(address):
                    answer = refusal(429, f"Too many wrong tokens: try again in {wait:.0f} s.")
                    answer.headers["retry-after"] = f"{math.ceil(wait)}"
                    return answer
                if not hmac.compare_digest(_bytes(tokens[0]), self._token):
                    self._attempts.add(address)
                    return refusal(401, "The page needs a token: open the address that the terminal shows.")
                rest = urlencode([pair for pair in query if pair[0] != "token"], errors="surrogateescape")
                home = f"{self._prefix}/"
                answer = RedirectResponse(f"{home}?{rest}" if rest else home, status_code=303)
                answer.headers["cache-control"] = "no-store"
                answer.set_cookie(self.cookie, secret, httponly=True, samesite="strict", path=home)
                return answer
        if any(hmac.compare_digest(_bytes(value), secret.encode()) for value in cookies):
            return None
        return refusal(401, "The page needs a token: open the address that the terminal shows.")

    def _has_pass(self, scope: Scope) -> bool:
        if self._passes is None or scope["type"] != "http" or scope["method"] not in _SAFE:
            return False
        return self._passes.allow(scope["path"], scope["query_string"].decode("latin-1"))


class _Limited:
    """ASGI middleware that ends a request while its body is received, if it exceeds the limit or stops arriving."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self.app, self.limit = app, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        declared = Headers(scope=scope).get("content-length", "0")
        too_large = refusal(413, f"More than {self.limit:,} bytes are not accepted.")
        if not (declared.isascii() and declared.isdigit()) or int(declared[:20]) > self.limit:
            await _close_with(too_large, scope, receive, send)
            return
        left, started = self.limit, False
        end: Response | None = None
        unread = int(declared) > 0 or "transfer-encoding" in Headers(scope=scope)

        async def counted() -> Message:
            nonlocal left, end, unread
            if end is None:
                try:
                    message = await asyncio.wait_for(receive(), BODY_S if unread else None)
                    left -= len(message.get("body", b""))
                    end, unread = too_large if left < 0 else None, message.get("more_body", False)
                except TimeoutError:
                    end = refusal(408, "The request did not arrive in time.")
            return message if end is None else {"type": "http.disconnect"}

        async def answer(message: Message) -> None:
            nonlocal started
            if end is not None and not started:
                return  # the response of the application is ignored
            if unread and not started:
                MutableHeaders(scope=message)["connection"] = "close"  # or the server would read the rest
            started = True
            await send(message)

        try:
            await self.app(scope, counted, answer)
        except Exception:
            if end is None:
                raise
        if end is not None and not started:
            await _close_with(end, scope, receive, send)


async def _close_with(answer: Response, scope: Scope, receive: Receive, send: Send) -> None:
    answer.headers["connection"] = "close"
    await answer(scope, receive, send)


def refusal(status: int, sentence: str) -> Response:
    """Create a response of one sentence."""
    return PlainTextResponse(sentence, status, headers={"cache-control": "no-store"})


def without_folders(text: str) -> str:
    """Remove the folders of absolute paths: a message may name a file, but not its location."""
    return _BARE_PATH.sub("", _QUOTED_PATH.sub(r"\1", text))


async def _send(answer: Response, scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "websocket":
        await receive()  # websocket.connect
        if "websocket.http.response" not in scope.get("extensions", {}):
            await send({"type": "websocket.close", "code": 1008})
            return
    await answer(scope, receive, send)


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _is_number(host: str) -> bool:
    with suppress(ValueError):
        ip_address(host.strip("[]"))
        return True
    return False


def _visitor(address: str) -> str:
    return str(ip_network(f"{address.split('%')[0]}/64", strict=False)) if ":" in address else address


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")
