"""Pack any images into Parquet shards that stream fast: `python -m anomalymatch.data.convert PHOTOS PACKED.parquet`."""

import argparse
import hashlib
import io
import json
import logging
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast, get_args

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import simplejpeg
from PIL import Image as PillowImage

from anomalymatch.data.open import open_path
from anomalymatch.data.source import ImageSource
from anomalymatch.data.sources.parquet import REJECTS_FILE
from anomalymatch.data.stream import resize
from anomalymatch.errors import AnomalyMatchError, ConfigError, DataError, UnreadableImageError
from anomalymatch.files import atomic_file, make_folder
from anomalymatch.progress import Advance, progress
from anomalymatch.types import Image, Reject

logger = logging.getLogger(__name__)

Packer = Callable[[Sequence[str]], list[bytes | Reject]]
_CHANNELS = {"jpeg": (1, 3), "png": (1, 3, 4), "webp_lossless": (1, 3, 4)}
_PLANES = {1: [0], 3: [2, 1, 0], 4: [2, 1, 0, 3]}
"""OpenCV's order is blue, green, red."""


def keeper(source: ImageSource, size: int | None) -> Packer:
    """Make the function that copies image files as they are.

    Raises:
        ConfigError: if the source has none, or they are to be resized.
    """
    if not source.encoded:
        raise ConfigError(f"encoding=keep: {source.name} holds no image files to copy, choose jpeg, png, webp_lossless")
    if size is not None:
        raise ConfigError("encoding=keep copies the images as they are: leave out size, or choose another encoding")

    def keep(id_: str) -> bytes | Reject:
        try:
            return source.raw_bytes(id_) or Reject(id_, "the file is empty (0 bytes)")
        except UnreadableImageError as error:
            return Reject(id_, str(error))

    return lambda ids: [keep(id_) for id_ in ids]


def packer(source: ImageSource, size: int | None, encoding: str, quality: int) -> Packer:
    """Make the function that encodes images anew.

    Raises:
        ConfigError: if the encoding does not have that number of channels.
    """
    if source.channels not in _CHANNELS[encoding]:
        raise ConfigError(
            f"encoding={encoding} holds {' or '.join(map(str, _CHANNELS[encoding]))} channels, but {source.name} has "
            f"{source.channels}: choose another encoding, or combine its bands by a rendering"
        )
    encoders: dict[str, Callable[[Image], bytes]] = {
        "jpeg": partial(_jpeg, quality=quality),
        "png": _png,
        "webp_lossless": _webp,
    }
    encode = encoders[encoding]

    def one(item: Image | Reject) -> bytes | Reject:
        return item if isinstance(item, Reject) else encode(item if size is None else resize(item, size))

    return lambda ids: [one(item) for item in source.read(ids)]


def _jpeg(image: Image, quality: int) -> bytes:
    grey = image.shape[2] == 1
    return simplejpeg.encode_jpeg(
        np.ascontiguousarray(image), quality, "GRAY" if grey else "RGB", "Gray" if grey else "444"
    )


def _png(image: Image) -> bytes:
    done, data = cv2.imencode(".png", np.ascontiguousarray(image[..., _PLANES[image.shape[2]]]))
    if not done:
        raise DataError(f"an image of the shape {image.shape} cannot be written as PNG")
    return data.tobytes()


def _webp(image: Image) -> bytes:
    buffer = io.BytesIO()
    pixels = image[..., 0] if image.shape[2] == 1 else image
    PillowImage.fromarray(pixels).save(buffer, "WEBP", lossless=True, exact=True)
    return buffer.getvalue()


Encoding = Literal["jpeg", "png", "webp_lossless", "keep"]
ROWS_PER_FILE = 100_000
GROUP_BYTES = 2**23
"""Encoded images of a row group: enough for a disk to stream, few enough to fetch one image at random."""
BATCH = 32
_IMAGE = pa.struct({"bytes": pa.binary(), "path": pa.string()})
_REJECTS = pa.schema({"id": pa.string(), "reason": pa.string()})
_NOTE = b"anomalymatch"


