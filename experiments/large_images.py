"""Find small details in large images: the probe on tiles (model.tiles) against the whole image.

Two kinds of images, both written as grey JPEGs:

- crack, blowhole: 768 x 768 px mosaics of magnetic tiles without a defect in cells of 256 px (cut out and mirrored
  at random), on which one more tile is pasted at its native size at a random place: one with a defect in the anomalies,
  another one without a defect in the normals.
- scratch: 2,000 x 2,000 px of brushed metal (noise blurred along a random direction, blotches, grain) with 5 to 14
  round dark specks; every eighth image also has one straight dark scratch of 30 px, 2 px wide, at a random place and
  angle.

Choices are made on the first half of the draws; the tables report the second half.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from bench import DATA, Row, format_interval, group_by, make_parser, markdown, parse_options, run_once, write_csv
from jaxtyping import Float32, Int64, UInt8
from PIL import Image as PillowImage
from sklearn.metrics import average_precision_score

from anomalymatch import initial_labels, make_learner, open_task
from anomalymatch.algorithms.probe import self_train
from anomalymatch.backbones.features import Features, Shard, normalise_last
from anomalymatch.backbones.inference import Inference
from anomalymatch.backbones.openvino import Forward
from anomalymatch.data.labels import training_ids
from anomalymatch.data.source import ImageSource
from anomalymatch.data.task import Task
from anomalymatch.evaluation.confidence import mean_interval
from anomalymatch.evaluation.contact_sheet import contact_sheet, save_sheet
from anomalymatch.files import atomic_folder
from anomalymatch.text import safe_name
from anomalymatch.types import Reject

Grey = UInt8[np.ndarray, "h w"]
ANOMALIES = {"mosaics": ("crack", "blowhole"), "surfaces": ("scratch",)}
SIDES = {"mosaics": 768, "surfaces": 2000}
"""Side of the images in pixels."""
CELL, SCRATCH = 256, 30
"""Side of a cell of a mosaic, and length of a scratch, in pixels."""
DEFECTS, EVERY, QUALITY = 57, 8, 95
"""Mosaics with each defect, surfaces for one with a scratch, and quality of the JPEGs."""
SETTINGS = {
    "whole, 224 px": (224, 1),
    "whole, 728 px": (728, 1),
    "whole, 1064 px": (1064, 1),
    "2 x 2 tiles": (224, 2),
    "4 x 4 tiles": (224, 4),
    "6 x 6 tiles": (224, 6),
}
"""Side of the network's images in pixels, and tiles along each side; 728 and 1,064 px are what 4 and 6 tiles cover."""
COMPARED = {
    "mosaics": ("whole, 224 px", "4 x 4 tiles", "whole, 728 px", "2 x 2 tiles"),
    "surfaces": ("whole, 224 px", "6 x 6 tiles", "whole, 1064 px", "4 x 4 tiles"),
}
"""Settings of each set; `model.tiles=auto` takes 2 and 6."""
APART = "all, weighted apart"
PARTS = {"all": (0, 1, 2), APART: (0, 1, 2), "largest": (1,), "mean": (2,)}
"""Choices among the parts of the features with tiles: whole, largest and mean.

Where they are weighted apart, cross-validation on the labels weights six views of an image instead of two.
"""
FIRST, TIMED = (20, 50), 8
"""Ranks up to which found anomalies are counted, and images whose work is timed."""


