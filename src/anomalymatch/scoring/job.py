"""Scoring job: open or continue its folder, score the missing parts, and make the tables when all are there."""

import logging
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby, tee
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from filelock import BaseFileLock, FileLock, Timeout

from anomalymatch.backbones.inference import Inference
from anomalymatch.backbones.network import Network
from anomalymatch.cache import Cache
from anomalymatch.checks import check_choice, check_range
from anomalymatch.data.source import ImageSource
from anomalymatch.data.stream import Collected, collect
from anomalymatch.errors import ConfigError, StorageError
from anomalymatch.files import make_folder, remove_leftovers, storage_errors
from anomalymatch.progress import Advance, progress
from anomalymatch.scoring.backends import BACKENDS, Scorer, ScoringNetwork, find_batch_size, make_scorer
from anomalymatch.scoring.cascade import Cascade, FirstLook, Look, decide, look_at, merged, open_cascade
from anomalymatch.scoring.finish import TopK, finish, is_finished
from anomalymatch.scoring.gpu_decode import check_gpu_decode, stream_images
from anomalymatch.scoring.model import TrainedModel
from anomalymatch.scoring.parts import INT8, Manifest, PartFolder, open_manifest, read_manifest, share_of
from anomalymatch.scoring.ray_engine import score_parts_on_ray
from anomalymatch.text import safe_name

logger = logging.getLogger(__name__)

ENGINES, DECODERS, CASCADES = ("local", "ray"), ("cpu", "gpu"), ("off", "auto")


@dataclass(frozen=True)
class ScoringSpec:
    """Settings of a scoring job; conf/scoring/default.yaml explains each and has the defaults."""

    engine: str
    backend: str
    batch_size: int | None
    part_images: int
    decode: str
    shard: str
    top: int
    features: bool
    csv: bool
    actors: int | None
    ray_address: str | None
    cascade: str
    sample: int

    def __post_init__(self) -> None:
        check_choice("scoring.engine", self.engine, ENGINES)
        check_choice("scoring.backend", self.backend, BACKENDS)
        check_choice("scoring.decode", self.decode, DECODERS)
        if self.decode == "gpu" and self.engine == "ray":
            raise ConfigError("scoring.decode=gpu needs scoring.engine=local: Ray decodes on CPUs")
        check_choice("scoring.cascade", self.cascade, CASCADES)
        if self.cascade == "auto" and self.engine == "ray":
            raise ConfigError("scoring.cascade=auto needs scoring.engine=local: divide the archive by scoring.shard")
        if self.cascade == "auto" and self.features:
            raise ConfigError("scoring.cascade=auto needs scoring.features=false: few images get the full look")
        check_range("scoring.sample", self.sample, low=1)
        check_range("scoring.batch_size", self.batch_size, low=1, null=True)
        check_range("scoring.part_images", self.part_images, low=1)
        check_range("scoring.actors", self.actors, low=1, null=True)
        check_range("scoring.top", self.top, low=0)
        share_of(1, self.shard)


def run_job(model: TrainedModel, source: ImageSource, spec: ScoringSpec, inference: Inference, output: Path) -> bool:
    """Score an archive into a folder; continue if an earlier call was stopped.

    Args:
        model: the trained model.
        source: the archive, opened with the rendering of the training.
        spec: settings of the job.
        inference: device, precision and decoding threads.
        output: folder for manifest.json and parts/, then scores/, top.csv, rejects.parquet and pictures.

    Returns:
        True if the whole archive is scored and the tables are made, False while other shares are missing.

    Raises:
        DataError: if the bands of the archive are not those of the training.
        ConfigError: if the folder holds another job, or a value is wrong.
        StorageError: if the disk is full, or a file in the folder is corrupt.
    """
    model.input.check(source)
    if spec.decode == "gpu":
        check_gpu_decode(source, inference.torch_device)
    share = safe_name(spec.shard)
    with storage_errors(output), _lock_share(make_folder(output) / f".lock-{share}"):
        if is_finished(output, model, source):
            logger.info("%s is complete already", output)
            return True
        for written in (output, output / "parts", output / "scores"):
            remove_leftovers(written)
        with FileLock(output / ".lock-manifest"):  # the first share decides for all
            manifest, built = _open(model, source, spec, inference, output)
        folder, parts = PartFolder(output, manifest), share_of(manifest.parts, spec.shard)
        missing = folder.missing(parts)
        listed = output / ("top.csv" if spec.shard == "1/1" else f"top-{share}.csv")
        top = TopK(spec.top, listed, has_first_looks=manifest.has_first_looks)
        for part in sorted(set(parts) - set(missing)):
            top.add(*folder.logits(part))
        if missing:
            _score(model, source, spec, inference, folder, missing, top, built)
        return finish(folder, source, model, device=inference.torch_device, top=spec.top, csv=spec.csv)


