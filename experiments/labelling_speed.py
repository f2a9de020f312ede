"""Measure the labelling page with a million images: pages, filters, labels and rankings (README, 6)."""

import argparse
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from bench import Row, make_parser, markdown, parse_options, write_csv
from synthetic import SyntheticSource

from anomalymatch import compose
from anomalymatch.algorithms.novelty.detectors import Neighbours
from anomalymatch.algorithms.probe.regression import ProbeSpec
from anomalymatch.backbones.features import SHARD_IMAGES, Features, Shard
from anomalymatch.build_images import build
from anomalymatch.data.source import ImageSource
from anomalymatch.types import Label
from anomalymatch.ui import LabelService, LiveRanking, Query, Show, Sort, build_feature_store, compute_novelty

DIMENSIONS = 128
STAGE_WIDTH = 128
"""Columns of the last layer and of the stages, as many as the principal components that the page keeps of each."""
COMPRESSIONS = ("exact", "pca")
REPEATS = 5
PROBE: ProbeSpec = build(compose("probe.orientations=1").probe)
LIMITS = {"first page": 2.0, "next page": 0.3, "a label": 0.1, "re-rank": 1.0}


def main() -> None:
    """Measure and print everything; with `--features FOLDER --compression NAME`, only that, in this process."""
    parser = make_parser(__doc__, quick="20,000 images")
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--features", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--compression", choices=COMPRESSIONS, help=argparse.SUPPRESS)
    options = parse_options(parser)
    if options.quick:
        options.images = 20_000
    if options.features is not None:
        print(json.dumps(measure(options.features, options.images, options.compression)))
        return
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        write_features(Path(name), options.images)
        for compression in COMPRESSIONS:  # each in its own process, to measure its memory
            arguments = ["--images", str(options.images), "--features", name, "--compression", compression]
            done = subprocess.run([sys.executable, __file__, *arguments], check=True, stdout=subprocess.PIPE, text=True)
            rows += json.loads(done.stdout)
    write_csv(options.results / "labelling_speed.csv", rows)
    lines = []
    for row in rows[: len(rows) // len(COMPRESSIONS)]:
        values = [f"{other['median']:.3g}" for other in rows if other["what"] == row["what"]]
        lines.append([str(row["what"]), str(row["bar"] or ""), *values])
    print(markdown(["what, seconds", "limit", *COMPRESSIONS], lines))


def image_ids(count: int) -> list[str]:
    """Make ids that look like the file names of an archive."""
    return [f"field_{i // 1000:05d}/cutout_{i:08d}.fits" for i in range(count)]


def write_features(folder: Path, count: int) -> None:
    """Write random features of `count` images in shards like those of the cache: L2-normalised, then stages."""
    rng = np.random.default_rng(0)
    for start in range(0, count, SHARD_IMAGES):
        rows = rng.standard_normal((min(SHARD_IMAGES, count - start), DIMENSIONS), dtype=np.float32)
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        stages = rng.standard_normal((len(rows), STAGE_WIDTH), dtype=np.float32)
        rows = np.concatenate([rows, stages], axis=1)
        np.save(folder / f"{start:09d}.npy", rows.astype(np.float16), allow_pickle=False)


def read_features(folder: Path, ids: list[str]) -> Features:
    """Map the shards of `write_features` into memory."""
    shards = []
    for start in range(0, len(ids), SHARD_IMAGES):
        rows = np.load(folder / f"{start:09d}.npy", mmap_mode="r", allow_pickle=False)
        shards.append(Shard(ids[start : start + SHARD_IMAGES], rows, []))
    return Features(shards, stage_width=STAGE_WIDTH)


def start_service(folder: Path, archive: ImageSource, compression: str) -> LabelService:
    """Start a service on the features in a folder, with its run folder in it, and wait for its first page."""
    features = read_features(folder, list(archive.ids))
    store = build_feature_store(features, archive.ids, compression=compression, dimensions=DIMENSIONS, folder=folder)
    novelty = compute_novelty(store, Neighbours(10), folder=folder)
    run = folder / compression
    run.mkdir(exist_ok=True)
    service = LabelService(
        run,
        archive,
        lambda *_: LiveRanking(store, PROBE, seed=0, novelty=novelty),
        encode=unused,
        locate=unused,
        divide=unused,
        training_steps=1,
        cache=folder / "thumbnails",
        workers=2,
        seed=0,
        needs_labels=True,
        stopping=build(compose().al.stopping),
    )
    service.preparation.wait()
    service.page(Query())
    return service


def measure(folder: Path, count: int, compression: str) -> list[Row]:
    """Measure the seconds that an annotator waits for each step."""
    archive = SyntheticSource(image_ids(count), 64)

    def opening_seconds() -> float:
        gc.collect()  # free the previous service: in real use, a process opens only one
        return timed(lambda: start_service(folder, archive, compression).close())

    seconds: dict[str, list[float]] = {"compress, once": [opening_seconds()]}
    seconds["first page, without labels"] = [opening_seconds() for _ in range(REPEATS)]
    service = start_service(folder, archive, compression)
    rng = np.random.default_rng(0)
    drawn = [archive.ids[i] for i in rng.choice(count, 60, replace=False)]
    service.label(drawn[:20], Label.ANOMALY, "start")
    service.label(drawn[20:], Label.NORMAL, "start")
    service.close()
    seconds["first page, with labels"] = [opening_seconds() for _ in range(REPEATS)]
    gc.collect()
    service = start_service(folder, archive, compression)
    for repeat in range(REPEATS):
        for what, work in steps(service, drawn[repeat]):
            seconds.setdefault(what, []).append(timed(work))
    service.close()
    return [row(compression, count, what, values) for what, values in seconds.items()]


def steps(service: LabelService, known: str) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield the steps of labelling, in order."""
    ranked = threading.Event()
    leave = service.subscribe(lambda change: ranked.set() if change.kind == "ranking" else None)

    def label() -> None:
        ranked.clear()
        service.label([service.page(Query()).tiles[0].id], Label.NORMAL, "annotator")

    yield "a label: on disk and gone from the page", label
    yield "re-rank behind a label", lambda: ranked.wait(60)
    leave()
    yield "re-rank: fit, project, sort, page", lambda: (service.rerank(), service.page(Query()))
    yield "next page", lambda: service.page(Query(page=1))
    for sort in Sort:
        yield f"next page, {sort}: first time", lambda sort=sort: service.page(Query(sort=sort, page=1))
    word = f"{known[-6:-5]}7{known[-8:-7]}"
    yield "next page, text filter: first time", lambda: service.page(Query(text=word, page=1))
    yield "next page, text filter: again", lambda: service.page(Query(text=word, page=2))
    yield "next page, all labels, scores 0.2 to 0.4", lambda: service.page(Query(show=Show.ALL, low=0.2, high=0.4))
    yield "neighbours of an image", lambda: service.neighbours(known, 48)
    yield "the panel", service.summary
    yield "undo", lambda: service.undo("annotator")
    time.sleep(1)  # wait for the ranking that follows, so that it does not slow the next step


def unused(*arguments: object) -> np.ndarray:
    """Stand in for the encoder and the grouping, which no step needs."""
    raise NotImplementedError


def timed(work: Callable[[], object]) -> float:
    """Return the seconds of one call."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def row(compression: str, count: int, what: str, values: list[float]) -> Row:
    """Make a row of the table, with the limit that it must stay under."""
    bar = next((limit for name, limit in LIMITS.items() if what.startswith(name)), "")
    named = {"compression": compression, "images": count, "what": what}
    return {**named, "median": statistics.median(values), "worst": max(values), "bar": bar}


if __name__ == "__main__":
    main()
