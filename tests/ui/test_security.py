import asyncio
import socket
from types import SimpleNamespace
from urllib.parse import urlencode

import pytest
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

TOKEN = "a secret of 27 characters ü"
OWN = "http://127.0.0.1:8765"
LISTEN = "127.0.0.1"
MACHINE = socket.gethostname()


async def echo(scope, receive, send):
    """Answer with the length of the body; accept any web socket."""
    if scope["type"] == "lifespan":
        return
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.accept"})
        await send({"type": "websocket.close", "code": 1000})
        return
    size, more = 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise RuntimeError("the client is gone")
        size += len(message.get("body", b""))
        more = message.get("more_body", False)
    headers = [(b"content-type", b"text/html; charset=utf-8"), (b"access-control-allow-origin", b"*")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": str(size).encode()})


@pytest.fixture
def guarded():
    from anomalymatch.ui.web.security import Guard, host_names

    def make(token=None, app=echo, **options):
        return Guard(app, names=host_names(LISTEN, LISTEN), token=token, **options)

    return make


@pytest.fixture
def browser(guarded):
    def make(token=None, **options):
        return TestClient(guarded(token, **options), base_url=OWN, follow_redirects=False)

    return make


def is_refused(client, path="/", **headers):
    """Return True if a web socket is refused."""
    try:
        with client.websocket_connect(path, headers=headers):
            return False
    except WebSocketDisconnect:
        return True


def ask(app, *, method="GET", path="/", query=b"", headers=(), chunks=(b"",), client="127.0.0.1"):
    """Send a request of raw bytes; return status, headers, body, and the bytes that were read."""
    host = [] if any(name == b"host" for name, _ in headers) else [(b"host", b"127.0.0.1:8765")]
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "scheme": "http",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "query_string": query,
        "root_path": "",
        "headers": [*host, *headers],
        "server": ("127.0.0.1", 8765),
        "client": (client, 50000),
    }
    waiting, read, sent = list(chunks), [], []

    async def receive():
        if not waiting:
            return {"type": "http.disconnect"}
        body = waiting.pop(0)
        if body is None:
            await asyncio.sleep(60)
        read.append(len(body))
        return {"type": "http.request", "body": body, "more_body": bool(waiting)}

    async def send(message):
        sent.append(message)

    asyncio.run(app(scope, receive, send))
    start = next(message for message in sent if message["type"] == "http.response.start")
    body = b"".join(message.get("body", b"") for message in sent if message["type"] == "http.response.body")
    return start["status"], {name.decode(): value.decode() for name, value in start["headers"]}, body, sum(read)


class TestNames:
    @pytest.mark.parametrize(
        "host",
        [
            *("evil.example", "evil.example:8765", "localhost.evil.example", "127.0.0.1.evil.example", "10.0.0.7:8765"),
            *("", " ", "localhost:", "localhost:x", "localhost:123456", "localhost/", "localhost,evil", "me@localhost"),
            *("localhost.", "[::1", "::1", "0x7f.1", "127.1", "[::ffff:127.0.0.1]", "localhost\x00", "löcalhost"),
        ],
    )
    def test_foreign_names_are_refused(self, guarded, host):
        status, _, body, _ = ask(guarded(), headers=[(b"host", host.encode("utf-8"))])
        assert (status, body.startswith(b"The server does not have this name")) == (403, True)

    @pytest.mark.parametrize("count", [0, 2])
    def test_no_and_two_host_headers_are_refused(self, guarded, count):
        async def app(scope, receive, send):
            await guarded()(scope | {"headers": [(b"host", b"localhost")] * count}, receive, send)

        assert ask(app)[0] == 403

    @pytest.mark.parametrize(
        ("host", "address", "own", "foreign"),
        [
            ("192.168.1.5", "192.168.1.5", ["192.168.1.5:80", MACHINE], ["evil.example", "192.168.1.6", "localhost"]),
            ("0.0.0.0", "0.0.0.0", ["192.168.1.5", "[fe80::1]:80", "localhost", MACHINE], ["evil.example"]),
            ("My.Lab.example", "127.0.0.1", ["my.lab.example:8765", "localhost"], ["evil.example"]),
            (LISTEN, LISTEN, ["127.0.0.1:8765", "localhost:8765", "LocalHost", "[::1]:8765", "localhost:9"], []),
        ],
    )
    def test_names_of_a_server(self, host, address, own, foreign):
        from anomalymatch.ui.web.security import host_names

        names = host_names(host, address)
        assert all(name in names for name in own)
        assert not any(name in names for name in foreign)

    def test_is_loopback(self):
        from anomalymatch.listening import is_loopback

        assert all(map(is_loopback, ("127.0.0.1", "127.9.9.9", "::1", "::1%lo")))
        assert not any(map(is_loopback, ("0.0.0.0", "::", "10.0.0.1", "192.168.0.1")))