def _lock_share(path: Path) -> BaseFileLock:
    lock = FileLock(path, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise StorageError(
            f"another process is scoring this share into {path.parent}: wait for it, or choose another output folder"
        ) from None
    return lock


class _Built(NamedTuple):
    """Forward functions that `_open` has built to decide about a job, and that the job uses, too."""

    scorer: Scorer | None
    first: FirstLook | None


def _open(
    model: TrainedModel, source: ImageSource, spec: ScoringSpec, inference: Inference, output: Path
) -> tuple[Manifest, _Built]:
    """Return the manifest of a new or continued job, which keeps what `auto` chose once, and what was built for it."""
    saved, scorer, first, network = read_manifest(output), None, None, model.network()
    backend, batch_size, asked = spec.backend, spec.batch_size, inference.precision
    precision = "int8" if asked == "int8" else "bf16" if inference.computes_bf16 else "fp32"
    if asked == "int8":
        if backend not in ("auto", "openvino"):
            raise ConfigError(f"inference.precision=int8 needs scoring.backend=openvino, not {backend}: set it to auto")
        backend = "openvino"
    if saved is not None:
        backend = saved.backend if backend == "auto" else backend
        batch_size = batch_size or saved.batch_size
        if asked == "auto" and saved.precision == "int8":
            precision = "int8"
    if batch_size is None:
        batch_size = find_batch_size(network, inference)
    manifest = Manifest(
        run_id=model.run_id,
        archive=source.name,
        fingerprint=source.fingerprint,
        images=len(source.ids),
        part_images=spec.part_images,
        batch_size=min(batch_size, spec.part_images),
        backend=backend,
        precision=precision,
        decode=spec.decode,
        features=spec.features,
        agreement=None if saved is None else saved.agreement,
        cascade=saved.cascade if saved is not None and spec.cascade == "auto" else None,
    )
    if saved is None and (backend == "auto" or spec.engine == "local"):  # only building shows that a backend works
        chosen, scorer = make_scorer(network, inference, **manifest.scorer_options)
        manifest = replace(manifest, backend=chosen)
    if saved is None and manifest.backend == "openvino":
        manifest, scorer = _try_int8(manifest, scorer, network, source, inference, output)
    if saved is None and scorer is not None and spec.cascade == "auto":
        manifest, first = decide(
            network, source, scorer, inference, manifest, output,
            sample=spec.sample, top=spec.top, decode_on=_decoding_device(spec, inference),
        )  # fmt: skip
    open_manifest(output, manifest)
    return manifest, _Built(scorer, first)


def _decoding_device(spec: ScoringSpec, inference: Inference) -> torch.device | None:
    return inference.torch_device if spec.decode == "gpu" else None


def _try_int8(
    manifest: Manifest, scorer: Scorer | None, network: Network, source: ImageSource, inference: Inference, output: Path
) -> tuple[Manifest, Scorer | None]:
    """Quantise the network if int8 is asked for or pays; return its manifest and scorer, or else the given ones."""
    size = network.spec.input_size
    if not inference.tries_int8(round(manifest.images * network.pixels_per_pixel * size**2)):
        return manifest, scorer
    agreement = inference.int8_agreement(
        ScoringNetwork(network, inference, features=manifest.features),
        source,
        Cache(output / INT8),
        size=size,
        batch_size=manifest.batch_size,
        scores=lambda outputs: outputs[:, :1],
    )
    if agreement is None:
        return manifest, scorer
    manifest = replace(manifest, precision="int8", agreement=agreement._asdict())
    int8 = PartFolder(output, manifest).int8
    return manifest, make_scorer(network, inference, **manifest.scorer_options, int8=int8)[1]


def _score(
    model: TrainedModel,
    source: ImageSource,
    spec: ScoringSpec,
    inference: Inference,
    folder: PartFolder,
    missing: Sequence[int],
    top: TopK,
    built: _Built,
) -> None:
    rows, manifest = (folder.manifest.rows(part) for part in missing), folder.manifest
    with progress("Scoring", sum(stop - start for start, stop in rows)) as advance:
        if spec.engine == "ray":
            score_parts_on_ray(
                model, source, inference, folder, missing,
                actors=spec.actors, address=spec.ray_address, top=top, advance=advance,
            )  # fmt: skip
            return
        network, scorer = model.network(), built.scorer
        if scorer is None:
            _, scorer = make_scorer(network, inference, **manifest.scorer_options, int8=folder.int8)
        score_parts(
            source,
            scorer,
            folder,
            missing,
            size=network.spec.input_size,
            width=network.backbone.features if manifest.features else 0,
            workers=inference.workers,
            decode_on=_decoding_device(spec, inference),
            cascade=open_cascade(folder.path, manifest, network, inference, built.first),
            top=top,
            advance=advance,
        )


def score_parts(
    source: ImageSource,
    score: Scorer,
    folder: PartFolder,
    parts: Sequence[int],
    *,
    size: int,
    width: int,
    workers: int,
    decode_on: torch.device | None = None,
    cascade: Cascade | None = None,
    top: TopK,
    advance: Advance,
) -> None:
    """Score `parts` and write each when it is complete.

    A batch never crosses the border of a part, so the numbers of a part do not depend on the process that scores it.
    Decoding runs ahead across borders: the network never waits for the first batch of a part.

    Args:
        source: the archive.
        score: function of the backend.
        folder: folder of the finished parts.
        parts: numbers of the parts.
        size: side to which images are resized, in pixels.
        width: number of features of an image that are kept; 0 keeps none.
        workers: decoding threads.
        decode_on: GPU that decodes JPEGs; None decodes in the threads.
        cascade: what is known of a sample, and the first look at the rest.
        top: gets the ids and logits of every part.
        advance: called with the number of images of every batch.
    """
    manifest = folder.manifest
    stream = partial(stream_images, source, workers=workers, decode_on=decode_on)
    full = Look(score, 1 + width, size, manifest.batch_size)
    first = full
    if cascade is not None and cascade.first is not None:
        first = Look(cascade.first.predict, 1, cascade.first.side, cascade.first.batch_size)
    known = {} if cascade is None else cascade.known
    planned = ((part, chunk) for part in parts for chunk in _chunks(source, manifest, part, known, first.batch_size))
    numbers, chunks = tee(planned)
    batches = stream((chunk for _, chunk in chunks), size=first.side)
    numbered = zip((part for part, _ in numbers), batches, strict=True)
    for part, group in groupby(numbered, key=itemgetter(0)):
        rows = ((b.ids, first.forward(b.images) if len(b.ids) else None, b.rejects) for _, b in group)
        found, looked = collect(rows, np.empty((0, first.width), np.float32), advance), None
        if cascade is not None:
            start, stop = manifest.rows(part)
            given = {source.ids[at]: known[at] for at in range(start, stop) if at in known}
            advance(len(given))
            if cascade.first is None:
                estimated, seen = Collected([], np.empty((0, 1), np.float32), []), found
            else:
                passed = [id_ for id_, z in zip(found.ids, found.rows[:, 0], strict=True) if z >= cascade.threshold]
                estimated, seen = found, look_at(source, passed, full, workers=workers, decode_on=decode_on)
            found, looked = merged(source.ids[start:stop], estimated, seen, given)
        folder.write(part, found, looked)
        top.add(found.ids, found.rows[:, 0], looked)


def _chunks(
    source: ImageSource, manifest: Manifest, part: int, known: Container[int], batch_size: int
) -> Iterator[list[str]]:
    """Yield the ids of each batch of a part, without the `known` positions; one empty batch if all are known."""
    start, stop = manifest.rows(part)
    ids = [source.ids[at] for at in range(start, stop) if at not in known]
    for at in range(0, max(1, len(ids)), batch_size):
        yield ids[at : at + batch_size]
