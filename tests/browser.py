"""Page in a real browser, and the command that serves it, with the actions of a person."""

import csv
import io
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

from anomalymatch.ui.state import IN_FILE_ORDER

SMALL = [
    *("dataset=demo", "dataset.source.count=600", "dataset.source.size=32", "dataset.image_size=32"),
    *("dataset.source.rare_fraction=0.05", "model.name=test_efficientnet", "model.weights=none"),
    *("inference.workers=1", "logger=none", "algorithm.learner.batch.labelled=2"),
]

WAIT_MS = 60_000


class Page:
    """Page in the browser with the actions of a person."""

    def __init__(self, context, url, path="", ready=True):
        self.page = context.new_page()
        self.page.set_default_timeout(WAIT_MS)
        self.complaints, self.foreign = [], []
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("console", self._record_console)
        own = url.partition("?")[0]
        self.page.on("request", lambda request: self._record_request(request.url, own))
        self.open(url + path)
        is_early = self.get("preparation").is_visible() or self.get("note").filter(has_text=IN_FILE_ORDER).count()
        if ready and is_early:  # the features were not there when the images were chosen
            self.page.wait_for_selector("[data-testid=preparation]", state="hidden")
            self.page.goto("about:blank")  # the same address again would be a reload, which keeps the images
            self.open(url + path)

    def open(self, address):
        """Go to an address and wait for its tiles."""
        self.page.goto(address)
        self.page.wait_for_selector("[data-testid=tile].am-cursor")

    def _record_console(self, message):
        if message.type == "error":
            self.complaints.append(message.text)

    def _record_request(self, address, url):
        if not address.startswith((url, url.replace("http", "ws", 1), "data:", "blob:")):
            self.foreign.append(address)

    def get(self, name):
        return self.page.locator(f"[data-testid={name}]")

    def tile(self, id_):
        escaped = re.sub(r"\W", lambda character: f"\\{ord(character[0]):x} ", id_)
        return self.page.locator(f'[data-testid=tile][data-id="{escaped}"]')

    @property
    def ids(self):
        return self.page.eval_on_selector_all("[data-testid=tile]", "tiles => tiles.map(tile => tile.dataset.id)")

    @property
    def cursor(self):
        return self.page.locator("[data-testid=tile].am-cursor").get_attribute("data-id")

    def press(self, *keys):
        for key in keys:
            self.page.keyboard.press(key)

    def count(self, label):
        return int(self.get(f"count-{label}").locator(".am-figure").inner_text().replace(",", ""))

    def counts(self):
        return {label: self.count(label) for label in ("anomaly", "normal", "unsure", "artefact")}

    def choose(self, name, value):
        """Choose a value of a drop-down list."""
        self.get(name).click()
        self.page.get_by_role("option", name=value, exact=True).click()

    def switch(self, name, on):
        switch = self.get(name)
        if (switch.get_attribute("aria-checked") == "true") != on:
            switch.click()
            self.tile(self.cursor).focus()

    def until(self, condition, what, seconds=60):
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"not in time: {what}"
            self.page.wait_for_timeout(50)

    def label(self, key, label):
        """Press a key for the tile under the cursor; return its id once the label is on disk and on the tile.

        This turns off `follow`: otherwise the order could change before the key is pressed.
        """
        self.switch("follow", False)
        id_ = self.cursor
        self.press(key)
        self.until(lambda: self.tile(id_).get_attribute("data-label") == label, f"{id_} is labelled {label}")
        return id_

    def rerank(self):
        """Re-rank and go to the top."""
        top = self.ids[0]
        self.press("r")
        self.until(lambda: self.ids[0] != top, "another image is on top")
        self.press("Home")

    def exported(self):
        """Return the labels of the CSV export."""
        with self.page.expect_download() as download:
            self.get("export-csv").click()
        text = Path(download.value.path()).read_text(encoding="utf-8")
        return {row["filename"]: row["label"] for row in csv.DictReader(io.StringIO(text))}


class Command:
    """Process of `python -m anomalymatch.label`."""

    def __init__(self, folder, *words):
        self.folder, self.words, self.url = folder, words, ""
        self.process = None

    def start(self, port=0):
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
        words = [*self.words, f"ui.run={self.folder / 'run'}", f"ui.port={port}", "ui.show=false"]
        with (self.folder / "stderr.txt").open("a") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "anomalymatch.label", *words],
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                cwd=self.folder,
                env=environment,
            )
        line = self.process.stdout.readline()
        assert line, self.output()
        self.url = re.search(r"http://\S+", line)[0]
        return self

    def output(self):
        return (self.folder / "stderr.txt").read_text(encoding="utf-8")

    def end(self, number=signal.SIGINT):
        """Stop the command and wait for its end."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            self.process.communicate(timeout=60)
        finally:
            self.process.kill()
        return self.process.returncode


@contextmanager
def running(folder, *words):
    command = Command(folder, *words).start()
    try:
        yield command
    finally:
        command.end()
        assert "Traceback" not in command.output()
