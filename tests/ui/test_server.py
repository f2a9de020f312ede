"""Tests of the server as a process of its own, on a page that needs no service."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import closing
from http.client import HTTPConnection

import pytest

LISTEN = "127.0.0.1"

SERVER = """
import logging, pathlib, sys, types
import anomalymatch
from nicegui import ui

def build_page(service, **_):
    @ui.page("/")
    def page():
        ui.label("all is well").on("click", lambda: ui.notify("pressed"))
        ui.upload()

def stub(name, **attributes):
    module = types.ModuleType(name)
    vars(module).update(attributes)
    sys.modules[name] = module

# The server needs no service, whose import takes seconds.
stub("anomalymatch.ui", __path__=[str(pathlib.Path(anomalymatch.__file__).parent / "ui")])
stub("anomalymatch.ui.service", LabelService=object)
stub("anomalymatch.ui.web.page", build_page=build_page)

from anomalymatch.errors import AnomalyMatchError
from anomalymatch import listening
from anomalymatch.listening import OpeningPage, open_site
from anomalymatch.ui.web import app, security
from anomalymatch.ui.web.app import serve

class Source:
    fingerprint = "f"

class Service:
    name, source, stretches, channels = "stub", Source(), ("as trained",), ()

for module, name in ((security, "BODY_S"), (app, "HEADERS_S"), (listening, "OPENING_S")):
    setattr(module, name, 2.0 if module is not listening else 0.1)
logging.basicConfig(level="INFO")
host, port, token = sys.argv[1], int(sys.argv[2]), sys.argv[3] or None
try:
    site = open_site(host, port, token=token)
    with OpeningPage(site, show=False):
        if "wait" in sys.argv:  # for a line, as for images that are being opened
            sys.stdin.readline()
    serve(Service(), site, show=False)
except AnomalyMatchError as error:
    sys.exit(f"error: {error}")