class TestOrigins:
    FOREIGN = ("http://evil.example", "null", "http://localhost:3000", "http://127.0.0.1", f"{OWN}.x", "")

    @pytest.mark.parametrize("origin", FOREIGN)
    def test_requests_of_other_pages_are_refused(self, browser, origin):
        client, headers = browser(), {"origin": origin}
        for path in ("/examples", "/import", "/_nicegui_ws/socket.io/?transport=polling"):
            answer = client.post(path, headers=headers)
            assert (answer.status_code, answer.text) == (403, "Only the page itself may request this.")
        assert client.get("/_nicegui_ws/socket.io/", headers=headers).status_code == 403
        assert client.options("/examples", headers=headers).status_code == 403
        assert is_refused(client, "/_nicegui_ws/socket.io/", **headers)

    @pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "FOO"])
    def test_requests_with_effects_need_one_origin(self, browser, guarded, method):
        assert browser().request(method, "/").status_code == 403
        for own in (OWN, OWN.replace("http", "https")):  # https: a proxy
            assert browser().request(method, "/", headers={"origin": own}).status_code == 200
        assert ask(guarded(), method=method, headers=[(b"origin", OWN.encode())] * 2)[0] == 403

    def test_web_sockets_need_an_origin(self, browser):
        assert is_refused(browser(), host="localhost")
        assert not is_refused(browser(), host="localhost:8765", origin="http://localhost:8765")

    @pytest.mark.parametrize("site", ["cross-site", "same-site"])
    def test_another_page_cannot_embed_pictures_or_frames(self, browser, site):
        image = {"sec-fetch-site": site, "sec-fetch-mode": "no-cors", "sec-fetch-dest": "image"}
        frame = {"sec-fetch-site": site, "sec-fetch-mode": "navigate", "sec-fetch-dest": "iframe"}
        link = {"sec-fetch-site": site, "sec-fetch-mode": "navigate", "sec-fetch-dest": "document"}
        assert browser().get("/thumb", headers=image).status_code == 403
        assert browser().get("/", headers=frame).status_code == 403
        assert browser().get("/", headers=link).status_code == 200
        assert browser().get("/export/csv", headers=link).status_code == 403
        for path, headers, status in (("/", frame, 200), ("/thumb", frame, 403), ("/thumb", image, 403)):
            assert browser(frames=True).get(path, headers=headers).status_code == status
        for own in ("same-origin", "none"):
            assert browser().get("/thumb", headers=image | {"sec-fetch-site": own}).status_code == 200


def test_only_pages_of_this_machine_may_show_the_page_in_a_frame(browser, check_headers):
    check_headers(browser().get("/").headers)
    headers = browser(frames=True).get("/").headers
    assert "x-frame-options" not in headers
    allowed = headers["content-security-policy"].split("frame-ancestors ")[1]
    assert allowed == "'self' http://localhost:* http://127.0.0.1:*"


def test_pictures_of_one_other_server_are_allowed_and_nothing_else(browser):
    def policy(**options):
        parts = browser(**options).get("/").headers["content-security-policy"].split("; ")
        return dict(part.split(" ", 1) for part in parts)

    plain, open_ = policy(), policy(images="https://sky.example")
    assert open_.pop("img-src") == "'self' https://sky.example data: blob:"
    assert plain.pop("img-src") == "'self' data: blob:"
    assert open_ == plain
    assert "example" not in str(plain)


def test_a_pass_opens_one_address_without_the_token(guarded):
    from anomalymatch.ui.web.security import Passes

    passes = Passes()
    app = guarded(TOKEN, passes=passes)

    def status(address, **options):
        path, _, query = address.partition("?")
        return ask(app, path=path, query=query.encode(), **options)[0]

    plain, image = passes.sign("/export/votable"), passes.sign("/original", "id=a%26b.fits&x=%C3%BC")
    assert status(plain) == status(image) == 200
    assert status(plain, method="POST", headers=[(b"origin", OWN.encode())]) == 401
    assert status(plain, headers=[(b"origin", b"http://evil.example")]) == 403
    for wrong in (
        *(plain[:-1], plain + "0", plain.upper(), plain.replace("votable", "zip"), plain + "&x=1"),
        *(plain.replace("?", "?x=1&"), image.replace("a%26b", "c"), "/export/votable", "/export/votable?pass="),
        Passes().sign("/export/votable"),
    ):
        assert status(wrong) == 401, wrong


