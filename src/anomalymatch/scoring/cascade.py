"""Cascade: a cheap first look at every image, the full network on the share that matters, decided on a sample."""

import hashlib
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float16, Float32, Int64, UInt8
from torch import Tensor

from anomalymatch.backbones.architectures import MIN_SIZE
from anomalymatch.backbones.checkpoint import load_tensors, save_tensors
from anomalymatch.backbones.features import normalise_last
from anomalymatch.backbones.inference import Inference
from anomalymatch.backbones.network import Backbone, Network
from anomalymatch.data.source import ImageSource
from anomalymatch.data.stream import Collected, collect
from anomalymatch.progress import progress
from anomalymatch.scoring.backends import Scorer, make_forward
from anomalymatch.scoring.first_look import MIN_TOP, Student, Threshold, choose_threshold, fit_student
from anomalymatch.scoring.gpu_decode import stream_images
from anomalymatch.scoring.parts import CASCADE, Manifest

logger = logging.getLogger(__name__)

SIDES = (0.43, 0.56, 1.0)
"""Sides of the first looks, as shares of the side that the network was made for: a forward pass costs about the square,
a fifth and a third. At the whole side it is cheaper only if the full look has crops, orientations or tiles."""
MIN_SPEED = 1.5
"""Least expected speed-up of a cascade: for less, scores that are partly estimates are a bad bargain."""
MIN_SAMPLE = 1000
"""Fewest images of a sample. The top of at least 99 images that a threshold needs is then a tenth of the sample."""
SAMPLE_DIVISOR = 5
"""A sample has at most a fifth of the archive: its first looks are lost time if the cascade is not used."""
TOP_DIVISOR = 100
"""The top that is measured has at least one in a hundred images of the sample."""
SLICE = 1024
"""Images of a sample that all looks read before the next ones are read."""
MAX_BATCH = 512
"""Largest number of images in a batch of a first look."""


@dataclass(frozen=True)
class Decision:
    """Decision about a cascade and the figures of the fastest one, measured on a sample of the archive.

    Attributes:
        used: whether the archive is scored with it.
        sample: readable images of the sample.
        side: side of the images of the first look, in pixels.
        size: side of those of the full look.
        threshold: lowest score of the first look that is passed on.
        share: share of the images that is passed on.
        kept: number of images of the top that are passed on.
        top: number of images of the top of the sample.
        low: lower bound of the 95 % interval of the share of the top that is kept.
        high: upper bound.
        cost: time of a first look over that of a full look, decoding included.
        speed: how many times as fast the cascade is for images that are not in the sample.
    """

    used: bool
    sample: int
    side: int
    size: int
    threshold: float
    share: float
    kept: int
    top: int
    low: float
    high: float
    cost: float
    speed: float

    def __str__(self) -> str:
        text = (
            f"images of {self.side} px first, {100 * self.share:.1f} % again at {self.size} px; {self.kept} of "
            f"{self.top} of the top kept ({self.low:.2f} to {self.high:.2f}); expected {self.speed:.1f} times as fast"
        )
        return text if self.used else f"not used, which needs {MIN_SPEED} times the speed. The best would be {text}"


class Look(NamedTuple):
    """Function of 8-bit images that returns a row of numbers for each, and the batches that it takes."""

    forward: Callable[[UInt8[Tensor, "b c h w"]], Float[np.ndarray, "b d"]]
    width: int
    side: int
    batch_size: int


class FirstLook:
    """First look at whole images of a smaller side: features of the run's own backbone, and their student.

    Its `student`, the regression to the full scores, is set once it is fitted or loaded.

    Args:
        network: the trained network.
        inference: device and precision.
        manifest: the job, for its backend and its batches.
        side: side of the images in pixels.

    Raises:
        ConfigError: if the backend cannot convert the backbone.
    """

    def __init__(self, network: Network, inference: Inference, manifest: Manifest, side: int) -> None:
        backbone = whole_image_backbone(network.backbone)
        self.side, self.width, self._last = side, backbone.width, backbone.features
        self.student: Student | None = None
        # As many pixels as in a batch of the full look.
        count = manifest.batch_size * network.spec.input_size**2 // side**2
        self.batch_size = max(1, min(MAX_BATCH, count, manifest.part_images))
        _, self._forward = make_forward(
            backbone.to(inference.torch_device).to(memory_format=torch.channels_last),
            inference,
            backend=manifest.backend,
            pixels=manifest.images * side**2,
            channels=network.spec.channels,
            size=side,
            batch_size=self.batch_size,
        )

    def features(self, images: UInt8[Tensor, "b c h w"]) -> Float16[np.ndarray, "b d"]:
        """Compute features in half precision, normalised like those of the feature cache."""
        return normalise_last(self._forward(images), self._last).astype(np.float16)

    def predict(self, images: UInt8[Tensor, "b c h w"]) -> Float32[np.ndarray, "b 1"]:
        """Predict the full logits of images."""
        assert self.student is not None
        return self.student.predict(self.features(images))[:, None].astype(np.float32)