def main() -> None:
    """Measure all tasks and print the tables."""
    parser = make_parser(__doc__)
    parser.add_argument("--draws", type=int, default=8, help="number of initial label sets")
    parser.add_argument("--images", type=int, default=240, help="number of surfaces, and of mosaics without defect")
    parser.add_argument("--sets", nargs="*", default=list(SIDES), choices=list(SIDES))
    parser.add_argument("--settings", type=int, default=4, help="number of settings of each set")
    options = parse_options(parser)
    draws, count = (2, 140) if options.quick else (options.draws, options.images)
    runs, rows, costs = options.runs / "large_images", list[Row](), list[Row]()
    for name in options.sets:
        settings = COMPARED[name][: 2 if options.quick else options.settings]
        folder = runs / f"{name}-{count}"
        if not folder.exists():
            runs.mkdir(parents=True, exist_ok=True)
            with atomic_folder(folder) as unfinished:
                write_images(name, unfinished, count)
        source = open_task("folder", f"data.root={folder}").source
        save_sheet(sheet_of(source), folder.with_suffix(".png"))
        for setting, anomaly in product(settings, ANOMALIES[name]):
            path = runs / f"{folder.name}-{safe_name(setting)}-{anomaly}-{draws}.csv"
            rows += run_once(path, measure, source, anomaly, setting, draws, runs)
        path = runs / f"{folder.name}-{len(settings)}-work.csv"
        costs += run_once(path, measure_work, source, name, settings, runs)
    write_csv(options.results / "large_images.csv", rows)
    print(compared(rows, costs, draws))


def write_images(name: str, folder: Path, count: int) -> None:
    """Write the images of a set as JPEGs, in a folder for each class."""
    images = surfaces(count) if name == "surfaces" else mosaics(count)
    for kind in ("free", *ANOMALIES[name]):
        (folder / kind).mkdir()
    for number, (kind, image) in enumerate(images):
        cv2.imwrite(str(folder / kind / f"{number:04d}.jpg"), image, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])


def mosaics(most: int) -> Iterator[tuple[str, Grey]]:
    """Yield class and pixels of a mosaic for each of `DEFECTS` tiles with each defect, and for `most` tiles without."""
    source = open_task("parquet", f"data.root={DATA / 'magnetic_tile'}", "dataset.source.channels=1").source
    tiles = {
        kind: [image[..., 0] for image in source.read([id_ for id_ in source.ids if source.truth[id_] == kind])]
        for kind in ("free", *ANOMALIES["mosaics"])
    }
    for kind, pasted in tiles.items():
        for number, tile in enumerate(pasted[: most if kind == "free" else DEFECTS]):
            others = [free for k, free in enumerate(tiles["free"]) if kind != "free" or k != number]
            yield kind, mosaic(others, tile, SIDES["mosaics"], np.random.default_rng([len(kind), number]))


def mosaic(free: Sequence[Grey], pasted: Grey, side: int, rng: np.random.Generator) -> Grey:
    """Fill an image with cells of tiles without a defect, and paste one tile at a random place."""
    image = np.empty((side, side), np.uint8)
    for top in range(0, side, CELL):
        for left in range(0, side, CELL):
            tile = free[rng.integers(len(free))][:: rng.choice([-1, 1]), :: rng.choice([-1, 1])]
            height, width = tile.shape
            tile = np.pad(tile, ((0, max(0, CELL - height)), (0, max(0, CELL - width))), mode="symmetric")
            y, x = (rng.integers(length - CELL + 1) for length in tile.shape)
            image[top : top + CELL, left : left + CELL] = tile[y : y + CELL, x : x + CELL]
    y, x = (rng.integers(side - length + 1) for length in pasted.shape)
    image[y : y + pasted.shape[0], x : x + pasted.shape[1]] = pasted
    return image


def surfaces(count: int) -> Iterator[tuple[str, Grey]]:
    """Yield class and pixels of surfaces, of which the first of every `EVERY` has a scratch."""
    for number in range(count):
        has = number % EVERY == 0
        yield "scratch" if has else "free", surface(SIDES["surfaces"], has, np.random.default_rng(number))