def test_the_report_of_a_run_runs_no_code(browser):
    policy = browser(frames=True, images="https://sky.example").get("/report").headers["content-security-policy"]
    parts = dict(part.partition(" ")[::2] for part in policy.split("; "))
    assert parts["default-src"] == "'none'"
    assert (parts["img-src"], parts["style-src"], parts["sandbox"]) == ("data:", "'unsafe-inline'", "")
    assert parts["frame-ancestors"] == "'none'"
    assert "script-src" not in parts
    assert "sandbox" not in browser().get("/reports").headers["content-security-policy"]  # only there


class TestPrefix:
    def test_token_and_cookie_are_those_of_the_path(self, guarded):
        from anomalymatch.ui.web.security import ANY_NAME, Guard

        app = Guard(echo, names=ANY_NAME, token=TOKEN, prefix="/user/me/proxy/8765")
        client = TestClient(app, base_url="https://hub.example", follow_redirects=False)
        answer = client.get("/", params={"token": TOKEN, "a": "1"})
        assert (answer.status_code, answer.headers["location"]) == (303, "/user/me/proxy/8765/?a=1")
        assert {"HttpOnly", "SameSite=strict", "Path=/user/me/proxy/8765/"} <= set(
            answer.headers["set-cookie"].split("; ")
        )
        cookie = {"cookie": answer.headers["set-cookie"].split(";")[0]}
        assert client.get("/thumb").status_code == 401
        assert client.get("/thumb", headers=cookie).status_code == 200
        assert client.get("/", headers=cookie | {"host": "[::1"}).status_code == 403
        own = cookie | {"origin": "https://hub.example"}
        assert client.post("/import", headers=own).status_code == 200
        assert is_refused(client, host="hub.example", origin="https://hub.example")
        assert not is_refused(client, host="hub.example", **own)
        assert client.post("/import", headers=own | {"origin": "https://evil.example"}).status_code == 403

    @pytest.mark.parametrize("prefix", ["", "/user/me/proxy/8765"])
    def test_only_the_own_prefix_reaches_the_page(self, guarded, prefix):
        found = []

        async def app(scope, receive, send):
            found.extend(value for name, value in scope["headers"] if name == b"x-forwarded-prefix")
            await echo(scope, receive, send)

        ask(guarded(app=app, prefix=prefix), headers=[(b"x-forwarded-prefix", b"//evil.example")])
        assert found == ([prefix.encode()] if prefix else [])

    @pytest.mark.parametrize("prefix", ["", "/", "//evil", "user/me", "/a b", "/a?b", "/a;b", "https://a.org/b", "/ü"])
    def test_a_prefix_is_a_path(self, prefix):
        from anomalymatch.errors import ConfigError
        from anomalymatch.listening import check_prefix

        assert check_prefix("/user/me%40x.org/proxy/PORT/", 8000) == "/user/me%40x.org/proxy/8000"
        assert check_prefix("/REPORTS/proxy/PORT", 8000) == "/REPORTS/proxy/8000"
        with pytest.raises(ConfigError, match=r"ui\.prefix"):
            check_prefix(prefix, 8000)