print("closed", flush=True)
"""


class Server:
    """`serve` in a process of its own, on a page that needs no service."""

    def __init__(self, folder, host=LISTEN, port=0, token="", words=(), while_opening=lambda _: None):
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
        self.errors = folder / "errors.txt"
        with self.errors.open("w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-W", "error", "-c", SERVER, host, str(port), token, *words],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                cwd=folder,
                env=environment,
            )
        while_opening(self)
        self.line = self.process.stdout.readline()
        match = re.fullmatch(r"stub: (http://[^/]+:(\d+)/(?:\?token=(\S+))?)\n", self.line)
        self.port, self.token = (int(match[2]), match[3]) if match else (0, None)

    def get(self, path, method="GET", body=None, **headers):
        connection = HTTPConnection(LISTEN, self.port, timeout=20)
        try:
            given = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, path, body=body, headers={"Host": f"{LISTEN}:{self.port}"} | given)
            answer = connection.getresponse()
            return answer.status, {n.lower(): v for n, v in answer.getheaders()}, answer.read()
        finally:
            connection.close()

    def end(self, signal_=signal.SIGINT):
        if self.process.poll() is None:
            self.process.send_signal(signal_)
        rest, _ = self.process.communicate(timeout=20)
        return self.process.returncode, rest, self.errors.read_text()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    check_end(server, signal.SIGINT)


@pytest.fixture(scope="module")
def closed_server(tmp_path_factory):
    """Server for all addresses, so with a generated token."""
    server = Server(tmp_path_factory.mktemp("closed"), host="0.0.0.0")
    yield server
    check_end(server, signal.SIGTERM, additional_headers={"Cookie": cookie_of(server)})


def cookie_of(server):
    status, headers, _ = server.get(f"/?token={server.token}")
    assert status == 303
    return headers["set-cookie"].split(";")[0]


def check_end(server, number, **options):
    """A server with an open page ends at once and without an error."""
    with web_socket(server, origin=f"http://{LISTEN}:{server.port}", **options) as connection:
        assert json.loads(connection.recv(timeout=20)[1:])["pingTimeout"] >= 10_000
        start = time.monotonic()
        code, rest, errors = server.end(number)
    assert (code, rest) == (0, "closed\n"), errors
    assert "Traceback" not in errors
    assert time.monotonic() - start < 20


def web_socket(server, *, host=None, **options):
    from websockets.sync.client import connect

    connection = socket.create_connection((LISTEN, server.port), timeout=20)
    url = f"ws://{host or f'{LISTEN}:{server.port}'}/_nicegui_ws/socket.io/?EIO=4&transport=websocket"
    return connect(url, sock=connection, open_timeout=20, **options)


class TestServer:
    def test_page_and_scripts_come_from_this_server(self, server, check_headers):
        status, headers, body = server.get("/")
        assert status == 200
        assert "all is well" in body.decode()
        check_headers(headers)
        assert "server" not in headers
        addresses = re.findall(r"""(?:src|href|url)\s*[=(]\s*["']([^"']+)""", body.decode())
        assert len(addresses) > 5
        for address in addresses:
            assert address.startswith(("/", "data:")), address
            if address.startswith("/"):
                status, headers, _ = server.get(address)
                assert status == 200
                check_headers(headers)

    @pytest.mark.parametrize(
        "path",
        [
            *("/nothing", "/docs", "/openapi.json", "/redoc", "/_nicegui/x", "/thumb"),
            *("/..%2f..%2fetc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/_nicegui/../../etc/passwd"),
        ],
    )
    def test_errors_have_the_headers_too_and_expose_no_file(self, server, path, check_headers):
        status, headers, body = server.get(path)
        assert status in (400, 404)
        check_headers(headers)
        assert b"site-packages" not in body
        assert b"root:" not in body

    @pytest.mark.parametrize(
        "options",
        [{"origin": "http://evil.example"}, {"origin": None}, {"origin": "null"}, {"host": "evil.example"}],
    )
    def test_web_sockets_of_others_are_refused(self, server, options, check_headers):
        from websockets.exceptions import InvalidStatus

        options = {"origin": f"http://{LISTEN}:{server.port}"} | options
        with pytest.raises(InvalidStatus) as error, web_socket(server, **options):
            pass  # pragma: no cover
        assert error.value.response.status_code == 403
        check_headers({name.lower(): value for name, value in error.value.response.headers.raw_items()})

    def test_polling_needs_the_token(self, closed_server):
        path = "/_nicegui_ws/socket.io/?EIO=4&transport=polling"
        assert closed_server.get(path)[0] == 401
        assert len(closed_server.token) >= 40
        cookie = cookie_of(closed_server)
        assert cookie.startswith(f"anomalymatch_{closed_server.port}=")
        assert closed_server.get(path, Cookie=cookie)[0] == 200
        assert closed_server.get(path, Cookie=cookie + "0")[0] == 401

    @pytest.mark.parametrize(
        "start",
        [
            b"",
            b"GET / HT",
            b"GET / HTTP/1.1\r\nHost: localhost\r\nX: y",
            b"GET /nothing HTTP/1.1\r\nHost: localhost\r\n\r\nGET",
            b"POST /import HTTP/1.1\r\nHost: localhost\r\nOrigin: http://localhost\r\nContent-Length: 9\r\n"
            b"Content-Type: multipart/form-data; boundary=b\r\n\r\n-",
        ],
        ids=["nothing", "line", "headers", "second request", "body"],
    )
    def test_half_open_requests_are_closed(self, server, start):
        with socket.create_connection((LISTEN, server.port), timeout=20) as connection:
            connection.sendall(start)
            answer = b"".join(iter(lambda: connection.recv(65536), b""))
        assert answer[:12] in (b"", b"HTTP/1.1 404", b"HTTP/1.1 408")

    @pytest.mark.parametrize("path", ["/nothing", "/_nicegui_ws/socket.io/?EIO=4&transport=polling", "/import"])
    def test_an_upload_in_chunks_ends_at_the_limit(self, server, path):
        start = (
            f"POST {path} HTTP/1.1\r\nHost: {LISTEN}:{server.port}\r\nOrigin: http://{LISTEN}:{server.port}\r\n"
            "Transfer-Encoding: chunked\r\nContent-Type: application/octet-stream\r\n\r\n"
        ).encode()
        chunk = b"10000\r\n" + b"x" * 65536 + b"\r\n"
        with socket.create_connection((LISTEN, server.port), timeout=20) as connection:
            connection.sendall(start)
            with pytest.raises(OSError, match=r"reset|[Bb]roken pipe"):
                connection.sendall(chunk * 200)


def test_browsers_are_answered_while_the_images_are_being_opened(tmp_path):
    answers = []

    def look(server):
        while not (match := re.search(r"The page opens at http://[^/]+:(\d+)/\?token=", server.errors.read_text())):
            assert server.process.poll() is None
            time.sleep(0.05)
        server.port = int(match[1])
        answers.extend(server.get(path) for path in ("/?token=wrong", "/any"))
        server.process.stdin.write("\n")
        server.process.stdin.flush()

    server = Server(tmp_path, token="0123456789abcdef", words=["wait"], while_opening=look)
    try:
        for status, headers, body in answers:
            assert (status, headers["retry-after"], headers["cache-control"]) == (503, "1", "no-store")
            assert b'http-equiv="refresh"' in body
            assert b"stub" not in body
            assert b"0123456789abcdef" not in body
        assert server.get("/")[0] == 401
        assert server.get("/", cookie=cookie_of(server))[0] == 200
    finally:
        assert server.end()[0] == 0


def test_the_browser_is_opened_before_the_images(monkeypatch):
    from anomalymatch import listening
    from anomalymatch.listening import OpeningPage, open_site

    opened = []
    monkeypatch.setattr(listening, "OPENING_S", 0.05)
    monkeypatch.setattr(listening.webbrowser, "open", opened.append)
    for host, prefix, show, expected in (
        ("127.0.0.1", None, True, 1),
        ("127.0.0.1", None, False, 0),
        ("127.0.0.1", "/user/proxy/PORT", True, 0),
    ):
        opened.clear()
        site = open_site(host, 0, token=None, prefix=prefix)
        with closing(site.listening), OpeningPage(site, show=show) as opening:
            connection = socket.create_connection((host, site.port), timeout=20)
            connection.sendall(b"GET / HTTP/1.0\r\n\r\n")
            assert b"503" in connection.recv(100)
            connection.close()
            while len(opened) < expected:
                time.sleep(0.01)
        assert opened == [site.url] * expected
        assert opening.is_shown == bool(expected)


def test_no_browser_is_opened_if_a_mistake_is_found_at_once(monkeypatch):
    from anomalymatch import listening
    from anomalymatch.listening import OpeningPage, open_site

    opened = []
    monkeypatch.setattr(listening, "OPENING_S", 0.3)
    monkeypatch.setattr(listening.webbrowser, "open", opened.append)
    site = open_site("127.0.0.1", 0, token=None)
    with pytest.raises(ZeroDivisionError), closing(site.listening), OpeningPage(site, show=True):
        raise ZeroDivisionError
    time.sleep(0.5)
    assert opened == []


def test_wrong_addresses_and_a_port_in_use():
    from anomalymatch.errors import ConfigError
    from anomalymatch.listening import listen

    for host, port, message in (
        ("203.0.113.9", 0, "ui.host is 203.0.113.9"),
        ("no such name", 0, "ui.host is no such name"),
        (LISTEN, 70_000, "ui.port is 70000"),
        (LISTEN, -1, "ui.port is -1"),
    ):
        with pytest.raises(ConfigError, match=message):
            listen(host, port)
    with listen(LISTEN, 0) as first:
        port = first.getsockname()[1]
        with pytest.raises(ConfigError, match=f"ui.port is {port}, which is in use"):
            listen(LISTEN, port)
