"""Who may talk to the server: names, origins, token, sizes, and the headers of every answer.

A page on this machine is within reach of every other page that is open in the browser. Names keep out a foreign name
that was made to point here (DNS rebinding), origins keep out other pages, the token everyone else on the network.
"""

import hashlib
import hmac
import re
import socket
from collections.abc import Mapping
from contextlib import suppress
from ipaddress import ip_address
from typing import NamedTuple
from urllib.parse import parse_qsl, urlencode

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import cookie_parser
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from anomalymatch.errors import ConfigError

MAX_URL = 16_384
MAX_BODY = 2 << 20  # of a message of the page itself; uploads have limits of their own
MIN_TOKEN = 16

_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::\d{1,5})?")
_LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
_SAFE = ("GET", "HEAD", "OPTIONS")

_QUOTED_PATH = re.compile(r"(['\"])(?:/|[A-Za-z]:[/\\]|\\\\)(?:(?!\1).)*[/\\](?=[^/\\]*\1)")
_BARE_PATH = re.compile(r"(?<![\w./\\:])(?:/|[A-Za-z]:[/\\]|\\\\)(?:[^\s'\"/\\]+[/\\])+")

# NiceGUI's own script needs inline code and eval; nothing comes from, or goes to, anywhere else.
_PAGE_POLICY = (
    "default-src 'none'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; manifest-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_FILE_POLICY = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; sandbox"
_HEADERS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}


class Names(NamedTuple):
    """What the server answers to: names in lower case, and whether to any number (an IP address cannot be rebound)."""

    names: frozenset[str]
    numbers: bool

    def __contains__(self, host: object) -> bool:
        """Whether a `Host` header is one of them; its port may be another one, as behind a tunnel."""
        match = _HOST.fullmatch(host.lower()) if isinstance(host, str) else None
        return match is not None and (match[1] in self.names or (self.numbers and _is_number(match[1])))


def names_of(host: str, address: str) -> Names:
    """Names under which a server is reached that was told to listen on `host`, which turned out to be `address`."""
    own = {host.lower(), _bracketed(host.lower()), _bracketed(address)}
    if is_loopback(address):
        return Names(frozenset({*own, *_LOOPBACK}), numbers=False)
    machine = socket.gethostname().lower()
    names = {*own, machine, machine.split(".")[0], f"{machine}.local"}
    if ip_address(address).is_unspecified:
        return Names(frozenset({*names, *_LOOPBACK}), numbers=True)
    return Names(frozenset(names), numbers=False)


def is_loopback(address: str) -> bool:
    """Whether only this machine itself can reach `address`."""
    return ip_address(address.split("%")[0]).is_loopback


def check_token(token: str) -> str:
    """Return `token`.

    Raises:
        ConfigError: if it is too short to be a secret.
    """
    if len(token) < MIN_TOKEN:
        raise ConfigError(f"a token of {len(token)} characters can be guessed: it needs at least {MIN_TOKEN}")
    return token


