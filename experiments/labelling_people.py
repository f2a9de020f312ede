"""Measure how long people wait for a label when many use one page: `labelling_people.py [--people 20] [--idle 500]`.

Each person has a connection of its own to a real server, as a browser has, and labels the images on the page one after
the other. A label is there when the server says so, which it does once the label is on disk. Then the label log is
compared with what was sent.
"""

import argparse
import asyncio
import html
import json
import os
import random
import re
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import socketio
from bench import Row, make_parser, markdown, parse_options, write_csv
from labelling_page import server

from anomalymatch.data.label_log import LabelLog

ARCHIVE = ["dataset=demo", "dataset.source.count=6664", "dataset.source.size=64", "algorithm=probe", "logger=none"]
PAUSES = (0.5, 0.0)
"""Mean seconds between the answer to a label and the next key; 0 is faster than any person."""
PATIENCE_S = 60.0
TILES = 150
"""Images on a page; two people share each page of the gallery, so that they see each other's labels."""
KEYS = ("anomaly", "normal", "normal", "normal", "unsure")


def main() -> None:
    """Start the server once for each pause and measure."""
    parser = make_parser(__doc__, quick="5 people, 5 labels each")
    parser.add_argument("--people", type=int, default=20)
    parser.add_argument("--labels", type=int, default=50, help="by each person")
    parser.add_argument("--idle", type=int, default=0, help="further open pages")
    parser.add_argument("--words", nargs="*", default=ARCHIVE, help="the archive, as for the command")
    options = parse_options(parser)
    if options.quick:
        options.people, options.labels = 5, 5
    rows = [measure(options, pause) for pause in PAUSES]
    write_csv(options.results / f"labelling_people_{options.idle}.csv", rows)
    lines = [[f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values()] for row in rows]
    print(markdown(list(rows[0]), lines))


def measure(options: argparse.Namespace, pause: float) -> Row:
    """Measure one session; the row has seconds from the key to the answer."""
    with tempfile.TemporaryDirectory() as folder, server(options.words, run=Path(folder) / "run") as url:
        load = os.getloadavg()[0]
        times, seconds, lost = asyncio.run(work(url, options.people, options.labels, options.idle, pause))
        log = LabelLog(Path(folder) / "run" / "labels.sqlite")
        stored = len({(event.annotator, event.id) for event in log.events()})
        log.close()
    return {
        "people": options.people,
        "labels": len(times),
        "idle pages": options.idle,
        "pause": pause,
        "p50": float(np.percentile(times, 50)),
        "p99": float(np.percentile(times, 99)),
        "worst": max(times),
        "labels/s": len(times) / seconds,
        "not answered": lost,
        "not on disk": options.people * options.labels - stored,
        "load before": load,
    }


