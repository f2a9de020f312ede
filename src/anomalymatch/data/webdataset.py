"""Tar shards in the layout of WebDataset as a source; nothing is unpacked, and any order of reading works."""

import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np

from anomalymatch.data._encoded import MAX_BYTES, EncodedSource, find_archives
from anomalymatch.data._handles import Handles
from anomalymatch.data._remote import local_path
from anomalymatch.data._tar import TarTable, tar_table
from anomalymatch.data.folder import SUFFIXES, read_labels
from anomalymatch.data.rendering import Rendering, band_names
from anomalymatch.data.source import EIGHT_BITS
from anomalymatch.errors import ConfigError, DataError, UnreadableImageError
from anomalymatch.progress import progress

logger = logging.getLogger(__name__)
DEFAULT_LABELS = "cls"
LABEL_KEYS = ("cls", "txt", "json")
KeyEnd = Literal["first_dot", "last_dot"]
_PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
_MEGABYTE = 10**6


class WebDatasetSource(EncodedSource):
    """Images in tar shards: a sample is all members with the same key, `key.jpg` and `key.cls` for example.

    An id is the key, the path in the shard up to the first dot of the file name. Setting up reads the headers of the
    shards and the labels, and keeps what it found in `cache_dir`; an image is then one read at a known place. From a
    shard that breaks off all that is whole can be read.

    Args:
        root: one shard, or a folder in which all files `*.tar`, at any depth, are read in the order of their paths.
        cache_dir: where the places of the images are kept; None finds them anew each time.
        image_key: which member of a sample is the image, "jpg" or "left.png"; None takes the only one.
        label_key: which member holds the class: "cls", "txt", "json" (its field "label") or "json.FIELD"; None reads
            no classes, and so does a set without a single `cls`.
        key_end: "first_dot", or "last_dot" for ordinary files with dots in their names, each a sample of its own.
        labels_file: a CSV `filename,label` that names keys, with the meaning it has for `FolderSource`; None takes
            `labels.csv` beside the shards, where there is one.
        channels: channels of the decoded images.
        rendering: how pixels become 8-bit channels.

    Attributes:
        labels: labels by a person, by id; empty without a labels file.

    Raises:
        DataError: if a shard is missing, compressed or no tar archive, if there are no images in them, a sample has
            several and none is named, or a key occurs twice, or if a label is missing.
        LabelError: if the labels file is missing, wrong, or an incomplete benchmark.
    """

    def __init__(
        self,
        root: Path,
        *,
        cache_dir: Path | None = None,
        image_key: str | None = None,
        label_key: str | None = DEFAULT_LABELS,
        key_end: KeyEnd = "first_dot",
        labels_file: Path | None = None,
        channels: int = 3,
        rendering: Rendering = EIGHT_BITS,
    ) -> None:
        self._files = list(_find(root).values())
        tables = _tables(self._files, None if label_key is None else f".{label_key.split('.')[0]}", cache_dir)
        samples = _samples(root, self._files, tables, _Keys(image_key, label_key, key_end))
        ids = list(samples)
        self._shards = np.array([sample.shard for sample in samples.values()], dtype=np.int32)
        self._offsets = np.array([sample.offset for sample in samples.values()], dtype=np.int64)
        self._sizes = np.array([sample.size for sample in samples.values()], dtype=np.int64)
        self._stats = [_state(os.stat(file)) for file in self._files]
        self._handles: Handles[Path, int] = Handles(_open, os.close)
        self.labels, truth = read_labels(root if root.is_dir() else root.parent, labels_file, ids)
        super().__init__(
            name=root.resolve().stem,
            ids=ids,
            bands=band_names(None, channels),
            rendering=rendering,
            fingerprint=self._fingerprint(channels),
            truth=truth if truth is not None else _truth(root, samples, label_key),
        )

    def _encoded(self, position: int) -> bytes:
        shard, size = int(self._shards[position]), int(self._sizes[position])
        if size > MAX_BYTES:
            raise UnreadableImageError(f"it claims {size:,} bytes, which is more than {MAX_BYTES:,}")
        name = self._files[shard].name
        try:
            with self._handles.use(self._files[shard]) as opened:
                own = os.dup(opened)  # so that other threads can read meanwhile
            try:
                changed = _state(os.fstat(own)) != self._stats[shard]
                data = os.pread(own, size, int(self._offsets[position]))
            finally:
                os.close(own)
        except OSError as error:
            raise UnreadableImageError(f"{name} cannot be read: {error.strerror}") from None
        if changed:  # its places are no longer those of its images
            raise UnreadableImageError(f"{name} has changed since the set was opened")
        if len(data) < size:
            raise UnreadableImageError(f"{name} breaks off within this image")
        return data

    def _fingerprint(self, channels: int) -> str:
        digest = hashlib.sha256(f"webdataset {channels}".encode())
        for file, (size, mtime_ns) in zip(self._files, self._stats, strict=True):
            digest.update(f"\n{file.name}\0{size}\0{mtime_ns}".encode())
        digest.update(self._offsets.tobytes())
        return digest.hexdigest()