class Guard:
    """ASGI middleware around everything, requests and web sockets alike.

    Args:
        app: what is guarded.
        names: `Host` headers that are served.
        token: secret that is asked for; None where none is needed.
        cookie: name of the cookie that stands for the token. Browsers do not tell ports apart: two servers on one
            machine need two names.
        limits: largest body in bytes by path; `MAX_BODY` for the rest.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        names: Names,
        token: str | None,
        cookie: str = "anomalymatch",
        limits: Mapping[str, int] | None = None,
    ) -> None:
        self.app, self.names, self.cookie, self.limits = app, names, cookie, dict(limits or {})
        self._token = None if token is None else _bytes(check_token(token))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or hand on what may pass."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        send = _with_headers(send)
        answer = self._answer(scope, Headers(scope=scope))
        if answer is not None:
            await _send(answer, scope, receive, send)
        elif scope["type"] == "http":
            limit = self.limits.get(scope["path"], MAX_BODY)
            await _Limited(self.app, limit)(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    def _answer(self, scope: Scope, headers: Headers) -> Response | None:
        """What is sent instead of handing on; None if all is well."""
        if len(scope.get("raw_path") or b"") + len(scope["query_string"]) > MAX_URL:
            return refusal(414, "This address is too long.")
        hosts = headers.getlist("host")
        if len(hosts) != 1 or hosts[0] not in self.names:
            return refusal(403, "The server does not go by this name: open the address that the terminal shows.")
        if not self._is_own(scope, headers, hosts[0].lower()):
            return refusal(403, "Only the page itself may ask for this.")
        return self._without_token(scope, headers)

    def _is_own(self, scope: Scope, headers: Headers, host: str) -> bool:
        """Whether a request comes from our own page, or is a person who opens it."""
        origins = headers.getlist("origin")
        own = {f"http://{host}", f"https://{host}"}  # https is a proxy in front of us
        if any(origin.lower() not in own for origin in origins) or len(origins) > 1:
            return False
        if scope["type"] == "websocket" or scope["method"] not in _SAFE:
            return bool(origins)
        if headers.get("sec-fetch-site", "none") in ("same-origin", "none"):
            return True
        opened = headers.get("sec-fetch-mode") == "navigate" and headers.get("sec-fetch-dest") == "document"
        return opened and scope["path"] == "/"  # a link to the page

    def _without_token(self, scope: Scope, headers: Headers) -> Response | None:
        """Ask for the token, or exchange it for the cookie; None once there is the cookie."""
        if self._token is None:
            return None
        cookies = [cookie_parser(line).get(self.cookie, "") for line in headers.getlist("cookie")]
        secret = hmac.new(self._token, b"cookie", hashlib.sha256).hexdigest()
        # The page's own address only: any other one (//elsewhere/?token=…) could send the browser away with it.
        if scope["type"] == "http" and scope["method"] == "GET" and scope["path"] == "/":
            query = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True, errors="surrogateescape")
            tokens = [value for name, value in query if name == "token"]
            if tokens:
                if not hmac.compare_digest(_bytes(tokens[0]), self._token):
                    return _no_token()
                rest = urlencode([pair for pair in query if pair[0] != "token"], errors="surrogateescape")
                answer = RedirectResponse(f"/?{rest}" if rest else "/", status_code=303)
                answer.headers["cache-control"] = "no-store"
                answer.set_cookie(self.cookie, secret, httponly=True, samesite="strict", path="/")
                return answer
        if any(hmac.compare_digest(_bytes(value), secret.encode()) for value in cookies):
            return None
        return _no_token()


class _Limited:
    """Ends a request whose body grows beyond the limit, while it comes in, whatever its `Content-Length` said."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self.app, self.limit = app, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        declared = Headers(scope=scope).get("content-length", "0")
        if not (declared.isascii() and declared.isdigit()) or int(declared[:20]) > self.limit:
            await self._refuse(scope, receive, send)
            return
        left, exceeded, started = self.limit, False, False
        unread = int(declared) > 0 or "transfer-encoding" in Headers(scope=scope)

        async def counted() -> Message:
            nonlocal left, exceeded, unread
            if exceeded:
                return {"type": "http.disconnect"}
            message = await receive()
            left -= len(message.get("body", b""))
            exceeded, unread = left < 0, message.get("more_body", False)
            return {"type": "http.disconnect"} if exceeded else message

        async def answer(message: Message) -> None:
            nonlocal started
            if exceeded and not started:
                return  # what the application makes of it does not matter any more
            if unread and not started:
                MutableHeaders(scope=message)["connection"] = "close"  # or the server would go on to read the rest
            started = True
            await send(message)

        try:
            await self.app(scope, counted, answer)
        except Exception:
            if not exceeded:
                raise
        if exceeded and not started:
            await self._refuse(scope, receive, send)

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = refusal(413, f"More than {self.limit:,} bytes are not accepted.")
        answer.headers["connection"] = "close"
        await answer(scope, receive, send)


def refusal(status: int, sentence: str) -> Response:
    """An answer of one plain sentence."""
    return PlainTextResponse(sentence, status, headers={"cache-control": "no-store"})


def without_folders(text: str) -> str:
    """`text` with the folders of absolute paths left out: a message may name a file, but not where it lies."""
    return _BARE_PATH.sub("", _QUOTED_PATH.sub(r"\1", text))


def _no_token() -> Response:
    return refusal(401, "A token is needed: open the address that the terminal shows.")


async def _send(answer: Response, scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "websocket":
        await receive()  # websocket.connect
        if "websocket.http.response" not in scope.get("extensions", {}):
            await send({"type": "websocket.close", "code": 1008})
            return
    await answer(scope, receive, send)


def _with_headers(send: Send) -> Send:
    async def sending(message: Message) -> None:
        if message["type"] in ("http.response.start", "websocket.http.response.start"):
            message.setdefault("headers", [])
            headers = MutableHeaders(scope=message)
            is_page = headers.get("content-type", "").startswith("text/html")
            headers["content-security-policy"] = _PAGE_POLICY if is_page else _FILE_POLICY
            headers.update(_HEADERS)
            for name in {name for name in headers if name.startswith("access-control-")}:
                del headers[name]  # socket.io would let any page read its answers
        await send(message)

    return sending


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _is_number(host: str) -> bool:
    with suppress(ValueError):
        ip_address(host.strip("[]"))
        return True
    return False


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")
