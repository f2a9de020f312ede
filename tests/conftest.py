"""Shared fixtures. They import the library themselves: imported at the top it would escape the run-time type checks."""

import csv
import faulthandler
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # no test phones home
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny networks gain nothing from threads, and wait long for busy cores

# The hook of the run-time type checks compiles all modules that are first imported by the library, which takes half a
# minute for these: import them before.
import albumentations  # noqa: F401
import numpy as np
import pyarrow.parquet as pq
import pytest
import pytorch_lightning  # noqa: F401
import sklearn.linear_model  # noqa: F401
import timm  # noqa: F401
import torch
import torchmetrics  # noqa: F401
from hypothesis import settings
from PIL import Image

# CI draws the same examples each time, so that changes do not fail by chance; other machines draw new ones.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")

STDERR = pytest.StashKey[int]()
"""File descriptor of the terminal, while pytest captures the output."""
DEAD = pytest.StashKey[bool]()
"""True once a process of a parallel run has died."""


def pytest_configure(config: pytest.Config) -> None:
    config.stash[STDERR] = os.dup(sys.__stderr__.fileno())


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_testnodedown(node: Any, error: object) -> None:
    if error:
        node.config.stash[DEAD] = True


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Tell a run in which tests are missing, because a process died, from one in which tests failed."""
    if session.config.stash.get(DEAD, False):
        session.exitstatus = pytest.ExitCode.INTERNAL_ERROR


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Print a traceback if the process crashes; each training of Lightning resets the signal handlers."""
    faulthandler.disable()
    faulthandler.enable(item.config.stash[STDERR])