def surface(side: int, has_scratch: bool, rng: np.random.Generator) -> Grey:
    """Draw brushed metal with specks, and perhaps a scratch."""
    angle = rng.uniform(0, np.pi)
    kernel = np.zeros((41, 41), np.float32)
    across, down = np.rint(20 * np.array([np.cos(angle), np.sin(angle)])).astype(int).tolist()
    cv2.line(kernel, (20 - across, 20 - down), (20 + across, 20 + down), 1.0)
    brushed = cv2.filter2D(rng.standard_normal((side, side), np.float32), -1, kernel)
    blotches = cv2.resize(rng.standard_normal((side // 50, side // 50), np.float32), (side, side))
    marks = np.zeros((side, side), np.uint8)
    for _ in range(rng.integers(5, 15)):
        place = rng.integers(SCRATCH, side - SCRATCH, 2).tolist()
        cv2.circle(marks, place, int(rng.integers(2, 5)), 255, -1, cv2.LINE_AA)
    middle, angle = rng.integers(2 * SCRATCH, side - 2 * SCRATCH, 2), rng.uniform(0, np.pi)
    if has_scratch:
        half = SCRATCH / 2 * np.array([np.cos(angle), np.sin(angle)])
        ends = (np.rint(middle + sign * half).astype(int).tolist() for sign in (-1, 1))
        cv2.line(marks, *ends, 255, 2, cv2.LINE_AA)
    image = rng.uniform(100, 150) + 10 * brushed / brushed.std() + 8 * blotches
    image -= 60 / 255 * cv2.GaussianBlur(marks, (0, 0), 0.7)
    image += 4 * rng.standard_normal((side, side), np.float32)
    return np.rint(image.clip(0, 255)).astype(np.uint8)


def measure(source: ImageSource, anomaly: str, setting: str, draws: int, cache: Path) -> Iterator[Row]:
    """Yield average precision and anomalies found of each draw, by all features and by each choice of the parts."""
    learner = make_setting(source, setting, cache)
    features = learner.embedding.probe_features
    columns = {"all": np.arange(features.dimensions)}
    if learner.embedding.spec.tiles > 1:
        columns = {name: columns_of(features, parts) for name, parts in PARTS.items()}
    kinds = {kind: [id_ for id_ in source.ids if id_.startswith(f"{kind}/")] for kind in (anomaly, "free")}
    task = Task(source, [*kinds[anomaly], *kinds["free"]], [], frozenset(kinds[anomaly]))
    for draw in range(draws):
        labels = initial_labels(task, anomalies=5, normals=100, seed=draw)
        rest = [id_ for id_ in task.pool if id_ not in labels]
        truth = task.truth(rest)
        for parts, own in columns.items():
            order = rank(learner, labels, rest, own, apart=parts == APART)
            yield {
                "anomaly": anomaly,
                "setting": setting,
                "parts": parts,
                "draw": draw,
                "there": int(truth.sum()),
                "ap": average_precision_score(truth, -np.argsort(order)),
                **{f"found_{first}": int(truth[order[:first]].sum()) for first in FIRST},
            }


def make_setting(source: ImageSource, setting: str, cache: Path) -> Any:
    """Make the probe of a setting."""
    size, tiles = SETTINGS[setting]
    words = [
        "probe.orientations=1",
        f"model.image_size={size}",
        f"model.tiles={tiles}",
        f"data.cache_dir={cache / 'cache'}",
    ]
    return make_learner("probe", Task(source, source.ids, [], None), *words)


def columns_of(features: Features, parts: Sequence[int]) -> Int64[np.ndarray, " c"]:
    """Return the columns of some of the three parts of features with tiles: whole, largest and mean."""
    last, stages = np.split(np.arange(features.dimensions), [features.last_width])
    return np.concatenate([np.split(own, 3)[part] for own in (last, stages) for part in parts])


def rank(
    learner: Any, labels: Mapping[str, str], rest: Sequence[str], columns: Int64[np.ndarray, " c"], *, apart: bool
) -> Int64[np.ndarray, " n"]:
    """Fit a probe without mirror images on some columns of the features, and order the other images by it."""
    features, spec = learner.embedding.probe_features, learner.spec

    def taken(rows: Float32[np.ndarray, "n d"]) -> Float32[np.ndarray, "n c"]:
        return normalise_last(rows[:, columns], int((columns < features.last_width).sum()))

    anomalies, normals = training_ids(labels)
    narrow = Features(
        [Shard(list(rest), taken(features.take(rest)).astype(np.float16), [])],
        stage_width=int((columns >= features.last_width).sum()),
    )
    scaling = narrow.scaling
    if apart:
        ends = np.cumsum([0, *[narrow.last_width // 3] * 3, *[narrow.stage_width // 3] * 3]).tolist()
        scaling = replace(scaling, blocks=tuple(slice(*pair) for pair in pairwise(ends)))
    rows = taken(features.take(anomalies)), taken(features.take(normals)), narrow.take(rest)
    fit = self_train(*rows, spec, scaling)
    return np.argsort(-fit.probe.logits(narrow.take(rest)), kind="stable")


def measure_work(source: ImageSource, name: str, settings: Sequence[str], cache: Path) -> Iterator[Row]:
    """Yield the seconds of processor time that reading and features of an image take, in turns, median of three."""
    work: dict[str, Callable[[], None]] = {}
    for setting in settings:
        embedding = make_setting(source, setting, cache).embedding
        size, inference = embedding.spec.input_size, replace(embedding.inference, backend="openvino")
        network = embedding.network(normalised=True).eval()
        forward = inference.prepare(network, size=size, count=10**6)
        work[setting] = partial(exhaust, inference, forward, source, size)
    seconds: dict[str, list[float]] = {setting: [] for setting in settings}
    for turn in range(4):
        for setting, call in work.items():
            start = time.process_time()
            call()
            if turn:  # the first one warms up
                seconds[setting].append((time.process_time() - start) / TIMED)
    for setting, values in seconds.items():
        yield from (
            {"anomaly": anomaly, "setting": setting, "seconds": float(np.median(values))} for anomaly in ANOMALIES[name]
        )


def exhaust(inference: Inference, forward: Forward, source: ImageSource, size: int) -> None:
    """Compute the outputs for the first images."""
    for _ in inference.run(forward, source, source.ids[:TIMED], size=size):
        pass


def compared(rows: Sequence[Row], costs: Sequence[Row], draws: int) -> str:
    """Format the average precision and the anomalies found of each setting, over the second half of the draws."""
    seconds = {(row["anomaly"], row["setting"]): float(row["seconds"]) for row in costs}
    lines = []
    for (name, setting, parts), own in group_by(rows, ("anomaly", "setting", "parts")).items():
        halves = [[row for row in own if (int(row["draw"]) >= draws // 2) == later] for later in (False, True)]
        first, later = (mean_interval([float(row["ap"]) for row in half]) for half in halves)
        found = [format_interval(mean_interval([float(row[f"found_{n}"]) for row in halves[1]]), ".1f") for n in FIRST]
        ratio = seconds[name, setting] / seconds[name, next(iter(SETTINGS))]
        cost = "" if parts != "all" else f"{ratio:.1f}"
        there = str(own[0]["there"])
        lines.append([name, setting, parts, f"{first.mean:.3f}", format_interval(later), *found, there, cost])
    head = ["anomaly", "images", "parts", "AP, first half", "AP"]
    return markdown([*head, *(f"found in {n}" for n in FIRST), "there", "work"], lines)


def sheet_of(source: ImageSource) -> PillowImage.Image:
    """Draw the first four images of each class."""
    by_kind = group_by([{"id": id_, "kind": id_.split("/")[0]} for id_ in source.ids], ("kind",))
    chosen = [str(row["id"]) for rows in by_kind.values() for row in rows[:4]]
    images = [image for image in source.read(chosen) if not isinstance(image, Reject)]
    return contact_sheet(images, chosen, columns=4, tile=448)


if __name__ == "__main__":
    main()