async def work(url: str, people: int, labels: int, idle: int, pause: float) -> tuple[list[float], float, int]:
    """Open all pages, label, and return the waiting times, the total time, and the number of unanswered labels."""
    await wait_for_features(url)
    pages = [Page(url, f"person{number}", seed=number) for number in range(people + idle)]
    for start in range(0, len(pages), 10):
        await asyncio.gather(*(page.open() for page in pages[start : start + 10]))
    await asyncio.gather(*(page.turn(number // 2) for number, page in enumerate(pages[:people])))
    begin = time.perf_counter()
    await asyncio.gather(*(page.label_images(labels, pause) for page in pages[:people]))
    seconds = time.perf_counter() - begin
    await asyncio.gather(*(page.socket.disconnect() for page in pages))
    times = [value for page in pages[:people] for value in page.times]
    return times, seconds, sum(page.lost for page in pages)


async def fetch(url: str) -> tuple[str, dict[str, Any]]:
    """Fetch a new page; return its id and its elements."""
    async with httpx.AsyncClient(timeout=PATIENCE_S) as client:
        text = (await client.get(url)).text
    match = re.search(r"parseElements\(String\.raw`(.*?)`\)", text, re.DOTALL)
    client_id = re.search(r"'client_id': '([^']+)'", text)
    assert match is not None, "the page is not NiceGUI's"
    assert client_id is not None, "the page has no client"
    return client_id[1], json.loads(html.unescape(match[1]))


async def wait_for_features(url: str) -> None:
    """Wait until the page no longer says that features are being computed."""
    while True:
        _, elements = await fetch(url)
        (line,) = [e for e in elements.values() if e.get("props", {}).get("data-testid") == "preparation"]
        if "hidden" in line["class"]:
            return
        await asyncio.sleep(2)


class Page:
    """Page of one person without a browser: it speaks NiceGUI's protocol."""

    def __init__(self, url: str, name: str, seed: int) -> None:
        self.url, self.name, self.rng = url.rstrip("/"), name, random.Random(seed)
        self.socket = socketio.AsyncClient()
        self.tiles: dict[str, str | None] = {}
        self.changed = asyncio.Event()
        self.times: list[float] = []
        self.lost = 0
        self.socket.on("update", self._update)
        self.socket.on("run_javascript", self._run)

    async def open(self) -> None:
        """Fetch the page and connect."""
        self.client, elements = await fetch(self.url)
        (self.gallery, gallery), *_ = [item for item in elements.items() if item[1]["tag"] == "nicegui-gallery"]
        self.events = {event["type"]: event["listener_id"] for event in gallery["events"]}
        query = f"client_id={self.client}&next_message_id=0&implicit_handshake=true&document_id={self.name}"
        await self.socket.connect(
            f"{self.url}?{query}&tab_id={self.name}&old_tab_id=",
            headers={"Origin": self.url},
            socketio_path="/_nicegui_ws/socket.io",
            transports=["websocket"],
            wait_timeout=PATIENCE_S,
        )
        await self._send("hello", {"annotator": self.name, "count": str(TILES)})

    async def turn(self, number: int) -> None:
        """Go to a page of the gallery and wait for its images."""
        while len(self.tiles) < TILES:
            await self._wait()
        if number:
            self.tiles = {}
            await self._send("turn", {"to": number, "at": "first"})
            while not self.tiles:
                await self._wait()

    async def _wait(self) -> None:
        self.changed.clear()
        await asyncio.wait_for(self.changed.wait(), PATIENCE_S)

    async def label_images(self, count: int, pause: float) -> None:
        """Label different images of the page, one after the other."""
        await asyncio.sleep(self.rng.random())
        done: set[str] = set()
        for _ in range(count):
            free = [id_ for id_, label in self.tiles.items() if label is None and id_ not in done]
            id_, label = self.rng.choice(free), self.rng.choice(KEYS)
            done.add(id_)
            begin = time.perf_counter()
            await self._send("label", {"ids": [id_], "label": label})
            while not self.tiles.get(id_) and time.perf_counter() - begin < PATIENCE_S:
                self.changed.clear()
                try:
                    await asyncio.wait_for(self.changed.wait(), 1)
                except TimeoutError:
                    continue
            self.lost += not self.tiles.get(id_)
            self.times.append(time.perf_counter() - begin)
            await asyncio.sleep(self.rng.uniform(0, 2 * pause))

    async def _send(self, event: str, args: dict[str, Any]) -> None:
        words = {"id": int(self.gallery), "client_id": self.client, "listener_id": self.events[event]}
        await self.socket.emit("event", words | {"args": [json.dumps(args)]})

    def _update(self, data: dict[str, Any]) -> None:
        page = (data.get(self.gallery) or {}).get("props", {}).get("page") or {}
        if page.get("tiles"):
            self.tiles = {tile["id"]: tile["label"] for tile in page["tiles"]}
            self.changed.set()

    def _run(self, data: dict[str, Any]) -> None:
        match = re.search(rf'runMethod\({self.gallery}, "patch", (.*)\)', data["code"], re.DOTALL)
        if match:
            tiles = json.loads(match[1])[0]
            self.tiles |= {tile["id"]: tile["label"] for tile in tiles if tile["id"] in self.tiles}
            self.changed.set()


if __name__ == "__main__":
    main()
