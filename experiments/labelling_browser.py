"""Measure what a person at the page waits for, in a browser, with archives of three sizes (README, 6).

The images are synthetic and their features random and stored, so that a million take minutes. Needs Playwright and
Chromium.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from bench import Row, make_parser, markdown, parse_options, write_csv
from labelling_page import browser
from labelling_speed import image_ids, start_service, write_features
from playwright.sync_api import Page
from synthetic import SyntheticSource

from anomalymatch.listening import open_site
from anomalymatch.ui.web.app import serve

SIZES = (6_664, 30_000, 1_000_000)
LABELS = 40
SEEN = """([id, isGone]) => new Promise((resolve) => {
  const begin = performance.now();
  const before = document.querySelector(`[data-testid=tile][data-id="${id}"]`);
  if (before.dataset.label) throw new Error(`${id} has a label already`);
  const look = () => {
    const tile = document.querySelector(`[data-testid=tile][data-id="${id}"]`);
    const isDone = isGone ? !tile : tile.dataset.label;
    isDone ? resolve((performance.now() - begin) / 1000) : requestAnimationFrame(look);
  };
  document.activeElement.dispatchEvent(new KeyboardEvent("keydown", { key: "n", bubbles: true, cancelable: true }));
  look();
})"""
"""Press n and wait, frame by frame, until a tile has its label or has gone; return the seconds."""
BOXES = """() => JSON.stringify([...document.querySelectorAll("[data-testid=tile]")].map((tile) => {
  const { x, y, width } = tile.getBoundingClientRect();
  let scrolled = 0;
  for (let around = tile.parentElement; around; around = around.parentElement) scrolled += around.scrollTop;
  return [tile.dataset.id, x, y + scrolled, width];
}))"""
"""Where the tiles are, wherever the cursor has scrolled the page to."""


def main() -> None:
    """Measure each size; with `--serve FOLDER`, only serve the page."""
    parser = make_parser(__doc__, quick="6,664 images, 10 labels")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--labels", type=int, default=LABELS)
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    options = parse_options(parser)
    if options.serve is not None:
        service = start_service(options.serve, SyntheticSource(image_ids(options.sizes[0]), 64), "auto")
        try:
            serve(service, open_site("127.0.0.1", 0, token=None), show=False)
        finally:
            service.close()
        return
    if options.quick:
        options.sizes, options.labels = SIZES[:1], 10
    rows = [row for count in options.sizes for row in measure(count, options.labels)]
    write_csv(options.results / "labelling_browser.csv", rows)
    lines = [[f"{row['images']:,}", str(row["what"]), f"{row['p50']:.3g}", f"{row['p95']:.3g}"] for row in rows]
    print(markdown(["images", "what", "p50", "p95"], lines))


def measure(count: int, labels: int) -> list[Row]:
    """Measure with one size: seconds from key to tile and to the new order, tiles that moved, and memory."""
    with tempfile.TemporaryDirectory() as name, browser() as chromium:
        write_features(Path(name), count)
        with server(Path(name), count) as (url, process):
            page = chromium.new_page(viewport={"width": 1440, "height": 900})
            begin = time.perf_counter()
            page.goto(url)
            page.wait_for_function(
                "[...document.querySelectorAll('[data-testid=tile] img')].some((i) => i.naturalWidth)"
            )
            first = time.perf_counter() - begin
            page.locator("[data-testid=tile].am-cursor").focus()
            page.keyboard.press("a")
            page.locator("[data-testid=new-order]").wait_for()
            before = page.evaluate(BOXES)
            to_tile = [press(page, is_gone=False) for _ in range(labels)]
            page.locator("[data-testid=new-order]").wait_for()
            moved = sum(
                one != other for one, other in zip(json.loads(before), json.loads(page.evaluate(BOXES)), strict=True)
            )
            page.locator("[data-testid=follow]").click()
            to_order = [press(page, is_gone=True) for _ in range(labels)]
            status = Path(f"/proc/{process.pid}/status").read_text()
            sizes = {name: int(kib) / 1024 for name, kib in re.findall(r"(\w+):\s+(\d+) kB", status)}
    seconds = {"page to first picture, s": [first], "key to tile, s": to_tile, "key to new order, s": to_order}
    memory = {"memory of the server, MiB": [sizes["VmRSS"]], "mapped files in it, MiB": [sizes["RssFile"]]}
    figures = {**seconds, "tiles moved by the labels": [moved], **memory}
    return [
        {"images": count, "what": what, "p50": np.percentile(values, 50), "p95": np.percentile(values, 95)}
        for what, values in figures.items()
    ]


def press(page: Page, *, is_gone: bool) -> float:
    """Label the image under the cursor and return the seconds until it shows its label, or has left the page."""
    cursor = page.locator("[data-testid=tile].am-cursor")
    cursor.focus()
    seconds = page.evaluate(SEEN, [cursor.get_attribute("data-id"), is_gone])
    page.wait_for_timeout(500)  # a person looks at the next image
    return float(seconds)


@contextmanager
def server(folder: Path, count: int) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Serve the page of an archive in a process of its own; yield its address and the process."""
    command = [sys.executable, __file__, "--serve", str(folder), "--sizes", str(count)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield process.stdout.readline().split()[-1], process
    finally:
        process.terminate()
        process.wait(60)


if __name__ == "__main__":
    main()
