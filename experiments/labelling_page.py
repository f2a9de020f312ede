"""Take screenshots of each view of the labelling page: `labelling_page.py FOLDER [OVERRIDES]`.

The overrides choose the images (default: the demo) and the training. Anomalies are labelled by their known classes, so
the data set must have classes and a rare one (`--rare`). Needs Playwright and Chromium.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Browser, Page, sync_playwright

from anomalymatch import compose
from anomalymatch.build_images import build_source

SHORT_TRAINING = ["trainer.iterations=60", "logger=none"]
EXAMPLES, LABELS = 5, 40
WIDE, PHONE = {"width": 1440, "height": 900}, {"width": 390, "height": 844}


def main() -> None:
    """Start the server, search for a while and save the screenshots."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder for the screenshots")
    parser.add_argument("overrides", nargs="*", default=["dataset=demo"], help="such as dataset=galaxyzoo1")
    parser.add_argument("--rare", default="lens_arc", help="class to search for")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    overrides = [*SHORT_TRAINING, *options.overrides]
    truth = build_source(compose(*overrides, name="label")).truth
    if truth is None or options.rare not in truth.values():
        sys.exit(f"no image has the class {options.rare}: choose another one with --rare")
    with server(overrides) as url, browser() as chromium:
        for name, page in views(chromium, url, truth, options.rare):
            path = options.folder / f"{name}.png"
            page.screenshot(path=path)
            print(path)


def views(chromium: Browser, url: str, truth: Mapping[str, str], rare: str) -> Iterator[tuple[str, Page]]:
    """Yield the name and page of each view when it is ready."""
    page = open_page(chromium, url, "dark")
    search(page, truth, rare)
    yield "gallery_dark", settled(page)
    yield "gallery_light", settled(open_page(chromium, url, "light"))
    page.keyboard.press("m")
    page.locator("[data-testid=map-state]").get_by_text("images").wait_for(timeout=300_000)
    yield "map", settled(page)
    page.keyboard.press("m")
    page.keyboard.press("r")
    page.wait_for_timeout(3000)
    page.locator("[data-testid=tile]").first.click()
    page.keyboard.press("Space")
    page.locator("[data-testid=viewer]").wait_for()
    page.locator("[data-testid=neighbour]").first.wait_for()
    yield "large_view", settled(page)
    page.locator("[data-testid=compare]").click()
    page.wait_for_function("document.querySelectorAll('[data-testid=full]').length > 1")
    yield "compare_stretches", settled(page)
    page.keyboard.press("Escape")
    page.locator("[data-testid=viewer]").wait_for(state="detached")
    page.keyboard.press("?")
    page.locator("[data-testid=help]").wait_for()
    yield "keys", settled(page)
    page.keyboard.press("Escape")
    page.locator("[data-testid=help]").wait_for(state="detached")
    page.keyboard.press("t")
    page.locator("[data-testid=train-yes]").click()
    page.locator("[data-testid=losses]").wait_for(timeout=600_000)
    page.wait_for_function(
        "parseInt(document.querySelector('[data-testid=training-state]').innerText.match(/step (\\d+)/)?.[1]) >= 12",
        timeout=600_000,
    )
    page.locator("[data-testid=section-training]").scroll_into_view_if_needed()
    yield "training", settled(page)
    yield "phone", settled(open_page(chromium, url, "dark", viewport=PHONE, is_mobile=True, has_touch=True))


def search(page: Page, truth: Mapping[str, str], rare: str) -> None:
    """Import five examples, then label images by their true class, ten between two rankings."""
    examples = [id_ for id_, name in truth.items() if name == rare][:EXAMPLES]
    text = "filename,label\n" + "".join(f"{id_},anomaly\n" for id_ in examples)
    file = {"name": "labels.csv", "mimeType": "text/csv", "buffer": text.encode()}
    page.locator("[data-testid=import-file]").set_input_files(files=[file])  # type: ignore[list-item]
    page.get_by_text(f"{EXAMPLES} labels imported").wait_for()
    for _ in range(LABELS // 10):
        page.keyboard.press("r")
        page.wait_for_timeout(3000)
        page.locator("[data-testid=tile]").first.click()
        for _ in range(10):
            tile = page.locator("[data-testid=tile].am-cursor")
            id_ = tile.get_attribute("data-id") or ""
            page.keyboard.press("a" if truth[id_] == rare else "n")
            page.wait_for_function(
                "id => document.querySelector(`[data-id='${CSS.escape(id)}']`)?.dataset.label", arg=id_
            )


def settled(page: Page) -> Page:
    """Wait until all visible images are loaded and notifications have disappeared."""
    page.wait_for_timeout(6500)
    page.wait_for_function(
        """[...document.images].every(image => image.complete ||
            image.getBoundingClientRect().top > innerHeight)"""
    )
    return page


def open_page(chromium: Browser, url: str, theme: str, **options: object) -> Page:
    """Open the page with a theme and an annotator's name."""
    page = chromium.new_page(**{"viewport": WIDE, **options})  # type: ignore[arg-type]
    page.set_default_timeout(60_000)
    closed = '["description"]'  # whose weights may be out of reach
    for key, value in {"theme": theme, "annotator": "Ada", "closed": closed}.items():
        page.add_init_script(f"localStorage.setItem('anomalymatch.{key}', '{value}')")
    page.goto(url)
    page.locator("[data-testid=tile].am-cursor").wait_for()
    return page


@contextmanager
def browser() -> Iterator[Browser]:
    """Start a headless Chromium: $CHROMIUM, the system's, or Playwright's own."""
    with sync_playwright() as playwright:
        path = os.environ.get("CHROMIUM") or shutil.which("chromium") or playwright.chromium.executable_path
        chromium = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@contextmanager
def server(overrides: list[str], run: Path | None = None) -> Iterator[str]:
    """Start the labelling page on a run folder, by default a temporary one, and yield its address."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "anomalymatch.label", *overrides]
        command += [f"ui.run={run or Path(folder) / 'run'}", "ui.port=0", "ui.show=false"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout is not None
            match = re.search(r"http://\S+", process.stdout.readline())
            if match is None:
                sys.exit("the server did not start: see its messages above")
            yield match[0]
        finally:
            process.terminate()
            process.wait(60)


if __name__ == "__main__":
    main()
