"""A million images on the labelling page: pages, filters, a label, a re-rank, memory (README: table 6)."""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from bench import HERE, Row

from anomalymatch.active.run_folder import to_csv
from anomalymatch.files import write_text
from anomalymatch.models.features import SHARD_IMAGES, Features, Shard
from anomalymatch.models.probe import ProbeSpec
from anomalymatch.ui.bank import FeatureBank, build_bank
from anomalymatch.ui.gallery import Gallery
from anomalymatch.ui.live import LiveRanking
from anomalymatch.ui.tiles import Query, Show, Sort

DIMENSIONS = 128
COMPRESSIONS = ("exact", "pca", "pq")
REPEATS = 5
PROBE = ProbeSpec(inverse_regularisation=10.0, rounds=3, confidence=0.8, weight=0.25, limit=200)
BARS = {"first page": 2.0, "next page": 0.3, "a label": 0.1, "re-rank": 1.0, "memory": 2048.0}


def main() -> None:
    """Measure and print; with `--features FOLDER --compression NAME`, only that, in this process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder of the table")
    parser.add_argument("--features", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--compression", choices=COMPRESSIONS, help="measure this one alone, on --features")
    options = parser.parse_args()
    if options.features is not None:
        print(json.dumps(measure(options.features, options.images, options.compression)))
        return
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        write_features(Path(name), options.images)
        for compression in COMPRESSIONS:  # in a process each, for the memory
            words = ["--images", str(options.images), "--features", name, "--compression", compression]
            done = subprocess.run([sys.executable, __file__, *words], check=True, stdout=subprocess.PIPE, text=True)
            rows += json.loads(done.stdout)
    write_text(options.results / "labelling_speed.csv", to_csv(rows))
    print(f"| what | bar | {' | '.join(COMPRESSIONS)} |\n|---|---|{'---|' * len(COMPRESSIONS)}")
    for row in rows[: len(rows) // len(COMPRESSIONS)]:
        values = " | ".join(f"{other['median']:.3g}" for other in rows if other["what"] == row["what"])
        print(f"| {row['what']}, {row['unit']} | {row['bar'] or ''} | {values} |")


def image_ids(count: int) -> list[str]:
    """Names as an archive has them."""
    return [f"field_{i // 1000:05d}/cutout_{i:08d}.fits" for i in range(count)]


def write_features(folder: Path, count: int) -> None:
    """Random L2-normalised features of `count` images in shards, as the feature cache has them."""
    rng = np.random.default_rng(0)
    for start in range(0, count, SHARD_IMAGES):
        rows = rng.standard_normal((min(SHARD_IMAGES, count - start), DIMENSIONS), dtype=np.float32)
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        np.save(folder / f"{start:09d}.npy", rows.astype(np.float16), allow_pickle=False)


def read_features(folder: Path, ids: list[str]) -> Features:
    """What `write_features` wrote, mapped into memory."""
    shards = []
    for start in range(0, len(ids), SHARD_IMAGES):
        rows = np.load(folder / f"{start:09d}.npy", mmap_mode="r", allow_pickle=False)
        shards.append(Shard(ids[start : start + SHARD_IMAGES], rows, []))
    return Features(shards)


def measure(folder: Path, count: int, compression: str) -> list[Row]:
    """Seconds of everything that a person waits for, and the memory in the end."""
    ids = image_ids(count)
    features = read_features(folder, ids)

    def start() -> tuple[FeatureBank, Gallery]:
        bank = build_bank(features, ids, compression=compression, dimensions=DIMENSIONS, folder=folder)
        return bank, Gallery(ids, seed=0, metadata=None)

    seconds: dict[str, list[float]] = {"compress, once": [timed(start)]}
    rng = np.random.default_rng(0)
    labels = np.zeros(count, dtype=np.int8)
    anomalies, normals = np.split(rng.choice(count, 60, replace=False), [20])
    labels[anomalies], labels[normals] = 1, 2
    no_examples = np.zeros((0, DIMENSIONS), dtype=np.float32)

    def show(gallery: Gallery, live: LiveRanking, logits: np.ndarray) -> None:
        newest = np.flatnonzero(labels)
        gallery.update(logits=logits, labels=labels, newest=newest, conflicts=newest[:3], diverse=live.diverse)
        gallery.rank(gallery.page(Query())[0])

    def first_batch() -> None:
        bank, _ = start()
        LiveRanking(bank, PROBE, seed=0).first_batch(48)

    def first_page() -> None:
        bank, gallery = start()
        live = LiveRanking(bank, PROBE, seed=0)
        show(gallery, live, live.fit(anomalies, normals, no_examples))

    seconds["first page, without labels"] = [timed(first_batch) for _ in range(REPEATS)]
    seconds["first page, with labels"] = [timed(first_page) for _ in range(REPEATS)]
    bank, gallery = start()
    live = LiveRanking(bank, PROBE, seed=0)
    for repeat in range(REPEATS):
        for what, work in steps(gallery, live, anomalies, normals[repeat:], labels, show):
            seconds.setdefault(what, []).append(timed(work))
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return [
        *(row(compression, count, what, "s", values) for what, values in seconds.items()),
        row(compression, count, "memory", "MB", [memory]),
    ]


def steps(
    gallery: Gallery,
    live: LiveRanking,
    anomalies: np.ndarray,
    normals: np.ndarray,
    labels: np.ndarray,
    show: Callable[[Gallery, LiveRanking, np.ndarray], None],
) -> Iterator[tuple[str, Callable[[], object]]]:
    """What happens while one labels."""
    state: dict[str, np.ndarray] = {}

    def rerank() -> None:
        state["logits"] = live.fit(anomalies, normals, np.zeros((0, DIMENSIONS), dtype=np.float32))
        show(gallery, live, state["logits"])

    def label() -> None:
        labels[gallery.page(Query())[0][0]] = 1
        show(gallery, live, state["logits"])

    yield "re-rank: fit, project, sort, page", rerank
    yield "next page", lambda: gallery.page(Query(page=1))
    yield "a label: page without it", label
    for sort in Sort:
        yield f"next page, {sort}: first time", lambda sort=sort: gallery.page(Query(sort=sort, page=1))
    word = f"{len(normals):02d}7"
    yield "next page, text filter: first time", lambda: gallery.page(Query(text=word, page=1))
    yield "next page, text filter: again", lambda: gallery.page(Query(text=word, page=2))
    yield "next page, all labels, scores 0.2 to 0.4", lambda: gallery.page(Query(show=Show.ALL, low=0.2, high=0.4))
    yield "neighbours of an image", lambda: live.bank.nearest(live.bank.rows(anomalies[:1])[0], 48)


def timed(work: Callable[[], object]) -> float:
    """Seconds of one call."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def row(compression: str, count: int, what: str, unit: str, values: list[float]) -> Row:
    """One line of the table, with the bar that it must stay under."""
    bar = next((limit for name, limit in BARS.items() if what.startswith(name)), "")
    median, worst = statistics.median(values), max(values)
    return {
        "compression": compression,
        "images": count,
        "what": what,
        "unit": unit,
        "median": median,
        "worst": worst,
        "bar": bar,
    }


if __name__ == "__main__":
    main()