class TestToken:
    def test_token_is_exchanged_for_a_strict_cookie(self, browser):
        client = browser(TOKEN)
        answer = client.get("/", params={"a": "1&2", "token": TOKEN, "b": ""})
        assert (answer.status_code, answer.headers["location"]) == (303, "/?a=1%262&b=")
        cookie = answer.headers["set-cookie"]
        assert {"HttpOnly", "SameSite=strict", "Path=/"} <= set(cookie.split("; "))
        assert TOKEN not in cookie
        assert answer.headers["cache-control"] == "no-store"
        assert client.get("/").status_code == 200
        assert client.get("/thumb").status_code == 200
        assert client.get("/", params={"token": TOKEN}).headers["location"] == "/"

    @pytest.mark.parametrize("token", ["", TOKEN[:-1], TOKEN[1:], TOKEN + " ", TOKEN.upper(), "x" * 27, "\x00", "ü"])
    def test_other_tokens_are_refused(self, browser, token):
        answer = browser(TOKEN).get("/", params={"token": token})
        assert (answer.status_code, "token" in answer.text) == (401, True)
        assert "set-cookie" not in answer.headers

    @pytest.mark.parametrize("query", [b"token=%ff%fe", b"token=\xff", b"token", b"token=a secr&token=%00", b""])
    @pytest.mark.parametrize("value", [TOKEN, "", "a secret of 27 characters u", "\udcff\udcfe; ;;=; anomalymatch"])
    def test_invalid_bytes_and_other_cookies_are_refused(self, guarded, query, value):
        cookie = f"anomalymatch={value}".encode("utf-8", "surrogateescape")
        assert ask(guarded(TOKEN), query=query, headers=[(b"cookie", cookie)])[0] == 401

    def test_the_cookie_of_another_server_is_refused(self, browser):
        first, second = browser(TOKEN), browser(TOKEN + "!")
        value = first.get("/", params={"token": TOKEN}).cookies["anomalymatch"]
        second.cookies.set("anomalymatch", value)
        assert second.get("/").status_code == 401
        third = browser(TOKEN, cookie="anomalymatch_9")
        third.cookies.set("anomalymatch", value)
        assert third.get("/").status_code == 401

    def test_only_the_address_of_the_page_takes_the_token(self, browser):
        client = browser(TOKEN)
        for path in ("/thumb", "//evil.example/", "/export/csv"):
            answer = client.get(f"{OWN}{path}", params={"token": TOKEN})
            assert (answer.status_code, "location" in answer.headers) == (401, False)
        assert client.post("/", params={"token": TOKEN}, headers={"origin": OWN}).status_code == 401
        assert is_refused(client, "/?token=" + TOKEN, host="localhost", origin="http://localhost")

    def test_web_sockets_need_the_cookie(self, browser):
        client, headers = browser(TOKEN), {"host": "127.0.0.1:8765", "origin": OWN}
        assert is_refused(client, **headers)
        value = client.get("/", params={"token": TOKEN}).cookies["anomalymatch"]
        assert not is_refused(client, **headers, cookie=f"anomalymatch={value}")
        assert is_refused(client, **headers, cookie=f"anomalymatch={value[:-1]}")

    def test_a_token_may_be_tried_ten_times_a_minute(self, guarded, monkeypatch):
        now = [1000.0]
        monkeypatch.setattr("anomalymatch.ui.web.security.time", SimpleNamespace(monotonic=lambda: now[0]))
        app = guarded(TOKEN)

        def status(token, client="10.0.0.1"):
            return ask(app, query=urlencode({"token": token}).encode(), client=client)[0]

        assert [status("wrong") for _ in range(12)] == [401] * 10 + [429] * 2
        code, headers, body, _ = ask(app, query=urlencode({"token": TOKEN}).encode(), client="10.0.0.1")
        assert (code, headers["retry-after"], b"60 s" in body) == (429, "60", True), "not even the right one"
        assert status(TOKEN, "10.0.0.2") == 303
        now[0] += 59
        assert status(TOKEN) == 429
        now[0] += 2
        assert status(TOKEN) == 303
        assert [status("wrong", f"2001:db8::{n:x}") for n in range(11)] == [401] * 10 + [429], "one network"

    def test_the_number_of_counted_visitors_is_bounded(self, monkeypatch):
        from anomalymatch.ui.web import security

        monkeypatch.setattr(security, "MAX_VISITORS", 5)
        attempts = security.Attempts()
        for number in range(50):
            attempts.add(f"10.0.0.{number}")
        assert len(attempts._times) == 5

    def test_short_tokens_are_refused(self, guarded):
        from anomalymatch.errors import ConfigError

        with pytest.raises(ConfigError, match=r"ui.token has 15 characters.*16"):
            guarded("x" * 15)