def webdataset_source(
    root: str | Path | None,
    *,
    cache_dir: str | Path | None = None,
    image_key: str | None = None,
    label_key: str | None = DEFAULT_LABELS,
    key_end: str = "first_dot",
    labels_file: str | Path | None = None,
    channels: int = 3,
    storage_options: Mapping[str, Any] | None = None,
    rendering: Rendering = EIGHT_BITS,
) -> WebDatasetSource:
    """Build a `WebDatasetSource` from configuration values; see there. Shards at a URL are copied to `cache_dir` first.

    Raises:
        DataError: if `root` is None, too.
        ConfigError: if `label_key` or `key_end` have no meaning.
    """
    if root is None:
        raise DataError("dataset=webdataset needs data.root=PATH, a tar shard or the folder that holds such files")
    if key_end not in get_args(KeyEnd):
        raise ConfigError(f"dataset.source.key_end must be one of {', '.join(get_args(KeyEnd))}, got {key_end}")
    if label_key is not None and label_key not in LABEL_KEYS and not label_key.startswith("json."):
        raise ConfigError(
            f"dataset.source.label_key must be null, one of {', '.join(LABEL_KEYS)}, or json.FIELD, got {label_key}"
        )
    return WebDatasetSource(
        local_path(root, cache_dir, (".tar", *_PACKED), storage_options),
        cache_dir=None if cache_dir is None else Path(cache_dir).expanduser(),
        image_key=image_key,
        label_key=label_key,
        key_end=cast(KeyEnd, key_end),
        labels_file=None if labels_file is None else Path(labels_file).expanduser(),
        channels=channels,
        rendering=rendering,
    )


@dataclass(frozen=True, slots=True)
class _Keys:
    image: str | None
    label: str | None
    end: KeyEnd

    def split(self, name: str) -> tuple[str, str]:
        """Divide a path into the key of its sample and the rest."""
        folder, slash, file = name.rpartition("/")
        key, _, rest = file.partition(".") if self.end == "first_dot" else file.rpartition(".")
        return folder + slash + key, rest

    def is_image(self, rest: str) -> bool:
        return self.image in (None, rest)


@dataclass(slots=True)
class _Sample:
    shard: int
    offset: int
    size: int
    member: str
    label: str | None = None


def _state(stat: os.stat_result) -> tuple[int, int]:
    return stat.st_size, stat.st_mtime_ns


def _open(file: Path) -> int:
    return os.open(file, os.O_RDONLY)


def _find(root: Path) -> dict[str, Path]:
    packed = [root] if root.is_file() else sorted(root.rglob("*.t*")) if root.is_dir() else []
    packed = [file for file in packed if file.name.lower().endswith(_PACKED)]
    if packed:
        raise DataError(
            f"{packed[0]}: no image can be looked up in a compressed tar archive: unpack it, or pack it again as .tar "
            "without compression"
        )
    return find_archives(root, ".tar", "tar shard")