def whole_image_backbone(backbone: Backbone) -> Backbone:
    """Return a copy for prediction that sees the whole image once, without crops, orientations and tiles."""
    fused = backbone.fused()
    mean, std = fused.mean.flatten() / 255.0, fused.std.flatten() / 255.0
    return Backbone(fused.body, mean, std, stage_features=fused.stage_features // fused.parts).eval()


class Cascade(NamedTuple):
    """Cascade of a job: what is known, and the first look at the rest.

    Attributes:
        known: full logits of the images of the sample, by their position in the archive.
        first: the first look; None if the cascade is not used, so that all others get the full look at once.
        threshold: lowest score of the first look that is passed on.
    """

    known: Mapping[int, float]
    first: FirstLook | None
    threshold: float


def open_cascade(
    path: Path, manifest: Manifest, network: Network, inference: Inference, first: FirstLook | None = None
) -> Cascade | None:
    """Load the cascade in the folder of a job; None if the job has none. `first` is the first look, if it is built.

    Raises:
        StorageError: if its file is missing or corrupt.
    """
    if manifest.cascade is None:
        return None
    decision, tensors = Decision(**manifest.cascade), load_tensors(path / CASCADE)
    known = dict(zip(tensors["positions"].tolist(), tensors["logits"].tolist(), strict=True))
    if not decision.used:
        return Cascade(known, None, -math.inf)
    student = Student(tensors["coefficients"].numpy(), float(tensors["intercept"]))
    if first is None:
        first = FirstLook(network, inference, manifest, decision.side)
    first.student = student
    return Cascade(known, first, decision.threshold)


def decide(
    network: Network,
    source: ImageSource,
    score: Scorer,
    inference: Inference,
    manifest: Manifest,
    path: Path,
    *,
    sample: int,
    top: int,
    decode_on: torch.device | None = None,
) -> tuple[Manifest, FirstLook | None]:
    """Measure first looks on a random sample of an archive, log the decision, and keep it in the folder of the job.

    Args:
        network: the trained network.
        source: the archive.
        score: the full look.
        inference: device, precision and decoding threads.
        manifest: the job, without a cascade.
        path: folder of the job; the scores of the sample, and the student, are written to it.
        sample: number of images to measure; at most a fifth of the archive is taken.
        top: number of images of the archive that are wanted.
        decode_on: GPU that decodes JPEGs; None decodes in threads.

    Returns:
        The manifest with the decision, if anything could be measured, and the first look, if the cascade is used.
    """
    images, least = len(source.ids), min(sample, MIN_SAMPLE)
    count = min(sample, images // SAMPLE_DIVISOR)
    if count < least:
        logger.info("cascade: not used, which needs %s images. There are %s", least * SAMPLE_DIVISOR, images)
        return manifest, None
    sides = first_sides(network)
    if not sides:
        logger.info("cascade: not used, the network takes images of one size only")
        return manifest, None
    looks = [FirstLook(network, inference, manifest, side) for side in sides]
    size = network.spec.input_size
    measured = measure_looks(
        source,
        _random_positions(manifest, count),
        [
            Look(score, 1, size, manifest.batch_size),
            *(Look(each.features, each.width, each.side, each.batch_size) for each in looks),
        ],
        workers=inference.workers,
        decode_on=decode_on,
    )
    full, readable = measured.rows[0][:, 0].astype(np.float64), len(measured.positions)
    if readable < MIN_TOP:
        logger.info("cascade: not used, %s images of the sample can be read, of %s", readable, count)
        return manifest, None
    wanted = min(readable, max(MIN_TOP, math.ceil(readable / TOP_DIVISOR), round(readable * top / images)))
    best: tuple[Decision, FirstLook] | None = None
    for look, features, seconds in zip(looks, measured.rows[1:], measured.seconds[1:], strict=True):
        look.student, unseen = fit_student(features, full)
        cost = seconds / measured.seconds[0]
        found = judged(choose_threshold(unseen, full, wanted), cost, sample=readable, side=look.side, size=size)
        if best is None or found.speed > best[0].speed:
            best = found, look
    assert best is not None
    decision, look = best
    logger.info("cascade: %s", decision)
    tensors = {"positions": torch.from_numpy(measured.positions), "logits": torch.from_numpy(measured.rows[0][:, 0])}
    if decision.used:
        assert look.student is not None
        tensors["coefficients"] = torch.from_numpy(look.student.coefficients)
        tensors["intercept"] = torch.tensor(look.student.intercept, dtype=torch.float64)
    save_tensors(tensors, path / CASCADE)
    return replace(manifest, cascade=asdict(decision)), look if decision.used else None


def judged(found: Threshold, cost: float, *, sample: int, side: int, size: int) -> Decision:
    """Return the decision about a cascade, whose first look needs `cost` times the time of the full look."""
    speed = 1 / (cost + found.share)
    return Decision(speed >= MIN_SPEED, sample, side, size, *found, *found.interval, cost, speed)


def first_sides(network: Network) -> list[int]:
    """Return the sides of images that are tried for the first look: the network takes them, and has less to compute."""
    spec, backbone = network.spec, whole_image_backbone(network.backbone)
    pixels = network.pixels_per_pixel * spec.input_size**2
    sides = sorted({round(share * spec.image_size) for share in SIDES})
    return [side for side in sides if side >= MIN_SIZE and side**2 < pixels and _takes(backbone, spec.channels, side)]


def _takes(backbone: Backbone, channels: int, side: int) -> bool:
    try:
        with torch.inference_mode():
            backbone(torch.zeros(1, channels, side, side, dtype=torch.uint8))
    except Exception:  # the model's own code may fail in any way: most transformers take one size
        return False
    return True


def _random_positions(manifest: Manifest, count: int) -> Int64[np.ndarray, " n"]:
    """Draw images of the archive, the same ones for the same run and archive, in the order of the archive."""
    digest = hashlib.blake2b(f"{manifest.run_id} {manifest.fingerprint}".encode(), digest_size=8).digest()
    chosen = np.random.default_rng(int.from_bytes(digest)).choice(manifest.images, count, replace=False)
    return np.sort(chosen).astype(np.int64)


class Measured(NamedTuple):
    """Rows of each look for the images that all looks could read, their positions, and the seconds of each look."""

    positions: Int64[np.ndarray, " n"]
    rows: list[Float[np.ndarray, "n d"]]
    seconds: list[float]


def measure_looks(
    source: ImageSource,
    positions: Int64[np.ndarray, " n"],
    looks: Sequence[Look],
    *,
    workers: int,
    decode_on: torch.device | None = None,
) -> Measured:
    """Compute the rows of several looks at the same images, and the time of each from the file to the row.

    They work in turns on a slice of the images, so that a slow moment of the machine affects all of them, and each is
    the first one equally often, which is the one that has to wait for the disk.
    """
    kept, rows, seconds = list[np.ndarray](), [list[np.ndarray]() for _ in looks], [0.0 for _ in looks]
    for look in looks:  # the first call prepares what later ones reuse
        look.forward(torch.zeros(look.batch_size, source.channels, look.side, look.side, dtype=torch.uint8))
    with progress("Measuring a cascade", len(positions)) as advance:
        for turn, start in enumerate(range(0, len(positions), SLICE)):
            some = positions[start : start + SLICE]
            names = {source.ids[int(position)]: position for position in some}
            found: dict[int, Collected] = {}
            for step in range(len(looks)):
                number = (turn + step) % len(looks)
                began = time.perf_counter()
                found[number] = look_at(source, list(names), looks[number], workers=workers, decode_on=decode_on)
                seconds[number] += time.perf_counter() - began
            common = set.intersection(*(set(each.ids) for each in found.values()))
            kept.append(np.array([position for name, position in names.items() if name in common], np.int64))
            for number, each in found.items():
                rows[number].append(each.rows[np.array([name in common for name in each.ids], bool)])
            advance(len(some))
    return Measured(np.concatenate(kept), [np.concatenate(blocks) for blocks in rows], seconds)


def look_at(
    source: ImageSource, ids: Sequence[str], look: Look, *, workers: int, decode_on: torch.device | None = None
) -> Collected:
    """Decode images and compute a row for each, in half precision if it is long."""
    chunks = (ids[start : start + look.batch_size] for start in range(0, len(ids), look.batch_size))
    batches = stream_images(source, chunks, size=look.side, workers=workers, decode_on=decode_on)
    rows = ((b.ids, look.forward(b.images) if len(b.ids) else None, b.rejects) for b in batches)
    return collect(rows, np.empty((0, look.width), np.float32 if look.width == 1 else np.float16))


def merged(
    ids: Sequence[str], first: Collected, full: Collected, known: Mapping[str, float]
) -> tuple[Collected, Bool[np.ndarray, " n"]]:
    """Merge the looks at some images: each has its full logit if there is one, else that of the first look.

    Args:
        ids: the images, in the order of the archive.
        first: logits of the first look, and images that it could not read.
        full: logits of the full look, and images that it could not read.
        known: full logits of other images, those of the sample.

    Returns:
        The logits with all rejects, and which logits are those of a full look.
    """
    seen = {**known, **dict(zip(full.ids, full.rows[:, 0].tolist(), strict=True))}
    unreadable = {reject.id for reject in full.rejects}
    logits = {id_: x for id_, x in zip(first.ids, first.rows[:, 0].tolist(), strict=True) if id_ not in unreadable}
    logits |= seen
    kept = [id_ for id_ in ids if id_ in logits]
    rejects = {reject.id: reject for reject in (*first.rejects, *full.rejects)}
    rows = np.array([[logits[id_]] for id_ in kept], np.float32).reshape(-1, 1)
    ordered = [rejects[id_] for id_ in ids if id_ in rejects]
    return Collected(kept, rows, ordered), np.array([id_ in seen for id_ in kept], bool)
