"""Tests of the page in a notebook: a process of its own, shown in a frame, directly or behind a proxy."""

import asyncio
import re
import threading
from concurrent.futures import Future
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import aiohttp
import pytest
from aiohttp import web
from yarl import URL

import anomalymatch as am
from anomalymatch.types import Label

pytestmark = [pytest.mark.ui, pytest.mark.slow, pytest.mark.timeout(600)]


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def notebook(tmp_path):
    """Folder and address of a server like that of a notebook."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield tmp_path, f"http://localhost:{server.server_port}"
        server.shutdown()


def test_a_notebook_shows_the_page_and_reads_its_labels(chromium, demo_words, notebook):
    folder, address = notebook
    page = am.label(*demo_words, folder=folder / "a run", height=700)
    try:
        assert page.labels == {}
        (folder / "notebook.html").write_text(f"<!DOCTYPE html>{page._repr_html_()}", encoding="utf-8")
        context = chromium.new_context(viewport={"width": 1200, "height": 800})
        tab = context.new_page()
        tab.goto(f"{address}/notebook.html")
        frame = tab.frame_locator("iframe")
        frame.locator("[data-testid=tile].am-cursor").wait_for(timeout=60_000)
        id_ = frame.locator("[data-testid=tile].am-cursor").get_attribute("data-id")
        frame.locator("[data-testid=action-normal]").click()
        frame.locator("[data-testid=tile][data-label=normal]").wait_for(timeout=60_000)
        assert page.labels == {id_: Label.NORMAL}
        context.close()
    finally:
        page.close()
    assert page.labels == {id_: Label.NORMAL}
    assert repr(page) == "LabelPage(closed)"
    assert (folder / "a run" / "labels.csv").exists()
    page.close()  # again


ONE_HOP = {"connection", "upgrade", "transfer-encoding", "content-length", "keep-alive"}


async def forward(request, client, notebook):
    """Answer as jupyter-server-proxy: `/user/me/proxy/PORT/…` goes to a server of this machine, without this path."""
    match = re.fullmatch(r"/user/me/proxy/(\d+)(/.*)", request.raw_path)
    if match is None:
        return web.Response(text=notebook.text, content_type="text/html")
    headers = [pair for pair in request.headers.items() if pair[0].lower() not in ONE_HOP]
    target = URL(f"http://127.0.0.1:{match[1]}{match[2]}", encoded=True)
    if request.headers.get("upgrade", "").lower() == "websocket":
        own = [pair for pair in headers if not pair[0].lower().startswith("sec-websocket")]
        front = web.WebSocketResponse()
        async with client.ws_connect(target.with_scheme("ws"), headers=own) as back:
            await front.prepare(request)
            ways = [asyncio.create_task(pump(*way)) for way in ((front, back), (back, front))]
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            await front.close()
        await asyncio.gather(*ways)
        return front
    body = await request.read()
    async with client.request(request.method, target, headers=headers, data=body, allow_redirects=False) as answer:
        kept = [pair for pair in answer.headers.items() if pair[0].lower() not in ONE_HOP]
        return web.Response(status=answer.status, headers=kept, body=await answer.read())


async def pump(source, sink):
    async for message in source:
        await (sink.send_str if message.type is aiohttp.WSMsgType.TEXT else sink.send_bytes)(message.data)


@pytest.fixture
def hub():
    """Server of a notebook at `/user/me/`, whose page has the text `text`, with a proxy."""
    notebook, started = SimpleNamespace(text=""), Future()

    async def serve():
        stop = asyncio.Event()
        async with aiohttp.ClientSession(auto_decompress=False, cookie_jar=aiohttp.DummyCookieJar()) as client:
            app = web.Application()
            app.router.add_route("*", "/{path:.*}", partial(forward, client=client, notebook=notebook))
            runner = web.AppRunner(app, shutdown_timeout=1)
            await runner.setup()
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            started.set_result((asyncio.get_running_loop(), stop, runner.addresses[0][1]))
            await stop.wait()
            await runner.cleanup()

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    loop, stop, port = started.result(20)
    notebook.address = f"http://localhost:{port}/user/me/lab"
    yield notebook
    loop.call_soon_threadsafe(stop.set)
    thread.join(20)


def test_a_notebook_of_a_hub_shows_the_page_through_its_proxy(chromium, demo_words, hub, tmp_path, monkeypatch):
    monkeypatch.setenv("JUPYTERHUB_SERVICE_PREFIX", "/user/me/")
    page = am.label(*demo_words, folder=tmp_path / "run")
    try:
        assert re.fullmatch(r"/user/me/proxy/\d+/\?token=[\w-]{43}", page.url)
        hub.text = f"<!DOCTYPE html>{page._repr_html_()}"
        context = chromium.new_context(viewport={"width": 1440, "height": 900})
        tab = context.new_page()
        failed = []
        tab.on("response", lambda answer: failed.append((answer.url, answer.status)) if answer.status >= 400 else None)
        tab.on("pageerror", lambda error: failed.append((str(error), 0)))
        tab.goto(hub.address)
        frame = tab.frame_locator("iframe")
        tile = frame.locator("[data-testid=tile].am-cursor")
        tile.wait_for(timeout=60_000)
        id_ = tile.get_attribute("data-id")
        frame.locator("[data-testid=action-anomaly]").click()
        frame.locator("[data-testid=tile][data-label=anomaly]").wait_for(timeout=60_000)
        assert page.labels == {id_: Label.ANOMALY}
        frame.locator("[data-testid=tile]").first.dblclick()
        near = frame.locator("[data-testid=neighbour] img").first  # an address that the server has made
        near.wait_for(timeout=60_000)
        for picture in (near, frame.locator("[data-testid=full]")):
            picture.evaluate("image => image.complete || new Promise(done => image.onload = done)")
            assert picture.evaluate("image => image.naturalWidth") > 0
        frame.locator("[data-testid=view-close]").click()
        with tab.expect_download() as download:
            frame.locator("[data-testid=export-csv]").click()
        assert id_ in download.value.path().read_text()
        (cookie,) = context.cookies()
        assert cookie["path"] == page.url.partition("?")[0]
        assert [answer for answer in failed if "favicon" not in answer[0]] == []
        context.close()
    finally:
        page.close()


def test_a_wrong_word_is_told_in_one_sentence(tmp_path):
    with pytest.raises(am.AnomalyMatchError, match=r"data\.rooot") as caught:
        am.label("data.rooot=x", folder=tmp_path / "run")
    assert "Traceback" not in str(caught.value)