def _tables(files: Sequence[Path], text_suffix: str | None, cache_dir: Path | None) -> list[TarTable]:
    done = 0
    total = sum(file.stat().st_size for file in files)
    with progress("Looking up images", max(1, total // _MEGABYTE), "MB") as advance:

        def passed(n: int) -> None:
            nonlocal done
            advance((done + n) // _MEGABYTE - done // _MEGABYTE)
            done += n

        return [tar_table(file, text_suffix, cache_dir, passed) for file in files]


def _samples(root: Path, files: Sequence[Path], tables: Sequence[TarTable], keys: _Keys) -> dict[str, _Sample]:
    samples: dict[str, _Sample] = {}
    rests: set[str] = set()
    last: dict[str, str] = {}
    for shard, (file, table) in enumerate(zip(files, tables, strict=True)):
        own: dict[str, _Sample] = {}
        for name, offset, size in zip(table.names, table.offsets.tolist(), table.sizes.tolist(), strict=True):
            key, rest = keys.split(name)
            rests.add(rest)
            if keys.is_image(rest):
                _check_new(key, name, own, samples, files, shard)
                own[key] = _Sample(shard, offset, size, name)
        for name, text in table.texts.items():
            key = keys.split(name)[0]
            if key in own:
                own[key].label = _label(file, name, text, keys.label or "")
        samples |= own
        if table.damage:
            logger.warning("%s: %s; %d images before that can be read, get it again", file, table.damage, len(own))
            last |= dict.fromkeys(list(own)[-1:], str(file))
    if not samples:
        found = f", found .{', .'.join(sorted(rests)[:9])}" if rests else ""
        wanted = f".{keys.image}" if keys.image else ", ".join(sorted(SUFFIXES))
        raise DataError(f"{root}: there are no images in it, expected members that end in {wanted}{found}")
    return _without_cut_samples(samples, last)


def _check_new(
    key: str,
    name: str,
    own: Mapping[str, _Sample],
    samples: Mapping[str, _Sample],
    files: Sequence[Path],
    shard: int,
) -> None:
    if key in samples:
        other = files[samples[key].shard]
        raise DataError(f"the key {key!r} is in {other} and in {files[shard]}: every image needs a key of its own")
    if key in own and own[key].member == name:
        raise DataError(f"{files[shard]}: {name} is in it twice, every image needs a key of its own")
    if key in own:
        raise DataError(
            f"{files[shard]}: the sample {key!r} has the images {own[key].member} and {name}: choose one by "
            "dataset.source.image_key, or set dataset.source.key_end=last_dot if each is a sample of its own"
        )


def _without_cut_samples(samples: dict[str, _Sample], last: Mapping[str, str]) -> dict[str, _Sample]:
    """Where a shard breaks off, so may its last sample: without the label that others have, it is left out."""
    if not any(sample.label is not None for sample in samples.values()):
        return samples
    cut = {key for key in last if samples[key].label is None}
    for key in cut:
        logger.warning("%s: left out %r, because the shard breaks off before its label", last[key], key)
    return {key: sample for key, sample in samples.items() if key not in cut}


def _label(file: Path, name: str, text: str, label_key: str) -> str | None:
    member, _, name_of_field = label_key.partition(".")
    if member != "json":
        return text.strip() or None
    try:
        value = json.loads(text)[name_of_field or "label"]
    except (ValueError, TypeError, KeyError):
        raise DataError(
            f"{file}: expected an object with the field {name_of_field or 'label'!r} in {name}, found {text[:60]!r}; "
            "correct dataset.source.label_key"
        ) from None
    return None if value is None else str(value)


def _truth(root: Path, samples: Mapping[str, _Sample], label_key: str | None) -> dict[str, str] | None:
    truth = {key: sample.label for key, sample in samples.items() if sample.label is not None}
    if not truth and label_key in (None, DEFAULT_LABELS):
        return None
    if len(truth) < len(samples):
        missing = next(key for key in samples if key not in truth)
        raise DataError(
            f"{root}: {len(samples) - len(truth):,} of {len(samples):,} images have no label {label_key}, the first is "
            f"{missing}; set dataset.source.label_key=null to read the images without classes"
        )
    return truth
