"""Convert images of any kind to Parquet shards: `python -m anomalymatch.data.convert PHOTOS PACKED.parquet`."""

import argparse
import hashlib
import io
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import simplejpeg
from PIL import Image as PillowImage

from anomalymatch.checks import check_choice, check_range
from anomalymatch.data.label_log import export_csv
from anomalymatch.data.labels import LABELS_FILE
from anomalymatch.data.open import open_path
from anomalymatch.data.source import ImageSource
from anomalymatch.data.sources.parquet import REJECTS_FILE
from anomalymatch.data.stream import none_readable, prefetch, scale, scaled_shape
from anomalymatch.errors import ConfigError, DataError, UnreadableImageError
from anomalymatch.files import atomic_file, make_folder, remove_leftovers
from anomalymatch.progress import Advance, progress
from anomalymatch.ranking import write_rejects
from anomalymatch.terminal import errors_in_a_line, set_up_logging
from anomalymatch.types import Image, Reject

logger = logging.getLogger(__name__)

Encoding = Literal["jpeg", "png", "webp_lossless", "keep"]
ROWS_PER_FILE = 100_000
GROUP_BYTES = 2**23
"""Encoded bytes of a row group: enough to stream from a disk, few enough to read one image at random."""
BATCH = 32
_LOSSLESS: dict[str, dict[str, Any]] = {
    "png": {"format": "PNG", "compress_level": 1},
    "webp_lossless": {"format": "WEBP", "lossless": True, "exact": True},
}
_CHANNELS = {"jpeg": (1, 3), "png": (1, 3, 4), "webp_lossless": (1, 3, 4)}
_IMAGE = pa.struct({"bytes": pa.binary(), "path": pa.string()})
_NOTE = b"anomalymatch"