@pytest.fixture
def make_source() -> Callable[..., Any]:
    """Function that makes an image source in memory: each tenth image is `rare`, with a bright square.

    `reads` counts the decoded images.
    """
    from anomalymatch.data.rendering import band_names
    from anomalymatch.data.source import ImageSource
    from anomalymatch.errors import UnreadableImageError

    class ArraySource(ImageSource):
        def __init__(self, count: int, size: int, channels: int, unreadable: set[str], **options: Any) -> None:
            ids = [f"im{i:06d}" for i in range(count)]
            truth = {id_: "rare" if i % 10 == 0 else "common" for i, id_ in enumerate(ids)}
            defaults = {"name": "array", "ids": ids, "bands": band_names(None, channels), "truth": truth}
            super().__init__(**defaults | {"fingerprint": f"array-{count}-{size}"} | options)
            self.size, self.unreadable, self.reads = size, unreadable, 0

        def load(self, position: int) -> np.ndarray:
            self.reads += 1
            if self.ids[position] in self.unreadable:
                raise UnreadableImageError("the file is truncated")
            rng = np.random.default_rng(position)
            image = rng.integers(0, 120, (self.size, self.size, self.channels), dtype=np.uint8)
            if position % 10 == 0:
                image[self.size // 4 : self.size // 2, self.size // 4 : self.size // 2] = 250
            return image

    def make(
        count: int = 30, *, size: int = 32, channels: int = 3, unreadable: Any = (), **options: Any
    ) -> ArraySource:
        return ArraySource(count, size, channels, set(unreadable), **options)

    return make


@pytest.fixture
def task(make_source: Any) -> Any:
    """100 images, 10 of them rare, of which 80 and 8 are in the pool."""
    from anomalymatch.data.task import make_task

    return make_task(make_source(100, size=16), anomaly="rare")


@pytest.fixture
def image_folder(make_source: Callable[..., Any], tmp_path: Path) -> Callable[..., Path]:
    """Function that writes images of `make_source` as PNG files, and broken files named `damaged`."""

    def make(count: int, damaged: Sequence[str] = ()) -> Path:
        folder, source = tmp_path / "archive", make_source(count)
        folder.mkdir()
        for id_, image in zip(source.ids, source.read(source.ids), strict=True):
            Image.fromarray(image).save(folder / f"{id_}.png")
        for name in damaged:
            (folder / name).write_bytes(b"\xff\xd8\xff\xe0")
        return folder

    return make


@pytest.fixture
def memory() -> Iterator[Any]:
    """File system of `memory://` URLs, empty again after the test."""
    import fsspec

    filesystem = fsspec.filesystem("memory")
    yield filesystem
    filesystem.store.clear()
    filesystem.pseudo_dirs[:] = [""]


@pytest.fixture
def tiny_backbone() -> Iterator[Any]:
    """A 99,196-parameter EfficientNet with random weights, for 32 px; 256 features."""
    from anomalymatch.backbones.network import build_backbone

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so small a network only waits for a second thread
    yield build_backbone(name="test_efficientnet", weights="none", channels=3, image_size=32)
    torch.set_num_threads(threads)


@pytest.fixture
def tiny_network(tiny_backbone: Any) -> Any:
    """The tiny backbone with a cold head on L2-normalised features, in training mode."""
    from anomalymatch.backbones.network import Head, Network

    spec, backbone = tiny_backbone
    head = Head(backbone.features, normalised=True, generator=torch.Generator().manual_seed(0))
    return Network(spec, backbone, head)


@pytest.fixture(scope="session")
def tiny_job(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides of a job that takes about a second a cycle: 120 galaxies of 32 px in the pool, 12 of them rare."""
    cache = tmp_path_factory.mktemp("cache")
    return (
        "dataset=demo dataset.source.count=150 dataset.source.size=32 dataset.image_size=32 "
        "dataset.source.rare_fraction=0.1 model.name=test_efficientnet model.weights=none "
        "al.initial.anomalies=3 al.initial.normals=10 al.budget=4 al.cycles=2 trainer.iterations=2 "
        f"algorithm.learner.batch.labelled=2 inference.workers=1 logger=none data.cache_dir={cache}"
    ).split()


@pytest.fixture
def probe_job(tiny_job: list[str]) -> list[str]:
    """The same with the probe, which takes a few milliseconds a cycle."""
    return ["algorithm=probe", *(word for word in tiny_job if not word.startswith("algorithm"))]


@pytest.fixture
def tiny_model(tiny_job: list[str]) -> list[str]:
    """The overrides of the tiny job that hold for any images: the network, the cache, no logger."""
    kept = ("model.", "data.", "inference.", "dataset.image_size", "logger")
    return [word for word in tiny_job if word.startswith(kept)]


@pytest.fixture
def without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the figures, contact sheets and the report: they take most of the time of a tiny job."""
    from anomalymatch.active import loop

    monkeypatch.setattr(loop.RunReport, "write", lambda report: report.folder.path / "report.html")
    monkeypatch.setattr(loop, "write_sheets", lambda *args: None)


class Outcome(NamedTuple):
    """Exit code and output of a command."""

    code: int
    out: str
    err: str

    @property
    def error_line(self) -> str:
        """The one line with which the command failed."""
        *before, line = self.err.splitlines()
        assert (self.code, self.out) == (1, "")
        assert line.startswith("error: ")
        assert not any(word in "".join(before) for word in ("error", "Error", "Traceback"))
        return line


@pytest.fixture
def call_main(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., Outcome]]:
    """Function that calls the `main` of a command with arguments, in this process."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level

    def call(main: Callable[[], None], *words: object) -> Outcome:
        monkeypatch.setattr("sys.argv", ["anomalymatch", *map(str, words)])
        capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
        return Outcome(code, *capsys.readouterr())

    yield call
    root.handlers[:], root.level = handlers, level


@pytest.fixture
def call_in_folder(call_main: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Function that binds `call_main` to the `main` of a command, in the empty folder `work`."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return lambda main: partial(call_main, main)


@pytest.fixture
def command(
    call_main: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., Outcome]:
    """Function that calls `python -m anomalymatch.run` with arguments in this process, in an empty folder."""
    from anomalymatch.run import main

    monkeypatch.chdir(tmp_path)
    return partial(call_main, main)


@pytest.fixture
def make_embedding(tmp_path: Path) -> Callable[..., Any]:
    """Function that makes an embedding: a tiny network with random weights, and a source."""
    from anomalymatch.backbones.embedding import Embedding
    from anomalymatch.backbones.inference import Inference

    def make(source: Any, **changes: Any) -> Embedding:
        values: dict[str, Any] = {"name": "test_efficientnet", "weights": "none", "image_size": 32, "bn_momentum": 0.01}
        values["inference"] = Inference(device="cpu", precision="fp32", workers=1)
        return Embedding(**values | changes, source=source, cache_dir=tmp_path / "cache")

    return make


@pytest.fixture
def events() -> Callable[..., Any]:
    """Function that reads the label log of a run folder."""
    from anomalymatch.data.label_log import LabelLog

    def read(path: Path) -> list[Any]:
        log = LabelLog(path / "labels.sqlite")
        try:
            return log.events()
        finally:
            log.close()

    return read


@pytest.fixture
def comparable(events: Any) -> Callable[..., Any]:
    """Function that reads everything of a run but times, to compare two runs."""

    def read(path: Path) -> dict[str, Any]:
        with (path / "metrics.csv").open(newline="") as file:
            rows = [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]
        return {
            "metrics": rows,
            "log": [(e.id, e.label, e.annotator, e.cycle, e.score) for e in events(path)],
            "labels.csv": (path / "labels.csv").read_text(),
            "rejects": pq.read_table(path / "rejects.parquet").to_pydict(),
            "scores": {p.parent.name: pq.read_table(p).to_pydict() for p in path.glob("cycles/??/scores.parquet")},
            "weights": {p.parent.name + p.name: p.read_bytes() for p in path.glob("cycles/??/*.safetensors")},
            "steps": {p.parent.name: p.read_text() for p in path.glob("cycles/??/steps.csv")},
        }

    return read


@pytest.fixture
def wait_for() -> Callable[..., None]:
    """Wait in a thread until a condition holds."""

    def wait(condition: Callable[[], object], seconds: float = 30) -> None:
        give_up = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < give_up, "the condition was not met in time"
            time.sleep(0.01)

    return wait