def convert(
    source: ImageSource,
    target: Path,
    *,
    size: int | None = None,
    encoding: Encoding = "jpeg",
    quality: int = 95,
    rows_per_file: int = ROWS_PER_FILE,
    workers: int | None = None,
) -> Path:
    """Write the images of `source` to the folder `target` as Parquet shards in the layout of the Hugging Face hub.

    The shards `00000.parquet`, … have the column image, struct{bytes, path} with the id as path, and the column label
    where the source knows classes. `ParquetSource` gives the same ids in the same order, without those that could not
    be read; these are listed with their reasons in `rejects.parquet`. A shard appears when it is complete; another
    call with the same source and options goes on after the last one. Neither an official test split nor the labels by
    a person are packed.

    Args:
        source: the images; they are written as its `rendering` shows them, unless they are kept as they are.
        target: the folder, made if it is missing.
        size: side to which images are resized, in pixels, as training would do it; None keeps their own sizes.
        encoding: "jpeg"; "png" and "webp_lossless" keep every pixel; "keep" copies the files as they are.
        quality: of the JPEGs, 1 to 100.
        rows_per_file: images of a shard, the unreadable ones counted.
        workers: threads; None takes one for each processor.

    Returns:
        `target`.

    Raises:
        ConfigError: if an option has no meaning, or not for such a source.
        DataError: if no image could be read, or `target` holds anything but shards of the same source and options.
        StorageError: if `target` cannot be written.
    """
    plan = _plan(source, size, encoding, quality, rows_per_file)
    threads = workers or os.cpu_count() or 1
    make_folder(target)
    files = [target / f"{n:05d}.parquet" for n in range(-(-len(source.ids) // rows_per_file))]
    _check_target(target, files, plan)
    with (
        progress(f"Packing {source.name}", len(source.ids)) as advance,
        ThreadPoolExecutor(threads, thread_name_prefix="pack") as pool,
    ):
        for n, file in enumerate(files):
            ids = [source.ids[i] for i in range(n * rows_per_file, min((n + 1) * rows_per_file, len(source.ids)))]
            if file.exists():
                advance(len(ids))
            else:
                _write_shard(file, plan, _rows(pool, threads + 2, plan, ids, advance))
    _finish(source, target, files)
    return target


class _Plan(NamedTuple):
    source: ImageSource
    pack: Packer
    classes: list[str] | None
    key: str


def _plan(source: ImageSource, size: int | None, encoding: Encoding, quality: int, rows_per_file: int) -> _Plan:
    if encoding not in get_args(Encoding):
        raise ConfigError(f"encoding must be one of {', '.join(get_args(Encoding))}, got {encoding}")
    for name, value, most in (("size", size, 2**14), ("quality", quality, 100), ("rows_per_file", rows_per_file, None)):
        if value is not None and not 1 <= value <= (most or value):
            raise ConfigError(f"{name} must be a whole number from 1{f' to {most:,}' if most else ' on'}, got {value}")
    pack = keeper(source, size) if encoding == "keep" else packer(source, size, encoding, quality)
    options = json.dumps([source.fingerprint, size, encoding, quality, rows_per_file])
    classes = sorted(set(source.truth.values())) if source.truth is not None else None
    return _Plan(source, pack, classes, hashlib.sha256(options.encode()).hexdigest())


def _rows(
    pool: ThreadPoolExecutor, depth: int, plan: _Plan, ids: Sequence[str], advance: Advance
) -> Iterator[tuple[str, bytes | Reject]]:
    """Yield the images in order, a few batches ahead of the writer."""
    waiting: deque[tuple[Sequence[str], Future[list[bytes | Reject]]]] = deque()
    starts = iter(range(0, len(ids), BATCH))
    try:
        while True:
            while len(waiting) < depth and (start := next(starts, None)) is not None:
                batch = ids[start : start + BATCH]
                waiting.append((batch, pool.submit(plan.pack, batch)))
            if not waiting:
                return
            batch, future = waiting.popleft()
            yield from zip(batch, future.result(), strict=True)
            advance(len(batch))
    finally:  # the writer may have failed
        for _, future in waiting:
            future.cancel()


def _write_shard(file: Path, plan: _Plan, rows: Iterator[tuple[str, bytes | Reject]]) -> None:
    rejects: list[Reject] = []
    columns: dict[str, pa.DataType] = {"image": _IMAGE} | ({"label": pa.int64()} if plan.classes is not None else {})
    schema = pa.schema(columns, metadata=_hub_metadata(plan.classes))
    options: dict[str, Any] = {"compression": "none", "use_dictionary": ["label"], "write_statistics": ["label"]}
    with atomic_file(file) as temporary, pq.ParquetWriter(temporary, schema, **options) as writer:
        for group in _groups(rows, rejects):
            writer.write_table(_table(group, plan, schema), row_group_size=len(group))
        note = {"key": plan.key, "rejects": [[reject.id, reject.reason] for reject in rejects]}
        writer.add_key_value_metadata({_NOTE: json.dumps(note).encode()})


def _groups(rows: Iterator[tuple[str, bytes | Reject]], rejects: list[Reject]) -> Iterator[list[tuple[str, bytes]]]:
    """Gather readable images into row groups, and the others in `rejects`."""
    group: list[tuple[str, bytes]] = []
    n_bytes = 0
    for id_, item in rows:
        if isinstance(item, Reject):
            rejects.append(item)
            continue
        group.append((id_, item))
        n_bytes += len(item)
        if n_bytes >= GROUP_BYTES:
            yield group
            group, n_bytes = [], 0
    if group:
        yield group


def _table(group: Sequence[tuple[str, bytes]], plan: _Plan, schema: pa.Schema) -> pa.Table:
    columns: dict[str, Any] = {"image": pa.array([{"bytes": data, "path": id_} for id_, data in group], _IMAGE)}
    if plan.classes is not None and plan.source.truth is not None:
        numbers = {name: n for n, name in enumerate(plan.classes)}
        columns["label"] = pa.array([numbers[plan.source.truth[id_]] for id_, _ in group], pa.int64())
    return pa.table(columns, schema=schema)


def _hub_metadata(classes: list[str] | None) -> dict[str, str]:
    features: dict[str, Any] = {"image": {"_type": "Image"}}
    if classes is not None:
        features["label"] = {"names": classes, "_type": "ClassLabel"}
    return {"huggingface": json.dumps({"info": {"features": features}})}


def _check_target(target: Path, files: Sequence[Path], plan: _Plan) -> None:
    strange = [file for file in sorted(target.glob("*.parquet")) if file not in files and file.name != REJECTS_FILE]
    for file in [*strange, *(file for file in files if file.exists())]:
        if _note(file).get("key") != plan.key:
            raise DataError(
                f"{file}: this is no shard of the same images with the same options: choose another folder than "
                f"{target}, or delete what is in it"
            )


def _note(file: Path) -> dict[str, Any]:
    try:
        return json.loads((pq.read_metadata(file).metadata or {})[_NOTE])
    except (OSError, KeyError, ValueError, pa.ArrowException):
        return {}


def _finish(source: ImageSource, target: Path, files: Sequence[Path]) -> None:
    rejects = [reject for file in files for reject in _note(file)["rejects"]]
    table = pa.table({"id": [id_ for id_, _ in rejects], "reason": [reason for _, reason in rejects]}, schema=_REJECTS)
    with atomic_file(target / REJECTS_FILE) as temporary:
        pq.write_table(table, temporary)
    if len(rejects) == len(source.ids):
        raise DataError(f"{source.name}: none of its images could be read, the first because: {rejects[0][1]}")
    if source.holdout:
        logger.warning("%s: its official test split is not kept, all images are in one set", source.name)
    logger.info("%s: %d images packed, %d unreadable", target, len(source.ids) - len(rejects), len(rejects))


def main(words: Sequence[str] | None = None) -> None:
    """Entry point of the command: errors that a user can mend are one line, exit code 1; Ctrl-C is 130."""
    arguments = _parser().parse_args(words)
    logging.basicConfig(level="INFO", format="%(message)s")
    encoding = "keep" if arguments.keep else "webp_lossless" if arguments.lossless else "jpeg"
    try:
        convert(
            open_path(arguments.source, cache_dir=arguments.cache_dir),
            Path(arguments.target).expanduser(),
            size=arguments.size,
            encoding=cast(Encoding, encoding),
            quality=arguments.quality,
            rows_per_file=arguments.rows_per_file,
        )
    except AnomalyMatchError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("Stopped. The finished shards are kept; the same command goes on.", file=sys.stderr)
        sys.exit(130)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m anomalymatch.data.convert", description="Pack images of any kind into Parquet shards."
    )
    parser.add_argument("source", help="a folder of images, an archive, or a URL of one")
    parser.add_argument("target", help="the folder for the shards")
    parser.add_argument("--size", type=int, help="side to which images are resized, in pixels")
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument("--quality", type=int, default=95, help="of the JPEGs, 1 to 100")
    kinds.add_argument("--lossless", action="store_true", help="keep every pixel, as lossless WebP")
    kinds.add_argument("--keep", action="store_true", help="copy the image files as they are")
    parser.add_argument("--rows-per-file", type=int, default=ROWS_PER_FILE, help="images of a shard")
    parser.add_argument(
        "--cache-dir",
        default=os.environ.get("ANOMALYMATCH_CACHE", "~/.cache/anomalymatch"),
        help="where copies of remote archives are kept",
    )
    return parser


if __name__ == "__main__":
    main()