class TestSizes:
    POST = ((b"origin", OWN.encode()),)

    def test_a_large_body_is_refused_before_it_is_read(self, guarded):
        app = guarded(limits={"/import": 1000})
        headers = [*self.POST, (b"content-length", b"1001")]
        status, answer, body, read = ask(app, method="POST", path="/import", headers=headers, chunks=[b"x" * 1001])
        assert (status, body, read) == (413, b"More than 1,000 bytes are not accepted.", 0)
        assert answer["connection"] == "close"

    @pytest.mark.parametrize("declared", [[], [(b"content-length", b"10")], [(b"transfer-encoding", b"chunked")]])
    def test_bodies_beyond_their_declared_length_are_refused(self, guarded, declared):
        app = guarded(limits={"/import": 1000})
        headers, chunks = [*self.POST, *declared], [b"x" * 100] * 1000
        status, answer, _, read = ask(app, method="POST", path="/import", headers=headers, chunks=chunks)
        assert (status, read, answer["x-content-type-options"]) == (413, 1100, "nosniff")

    def test_what_fits_passes(self, guarded):
        app = guarded(limits={"/import": 1000})
        assert ask(app, method="POST", path="/import", headers=self.POST, chunks=[b"x" * 100] * 10)[2] == b"1000"
        assert ask(app, method="POST", path="/", headers=self.POST, chunks=[b"x" * 100] * 20)[2] == b"2000"
        assert ask(app, method="POST", path="/", headers=self.POST, chunks=[b"x" * (1 << 20)] * 9)[0] == 413

    def test_a_body_that_stops_arriving_is_refused(self, guarded, monkeypatch):
        monkeypatch.setattr("anomalymatch.ui.web.security.BODY_S", 0.05)
        headers = [*self.POST, (b"content-length", b"30")]
        status, answer, body, read = ask(guarded(), method="POST", headers=headers, chunks=[b"x" * 10, None, b""])
        assert (status, read, answer["connection"], b"in time" in body) == (408, 10, "close", True)

    def test_limit_does_not_depend_on_the_application(self, guarded):
        async def stubborn(scope, receive, send):
            while (await receive())["type"] != "http.disconnect":
                pass
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"all is well"})

        app = guarded(app=stubborn, limits={"/": 10})
        assert ask(app, method="POST", headers=self.POST, chunks=[b"x" * 8] * 4)[0] == 413

    @pytest.mark.parametrize("length", [b"-1", b"ten", b"", b"1e9", b"9" * 5000, b"\xd9\xa1"])
    def test_invalid_lengths_are_refused(self, guarded, length):
        assert ask(guarded(), method="POST", headers=[*self.POST, (b"content-length", length)])[0] == 413

    def test_a_long_address_is_refused(self, guarded):
        assert ask(guarded(), path="/thumb", query=b"id=" + b"x" * 20_000)[0] == 414
        assert ask(guarded(), path="/" + "x" * 20_000)[0] == 414
        assert ask(guarded(), path="/thumb", query=b"id=" + b"x" * 9_000)[0] == 200

    def test_errors_of_the_application_are_raised(self, guarded):
        with pytest.raises(RuntimeError, match="the client is gone"):
            ask(guarded(), method="POST", headers=self.POST, chunks=[])


class TestHeaders:
    def test_every_response_has_the_headers(self, browser, guarded, check_headers):
        client = browser(TOKEN)
        check_headers(client.get("/").headers)
        check_headers(client.get("/", params={"token": TOKEN}).headers)
        check_headers(client.get("/").headers)
        check_headers(client.get("/", headers={"host": "evil"}).headers)
        check_headers(client.post("/", headers={"origin": "http://evil"}).headers)
        check_headers(client.get("/" + "x" * 20_000).headers)
        check_headers(ask(guarded(), method="POST", headers=[*TestSizes.POST, (b"content-length", b"9" * 9)])[1])

    def test_only_pages_may_run_scripts(self, browser):
        page = browser().get("/").headers["content-security-policy"]
        assert "script-src 'self'" in page
        assert "http:" not in page
        refused = browser().get("/", headers={"host": "evil"}).headers["content-security-policy"]
        assert "script-src" not in refused
        assert "sandbox" in refused

    def test_refused_web_sockets_without_responses_close(self, guarded):
        sent = []
        scope = {"type": "websocket", "path": "/", "query_string": b"", "headers": [], "raw_path": None}

        async def receive():
            return {"type": "websocket.connect"}

        async def send(message):
            sent.append(message)

        asyncio.run(guarded()(scope, receive, send))
        assert sent == [{"type": "websocket.close", "code": 1008}]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("cannot write /home/me/run/a.png: the disk is full", "cannot write a.png: the disk is full"),
        ("[Errno 2] No such file: '/data/my images/a b.jpg'", "[Errno 2] No such file: 'a b.jpg'"),
        (r"cannot open C:\Users\me\a.jpg", "cannot open a.jpg"),
        ('in "/x/y" and (/a/b/c)', 'in "y" and (c)'),
        ("5 km/s, 3/4, n/a, https://example.org/a/b and galaxies/a.jpg stay", None),
        ("a/../../b stays", None),
    ],
)
def test_folders_are_removed_from_messages(text, shown):
    from anomalymatch.ui.web.security import without_folders

    assert without_folders(text) == (shown or text)