Encoded = list[tuple[str, bytes | Reject]]
"""Ids and encoded images, or the reasons why these could not be read."""


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
    if the source knows classes. `ParquetSource` reads the same ids in the same order. Unreadable images are left out
    and listed in `rejects.parquet`. Another call with the same source and options resumes after the last complete
    shard. Labels by a person are written to `labels.csv` beside the shards; the official test split is not stored.

    Args:
        source: images; stored as its `rendering` shows them, except for `encoding="keep"`.
        target: folder, created if it is missing.
        size: shorter side in pixels to which images are resized, without distortion; None keeps their sizes.
        encoding: "jpeg"; "png" and "webp_lossless" without loss; "keep" copies the files.
        quality: quality of the JPEGs, 1 to 100.
        rows_per_file: images of a shard, unreadable ones included.
        workers: number of threads; None takes one for each processor.

    Returns:
        `target`.

    Raises:
        ConfigError: if an option is out of range or does not fit the source.
        DataError: if no image could be read, or `target` holds other Parquet files.
        StorageError: if `target` cannot be written.
    """
    plan = _plan(source, size, encoding, quality, rows_per_file)
    threads = workers or os.cpu_count() or 1
    make_folder(target)
    remove_leftovers(target)
    files = [target / f"{n:05d}.parquet" for n in range(-(-len(source.ids) // rows_per_file))]
    _check_target(target, files, plan)
    with (
        progress(f"Packing {source.name}", len(source.ids)) as advance,
        ThreadPoolExecutor(threads, thread_name_prefix="pack") as pool,
    ):
        for n, file in enumerate(files):
            first, end = n * rows_per_file, min((n + 1) * rows_per_file, len(source.ids))
            if file.exists():
                advance(end - first)
                continue
            chunks = (source.ids[start : min(start + BATCH, end)] for start in range(first, end, BATCH))
            _write_shard(file, plan, prefetch(pool, plan.encode, chunks, threads + 1), advance)
    _finish(source, target, files)
    return target


class _Plan(NamedTuple):
    source: ImageSource
    encode: Callable[[Sequence[str]], Encoded]
    schema: pa.Schema
    class_numbers: dict[str, int]
    key: str


def _plan(source: ImageSource, size: int | None, encoding: Encoding, quality: int, rows_per_file: int) -> _Plan:
    check_choice("encoding", encoding, get_args(Encoding))
    check_range("size", size, low=1, high=2**14, null=True)
    check_range("quality", quality, low=1, high=100)
    check_range("rows_per_file", rows_per_file, low=1)
    encode = _copier(source, size) if encoding == "keep" else _encoder(source, size, encoding, quality)
    options = json.dumps([source.fingerprint, size, encoding, quality, rows_per_file])
    columns: dict[str, pa.DataType] = {"image": _IMAGE}
    features: dict[str, Any] = {"image": {"_type": "Image"}}
    classes = sorted(set((source.truth or {}).values()))
    if classes:
        columns["label"] = pa.int64()
        features["label"] = {"names": classes, "_type": "ClassLabel"}
    schema = pa.schema(columns, metadata={"huggingface": json.dumps({"info": {"features": features}})})
    numbers = {name: n for n, name in enumerate(classes)}
    return _Plan(source, encode, schema, numbers, hashlib.sha256(options.encode()).hexdigest())


def _copier(source: ImageSource, size: int | None) -> Callable[[Sequence[str]], Encoded]:
    if not source.encoded:
        raise ConfigError(f"encoding=keep: {source.name} holds no image files to copy, choose jpeg, png, webp_lossless")
    if size is not None:
        raise ConfigError("encoding=keep copies the images as they are: leave out size, or choose another encoding")

    def copy(id_: str) -> bytes | Reject:
        try:
            return source.raw_bytes(id_) or Reject(id_, "the file is empty (0 bytes)")
        except UnreadableImageError as error:
            return Reject(id_, str(error))

    return lambda ids: [(id_, copy(id_)) for id_ in ids]


def _encoder(source: ImageSource, size: int | None, encoding: str, quality: int) -> Callable[[Sequence[str]], Encoded]:
    if source.channels not in _CHANNELS[encoding]:
        raise ConfigError(
            f"encoding={encoding} holds {' or '.join(map(str, _CHANNELS[encoding]))} channels, but {source.name} has "
            f"{source.channels}: choose another encoding, or combine its bands by a rendering"
        )

    def encode(item: Image | Reject) -> bytes | Reject:
        if isinstance(item, Reject):
            return item
        if size is not None:
            height, width = item.shape[:2]
            item = scale(item, *scaled_shape(height, width, size / min(height, width)))
        image = np.ascontiguousarray(item)
        if encoding == "jpeg":
            colours, sampling = ("GRAY", "Gray") if image.shape[2] == 1 else ("RGB", "444")
            return simplejpeg.encode_jpeg(image, quality, colours, sampling)
        buffer = io.BytesIO()
        PillowImage.fromarray(image[..., 0] if image.shape[2] == 1 else image).save(buffer, **_LOSSLESS[encoding])
        return buffer.getvalue()

    def encode_batch(ids: Sequence[str]) -> Encoded:
        items = source.read(ids) if size is None else source.read_for(ids, size)
        return [(id_, encode(item)) for id_, item in zip(ids, items, strict=True)]

    return encode_batch


def _write_shard(file: Path, plan: _Plan, batches: Iterator[Encoded], advance: Advance) -> None:
    rejects: list[Reject] = []
    options: dict[str, Any] = {"compression": "none", "use_dictionary": ["label"], "write_statistics": ["label"]}
    with atomic_file(file) as temporary, pq.ParquetWriter(temporary, plan.schema, **options) as writer:
        for group in _row_groups(batches, rejects, advance):
            columns = {"image": pa.array([{"bytes": data, "path": id_} for id_, data in group], _IMAGE)}
            if plan.source.truth is not None:
                columns["label"] = pa.array([plan.class_numbers[plan.source.truth[id_]] for id_, _ in group])
            writer.write_table(pa.table(columns, schema=plan.schema), row_group_size=len(group))
        note = {"key": plan.key, "rejects": [[reject.id, reject.reason] for reject in rejects]}
        writer.add_key_value_metadata({_NOTE: json.dumps(note).encode()})


def _row_groups(
    batches: Iterator[Encoded], rejects: list[Reject], advance: Advance
) -> Iterator[list[tuple[str, bytes]]]:
    """Gather readable images into row groups, and append the others to `rejects`."""
    group: list[tuple[str, bytes]] = []
    n_bytes = 0
    for batch in batches:
        for id_, data in batch:
            if isinstance(data, Reject):
                rejects.append(data)
                continue
            group.append((id_, data))
            n_bytes += len(data)
            if n_bytes >= GROUP_BYTES:
                yield group
                group, n_bytes = [], 0
        advance(len(batch))
    if group:
        yield group


def _check_target(target: Path, files: Sequence[Path], plan: _Plan) -> None:
    others = [file for file in sorted(target.glob("*.parquet")) if file not in files and file.name != REJECTS_FILE]
    for file in [*others, *(file for file in files if file.exists())]:
        if _note(file).get("key") != plan.key:
            raise DataError(
                f"{file}: this is no shard of the same images with the same options: choose another folder than "
                f"{target}, or delete its content"
            )


def _note(file: Path) -> dict[str, Any]:
    try:
        return json.loads((pq.read_metadata(file).metadata or {})[_NOTE])
    except (OSError, KeyError, ValueError, pa.ArrowException):
        return {}


def _finish(source: ImageSource, target: Path, files: Sequence[Path]) -> None:
    rejects = [Reject(*reject) for file in files for reject in _note(file)["rejects"]]
    write_rejects(rejects, target / REJECTS_FILE)
    if len(rejects) == len(source.ids):
        raise none_readable(source, rejects)
    unread = {reject.id for reject in rejects}
    if labels := {id_: label for id_, label in source.labels.items() if id_ not in unread}:
        export_csv(labels, target / LABELS_FILE)
    if source.holdout:
        logger.warning("%s: its official test split is not stored, all images are in one set", source.name)
    logger.info("%s: %d images packed", target, len(source.ids) - len(rejects))


def main(words: Sequence[str] | None = None) -> None:
    """Run the command; a user's error is one line with exit code 1, Ctrl-C exits with 130."""
    arguments = _parser().parse_args(words)
    set_up_logging("info")
    with errors_in_a_line(stopped="Complete shards are kept; the same command resumes."):
        convert(
            open_path(arguments.source, cache_dir=arguments.cache_dir),
            Path(arguments.target).expanduser(),
            size=arguments.size,
            encoding=arguments.encoding,
            quality=arguments.quality,
            rows_per_file=arguments.rows_per_file,
        )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m anomalymatch.data.convert", description="Convert images of any kind to Parquet shards."
    )
    parser.add_argument("source", help="folder of images, archive, or URL of one")
    parser.add_argument("target", help="folder of the shards")
    parser.add_argument("--size", type=int, help="shorter side in pixels to which images are resized")
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument("--quality", type=int, default=95, help="quality of the JPEGs, 1 to 100")
    choice: dict[str, Any] = {"action": "store_const", "dest": "encoding", "default": "jpeg"}
    kinds.add_argument("--lossless", **choice, const="webp_lossless", help="lossless WebP")
    kinds.add_argument("--keep", **choice, const="keep", help="copy the image files")
    parser.add_argument("--rows-per-file", type=int, default=ROWS_PER_FILE, help="images in a shard")
    parser.add_argument(
        "--cache-dir",
        default=os.environ.get("ANOMALYMATCH_CACHE", "~/.cache/anomalymatch"),
        help="folder for copies of remote archives",
    )
    return parser


if __name__ == "__main__":
    main()
